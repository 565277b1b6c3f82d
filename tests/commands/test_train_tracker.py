"""`visa train` with a recipe of a tracker, and `visa merge --tracker`, from a data set on disk to a loaded model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import visa_hf
from visa_hf import VisaConfig, VisaForVideoSegmentation, VisaProcessor, XMemModel, cli

NUM_STEPS = 4
TOKENIZER = os.path.join(os.path.dirname(visa_hf.__file__), "assets", "tokenizer")


@pytest.fixture
def write(world, cache, tmp_path):
    """Write a recipe of a few steps; `changes` are values by name."""
    return lambda **changes: write_recipe(tmp_path / "recipe.yaml", world, cache, changes)


@pytest.fixture(scope="module")
def finished(world, cache, tmp_path_factory):
    """Folder of a training that ran to its end; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(write_recipe(folder / "recipe.yaml", world, cache, {}), "-o", folder / "out") == 0
    return folder / "out"


@pytest.fixture(scope="module")
def whole_visa(tmp_path_factory):
    """A VISA with a tracker of its own."""
    folder = tmp_path_factory.mktemp("visa") / "visa"
    torch.manual_seed(1)
    config = VisaConfig.tiny()
    VisaForVideoSegmentation(config).save_pretrained(folder)
    VisaProcessor.from_config(config, AutoTokenizer.from_pretrained(TOKENIZER)).save_pretrained(folder)
    return folder


def write_recipe(path, world, cache, changes):
    recipe = {
        "task": "tracker",
        "model": {"preset": "tiny", "weights": "random", "options": {"train_batch_norm": True, "key_dim": 16}},
        "data": {
            "mixture": {"groups": {"videos": {"weight": 1, "sources": {"revos": {"weight": 1}}}}},
            "folders": {"revos": str(world)},
            "cache_dir": str(cache),
        },
        "clips": {"num_frames": 3, "max_gap": 2, "first_max_gap": 1, "max_objects": 2, "size": 32},
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
        section, name = key.split("__")
        recipe.setdefault(section, {})[name] = value
    path.write_text(yaml.safe_dump(recipe))
    return path


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def merge(*arguments):
    return cli.main(["merge", *map(str, arguments)])


def logged(folder):
    """What was logged, step by step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [
        (entry["step"], entry["loss"], entry["ce_loss"], entry["dice_loss"])
        for entry in state["log_history"]
        if "loss" in entry
    ]


def weights(folder):
    return (folder / "final" / "model.safetensors").read_bytes()


def test_a_training_from_nothing_ends_in_a_tracker(finished):
    model = XMemModel.from_pretrained(finished / "final")
    assert model.config.key_dim == 16 and model.config.train_batch_norm
    assert model.key_encoder.backbone.stem.norm.num_batches_tracked == 2 * NUM_STEPS
    steps = logged(finished / "checkpoint-4")
    assert [step for step, *_ in steps] == [1, 2, 3, 4]
    assert all(loss == pytest.approx(ce + dice, rel=1e-3) for _, loss, ce, dice in steps)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(write, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    assert train(write(), "-o", tmp_path / "out") == 0
    assert logged(tmp_path / "out" / "checkpoint-4") == logged(finished / "checkpoint-4")
    assert weights(tmp_path / "out") == weights(finished)


def test_the_folder_of_another_recipe_is_refused(write, finished, capsys):
    assert train(write(clips__num_frames=2), "-o", finished) == 2
    assert "holds a training with another recipe: `clips.num_frames` differs." in capsys.readouterr().err


def test_an_evaluation_logs_j_and_f(write, world, tmp_path):
    recipe = write(
        evaluation__dataset="revos",
        evaluation__folder=str(world),
        evaluation__num_videos=1,
        arguments__eval_strategy="steps",
        arguments__eval_steps=NUM_STEPS,
    )
    assert train(recipe, "-o", tmp_path / "out") == 0
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    (measured,) = [entry for entry in state["log_history"] if "eval_J" in entry]
    assert measured["eval_num_objects"] >= 1
    assert measured["eval_JF"] == pytest.approx((measured["eval_J"] + measured["eval_F"]) / 2)


def test_a_tracker_or_that_of_a_visa_can_be_fine_tuned(write, finished, whole_visa, tmp_path):
    for name, folder in (("tracker", finished / "final"), ("visa", whole_visa)):
        # A rate of 0 leaves the weights as they are.
        recipe = write(model__weights=str(folder), model__options={}, arguments__learning_rate=0.0)
        assert train(recipe, "-o", tmp_path / name) == 0
    before, after = (XMemModel.from_pretrained(folder / "final") for folder in (finished, tmp_path / "tracker"))
    assert all(torch.equal(one, after.get_parameter(key)) for key, one in before.named_parameters())
    before = VisaForVideoSegmentation.from_pretrained(whole_visa).tracker.state_dict()
    after = XMemModel.from_pretrained(tmp_path / "visa" / "final").state_dict()
    # Its BatchNorm, as published weights want it, is frozen.
    assert before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_tracker_is_put_into_a_visa(finished, whole_visa, tmp_path, capsys):
    assert merge(whole_visa, "--tracker", finished / "final", "-o", tmp_path / "both") == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'both'}\n")
    both, before = AutoModel.from_pretrained(tmp_path / "both"), AutoModel.from_pretrained(whole_visa)
    tracker = XMemModel.from_pretrained(finished / "final").state_dict()
    assert both.config.tracker_config.key_dim == 16
    assert all(torch.equal(value, tracker[key]) for key, value in both.tracker.state_dict().items())
    assert all(torch.equal(one, before.get_parameter(f"model.{key}")) for key, one in both.model.named_parameters())
    assert VisaProcessor.from_pretrained(tmp_path / "both").image_token_id == before.config.image_token_id
    assert merge(whole_visa, "--tracker", finished / "final", "-o", tmp_path / "half", "--dtype", "float16") == 0
    assert AutoModel.from_pretrained(tmp_path / "half", dtype="auto").tracker.dtype == torch.float16


def test_what_cannot_be_put_together_is_refused(finished, whole_visa, tmp_path, capsys):
    assert merge(whole_visa, "--tracker", whole_visa, "-o", tmp_path / "out") == 2
    assert f"`{whole_visa}` holds no tracker. Give the folder `final` of a tracker's" in capsys.readouterr().err
    assert merge(whole_visa, "--tracker", finished / "final", "-o", finished) == 2
    assert f"`{finished}` exists already and is not empty." in capsys.readouterr().err
    assert merge(whole_visa, "--tracker", finished / "final", "-o", tmp_path / "out", "--base", whole_visa) == 2
    assert "A base is given, but" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*tmp"))


def test_a_dry_run_tells_the_plan_and_weights_are_asked_for(write, tmp_path, capsys):
    assert train(write(), "--dry-run") == 0
    assert "steps: 4 of 2 clips = 1 processes x 1 clips x 2 micro-batches; 8 clips in all" in capsys.readouterr().out
    assert train(write(), "--dry-run", "--processes", 3) == 2
    assert "3 processes of `per_device_train_batch_size` 1 take 3 samples at once" in capsys.readouterr().err
    assert train(write(model__weights=None), "-o", tmp_path / "out") == 2
    assert "`model`: `weights` is missing" in capsys.readouterr().err
    assert train(write()) == 2
    assert "No output folder is given." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_visa_without_a_tracker_has_none_to_begin_with(write, tmp_path, capsys):
    VisaConfig.tiny(tracker_config=None).save_pretrained(tmp_path / "blind")
    assert train(write(model__weights=str(tmp_path / "blind")), "-o", tmp_path / "out") == 2
    assert f"`model`: The VISA `{tmp_path / 'blind'}` has no tracker." in capsys.readouterr().err


def test_a_killed_training_continues(write, finished, tmp_path):
    """A real process, kill -9 in the middle."""
    recipe = write(arguments__save_steps=1)
    command = [sys.executable, "-m", "visa_hf", "train", str(recipe), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "checkpoint-2").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "final").exists()
    assert train(recipe, "-o", tmp_path / "out") == 0
    assert logged(tmp_path / "out" / "checkpoint-4") == logged(finished / "checkpoint-4")
