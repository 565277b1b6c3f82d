"""Two processes on a CPU: DDP and DeepSpeed ZeRO-2 and ZeRO-3 learn what one process learns, and can be resumed.

All trainings run in one pair of processes, since starting takes longer than training. Needs DeepSpeed, ninja and g++.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import visa_hf
from tests.trainer.training import (
    GradientsOfFirstStep,
    TinySamples,
    make_trainer,
    tiny_model,
    tiny_processor,
    visa_train,
)
from visa_hf import VisaForVideoSegmentation, cli
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset
from visa_hf.trainer import VisaDataCollator, merge_adapter
from visa_hf.trainer.checkpoints import find_fault

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEEPSPEED = Path(visa_hf.__file__).parent / "trainer" / "deepspeed"
PARTS = ("loss", "text_loss", "bce_loss", "dice_loss")
# Dealt to two processes in turn, one gets all [SEG]s and the other none.
KINDS = ["masks", "text", "one", "no_seg"]
SHARED = {
    "kinds": KINDS,
    "num_samples": 12,
    "eval_samples": 3,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
}
# No [SEG] anywhere; all parts unfrozen, with a [SEG] in one process only.
EXTREMES = {
    "no_seg": {"kinds": ["text", "no_seg"], "num_samples": 4, "eval_samples": 0},
    "towers": {
        "num_samples": 4,
        "eval_samples": 0,
        "options": {"lora_dropout": 0.0, "unfreeze": ["vision_tower", "mm_projector", "sam"]},
    },
}
# Trainings of `visa train` with ZeRO: name -> (stage, values of the recipe). Nothing is left out of "full".
COMMANDS = {
    "full-zero2": (2, {}),
    "full-zero3": (3, {}),
    "lora-zero3": (3, {"trained": "{lora_dropout: 0.0}"}),
}


def zero(stage, folder):
    """Our configuration with one change: on a CPU each reduction costs as much as the rest, so there shall be few."""
    config = json.loads((DEEPSPEED / f"zero{stage}.json").read_text())
    config["zero_optimization"]["reduce_bucket_size"] = 50_000_000
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder that holds the results of all trainings of two processes."""
    root = tmp_path_factory.mktemp("distributed")
    tiny_model().save_pretrained(root / "base")
    tiny_processor().save_pretrained(root / "base")
    modes = {"ddp": {}, "zero2": {"deepspeed": zero(2, root)}, "zero3": {"deepspeed": zero(3, root)}}
    settings = []
    for mode, more in modes.items():
        shared = {**SHARED, **more, "base": str(root / "base")}
        saving = {"save_strategy": "steps", "save_steps": 2}
        settings.append({**shared, **saving, "output_dir": str(root / mode)})
        resume = str(root / mode / "checkpoint-2")
        settings.append({**shared, "output_dir": str(root / f"{mode}-resumed"), "resume": resume})
        for name, extreme in EXTREMES.items():
            settings.append({**shared, **extreme, "output_dir": str(root / f"{mode}-{name}")})
    clips = ClipOptions(size=(48, 64), num_frames=(4, 5))
    write_dataset(root / "world", num_videos={"train": 3}, options=clips, show_progress=False)
    for name, (stage, values) in COMMANDS.items():
        words = visa_train(
            root / name, root / "world", root / "cache", arguments__deepspeed=zero(stage, root), **values
        )
        settings.append({"visa": words})
    file = root / "settings.json"
    file.write_text(json.dumps(settings))
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
        + [str(Path(__file__).with_name("training.py")), str(file)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return root


def result(folder, rank=0):
    return json.loads((folder / f"result-{rank}.json").read_text())


def losses(log):
    return [[row[name] for name in PARTS] for row in log if "loss" in row]


@pytest.fixture(scope="module")
def alone(runs, tmp_path_factory):
    """The same trainings by one process: name -> (losses, metrics, gradients of the first step)."""
    found = {}
    for name, more in {"": {}, **EXTREMES}.items():
        gradients = GradientsOfFirstStep()
        settings = {**SHARED, **more, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
        folder = tmp_path_factory.mktemp("alone")
        trainer = make_trainer(folder, base=runs / "base", callbacks=[gradients], **settings)
        trainer.train()
        metrics = trainer.evaluate() if settings["eval_samples"] else {}
        found[name] = (losses(trainer.state.log_history), metrics, gradients.gradients)
    return found


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
@pytest.mark.parametrize("name", ["", "no_seg", "towers"])
def test_two_processes_learn_what_one_does(runs, alone, mode, name):
    done = result(runs / (f"{mode}-{name}" if name else mode))
    assert done["world_size"] == 2
    torch.testing.assert_close(torch.tensor(losses(done["log"])), torch.tensor(alone[name][0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["", "no_seg", "towers"])
def test_gradients_of_two_processes_are_those_of_one(runs, alone, name):
    ours = load_file(runs / (f"ddp-{name}" if name else "ddp") / "gradients-0.safetensors")
    expected = alone[name][2]
    assert set(ours) == set(expected)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-4, atol=2e-6 * largest)


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_two_processes_measure_what_one_does(runs, alone, mode):
    for rank in (0, 1):
        metrics = result(runs / mode, rank)["metrics"]
        for name in ("loss", "text_loss", "bce_loss", "dice_loss", "J", "F", "JF", "num_masks"):
            assert metrics[f"eval_{name}"] == pytest.approx(alone[""][1][f"eval_{name}"], abs=1e-4)


def test_processes_share_the_samples(runs):
    assert [result(runs / "ddp", rank)["asked"] for rank in (0, 1)] == [list(range(0, 12, 2)), list(range(1, 12, 2))]


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_a_resumed_training_goes_on_as_it_would_have(runs, mode):
    whole, resumed = result(runs / mode), result(runs / f"{mode}-resumed")
    assert find_fault(runs / mode / "checkpoint-2") is None
    assert resumed["asked"] == whole["asked"][-2:]
    torch.testing.assert_close(
        torch.tensor(losses(resumed["log"])), torch.tensor(losses(whole["log"])), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3"])
def test_checkpoints_of_two_processes_can_be_merged(runs, mode, tmp_path):
    merge_adapter(runs / mode / "checkpoint-2", tmp_path / "merged")
    merged = VisaForVideoSegmentation.from_pretrained(tmp_path / "merged").train()
    # The loss of the next step, which the training logged.
    batch = VisaDataCollator(tiny_processor())([TinySamples(12, tuple(KINDS))[draw] for draw in range(8, 12)])
    with torch.no_grad():
        loss = float(merged(**batch).loss)
    assert loss == pytest.approx(losses(result(runs / mode)["log"])[2][0], abs=1e-4)


@pytest.fixture(scope="module")
def full_alone(runs, tmp_path_factory):
    """Folder of the training of `COMMANDS` in full, by one process."""
    out = tmp_path_factory.mktemp("alone") / "full"
    words = visa_train(out, runs / "world", runs / "cache", arguments__per_device_train_batch_size=4)
    assert cli.main(words) == 0
    return out


def loaded(folder):
    """The model in a folder, every weight of it as saved."""
    model, loading = VisaForVideoSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.train()


def command_losses(out):
    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    return torch.tensor(losses(state["log_history"]))


@pytest.mark.parametrize("name", ["full-zero2", "full-zero3"])
def test_the_whole_model_that_visa_train_leaves_under_zero_is_that_of_one_process(runs, full_alone, name):
    torch.testing.assert_close(command_losses(runs / name), command_losses(full_alone), rtol=0, atol=1e-4)
    assert find_fault(runs / name / "checkpoint-2") is None
    batch = VisaDataCollator(tiny_processor())([TinySamples(4, tuple(KINDS))[draw] for draw in range(4)])
    folders = runs / name / "final", runs / name / "checkpoint-2", full_alone / "final", full_alone / "base"
    with torch.no_grad():
        ours, checkpoint, theirs, base = ([float(loaded(one)(**batch)[part]) for part in PARTS] for one in folders)
    assert ours == checkpoint == pytest.approx(theirs, abs=1e-4)
    assert abs(ours[0] - base[0]) > 1e-3  # it learnt, far more than the tolerance


def test_the_adapter_that_visa_train_leaves_under_zero_3_is_merged(runs, full_alone, tmp_path):
    out = runs / "lora-zero3"
    # Before the first step adapters add nothing; they are drawn at random, in another order than by one process.
    torch.testing.assert_close(command_losses(out)[0], command_losses(full_alone)[0], rtol=0, atol=1e-4)
    assert cli.main(["merge", str(out / "final"), "-o", str(tmp_path / "merged")]) == 0
    merged, base = loaded(tmp_path / "merged"), loaded(out / "base")
    saved = load_file(out / "final" / "adapter_model.safetensors")
    name = "model.language_model.layers.1.self_attn.v_proj"
    first, second = (saved[f"base_model.model.{name}.lora_{matrix}.weight"] for matrix in "AB")
    change = 2 * second @ first  # alpha / r
    assert change.abs().max() > 1e-5
    expected = base.get_parameter(f"{name}.weight") + change
    torch.testing.assert_close(merged.get_parameter(f"{name}.weight"), expected, rtol=0, atol=1e-7)
    assert torch.equal(merged.lm_head.weight, saved["base_model.model.lm_head.weight"])
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)
