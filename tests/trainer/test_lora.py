"""What is trained: exact lists, gradients and movement, and every option."""

import re

import pytest
import torch
from peft import PeftModel

from tests.trainer.training import GradientsOfFirstStep, make_trainer, tiny_model
from visa_hf import VisaConfig, VisaForVideoSegmentation
from visa_hf.trainer import TrainingOptions, prepare_for_training, quantization_config, trainable_parameters

LAYERS = range(2)
LORA = {
    f"model.language_model.layers.{layer}.self_attn.{name}.lora_{matrix}.weight"
    for layer in LAYERS
    for name in ("q_proj", "v_proj")
    for matrix in "AB"
}
EMBEDDINGS = {"model.language_model.embed_tokens.weight", "lm_head.weight"}
HEAD = {f"model.text_hidden_fcs.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")}


def _decoder():
    """SAM's mask decoder, written out from its architecture; without the head that estimates IoUs."""
    parts = ["iou_token", "mask_tokens"]
    both = ["upscale_conv1", "upscale_conv2", "upscale_layer_norm", "transformer.layer_norm_final_attn"]
    attentions = ["transformer.final_attn_token_to_image"]
    for layer in LAYERS:
        attentions += [
            f"transformer.layers.{layer}.{name}"
            for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        ]
        both += [f"transformer.layers.{layer}.layer_norm{number}" for number in (1, 2, 3, 4)]
        both += [f"transformer.layers.{layer}.mlp.{name}" for name in ("lin1", "lin2")]
    both += [f"{attention}.{name}_proj" for attention in attentions for name in ("q", "k", "v", "out")]
    both += [
        f"output_hypernetworks_mlps.{number}.{name}"
        for number in range(4)
        for name in ("proj_in", "layers.0", "proj_out")
    ]
    names = [f"{part}.weight" for part in parts] + [f"{part}.{kind}" for part in both for kind in ("weight", "bias")]
    return {f"model.sam.mask_decoder.{name}" for name in names}


DECODER = _decoder()


def trained_names(**options):
    return set(trainable_parameters(prepare_for_training(tiny_model(), TrainingOptions(**options))))


def test_the_published_recipe_trains_exactly_this():
    assert trained_names() == LORA | EMBEDDINGS | HEAD | DECODER


def test_the_adapter_is_around_the_whole_model():
    model = tiny_model()
    prepared = prepare_for_training(model)
    assert isinstance(prepared, PeftModel) and prepared.get_base_model() is model
    config = prepared.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout, config.task_type) == (8, 16, 0.05, None)


def test_lora_never_touches_modules_of_the_same_name_elsewhere():
    prepared = prepare_for_training(tiny_model(), TrainingOptions(lora_targets=["q_proj", "k_proj", "v_proj"]))
    adapted = {name.split(".lora_A")[0] for name, _ in prepared.named_modules() if name.endswith("lora_A.default")}
    assert adapted == {
        f"base_model.model.model.language_model.layers.{layer}.self_attn.{name}_proj"
        for layer in LAYERS
        for name in "qkv"
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"embeddings": "frozen", "mask_decoder": False}, LORA | HEAD),
        ({"text_hidden_fcs": False, "embeddings": "frozen"}, LORA | DECODER),
        ({"language_model": "frozen"}, EMBEDDINGS | HEAD | DECODER),
        (
            {"lora_targets": ["o_proj", "down_proj"], "embeddings": "frozen", "mask_decoder": False},
            HEAD
            | {
                f"model.language_model.layers.{layer}.{name}.lora_{matrix}.weight"
                for layer in LAYERS
                for name in ("self_attn.o_proj", "mlp.down_proj")
                for matrix in "AB"
            },
        ),
    ],
    ids=range(4),
)
def test_parts_are_chosen(options, expected):
    assert trained_names(**options) == expected


def test_full_fine_tuning_trains_the_language_model_and_needs_no_adapter():
    prepared = prepare_for_training(tiny_model(), TrainingOptions(language_model="full"))
    assert not isinstance(prepared, PeftModel)
    names = {name for name, _ in prepared.named_parameters() if name.startswith(("model.language_model.", "lm_head"))}
    assert set(trainable_parameters(prepared)) == names | HEAD | DECODER


def test_only_the_row_of_seg_is_trained(tmp_path):
    trainer = make_trainer(tmp_path, options={"embeddings": "seg", "lora_dropout": 0.0}, per_device_train_batch_size=4)
    names = trainable_parameters(trainer.model)
    rows = set(names) - LORA - HEAD - DECODER
    assert len(rows) == 2 and all(names[name].shape == (1, 64) for name in rows)
    base = trainer.model.get_base_model()
    ids = torch.tensor([[5, 1200]])
    before = base.get_input_embeddings()(ids).detach().clone(), base.lm_head(torch.ones(1, 64)).detach().clone()
    trainer.train()
    after = base.get_input_embeddings()(ids), base.lm_head(torch.ones(1, 64))
    assert torch.equal(before[0][0, 0], after[0][0, 0]) and not torch.equal(before[0][0, 1], after[0][0, 1])
    assert torch.equal(before[1][0, :1200], after[1][0, :1200]) and before[1][0, 1200] != after[1][0, 1200]


def test_unfrozen_towers_train_only_what_the_features_come_from():
    names = trained_names(unfreeze=["vision_tower", "mm_projector", "sam"])
    assert {"model.mm_projector.weight", "model.mm_projector.bias"} <= names
    tower = {name for name in names if "vision_tower" in name}
    # Features of layer -2 of two: the first layer's.
    assert {re.search(r"layers\.(\d+)", name)[1] for name in tower if "layers" in name} == {"0"}
    assert not any("post_layernorm" in name for name in tower)
    everything = {name for name, _ in tiny_model().named_parameters() if "sam.vision_encoder" in name}
    assert everything <= names and not any("prompt_encoder" in name for name in names)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"language_model": "full"},
        {"language_model": "full", "unfreeze": ["vision_tower", "mm_projector", "sam"]},
        {"unfreeze": ["vision_tower", "mm_projector", "sam"]},
    ],
    ids=["published", "full", "everything", "towers"],
)
@pytest.mark.parametrize("kinds", [("masks", "one"), ("text",), ("no_seg",)], ids=lambda kinds: kinds[0])
def test_gradients_reach_exactly_what_is_trained(options, kinds, tmp_path):
    found = GradientsOfFirstStep()
    trainer = make_trainer(
        tmp_path, num_samples=2, kinds=kinds, options=options, callbacks=[found], per_device_train_batch_size=2
    )
    expected = set(trainable_parameters(trainer.model))
    frozen = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trained = {name: value.detach().clone() for name, value in trainable_parameters(trainer.model).items()}
    trainer.train()
    assert set(found.gradients) == expected
    # Each has a gradient in every batch, if only zeros: else DDP waits for ever.
    assert {name for name, gradient in found.gradients.items() if gradient is None} == set()
    assert all(torch.equal(value, frozen[name]) for name, value in trainer.model.named_parameters() if name in frozen)
    moved = {
        name for name, value in trainable_parameters(trainer.model).items() if not torch.equal(value, trained[name])
    }
    if kinds == ("masks", "one"):
        # Keys' biases do not change a softmax, and of four masks SAM is asked for the first.
        still = {name for name in expected if re.search(r"k_proj\.bias|mlps\.[123]\.", name)}
        assert expected - moved <= still
    else:
        assert not any("sam" in name or "text_hidden" in name for name in moved)
        assert any("language_model" in name for name in moved)


def test_trained_weights_are_float32_and_the_others_stay():
    prepared = prepare_for_training(tiny_model().to(torch.bfloat16))
    assert {value.dtype for value in trainable_parameters(prepared).values()} == {torch.float32}
    assert {value.dtype for value in prepared.parameters() if not value.requires_grad} == {torch.bfloat16}


def test_a_half_precision_base_trains_in_mixed_precision(tmp_path):
    model = prepare_for_training(tiny_model().to(torch.bfloat16))
    trainer = make_trainer(tmp_path, model=model, per_device_train_batch_size=4, bf16=True, eval_samples=2)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_four_bits_need_bitsandbytes(monkeypatch):
    monkeypatch.setattr("visa_hf.trainer.lora.is_bitsandbytes_available", lambda: False)
    assert quantization_config(TrainingOptions()) is None
    expected = r'`is_4bit` needs bitsandbytes [\d.]+ or newer, which is not .* `pip install "visa-hf\[qlora\]"`'
    with pytest.raises(ImportError, match=expected):
        quantization_config(TrainingOptions(is_4bit=True))


def test_what_zero_3_cannot_split_is_refused(monkeypatch):
    monkeypatch.setattr("visa_hf.trainer.lora.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="`is_4bit` is True under DeepSpeed's ZeRO-3, .* Take ZeRO-2 .* or plain DDP"):
        quantization_config(TrainingOptions(is_4bit=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match='`embeddings` is "seg" under DeepSpeed\'s ZeRO-3 on a CPU, .* take ZeRO-2'):
        prepare_for_training(tiny_model(), TrainingOptions(embeddings="seg"))


def test_four_bits_are_asked_for_where_nothing_else_is_harmed(monkeypatch):
    monkeypatch.setattr("visa_hf.trainer.lora.is_bitsandbytes_available", lambda: True)
    config = quantization_config(TrainingOptions(is_4bit=True))
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
    tops = {f"model.{name}" for name, _ in tiny_model().model.named_children()} | {"lm_head", "tracker"}
    assert set(config.llm_int8_skip_modules) == tops - {"model.language_model"}


def test_a_model_in_other_precision_than_said_is_refused():
    with pytest.raises(ValueError, match="`is_4bit` is True but the model is not in 4 bits"):
        prepare_for_training(tiny_model(), TrainingOptions(is_4bit=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language_model": "half"}, "`language_model` is 'half' but must be one of 'lora', 'full', 'frozen'"),
        ({"embeddings": "none"}, "`embeddings` is 'none' but must be one of 'full', 'seg', 'frozen'"),
        ({"lora_rank": 0}, "`lora_rank` is 0"),
        ({"lora_dropout": 1.0}, "`lora_dropout` 1.0, but"),
        ({"lora_targets": "q_proj"}, "`lora_targets` is 'q_proj' but must be a list of names"),
        ({"lora_targets": []}, "`lora_targets` is empty"),
        ({"unfreeze": ["clip"]}, "`unfreeze` names 'clip' but knows only 'vision_tower', 'mm_projector', 'sam'"),
        ({"embeddings": "seg", "language_model": "full"}, 'is "seg" with `language_model` "full"'),
        ({"is_4bit": True, "language_model": "full"}, "weights in 4 bits cannot be trained"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**options)


def test_what_fits_no_module_is_refused():
    with pytest.raises(
        ValueError, match="`lora_targets` names 'query' but a layer of the language model has down_proj"
    ):
        prepare_for_training(tiny_model(), TrainingOptions(lora_targets=["q_proj", "query"]))
    nothing = TrainingOptions(language_model="frozen", embeddings="frozen", text_hidden_fcs=False, mask_decoder=False)
    with pytest.raises(ValueError, match="Nothing is left to train"):
        prepare_for_training(tiny_model(), nothing)


def test_activation_checkpointing_changes_no_gradient(tmp_path):
    results = []
    for is_on in (False, True):
        for embeddings in ("full", "frozen"):
            found = GradientsOfFirstStep()
            make_trainer(
                tmp_path / f"{is_on}{embeddings}",
                options={"lora_dropout": 0.0, "embeddings": embeddings},
                callbacks=[found],
                per_device_train_batch_size=4,
                activation_checkpointing=is_on,
            ).train()
            results.append(found.gradients)
    for plain, checkpointed in ((results[0], results[2]), (results[1], results[3])):
        assert set(plain) == set(checkpointed)
        for name in plain:
            torch.testing.assert_close(plain[name], checkpointed[name], rtol=1e-5, atol=1e-7)


def test_the_tracker_is_never_trained():
    prepared = prepare_for_training(
        VisaForVideoSegmentation(VisaConfig.tiny()), TrainingOptions(language_model="full", unfreeze=["sam"])
    )
    assert not any("tracker" in name for name in trainable_parameters(prepared))
