"""Configurations: what they keep, what they refuse, and the sizes of the published models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, Qwen2Config

from visa_hf import VisaConfig, VisaForVideoSegmentation, XMemConfig, XMemModel
from visa_hf.convert import convert_visa_state_dict

MANIFESTS = Path(__file__).parents[1] / "reference" / "manifests"


# --- Keeping ---


@pytest.mark.parametrize("config", [VisaConfig.tiny(), VisaConfig.visa_7b(), VisaConfig.visa_13b()])
def test_a_configuration_survives_saving(config: VisaConfig, tmp_path) -> None:
    config.save_pretrained(tmp_path)
    for load in (VisaConfig.from_pretrained, AutoConfig.from_pretrained):
        loaded = load(tmp_path)
        assert type(loaded) is VisaConfig
        assert comparable(loaded) == comparable(config)
    assert comparable(VisaConfig(**comparable(config))) == comparable(config)


def comparable(config: Any) -> dict[str, Any]:
    """What is saved of a configuration, but for where it came from."""
    saved = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in saved.items() if name not in ("_name_or_path", "architectures", "auto_map")}


def test_what_differs_from_the_defaults_survives_saving(tmp_path) -> None:
    values = {
        "vision_feature_layer": -1,
        "use_token_merging": False,
        "num_reference_frames": 3,
        "reference_strategy": "local",
        "text_loss_weight": 0.25,
        "bce_loss_weight": 3,
        "dice_loss_weight": 0.0,
        "loss_reduction": "microbatch",
        "tie_word_embeddings": True,
        "image_token_id": 7,
        "seg_token_id": 8,
    }
    VisaConfig.tiny(**values).save_pretrained(tmp_path)
    loaded = VisaConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values


def test_the_tracker_is_optional(tmp_path) -> None:
    config = VisaConfig.tiny(tracker_config=None)
    assert config.tracker_config is None
    config.save_pretrained(tmp_path)
    assert VisaConfig.from_pretrained(tmp_path).tracker_config is None
    assert VisaConfig.tiny(tracker_config={"key_dim": 8}).tracker_config.key_dim == 8


def test_the_tracker_can_be_read_out_of_a_whole_configuration(tmp_path) -> None:
    VisaConfig.tiny().save_pretrained(tmp_path)
    assert comparable(XMemConfig.from_pretrained(tmp_path)) == comparable(XMemConfig.tiny())


def test_fields_can_be_overridden_when_loading(tmp_path) -> None:
    VisaConfig.tiny().save_pretrained(tmp_path)
    config = VisaConfig.from_pretrained(tmp_path, text_config={"num_hidden_layers": 5}, bce_loss_weight=0.5)
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (5, 64)
    assert config.bce_loss_weight == 0.5


def test_configurations_of_parts_may_be_objects_or_dictionaries() -> None:
    text = LlamaConfig(vocab_size=50, hidden_size=32, num_attention_heads=4)
    assert VisaConfig.tiny(text_config=text, seg_token_id=49, image_token_id=50).text_config is text
    text_config = {"model_type": "qwen2", "vocab_size": 2000}
    assert isinstance(VisaConfig.tiny(text_config=text_config).text_config, Qwen2Config)


def test_the_text_model_is_the_text_part() -> None:
    config = VisaConfig.tiny()
    assert config.get_text_config() is config.text_config


def test_the_other_name_of_the_image_token_works() -> None:
    assert VisaConfig.tiny(image_token_index=9).image_token_id == 9


# --- Visual tokens ---


@pytest.mark.parametrize(
    ("settings", "sizes", "num_tokens"),
    [
        ({"merge_cluster_counts": (64, 32, 16)}, (64, 32, 16), 112),
        ({"merge_cluster_counts": (0.5, 0.3, 0.1)}, (32, 10, 1), 43),  # of 64 patches, rounded up
        ({"merge_cluster_counts": (8,), "merge_neighbors": (2,)}, (8,), 8),
        ({"use_token_merging": False}, (16, 8, 4), 64),
    ],
)
def test_visual_tokens_of_a_frame(settings: dict[str, Any], sizes: tuple[int, ...], num_tokens: int) -> None:
    config = VisaConfig.tiny(**settings)
    assert config.num_patches == 64
    assert (config.merge_sizes, config.num_visual_tokens) == (sizes, num_tokens)


def test_the_published_models_make_112_visual_tokens() -> None:
    assert VisaConfig.visa_7b().num_visual_tokens == VisaConfig.visa_13b().num_visual_tokens == 112


# --- Published sizes ---


def meta_tensors(manifest: str) -> dict[str, torch.Tensor]:
    """Tensors without memory, of the published names and shapes."""
    entries = json.loads((MANIFESTS / manifest).read_text())
    return {name: torch.empty(shape, device="meta") for name, shape in entries.items()}


@pytest.mark.parametrize("size", ["7b", "13b"])
def test_presets_have_the_shapes_of_the_published_checkpoints(size: str) -> None:
    published = convert_visa_state_dict(meta_tensors(f"visa_{size}.json"))
    with torch.device("meta"):
        model = VisaForVideoSegmentation(getattr(VisaConfig, f"visa_{size}")())
    assert shapes_of(model.state_dict()) == shapes_of(published)


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_the_tiny_tracker_is_tiny() -> None:
    with torch.device("meta"):
        model = XMemModel(XMemConfig.tiny())
    assert model.num_parameters() <= 2_000_000


# --- Refusing ---

TINY_SAM = VisaConfig.tiny().sam_config.to_dict()
BAD_VISA: list[tuple[dict[str, Any], str]] = [
    ({"seg_token_idx": 3}, "`seg_token_idx` is not a field of VisaConfig. Did you mean `seg_token_id`?"),
    ({"zzz": 3}, "`zzz` is not a field of VisaConfig. Known fields: bce_loss_weight, "),
    ({"vision_config": {"hiden_size": 3}}, "`hiden_size` is not a field of `vision_config` .*`hidden_size`?"),
    ({"text_config": {"num_layer": 3}}, "`num_layer` is not a field of `text_config` .LlamaConfig."),
    ({"sam_config": {"vision_config": {"imagesize": 3}}}, "`imagesize` is not a field of `sam_config.vision_config`"),
    ({"tracker_config": {"topk": 3}}, "`topk` is not a field of `tracker_config` .*`top_k`?"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "`vision_config` has model_type 'siglip_vision_model'"),
    ({"text_config": {"model_type": "no_such_model"}}, "no_such_model"),
    ({"seg_token_id": 1201}, "`seg_token_id` is 1201 but the text model has 1201 embedding rows"),
    ({"seg_token_id": -1}, "`seg_token_id` is -1"),
    ({"image_token_id": -1}, "`image_token_id` is -1 but token ids start at 0"),
    ({"image_token_id": 1200}, "`image_token_id` and `seg_token_id` are both 1200"),
    ({"vision_feature_layer": -4}, "`vision_feature_layer` is -4 but the visual tower has 2 layers"),
    ({"vision_feature_layer": 3}, "give a number from -3 to 2"),
    ({"vision_config": {"image_size": 64, "patch_size": 9}}, "`vision_config.image_size` 64 is not a multiple"),
    ({"merge_cluster_counts": ()}, "`merge_cluster_counts` has 0 rounds and `merge_neighbors` 3"),
    ({"merge_neighbors": (5, 3)}, "`merge_cluster_counts` has 3 rounds and `merge_neighbors` 2"),
    ({"merge_cluster_counts": (16, 32, 4)}, "asks for 32 clusters of 16 tokens"),
    ({"merge_cluster_counts": (65, 8, 4)}, "asks for 65 clusters of 64 tokens"),
    ({"merge_cluster_counts": (16, 7.5, 4)}, "needs whole numbers, or shares"),
    ({"merge_cluster_counts": (16, 0, 4)}, "needs whole numbers, or shares"),
    ({"merge_neighbors": (5, 0, 3)}, "`merge_neighbors` is .* but must be at least 1 each"),
    ({"sam_config": TINY_SAM | {"mask_decoder_config": {"hidden_size": 64}}}, "SAM's widths differ"),
    (
        {"sam_config": TINY_SAM | {"prompt_encoder_config": {"hidden_size": 32, "image_size": 256}}},
        "SAM's image encoder takes 128 pixels in patches of 16 but its prompt encoder 256 in 16",
    ),
    ({"vision_config": {"hidden_size": 30, "num_attention_heads": 4}}, "30"),
    ({"bce_loss_weight": -1.0}, "`bce_loss_weight` is -1.0 but must be at least 0"),
    ({"num_reference_frames": -1}, "`num_reference_frames` is -1"),
    ({"num_reference_frames": 0}, '`num_reference_frames` is 0 with `reference_strategy` "global_local"'),
]
BAD_XMEM: list[tuple[dict[str, Any], str]] = [
    ({"memory_evry": 3}, "`memory_evry` is not a field of XMemConfig. Did you mean `memory_every`?"),
    ({"key_dim": 0}, "`key_dim` is 0 but must be at least 1"),
    ({"key_encoder_depths": (1, 1)}, "`key_encoder_depths` is .* but must be 3 numbers"),
    ({"decoder_dims": (8, 8, 8)}, "`decoder_dims` is .* but must be 2 numbers"),
    ({"key_encoder_dims": (30, 60, 90)}, "bottleneck blocks need multiples of 4"),
    ({"memory_every": 0}, "`memory_every` is 0"),
    ({"deep_update_every": 0}, "`deep_update_every` is 0 but must be -1 .* or at least 1"),
    ({"top_k": 0}, "`top_k` is 0 but must be at least 1, or None"),
    ({"min_working_frames": 1}, "2 <= min_working_frames < max_working_frames"),
    ({"max_working_frames": 5}, "2 <= min_working_frames < max_working_frames"),
    ({"num_prototypes": 100, "max_long_term_elements": 50}, "long-term memory holds only"),
    ({"input_size": 8}, "`input_size` is 8 but the network works at stride 16"),
]


@pytest.mark.parametrize(("values", "message"), BAD_VISA, ids=[str(values)[:60] for values, _ in BAD_VISA])
def test_what_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisaConfig.tiny(**values)


@pytest.mark.parametrize(("values", "message"), BAD_XMEM, ids=[str(values)[:60] for values, _ in BAD_XMEM])
def test_a_tracker_that_cannot_work_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XMemConfig(**values)


def test_wrong_types_are_refused_also_later() -> None:
    for name, value in {"seg_token_id": "3", "use_token_merging": 2, "loss_reduction": "mean", "top_k": ""}.items():
        config_class = XMemConfig if name == "top_k" else VisaConfig
        with pytest.raises(TypeError, match=f"'{name}' expected .*got .*{value}"):
            config_class.tiny(**{name: value})
    config = VisaConfig.tiny()
    with pytest.raises(TypeError, match="Field 'seg_token_id' expected int, got str"):
        config.seg_token_id = "3"
    assert config.seg_token_id == 1200
    with pytest.raises(TypeError, match="`sam_config` is 3 but a dictionary or a configuration is needed"):
        VisaConfig(sam_config=3)


def test_unknown_names_are_refused_in_files_and_overrides_too(tmp_path) -> None:
    VisaConfig.tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`seg_id` is not a field of VisaConfig. Did you mean `seg_token_id`?"):
        VisaConfig.from_pretrained(tmp_path, seg_id=3)
    with pytest.raises(ValueError, match="`hidden` is not a field of `text_config`"):
        VisaConfig.from_pretrained(tmp_path, text_config={"hidden": 3})
    saved = json.loads((tmp_path / "config.json").read_text())
    for spoilt in (saved | {"colour": 1}, saved | {"sam_config": saved["sam_config"] | {"colour": 1}}):
        (tmp_path / "config.json").write_text(json.dumps(spoilt))
        with pytest.raises(ValueError, match="`colour` is not a field of"):
            VisaConfig.from_pretrained(tmp_path)


def test_overrides_must_fit_together_too(tmp_path) -> None:
    VisaConfig.tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`image_token_id` and `seg_token_id` are both 1201"):
        VisaConfig.from_pretrained(tmp_path, seg_token_id=1201, text_config={"vocab_size": 1300})


def test_an_impossible_configuration_is_not_saved(tmp_path) -> None:
    config = VisaConfig.tiny()
    config.seg_token_id = config.image_token_id
    with pytest.raises(ValueError, match="`seg_token_id` is 1201 but the text model has 1201"):
        config.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_what_transformers_keeps_in_a_file_is_allowed(tmp_path) -> None:
    VisaConfig.tiny().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    extra = {
        "auto_map": {"AutoConfig": "configuration_visa.VisaConfig"},
        "custom_pipelines": {},
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
        "_attn_implementation": "sdpa",
        "torch_dtype": "float32",
    }
    (tmp_path / "config.json").write_text(json.dumps(saved | extra))
    assert VisaConfig.from_pretrained(tmp_path).seg_token_id == 1200


def test_parts_saved_by_transformers_4_are_read(tmp_path) -> None:
    old = {"torchscript": False, "pruned_heads": {}, "max_length": 20, "bad_words_ids": None, "use_bfloat16": False}
    vision = VisaConfig.tiny().vision_config.to_dict() | old
    assert VisaConfig.tiny(vision_config=vision).vision_config.hidden_size == 32
