"""QLoRA for real, on a CPU: a base in 4 bits learns, checkpoints are resumed, adapters become plain models."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.trainer.training import make_trainer, tiny_model, tiny_processor, visa_train
from visa_hf import VisaForVideoSegmentation, cli
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset
from visa_hf.trainer import TrainingOptions, merge_adapter, prepare_for_training, quantization_config

bitsandbytes = pytest.importorskip("bitsandbytes")

OPTIONS = TrainingOptions(is_4bit=True, lora_dropout=0.2)
LINEARS = {
    f"model.language_model.layers.{layer}.{name}_proj"
    for layer in range(2)
    for name in (*(f"self_attn.{one}" for one in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a model in full precision."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def quantized(base):
    return VisaForVideoSegmentation.from_pretrained(base, quantization_config=quantization_config(OPTIONS))


def trainer_of(base, output_dir, **arguments):
    torch.manual_seed(0)
    settings = {"kinds": ("masks", "one"), "per_device_train_batch_size": 2, "learning_rate": 5e-3, **arguments}
    return make_trainer(output_dir, model=prepare_for_training(quantized(base), OPTIONS), **settings)


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_only_the_linears_of_the_language_model_are_in_4_bits(base):
    model = quantized(base)
    found = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert found == LINEARS
    plain = VisaForVideoSegmentation.from_pretrained(base)
    for name in LINEARS:
        packed, weight = model.get_submodule(name).weight, plain.get_submodule(name).weight
        assert packed.dtype == torch.uint8 and packed.numel() == weight.numel() // 2
        restored = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state).float()
        # NF4 has 16 levels for the 64 values of a block; the widest step is 0.3 of the largest value.
        assert 0 < (restored - weight).abs().max() < 0.16 * weight.abs().max()


def test_a_base_in_4_bits_learns_and_stays_as_it_is(base, tmp_path):
    trainer = trainer_of(base, tmp_path, num_samples=2, num_train_epochs=20)
    before = {name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad}
    trainer.train()
    assert sum(losses(trainer)[-3:]) < 0.6 * sum(losses(trainer)[:3])
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters() if name in before)
    adapter = [value for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert len(adapter) == 4 and all(value.abs().max() > 0 for value in adapter)


def test_a_training_in_4_bits_is_resumed_exactly(base, tmp_path):
    settings = {"num_samples": 8, "save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(base, tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("checkpoint-4"))
    resumed = trainer_of(base, tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert len(losses(whole)) == 4 and losses(resumed) == losses(whole)
    assert not (tmp_path / "whole" / "checkpoint-4" / "model.safetensors").exists()


def test_an_adapter_learnt_in_4_bits_is_merged_into_the_weights_in_full(base, tmp_path):
    trainer = trainer_of(base, tmp_path / "run", num_samples=4, save_strategy="epoch")
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    merge_adapter(checkpoint, tmp_path / "merged")
    merged, plain = (VisaForVideoSegmentation.from_pretrained(one) for one in (tmp_path / "merged", base))
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {value.dtype for value in merged.parameters()} == {torch.float32}
    saved = load_file(checkpoint / "adapter_model.safetensors")
    for name in LINEARS:
        weight = plain.get_submodule(name).weight
        if name.endswith(("q_proj", "v_proj")):
            first, second = (saved[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
            weight = weight + OPTIONS.lora_alpha / OPTIONS.lora_rank * second @ first
        torch.testing.assert_close(merged.get_submodule(name).weight, weight)
    assert torch.equal(merged.lm_head.weight, saved["base_model.model.lm_head.weight"])


def test_visa_train_in_4_bits_ends_in_a_plain_model(tmp_path):
    clips = ClipOptions(size=(48, 64), num_frames=(4, 5))
    write_dataset(tmp_path / "world", num_videos={"train": 2}, options=clips, show_progress=False)
    words = visa_train(
        tmp_path / "out",
        tmp_path / "world",
        tmp_path / "cache",
        model__options="{}",
        trained="{is_4bit: true, embeddings: seg}",
        arguments__activation_checkpointing="true",
    )
    assert cli.main(words) == 0
    assert cli.main(["merge", str(tmp_path / "out" / "final"), "-o", str(tmp_path / "merged")]) == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in merged.modules())
    assert merged.tracker is not None
