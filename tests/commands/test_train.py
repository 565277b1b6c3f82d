"""`visa train` and `visa merge`, from a recipe and a data set on disk to a folder that `from_pretrained` loads."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

from visa_hf import cli
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset

NUM_STEPS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "synthetic"
    options = ClipOptions(size=(48, 64), num_frames=(4, 5))
    write_dataset(folder, num_videos={"train": 3, "valid": 2}, options=options, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def write(world, cache, tmp_path):
    """Write a recipe of a few steps with LoRA; `changes` are values by name."""

    def write(name="recipe.yaml", **changes):
        recipe = {
            "model": {"preset": "tiny", "weights": "random", "options": {"tracker_config": None}},
            "trained": {"lora_dropout": 0.1},
            "data": {
                "mixture": {
                    "groups": {"rvos": {"weight": 1, "sources": {"revos": {"weight": 1, "sampling": SAMPLING}}}}
                },
                "folders": {"revos": str(world)},
                "cache_dir": str(cache),
            },
            "schedule": {"epochs": 1, "steps_per_epoch": NUM_STEPS, "global_batch_size": 2},
            "arguments": {
                "per_device_train_batch_size": 1,
                "learning_rate": 1e-3,
                "save_strategy": "steps",
                "save_steps": 2,
                "logging_steps": 1,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "seed": 5,
            },
        }
        for key, value in changes.items():
            section, field = key.split("__")
            recipe.setdefault(section, {})[field] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


SAMPLING = {"min_reference_frames": 1, "max_reference_frames": 2, "min_video_frames": 1}


def losses(folder):
    """What was logged, step by step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def test_a_training_from_nothing_ends_in_an_adapter_that_merges_into_a_model(write, tmp_path, capsys):
    assert train(write(), "-o", tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'out' / 'final'}\n")
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()
    assert [step for step, _ in losses(tmp_path / "out" / "checkpoint-4")] == [1, 2, 3, 4]
    assert cli.main(["merge", str(tmp_path / "out" / "final"), "-o", str(tmp_path / "merged")]) == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    base = AutoModel.from_pretrained(tmp_path / "out" / "base")
    AutoProcessor.from_pretrained(tmp_path / "merged")
    changed = {
        name for name, parameter in merged.named_parameters() if not torch.equal(parameter, base.get_parameter(name))
    }
    assert any("q_proj" in name for name in changed) and any("mask_decoder" in name for name in changed)
    assert not any(name.startswith("model.vision_tower") for name in changed)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(write, tmp_path):
    assert train(write(), "-o", tmp_path / "whole") == 0
    assert train(write(), "-o", tmp_path / "stopped") == 0
    # Back to where it was after two steps.
    for name in ("checkpoint-4", "final"):
        (tmp_path / "stopped" / name).rename(tmp_path / name)
    assert train(write(), "-o", tmp_path / "stopped") == 0
    assert losses(tmp_path / "stopped" / "checkpoint-4") == losses(tmp_path / "whole" / "checkpoint-4")
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "stopped" / "final" / name).read_bytes() == (
            tmp_path / "whole" / "final" / name
        ).read_bytes()


def test_the_folder_of_another_recipe_is_refused(write, tmp_path, capsys):
    assert train(write(), "-o", tmp_path / "out") == 0
    assert train(write(arguments__learning_rate=1e-4, arguments__seed=6), "-o", tmp_path / "out") == 2
    expected = "holds a training with another recipe: `arguments.learning_rate`, `arguments.seed` differs."
    assert expected in capsys.readouterr().err


def test_full_training_with_evaluation_logs_j_and_f(write, world, tmp_path):
    recipe = write(
        trained__language_model="full",
        arguments__eval_strategy="steps",
        arguments__eval_steps=2,
        evaluation__dataset="revos",
        evaluation__folder=str(world),
        evaluation__num_samples=3,
    )
    assert train(recipe, "-o", tmp_path / "out") == 0
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    scored = [entry for entry in state["log_history"] if "eval_J" in entry]
    assert len(scored) == 2 and all(0 <= entry["eval_F"] <= 1 for entry in scored)
    AutoModel.from_pretrained(tmp_path / "out" / "final")


def test_a_dry_run_tells_the_plan_and_writes_nothing(write, tmp_path, capsys):
    assert train(write(), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "steps: 4 of 2 samples = 1 processes x 1 samples x 2 micro-batches; 8 samples in all" in printed
    assert "SAM mask decoder" in printed and "revos" in printed
    assert train(write(), "--dry-run", "--processes", 3) == 2
    assert "3 processes of `per_device_train_batch_size` 1 take 3 samples at once" in capsys.readouterr().err


def test_weights_and_output_are_asked_for(write, tmp_path, capsys):
    assert train(write(model__weights=None), "-o", tmp_path / "out") == 2
    assert "`model.weights` is missing" in capsys.readouterr().err
    assert train(write()) == 2
    assert "No output folder is given." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_fit_the_model_are_named(write, tmp_path, capsys):
    assert train(write(model__options={"bce_loss_wieght": 1.0}), "-o", tmp_path / "out") == 2
    assert "bce_loss_weight" in capsys.readouterr().err


def test_a_killed_training_continues(write, tmp_path):
    """A real process, kill -9 in the middle."""
    recipe = write(arguments__save_steps=1, schedule__steps_per_epoch=6)
    command = [sys.executable, "-m", "visa_hf", "train", str(recipe), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-2").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert train(recipe, "-o", tmp_path / "out") == 0
    assert train(recipe, "-o", tmp_path / "whole") == 0
    assert losses(tmp_path / "out" / "checkpoint-6") == losses(tmp_path / "whole" / "checkpoint-6")
