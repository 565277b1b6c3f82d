"""VISA's published tensor names become ours: all of them, nothing else, no data copied."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visa_hf.convert import assemble_visa_state_dict, convert_visa_state_dict
from visa_hf.modeling.configuration_visa import VisaConfig
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation

REFERENCE = Path(__file__).parent / "reference"
CLIP = "model.vision_tower.vision_tower.vision_model."


def tiny_config() -> VisaConfig:
    """The sizes in visa_tiny/config.json."""
    return VisaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 224,
            "patch_size": 14,
            "projection_dim": 32,
        },
        text_config={
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
        },
        sam_config={
            "vision_config": {
                "hidden_size": 48,
                "output_channels": 32,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "image_size": 256,
                "window_size": 5,
                "global_attn_indexes": (1, 3),
                "num_pos_feats": 16,
            },
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 256},
            "mask_decoder_config": {
                "hidden_size": 32,
                "mlp_dim": 64,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 32,
            },
        },
        seg_token_id=127,
        image_token_id=128,
    )


@pytest.fixture(scope="module")
def tiny_state_dict():
    return load_file(REFERENCE / "visa_tiny" / "original_state_dict.safetensors")


def manifest_on_meta(name: str) -> dict[str, torch.Tensor]:
    manifest = json.loads((REFERENCE / "manifests" / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in manifest.items()}


@pytest.mark.parametrize(
    ("config", "name"), [(VisaConfig.visa_7b, "visa_7b"), (VisaConfig.visa_13b, "visa_13b")], ids=["7b", "13b"]
)
def test_published_names_and_shapes_are_exactly_those_of_the_preset(config, name):
    published = manifest_on_meta(name)
    converted = convert_visa_state_dict(published)
    with torch.device("meta"):
        ours = VisaForVideoSegmentation(config()).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in converted.items()} == {
        key: tuple(tensor.shape) for key, tensor in ours.items()
    }
    used = {id(tensor) for tensor in converted.values()}
    left_out = {key for key, tensor in published.items() if id(tensor) not in used}
    assert left_out == {key for key in published if key.endswith("rotary_emb.inv_freq")}


def test_a_small_model_loads_strictly_and_gets_each_tensor(tiny_state_dict):
    model = VisaForVideoSegmentation(tiny_config())
    converted = convert_visa_state_dict(tiny_state_dict)
    model.load_state_dict(converted, strict=True)
    loaded = model.state_dict()
    for old, new in {
        "lm_head.weight": "lm_head.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "model.layers.1.mlp.up_proj.weight": "model.language_model.layers.1.mlp.up_proj.weight",
        f"{CLIP}encoder.layers.2.mlp.fc1.bias": "model.vision_tower.encoder.layers.2.mlp.fc1.bias",
        f"{CLIP}pre_layrnorm.weight": "model.vision_tower.pre_layrnorm.weight",
        "model.text_hidden_fcs.0.2.weight": "model.text_hidden_fcs.2.weight",
        "model.visual_model.image_encoder.blocks.3.norm2.bias": "model.sam.vision_encoder.layers.3.layer_norm2.bias",
        "model.visual_model.image_encoder.neck.2.weight": "model.sam.vision_encoder.neck.conv2.weight",
        "model.visual_model.prompt_encoder.mask_downscaling.4.weight": (
            "model.sam.prompt_encoder.mask_embed.layer_norm2.weight"
        ),
        "model.visual_model.mask_decoder.transformer.layers.1.norm4.weight": (
            "model.sam.mask_decoder.transformer.layers.1.layer_norm4.weight"
        ),
        "model.visual_model.mask_decoder.output_hypernetworks_mlps.3.layers.1.weight": (
            "model.sam.mask_decoder.output_hypernetworks_mlps.3.layers.0.weight"
        ),
        "model.visual_model.mask_decoder.iou_prediction_head.layers.2.bias": (
            "model.sam.mask_decoder.iou_prediction_head.proj_out.bias"
        ),
    }.items():
        assert torch.equal(loaded[new], tiny_state_dict[old]), old


def test_both_places_of_the_positional_matrix_are_filled(tiny_state_dict):
    converted = convert_visa_state_dict(tiny_state_dict)
    matrix = tiny_state_dict["model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"]
    assert converted["model.sam.shared_image_embedding.positional_embedding"] is matrix
    assert converted["model.sam.prompt_encoder.shared_embedding.positional_embedding"] is matrix


def test_tensors_are_handed_on_and_the_input_is_left_alone(tiny_state_dict):
    given = dict(tiny_state_dict)
    converted = convert_visa_state_dict(given)
    assert given.keys() == tiny_state_dict.keys()
    assert {id(tensor) for tensor in converted.values()} <= {id(tensor) for tensor in tiny_state_dict.values()}


def test_buffers_that_are_computed_today_are_left_out(tiny_state_dict):
    given = {**tiny_state_dict, f"{CLIP}embeddings.position_ids": torch.arange(257)[None]}
    assert convert_visa_state_dict(given).keys() == convert_visa_state_dict(tiny_state_dict).keys()
    without = {name: tensor for name, tensor in given.items() if "inv_freq" not in name}
    assert convert_visa_state_dict(without).keys() == convert_visa_state_dict(tiny_state_dict).keys()


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        f"{CLIP}encoder.layers.1.layer_norm1.bias",
        "model.visual_model.image_encoder.blocks.0.attn.rel_pos_w",
        "model.visual_model.mask_decoder.transformer.layers.0.norm3.weight",
        "model.visual_model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ],
)
def test_a_missing_tensor_is_named(tiny_state_dict, name):
    given = {key: tensor for key, tensor in tiny_state_dict.items() if key != name}
    with pytest.raises(ValueError, match=r"not the state dict of a published VISA") as error:
        convert_visa_state_dict(given)
    assert f"1 missing: {name}. Give the whole state dict" in str(error.value)
    assert "CLIP" not in str(error.value)


def test_a_missing_layer_is_seen_by_the_numbers_of_the_others(tiny_state_dict):
    given = {key: tensor for key, tensor in tiny_state_dict.items() if not key.startswith("model.layers.0.")}
    with pytest.raises(
        ValueError, match=r"9 missing: model\.layers\.0\.input_layernorm\.weight, model\.layers\.0\.mlp"
    ):
        convert_visa_state_dict(given)


def test_without_the_clip_tower_the_error_says_where_it_belongs(tiny_state_dict):
    given = {key: tensor for key, tensor in tiny_state_dict.items() if not key.startswith(CLIP)}
    with pytest.raises(ValueError, match="23 missing") as error:
        convert_visa_state_dict(given)
    assert f"The CLIP tower (`{CLIP}*`) is missing altogether, as in the released export" in str(error.value)
    assert "add the `vision_model.*` tensors of openai/clip-vit-large-patch14 under that prefix" in str(error.value)


@pytest.mark.parametrize(
    "name", ["model.extra.weight", "model.layers.0.self_attn.q_proj.bias", "model.layers.123456.mlp.up_proj.weight"]
)
def test_an_unexpected_tensor_is_named(tiny_state_dict, name):
    with pytest.raises(ValueError, match=r"Tensors 1 unexpected: ") as error:
        convert_visa_state_dict({**tiny_state_dict, name: torch.zeros(1)})
    assert f"unexpected: {name}. " in str(error.value)


def test_hundreds_of_names_are_shortened(tiny_state_dict):
    given = {f"module.{key}": tensor for key, tensor in tiny_state_dict.items()}
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more; 284 unexpected: .* and \d+ more") as error:
        convert_visa_state_dict(given)
    assert len(str(error.value)) < 6000


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.norm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "model.layers.0.self_attn.q_proj.lora_B.weight",
        "model.text_hidden_fcs.modules_to_save.default.0.0.weight",
    ],
)
def test_names_of_lora_training_must_be_merged_first(tiny_state_dict, name):
    with pytest.raises(ValueError, match=r"1 names are those of LoRA training: .*Merge the LoRA weights") as error:
        convert_visa_state_dict({**tiny_state_dict, name: torch.zeros(1)})
    assert name in str(error.value)


def test_a_wrapped_state_dict_says_how_to_unwrap_it(tiny_state_dict):
    with pytest.raises(TypeError, match=r"sd\['module'\] is a dict but .* Give what it wraps: sd\['module'\]\."):
        convert_visa_state_dict({"module": tiny_state_dict, "global_steps": 3})


def test_what_is_not_a_tensor_is_refused(tiny_state_dict):
    with pytest.raises(TypeError, match=r"sd\['step'\] is a int but a state dict maps names to tensors"):
        convert_visa_state_dict({**tiny_state_dict, "step": 3})
    with pytest.raises(TypeError, match=r"`sd` is a list but a mapping of names to tensors is needed"):
        convert_visa_state_dict(list(tiny_state_dict))


def test_an_empty_state_dict_is_refused():
    with pytest.raises(ValueError, match="not the state dict of a published VISA"):
        convert_visa_state_dict({})


# What a training begins with, put together from Chat-UniVi, SAM and CLIP


@pytest.fixture
def parts():
    """A published VISA taken apart: (language model, SAM, CLIP), and the whole."""
    whole = load_file(REFERENCE / "visa_tiny" / "original_state_dict.safetensors")
    sam, tower = {}, {}
    language = {}
    for name, tensor in whole.items():
        if name.startswith("model.visual_model."):
            sam[name.removeprefix("model.visual_model.")] = tensor
        elif name.startswith("model.vision_tower.vision_tower."):
            tower[name.removeprefix("model.vision_tower.vision_tower.")] = tensor
        elif "text_hidden_fcs" not in name:
            language[name] = tensor
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        language[name] = language[name][:-1]  # [SEG] is VISA's
    return language, sam, tower, whole


def test_parts_become_a_visa_whose_new_weights_alone_differ(parts):
    language, sam, tower, whole = parts
    assembled = assemble_visa_state_dict(language, sam, {**tower, "text_model.x": torch.ones(1)}, vocab_size=127)
    assert set(assembled) == set(whole)
    new = {name for name, tensor in whole.items() if not torch.equal(assembled[name], tensor)}
    embeddings = {"model.embed_tokens.weight", "lm_head.weight"}
    assert new == embeddings | {name for name in whole if "text_hidden_fcs" in name}
    for name in embeddings:
        assert torch.equal(assembled[name][:-1], whole[name][:-1])
        assert torch.allclose(assembled[name][-1], whole[name][:-1].mean(dim=0))
    model = VisaForVideoSegmentation(tiny_config())
    loaded = model.load_state_dict(convert_visa_state_dict(assembled), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith("tracker.") or "shared_embedding" in name for name in loaded.missing_keys)


def test_new_weights_come_from_the_seed_alone(parts):
    language, sam, tower, _ = parts
    name = "model.text_hidden_fcs.0.2.weight"
    drawn = [assemble_visa_state_dict(language, sam, tower, vocab_size=127, seed=seed)[name] for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].shape == (32, 64)


def test_parts_that_do_not_fit_are_refused(parts):
    language, sam, tower, _ = parts
    with pytest.raises(ValueError, match="`model.embed_tokens.weight` has 127 rows but the tokenizer 32000 pieces"):
        assemble_visa_state_dict(language, sam, tower)
    with pytest.raises(ValueError, match="`sam` has no prompt_encoder.no_mask_embed.weight"):
        assemble_visa_state_dict(language, {}, tower)
    with pytest.raises(ValueError, match="`visual_tower` has no names `vision_model"):
        assemble_visa_state_dict(language, sam, {}, vocab_size=127)
    prefixed = {f"model.vision_tower.vision_tower.{name}": tensor for name, tensor in tower.items()}
    with pytest.raises(ValueError, match="holds a CLIP tower already"):
        assemble_visa_state_dict({**language, **prefixed}, sam, tower, vocab_size=127)
