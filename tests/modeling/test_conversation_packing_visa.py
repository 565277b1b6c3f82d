"""Packed conversations: layout by hand, and the same losses and gradients as one row for each conversation."""

import copy
from typing import Any

import pytest
import torch

from visa_hf import VisaConfig, VisaForVideoSegmentation, VisaProcessor
from visa_hf.modeling.conversation_packing_visa import pack_conversations
from visa_hf.modeling.inputs_visa import Videos

IMAGE = 99


def videos_of(video_of: list[int], num_frames: list[int]) -> Videos:
    sizes = [(8, 8)] * len(num_frames)
    return Videos(video_of, num_frames, sizes, sizes)


def test_two_conversations_become_a_beginning_and_two_branches() -> None:
    rows = torch.tensor([[1, IMAGE, 5, 6, 7], [1, IMAGE, 5, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    packed = pack_conversations(rows, mask, videos_of([0, 0], [1]), IMAGE)
    assert packed is not None
    assert packed.input_ids.tolist() == [[1, IMAGE, 5, 6, 7, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert packed.places.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]]
    assert packed.frame_rows == [0]
    assert packed.is_seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],  # the second branch does not see the first
    ]


def test_videos_may_be_mixed_and_text_alone_stands_for_itself() -> None:
    rows = torch.tensor([[1, IMAGE, 2, 3], [4, 5, 0, 0], [1, IMAGE, IMAGE, 6], [1, IMAGE, 2, 7], [4, 5, 8, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]])
    packed = pack_conversations(rows, mask, videos_of([1, -1, 0, 1, -1], [2, 1]), IMAGE)
    assert packed is not None
    assert packed.input_ids.tolist() == [
        [1, IMAGE, 2, 3, 7],
        [4, 5, 0, 0, 0],
        [1, IMAGE, IMAGE, 6, 0],
        [4, 5, 8, 0, 0],
    ]
    # Of video 1 first, whose conversation comes first; then the two of video 0.
    assert packed.frame_rows == [2, 0, 1]
    states = packed.input_ids[:, :, None].float()
    assert torch.equal(packed.unpack(states)[:, :, 0][mask.bool()], rows.float()[mask.bool()])


def test_equal_conversations_keep_a_token_of_their_own() -> None:
    rows = torch.tensor([[1, IMAGE, 2], [1, IMAGE, 2]])
    packed = pack_conversations(rows, None, videos_of([0, 0], [1]), IMAGE)
    assert packed is not None and packed.input_ids.tolist() == [[1, IMAGE, 2, 2]]


@pytest.mark.parametrize(
    ("rows", "mask", "video_of"),
    [
        ([[1, IMAGE, 2], [1, IMAGE, 3]], None, [0, 1]),  # nothing in common
        ([[0, 1, IMAGE], [1, IMAGE, 3]], [[0, 1, 1], [1, 1, 1]], [0, 0]),  # padded on the left
        ([[1, 2, IMAGE], [1, 3, IMAGE]], None, [0, 0]),  # frames behind what differs
        ([[1, 2, 3], [1, 2, 4]], None, [-1, -1]),  # text alone
        ([[1, IMAGE, 2], [1, IMAGE, 3]], [[[1] * 3] * 3] * 2, [0, 0]),  # a mask of another shape
        ([[1, IMAGE, 2, 3, 4]] * 2 + [[5, 0, 0, 0, 0]], [[1, 1, 0, 1, 1]] * 2 + [[1, 0, 0, 0, 0]], [0, 0, -1]),
        ([[1, 2, 3, 4], [1, 5, 6, 7], [8, 0, 0, 0]], [[1] * 4, [1] * 4, [1, 0, 0, 0]], [0, 0, -1]),  # 14 > 12 tokens
    ],
)
def test_what_cannot_be_packed_is_left_alone(rows: list[list[int]], mask: Any, video_of: list[int]) -> None:
    tensor = None if mask is None else torch.tensor(mask)
    assert pack_conversations(torch.tensor(rows), tensor, videos_of(video_of, [1, 1]), IMAGE) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_kind_mean_the_same(dtype: torch.dtype) -> None:
    """The second conversation is how the first one begins."""
    rows = torch.tensor([[1, IMAGE, 5, 6], [1, IMAGE, 5, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=dtype)
    packed = pack_conversations(rows, mask, videos_of([0, 0], [1]), IMAGE)
    assert packed is not None
    assert packed.input_ids.tolist() == [[1, IMAGE, 5, 6, 5]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.places.tolist() == [[0, 1, 2, 3], [0, 1, 4, 0]]


def batch_of(processor: VisaProcessor) -> dict[str, Any]:
    """Three conversations about one video, one about another, two of text alone."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 40, 56, 3), generator=generator, dtype=torch.uint8).numpy()
    masks = torch.randint(0, 2, (1, 40, 56), generator=generator, dtype=torch.uint8).numpy()
    return dict(
        processor(
            target_frame=[frames[0], frames[3]],
            reference_frames=[[frames[1], frames[2]], [frames[4]]],
            query=["the dog", "which one wins?", "who are you?", "the cat", "the dog", "hello"],
            answer=[
                "It is [SEG].",
                "It is [SEG], because it runs.",
                "Nobody.",
                "Sure, [SEG].",
                "No such thing.",
                "Hi",
            ],
            masks=[masks, masks, None, masks, None, None],
            conversation_to_video=[0, 0, -1, 1, 0, -1],
        )
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_losses_and_gradients_are_those_of_one_row_each(
    tiny_model: VisaForVideoSegmentation, tiny_processor: VisaProcessor, attention: str, skip_logits: bool
) -> None:
    batch = batch_of(tiny_processor)
    model = copy.deepcopy(tiny_model).train()
    model.model.language_model.set_attn_implementation(attention)
    found = []
    for options in ({}, {"packs_conversations": True, "skip_logits": skip_logits}):
        model.zero_grad()
        output = model(**batch, use_cache=False, **options)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((output, gradients))
    (plain, plain_gradients), (packed, packed_gradients) = found
    for name in ("loss", "text_loss", "bce_loss", "dice_loss"):
        torch.testing.assert_close(getattr(packed, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
    for ours, true in zip(packed.mask_logits, plain.mask_logits, strict=True):
        torch.testing.assert_close(ours, true, rtol=0, atol=1e-4)
    assert packed_gradients.keys() == plain_gradients.keys()
    largest = max(gradient.abs().max() for gradient in plain_gradients.values())
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(packed_gradients[name], gradient, rtol=0, atol=float(largest) * 1e-5, msg=name)
    if skip_logits:
        assert packed.logits is None
    else:
        is_token = batch["attention_mask"].bool()
        torch.testing.assert_close(packed.logits[is_token], plain.logits[is_token], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "checkpointing", "adapter"])
def test_packing_goes_with_what_training_does(
    tiny_model: VisaForVideoSegmentation, tiny_processor: VisaProcessor, kind: str
) -> None:
    batch = batch_of(tiny_processor)
    model: Any = copy.deepcopy(tiny_model).train()
    if kind == "bfloat16":
        model.to(torch.bfloat16)
    if kind == "checkpointing":
        model.activation_checkpointing_enable()
    if kind == "adapter":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    losses, gradients = [], []
    for packs in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            loss = model(**batch, use_cache=False, packs_conversations=packs, skip_logits=True).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).float())
    is_rounded = kind in ("bfloat16", "autocast")
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2 if is_rounded else 1e-5, atol=0)
    assert torch.cosine_similarity(*gradients, dim=0) > (0.99 if is_rounded else 0.9999)


@pytest.mark.parametrize("asked", [{"use_cache": None}, {"use_cache": True}, {"output_hidden_states": True}])
def test_what_needs_a_row_for_each_conversation_is_not_packed(
    tiny_model: VisaForVideoSegmentation, tiny_processor: VisaProcessor, asked: dict[str, Any]
) -> None:
    batch = batch_of(tiny_processor)
    with torch.no_grad():
        output = tiny_model(**batch, **{"use_cache": False, **asked}, packs_conversations=True)
    if "use_cache" in asked:
        assert output.past_key_values.get_seq_length() == batch["input_ids"].shape[1]
    else:
        assert output.hidden_states[0].shape[:2] == batch["input_ids"].shape


def test_embeddings_are_read_as_they_are_given(tiny_model: VisaForVideoSegmentation) -> None:
    embeds = torch.randn(2, 6, tiny_model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = tiny_model(inputs_embeds=embeds, use_cache=False)
        packed = tiny_model(inputs_embeds=embeds, use_cache=False, packs_conversations=True)
    assert torch.equal(plain.logits, packed.logits)


def test_fewer_tokens_are_read(tiny_model: VisaForVideoSegmentation, tiny_processor: VisaProcessor) -> None:
    read = []
    hook = tiny_model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args: read.append(args[0].shape[:2].numel())
    )
    batch = batch_of(tiny_processor)
    for packs in (False, True):
        tiny_model(**batch, use_cache=False, packs_conversations=packs)
    hook.remove()
    assert read[0] == batch["input_ids"].numel()
    assert read[1] < read[0]


def test_a_language_model_that_sees_through_a_window_is_not_packed(tiny_processor: VisaProcessor) -> None:
    tiny = VisaConfig.tiny()
    text = {
        key: value
        for key, value in tiny.text_config.to_dict().items()
        if key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    }
    text |= {"model_type": "qwen2", "num_key_value_heads": 4, "use_sliding_window": True, "max_window_layers": 1}
    model = VisaForVideoSegmentation(VisaConfig.tiny(text_config=text)).eval()
    batch = batch_of(tiny_processor)
    with torch.no_grad():
        plain = model(**batch, use_cache=False)
        packed = model(**batch, use_cache=False, packs_conversations=True)
    assert torch.equal(plain.logits, packed.logits)
