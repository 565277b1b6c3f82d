"""The model is one of transformers: saving, loading, generating and training work as people know them."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, StaticCache

from tests.modeling.batches import make_batch, prompts, without
from visa_hf import VisaConfig, VisaForVideoSegmentation, XMemConfig, XMemModel

OUTPUTS = ("loss", "text_loss", "bce_loss", "dice_loss", "logits", "seg_embeddings")
LISTS = ("low_res_mask_logits", "mask_logits", "iou_scores")


def assert_same_outputs(one: Any, other: Any, atol: float = 1e-6) -> None:
    """Equal but for the last bit, which on a CPU depends on where in memory a weight happens to lie."""
    for name in OUTPUTS:
        torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0)
    for name in LISTS:
        for ours, theirs in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    return make_batch(VisaConfig.tiny())


@pytest.fixture(scope="module")
def output(tiny_model, batch) -> Any:
    with torch.no_grad():
        return tiny_model(**batch)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(path)
    return path


# --- Saving and loading ---


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(tiny_model, batch, output, folder) -> None:
    model, info = VisaForVideoSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not model.training
    assert_same_outputs(model(**batch), output)
    theirs = dict(tiny_model.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, theirs[name]), name


def test_the_auto_classes_know_it(folder) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is VisaConfig
    model = AutoModel.from_pretrained(folder)
    assert type(model) is VisaForVideoSegmentation
    assert type(model.tracker) is XMemModel
    assert type(AutoModel.from_config(XMemConfig.tiny())) is XMemModel


@torch.no_grad()
def test_a_sharded_model_loads_as_it_was(tiny_model, batch, output, tmp_path) -> None:
    tiny_model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    model, info = VisaForVideoSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert_same_outputs(model(**batch), output)


@torch.no_grad()
def test_half_precision_is_close(batch, output, folder) -> None:
    model = VisaForVideoSegmentation.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    half = model(**batch)
    assert half.logits.dtype == half.low_res_mask_logits[0].dtype == torch.bfloat16
    # Enlarging and losses stay in float32.
    assert half.mask_logits[0].dtype == half.loss.dtype == torch.float32
    torch.testing.assert_close(half.text_loss, output.text_loss, atol=0.1, rtol=0)
    model.generate_masks(**prompts(batch), max_new_tokens=3)


@torch.no_grad()
def test_parts_may_have_other_dtypes(batch, output, folder) -> None:
    model = VisaForVideoSegmentation.from_pretrained(folder)
    model.model.sam.vision_encoder.to(torch.bfloat16)
    model.model.vision_tower.to(torch.float64)
    mixed = model(**batch)
    torch.testing.assert_close(mixed.text_loss, output.text_loss, atol=1e-3, rtol=0)
    assert mixed.low_res_mask_logits[0].dtype == torch.float32


@torch.no_grad()
def test_a_device_map_loads_the_same(batch, output, folder) -> None:
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = VisaForVideoSegmentation.from_pretrained(folder, device_map=device_map)
        assert_same_outputs(model(**batch), output)


@torch.no_grad()
def test_parts_on_disk_compute_the_same(batch, output, folder, tmp_path) -> None:
    """Offloaded parts get their weights from hooks, which reading a weight from outside its module goes past.

    SAM's mask decoder of transformers reads its tokens like that, so it cannot be offloaded.
    """
    device_map = {
        "model.vision_tower": "cpu",
        "model.mm_projector": "disk",
        "model.language_model": "disk",
        "model.text_hidden_fcs": "cpu",
        "model.sam.vision_encoder": "disk",
        "model.sam.prompt_encoder": "disk",
        "model.sam.shared_image_embedding": "disk",
        "model.sam.mask_decoder": "cpu",
        "lm_head": "disk",
        "tracker": "cpu",
    }
    model = VisaForVideoSegmentation.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert_same_outputs(model(**batch), output)


def test_layers_are_not_split_between_devices(tiny_model) -> None:
    kept_whole = {"CLIPEncoderLayer", "LlamaDecoderLayer", "SamVisionLayer", "SamMaskDecoder", "XMemModel"}
    assert kept_whole <= tiny_model._no_split_modules


def test_every_weight_and_buffer_is_initialised() -> None:
    """What is on the meta device first must be filled: memory that was never written to looks like weights."""
    config = VisaConfig.tiny()
    poison = VisaForVideoSegmentation.from_pretrained(None, config=config, state_dict={})
    for name, tensor in (*poison.named_parameters(), *poison.named_buffers()):
        values = tensor.float()
        assert values.isfinite().all(), name
        assert values.abs().max() < 100, name
        is_drawn = isinstance(tensor, nn.Parameter) and tensor.ndim > 1
        if is_drawn and "rel_pos" not in name and "pos_embed" not in name:
            # The positional matrix of SAM is the largest, drawn with 1 as SAM itself does.
            assert 0 < values.std() <= 1.5 and values.mean().abs() < 0.5, name
    built = VisaForVideoSegmentation(config)
    for name, buffer in built.named_buffers():
        assert torch.equal(poison.get_buffer(name), buffer), name


def test_a_seed_makes_the_model() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        weights.append(VisaForVideoSegmentation(VisaConfig.tiny(tracker_config=None)).state_dict())
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_checkpoint_that_lacks_weights_is_refused(folder, tmp_path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModel.from_pretrained(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.text_hidden_fcs.0.weight"], weights["tracker.decoder.mask_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="lacks 2 of the weights .*: model.text_hidden_fcs.0.weight, tracker"):
        AutoModel.from_pretrained(tmp_path)


def test_a_checkpoint_without_tracker_says_how_to_load_it(folder, tmp_path) -> None:
    weights = {
        name: tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if not name.startswith("tracker.")
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(RuntimeError, match="left out with `tracker_config=None`"):
        AutoModel.from_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path, tracker_config=None).tracker is None


def test_unknown_keywords_are_refused(folder) -> None:
    for load in (VisaForVideoSegmentation.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(ValueError, match="`dtypee` is not a field .* Did you mean `dtype`?"):
            load(folder, dtypee="auto")
        with pytest.raises(ValueError, match="`seg_token_idx` is not a field .* Did you mean `seg_token_id`?"):
            load(folder, seg_token_idx=3)
    with pytest.raises(ValueError, match="`tracker` is not a field"):
        VisaForVideoSegmentation(VisaConfig.tiny(), tracker=None)


def test_configuration_fields_can_be_set_when_loading(folder) -> None:
    model = AutoModel.from_pretrained(folder, loss_reduction="microbatch", bce_loss_weight=1.0)
    assert (model.config.loss_reduction, model.config.bce_loss_weight) == ("microbatch", 1.0)


def test_generation_knows_the_tokens_of_the_text_model(tiny_model, folder) -> None:
    for config in (tiny_model.generation_config, AutoModel.from_pretrained(folder).generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


# --- Attention, caches, positions ---


@torch.no_grad()
def test_eager_attention_equals_sdpa(batch, output, folder) -> None:
    model = VisaForVideoSegmentation.from_pretrained(folder, attn_implementation="eager")
    implementations = {type(module).__name__ for module in model.modules()}
    assert "SamVisionSdpaAttention" not in implementations
    assert_same_outputs(model(**batch), output, atol=2e-5)


def test_attention_can_be_chosen_for_each_part(folder) -> None:
    model = VisaForVideoSegmentation.from_pretrained(folder, attn_implementation={"text_config": "eager"})
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_answers_are_the_same_with_and_without_cache(tiny_model, batch) -> None:
    given = prompts(batch)
    settings = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    cached = tiny_model.generate(**given, **settings)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        same = tiny_model.generate(**given, **settings, **other)
        assert torch.equal(same.sequences, cached.sequences)
        for one, two in zip(same.logits, cached.logits, strict=True):
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    length = given["input_ids"].shape[1]
    answers = torch.cat([given["attention_mask"], torch.ones_like(cached.sequences[:, length:])], dim=1)
    forced = tiny_model(**given | {"input_ids": cached.sequences, "attention_mask": answers})
    stacked = torch.stack(cached.logits, dim=1)
    torch.testing.assert_close(forced.logits[:, length - 1 : -1], stacked, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_conversation_can_go_on_from_a_cache(tiny_model) -> None:
    """What several queries about the same frames share is read once."""
    batch = make_batch(tiny_model.config, [(0, 1)], [2])
    whole = tiny_model(**batch)
    split = int((batch["input_ids"][0] == tiny_model.config.image_token_id).nonzero()[-1]) + 1
    begun = tiny_model(input_ids=batch["input_ids"][:, :split], pixel_values=batch["pixel_values"], use_cache=True)
    ended = tiny_model(input_ids=batch["input_ids"][:, split:], past_key_values=begun.past_key_values)
    torch.testing.assert_close(ended.logits, whole.logits[:, split:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_static_cache_can_be_given(tiny_model) -> None:
    batch = make_batch(tiny_model.config, [(0, 1)], [2])
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    cache = StaticCache(config=tiny_model.config.text_config, max_cache_len=128)
    # The mask speaks of the tokens that are there.
    cached = tiny_model(**without(text, "attention_mask"), past_key_values=cache, use_cache=True)
    torch.testing.assert_close(cached.logits, tiny_model(**text).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_tuple_can_be_asked_for(tiny_model, batch, output) -> None:
    loss, text_loss, *_ = tiny_model(**batch, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(text_loss, output.text_loss)


# --- Other text models ---


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "mistral"])
def test_other_text_models_run(model_type: str, tmp_path) -> None:
    text_config = {
        "model_type": model_type,
        "vocab_size": 1201,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    if model_type != "qwen2":
        text_config["head_dim"] = 16
    config = VisaConfig.tiny(text_config=text_config, tracker_config=None)
    torch.manual_seed(0)
    model = VisaForVideoSegmentation(config).eval()
    batch = make_batch(config)
    output = model(**batch)
    output.loss.backward()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_same_outputs(AutoModel.from_pretrained(tmp_path)(**batch), output)
    assert len(model.generate_masks(**prompts(batch), max_new_tokens=3).answer_ids) == 4


# --- Vocabulary ---


@torch.no_grad()
def test_embeddings_can_be_resized(tiny_model, batch, output, tmp_path) -> None:
    model = copy.deepcopy(tiny_model)
    model.resize_token_embeddings(1210, mean_resizing=False)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == 1210
    assert model.get_input_embeddings().num_embeddings == 1210
    resized = model(**batch)
    assert resized.logits.shape[-1] == 1210
    torch.testing.assert_close(resized.logits[..., :1201], output.logits)
    model.save_pretrained(tmp_path)
    assert_same_outputs(AutoModel.from_pretrained(tmp_path)(**batch), resized)


@torch.no_grad()
def test_head_and_embeddings_can_be_tied(tmp_path, batch) -> None:
    model = VisaForVideoSegmentation(VisaConfig.tiny(tie_word_embeddings=True, tracker_config=None)).eval()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded, info = VisaForVideoSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert_same_outputs(loaded(**batch), model(**batch))


def test_the_positions_of_sam_stay_tied_and_the_head_does_not(tiny_model, folder) -> None:
    model = AutoModel.from_pretrained(folder)
    for each in (tiny_model, model):
        of_prompts, of_images = each.model.sam.prompt_encoder.shared_embedding, each.model.sam.shared_image_embedding
        assert of_prompts.positional_embedding is of_images.positional_embedding
        assert each.lm_head.weight is not each.get_input_embeddings().weight


# --- Training ---


def gradients_of(model: nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_checkpointing_activations_changes_no_gradient(tiny_model, batch) -> None:
    model = copy.deepcopy(tiny_model).train()
    assert not model.tracker.key_encoder.training or not any(
        module.training for module in model.tracker.modules() if isinstance(module, nn.BatchNorm2d)
    )
    plain = gradients_of(model, batch)
    model.activation_checkpointing_enable()
    assert model.model.language_model.gradient_checkpointing and model.model.sam.vision_encoder.gradient_checkpointing
    saved = gradients_of(model, batch)
    assert plain.keys() == saved.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saved[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_what_learns_gets_a_gradient(tiny_model, batch) -> None:
    learnt = gradients_of(copy.deepcopy(tiny_model).train(), batch)
    without_gradient = {name for name, _ in tiny_model.named_parameters()} - learnt.keys()
    # The tracker is trained apart; SAM sees no points, boxes or masks; nothing is learnt from the IoU estimates; the
    # last layer of the visual tower is not looked at.
    known = ("tracker.", "model.sam.prompt_encoder.", "model.sam.shared_image_embedding.")
    known += ("model.sam.mask_decoder.iou_prediction_head.", "model.vision_tower.post_layernorm.")
    known += ("model.vision_tower.encoder.layers.1.",)
    assert not [name for name in without_gradient if not name.startswith(known)]
    assert "model.sam.prompt_encoder.no_mask_embed.weight" in learnt


def test_the_frozen_system_of_the_paper_learns_where_it_should(tiny_model, batch) -> None:
    model = copy.deepcopy(tiny_model).train()
    model.requires_grad_(False)
    for part in (model.model.text_hidden_fcs, model.model.sam.mask_decoder, model.lm_head):
        part.requires_grad_(True)
    learnt = gradients_of(model, batch)
    assert all(name.split(".")[1] in ("text_hidden_fcs", "sam", "weight") for name in learnt)
    assert learnt["model.text_hidden_fcs.0.weight"].abs().sum() > 0


def test_trainers_count_learnt_tokens_as_in_a_language_model(tiny_model) -> None:
    assert tiny_model.loss_type == "ForCausalLM"
    assert tiny_model.accepts_loss_kwargs is False


# --- LoRA ---

LORA_TARGETS = r"model\.language_model\.layers\.\d+\.self_attn\.(q_proj|v_proj)"


@pytest.fixture
def adapted(tiny_model) -> Any:
    """The paper's recipe on the tiny model, with adapters that already do something."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=LORA_TARGETS,
        modules_to_save=["mask_decoder", "text_hidden_fcs", "embed_tokens", "lm_head"],
    )
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(tiny_model), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "text_hidden_fcs.modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_lora_adapts_the_language_model_alone(adapted) -> None:
    adapters = {name.split(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    start = "base_model.model.model.language_model.layers"
    assert adapters == {f"{start}.{layer}.self_attn.{part}" for layer in (0, 1) for part in ("q_proj", "v_proj")}
    learnt = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    saved = ("mask_decoder", "text_hidden_fcs", "embed_tokens", "lm_head")
    assert all("lora_" in name or any(f"{part}.modules_to_save" in name for part in saved) for name in learnt)
    assert all(any(f"{part}.modules_to_save" in name for name in learnt) for part in saved)


@torch.no_grad()
def test_lora_saves_loads_and_merges_to_the_same_masks(adapted, tiny_model, batch, output, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    with_lora = adapted(**batch)
    assert not torch.allclose(with_lora.logits, output.logits, atol=1e-3)
    assert not torch.allclose(with_lora.mask_logits[0], output.mask_logits[0], atol=1e-4)
    answers = adapted.generate(**prompts(batch), max_new_tokens=4, do_sample=False)

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path / "adapter").eval()
    assert_same_outputs(loaded(**batch), with_lora)

    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain, info = VisaForVideoSegmentation.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    assert_same_outputs(plain(**batch), with_lora, atol=1e-4)
    assert torch.equal(plain.generate(**prompts(batch), max_new_tokens=4, do_sample=False), answers)


def test_lora_learns_through_checkpointed_activations(adapted, batch) -> None:
    adapted.train()
    adapted.enable_input_require_grads()
    adapted.base_model.model.activation_checkpointing_enable()
    learnt = gradients_of(adapted, batch)
    lora = [gradient for name, gradient in learnt.items() if "lora_A" in name]
    assert len(lora) == 4 and all(gradient.abs().sum() > 0 for gradient in lora)


# --- Compilers ---


@torch.no_grad()
def test_the_path_of_the_text_exports(tiny_model) -> None:
    """From embeddings to hidden states; what is done with [SEG]s depends on the data and stays outside."""

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.language_model, self.lm_head = tiny_model.model.language_model, tiny_model.lm_head

        def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state)

    embeddings = torch.randn(1, 9, 64)
    exported = torch.export.export(Text().eval(), (embeddings,))
    torch.testing.assert_close(exported.module()(embeddings), Text()(embeddings))


# --- What a checkpoint looks like ---


def test_configuration_and_names_of_a_saved_folder(folder) -> None:
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model_type"] == "visa" and saved["architectures"] == ["VisaForVideoSegmentation"]
    names = load_file(folder / "model.safetensors").keys()
    parts = {".".join(name.split(".")[:2]) if name.startswith("model.") else name.split(".")[0] for name in names}
    of_model = ("vision_tower", "mm_projector", "language_model", "text_hidden_fcs", "sam")
    assert parts == {"lm_head", "tracker", *(f"model.{part}" for part in of_model)}
