"""transformers' SAM, with weights that `convert_visa_state_dict` renamed, against the `segment-anything` package."""

import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import SamConfig, SamModel

from visa_hf.convert import convert_visa_state_dict

VISA_TINY = Path(__file__).parents[1] / "reference" / "visa_tiny"
OLD, NEW = "model.visual_model.", "model.sam."
DIM, HEADS, MLP_DIM = 32, 4, 64  # of the prompt encoder and the mask decoder
WIDTH, DEPTH, GLOBAL_LAYERS = 48, 4, (1, 3)  # of the image encoder
IMAGE_SIZE, PATCH = 144, 16
GRID = IMAGE_SIZE // PATCH  # 9: windows of 3 fit, windows of 5 are padded
# What segment-anything's decoder layers divide by, PyTorch's default; transformers' default is 1e-6.
DECODER_EPS = 1e-5


@pytest.fixture(scope="module")
def peer_modules():
    """`segment_anything.modeling`, imported with stubs for the few torchvision functions that it never calls here."""
    with pytest.MonkeyPatch.context() as patch:
        for name, attributes in {
            "torchvision": (),
            "torchvision.ops": (),
            "torchvision.ops.boxes": ("batched_nms", "box_area"),
            "torchvision.transforms": (),
            "torchvision.transforms.functional": ("resize", "to_pil_image"),
        }.items():
            module = ModuleType(name)
            for attribute in attributes:
                setattr(module, attribute, None)
            patch.setitem(sys.modules, name, module)
        return pytest.importorskip("segment_anything.modeling")


@pytest.fixture(scope="module", params=[3, 5], ids=["windows fit", "windows are padded"])
def sams(request, peer_modules):
    """`(peer, ours)`: the same random network twice."""
    torch.manual_seed(request.param)
    peer = build_peer(peer_modules, window_size=request.param).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            # Tables that the package starts at zero, or at the same value, would hide what is mixed up.
            spread = 0.3 if parameter.ndim < 2 or "rel_pos" in name or "pos_embed" in name else 1.5
            fan_in = parameter[0].numel() if parameter.ndim > 1 and spread > 1 else 1
            parameter.add_(spread * fan_in**-0.5 * torch.randn_like(parameter))
    # The rest of a VISA checkpoint, so that the weights go through the public converter.
    checkpoint = load_file(VISA_TINY / "original_state_dict.safetensors")
    checkpoint = {name: tensor for name, tensor in checkpoint.items() if not name.startswith(OLD)}
    checkpoint |= {OLD + name: tensor for name, tensor in peer.state_dict().items()}
    converted = convert_visa_state_dict(checkpoint)
    ours = SamModel(sam_config(window_size=request.param)).eval()
    ours.load_state_dict(
        {name.removeprefix(NEW): tensor for name, tensor in converted.items() if name.startswith(NEW)}, strict=True
    )
    return peer, ours


def build_peer(modules, window_size: int) -> nn.Module:
    return modules.Sam(
        image_encoder=modules.ImageEncoderViT(
            img_size=IMAGE_SIZE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=DEPTH,
            num_heads=HEADS,
            out_chans=DIM,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window_size,
            global_attn_indexes=GLOBAL_LAYERS,
        ),
        prompt_encoder=modules.PromptEncoder(
            embed_dim=DIM,
            image_embedding_size=(GRID, GRID),
            input_image_size=(IMAGE_SIZE, IMAGE_SIZE),
            mask_in_chans=16,
        ),
        mask_decoder=modules.MaskDecoder(
            transformer_dim=DIM,
            transformer=modules.TwoWayTransformer(depth=2, embedding_dim=DIM, num_heads=HEADS, mlp_dim=MLP_DIM),
            iou_head_hidden_dim=DIM,
        ),
    )


def sam_config(window_size: int) -> SamConfig:
    return SamConfig(
        vision_config={
            "hidden_size": WIDTH,
            "output_channels": DIM,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": HEADS,
            "image_size": IMAGE_SIZE,
            "window_size": window_size,
            "global_attn_indexes": GLOBAL_LAYERS,
            "num_pos_feats": DIM // 2,
        },
        prompt_encoder_config={"hidden_size": DIM, "image_size": IMAGE_SIZE},
        mask_decoder_config={
            "hidden_size": DIM,
            "mlp_dim": MLP_DIM,
            "num_attention_heads": HEADS,
            "iou_head_hidden_dim": DIM,
            "layer_norm_eps": DECODER_EPS,
        },
    )


def assert_equal_but_for_rounding(ours: torch.Tensor, peer: torch.Tensor) -> None:
    assert ours.shape == peer.shape
    assert peer.std() > 1e-2, "the reference is too flat to show anything"
    assert (ours - peer).abs().max() <= 1e-5 * peer.abs().max()


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_image_embeddings_are_the_peers(sams):
    peer, ours = sams
    pixel_values = random_tensor(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert_equal_but_for_rounding(ours.vision_encoder(pixel_values)[0], peer.image_encoder(pixel_values))


@torch.no_grad()
def test_positional_embeddings_of_the_image_are_the_peers(sams):
    peer, ours = sams
    assert_equal_but_for_rounding(ours.get_image_wide_positional_embeddings(), peer.prompt_encoder.get_dense_pe())


@torch.no_grad()
def test_the_dense_prompt_without_a_mask_is_the_peers(sams):
    peer, ours = sams
    _, expected = peer.prompt_encoder(points=None, boxes=None, masks=None)
    sparse, dense = ours.prompt_encoder(input_points=None, input_labels=None, input_boxes=None, input_masks=None)
    assert sparse is None
    assert torch.equal(dense, expected)


@torch.no_grad()
def test_prompts_of_every_kind_are_the_peers(sams):
    """Not used by VISA, but their tensors are converted too."""
    peer, ours = sams
    points, labels = torch.rand(2, 3, 2) * IMAGE_SIZE, torch.tensor([[0, 1, 1], [1, 0, 1]])
    boxes = torch.rand(2, 4) * IMAGE_SIZE
    masks = random_tensor(2, 1, 4 * GRID, 4 * GRID)
    for peer_boxes, our_boxes in ((None, None), (boxes, boxes[:, None])):
        expected_sparse, expected_dense = peer.prompt_encoder(points=(points, labels), boxes=peer_boxes, masks=masks)
        sparse, dense = ours.prompt_encoder(
            input_points=points[:, None], input_labels=labels[:, None], input_boxes=our_boxes, input_masks=masks
        )
        assert_equal_but_for_rounding(sparse.flatten(0, 1), expected_sparse)
        assert_equal_but_for_rounding(dense, expected_dense)


@torch.no_grad()
def test_masks_and_scores_of_one_external_prompt_are_the_peers(sams):
    """As VISA calls the decoder: several [SEG]s on the embeddings of one image, one mask each."""
    peer, ours = sams
    num_prompts = 3
    image_embeddings = peer.image_encoder(random_tensor(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    seg_embeddings = random_tensor(num_prompts, DIM, seed=1)
    dense = ours.prompt_encoder.no_mask_embed.weight.reshape(1, DIM, 1, 1).expand(num_prompts, DIM, GRID, GRID)
    expected_masks, expected_scores = peer.mask_decoder(
        image_embeddings=image_embeddings,
        image_pe=peer.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=seg_embeddings[:, None],
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    masks, scores = ours.mask_decoder(
        image_embeddings=image_embeddings.expand(num_prompts, -1, -1, -1),
        image_positional_embeddings=ours.get_image_wide_positional_embeddings().expand(num_prompts, -1, -1, -1),
        sparse_prompt_embeddings=seg_embeddings[:, None, None],
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )[:2]
    assert masks.shape == (num_prompts, 1, 1, 4 * GRID, 4 * GRID)
    assert_equal_but_for_rounding(masks[:, 0], expected_masks)
    assert_equal_but_for_rounding(scores[:, 0], expected_scores)
