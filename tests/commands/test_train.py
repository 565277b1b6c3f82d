"""`visa train` and `visa merge`, from a recipe and a data set on disk to a folder that `from_pretrained` loads."""

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
from transformers import AutoModel, AutoProcessor

from visa_hf import cli

NUM_STEPS = 4


@pytest.fixture
def write(world, cache, tmp_path):
    """Write a recipe of a few steps with LoRA; `changes` are values by name."""
    return lambda **changes: write_recipe(tmp_path / "recipe.yaml", world, cache, changes)


@pytest.fixture(scope="module")
def finished(world, cache, tmp_path_factory):
    """Folder of a training that ran to its end; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert train(write_recipe(folder / "recipe.yaml", world, cache, {}), "-o", folder / "out") == 0
    return folder / "out"


def write_recipe(path, world, cache, changes):
    recipe = {
        "model": {"preset": "tiny", "weights": "random", "options": {"tracker_config": None}},
        "trained": {"lora_dropout": 0.1},
        "data": {
            "mixture": {"groups": {"rvos": {"weight": 1, "sources": {"revos": {"weight": 1, "sampling": SAMPLING}}}}},
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
    path.write_text(yaml.safe_dump(recipe))
    return path


SAMPLING = {"min_reference_frames": 1, "max_reference_frames": 2, "min_video_frames": 1}


def losses(folder):
    """What was logged, step by step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]


def train(*arguments):
    return cli.main(["train", *map(str, arguments)])


def test_a_training_from_nothing_ends_in_an_adapter_that_merges_into_a_model(finished, tmp_path):
    assert (finished / "final" / "adapter_model.safetensors").is_file()
    assert [step for step, _ in losses(finished / "checkpoint-4")] == [1, 2, 3, 4]
    assert cli.main(["merge", str(finished / "final"), "-o", str(tmp_path / "merged")]) == 0
    merged = AutoModel.from_pretrained(tmp_path / "merged")
    base = AutoModel.from_pretrained(finished / "base")
    AutoProcessor.from_pretrained(tmp_path / "merged")
    changed = {
        name for name, parameter in merged.named_parameters() if not torch.equal(parameter, base.get_parameter(name))
    }
    assert any("q_proj" in name for name in changed) and any("mask_decoder" in name for name in changed)
    assert not any(name.startswith("model.vision_tower") for name in changed)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(write, finished, tmp_path, capsys):
    # As it was after two steps.
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-4", "final"))
    assert train(write(), "-o", tmp_path / "out") == 0
    assert capsys.readouterr().out.endswith(f"wrote {tmp_path / 'out' / 'final'}\n")
    assert losses(tmp_path / "out" / "checkpoint-4") == losses(finished / "checkpoint-4")
    weights = [folder / "final" / "adapter_model.safetensors" for folder in (tmp_path / "out", finished)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_training_can_forbid_what_differs_from_run_to_run(write, finished, tmp_path):
    """Sums that several threads make in any order, above all; every operation of a step must have another way."""
    try:
        assert train(write(arguments__full_determinism=True), "-o", tmp_path / "out") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    expected = losses(finished / "checkpoint-4")
    assert losses(tmp_path / "out" / "checkpoint-4") == [
        (step, pytest.approx(loss, rel=1e-4)) for step, loss in expected
    ]


def test_the_folder_of_another_recipe_is_refused(write, finished, capsys):
    assert train(write(arguments__learning_rate=1e-4, arguments__seed=6), "-o", finished) == 2
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


def test_whole_clips_are_measured_on_the_way(write, world, tmp_path):
    recipe = write(
        model__options={},
        schedule__steps_per_epoch=2,
        arguments__eval_strategy="steps",
        arguments__eval_steps=2,
        arguments__save_steps=2,
        evaluation__dataset="revos",
        evaluation__folder=str(world),
        evaluation__num_samples=1,
        evaluation__num_clips=3,
    )
    assert train(recipe, "-o", tmp_path / "out") == 0
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    (scored,) = [entry for entry in state["log_history"] if "eval_J" in entry]
    assert scored["eval_clip_num_expressions"] == 3 and scored["step"] == 2
    assert {"eval_clip_referring_JF", "eval_clip_no_object_R", "eval_R"} <= set(scored)


def test_whole_clips_and_zero_3_are_refused_before_anything_is_read(write, world, tmp_path, capsys, monkeypatch):
    from visa_hf.trainer import clip_evaluation

    monkeypatch.setattr(clip_evaluation, "is_deepspeed_zero3_enabled", lambda: True)
    evaluation = {"evaluation__dataset": "revos", "evaluation__folder": str(world), "evaluation__num_clips": 3}
    recipe = write(arguments__eval_strategy="steps", **evaluation)
    assert train(recipe, "-o", tmp_path / "out") == 2
    line = recipe.read_text().splitlines().index("evaluation:") + 2
    expected = f"{recipe}, line {line}: `evaluation`: Whole clips (`num_clips`) are to be measured during a training"
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_plan_and_writes_nothing(write, tmp_path, capsys):
    assert train(write(), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "steps: 4 of 2 samples = 1 processes x 1 samples x 2 micro-batches; 8 samples in all" in printed
    assert "SAM mask decoder" in printed and "revos" in printed
    assert train(write(), "--dry-run", "--processes", 3) == 2
    assert "3 processes of `per_device_train_batch_size` 1 take 3 samples at once" in capsys.readouterr().err


def test_weights_and_output_are_asked_for(write, tmp_path, capsys):
    assert train(write(model__weights=None), "-o", tmp_path / "out") == 2
    assert "`model`: `weights` is missing" in capsys.readouterr().err
    assert train(write()) == 2
    assert "No output folder is given." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_came_to_nothing_may_be_corrected(write, tmp_path, capsys):
    """The split is found to be wrong when the data set is read; the folder holds the recipe by then."""
    wrong = write(
        data__mixture={"groups": {"a": {"weight": 1, "sources": {"revos": {"weight": 1, "split": "tarin"}}}}}
    )
    assert train(wrong, "-o", tmp_path / "out") == 2
    expected = f"{wrong}, line {wrong.read_text().splitlines().index('data:') + 2}: `data`: Source `revos` is to have"
    assert expected in capsys.readouterr().err
    assert train(write(schedule__steps_per_epoch=1), "-o", tmp_path / "out") == 0


def test_an_unknown_split_of_the_evaluation_is_named_with_its_line(write, world, tmp_path, capsys):
    evaluation = {"evaluation__dataset": "revos", "evaluation__folder": str(world), "evaluation__split": "test"}
    recipe = write(arguments__eval_strategy="steps", **evaluation)
    assert train(recipe, "-o", tmp_path / "out") == 2
    line = recipe.read_text().splitlines().index("evaluation:") + 2
    assert (
        f"{recipe}, line {line}: `evaluation`: Source `revos` is to have the split 'test'" in capsys.readouterr().err
    )


def test_what_changes_no_step_may_differ_when_a_training_is_continued(write, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out", ignore=shutil.ignore_patterns("final"))
    assert (
        train(write(arguments__dataloader_num_workers=1, arguments__save_total_limit=3), "-o", tmp_path / "out") == 0
    )
    assert (tmp_path / "out" / "final" / "adapter_model.safetensors").is_file()


def test_an_interruption_says_how_to_go_on(write, tmp_path, capsys, monkeypatch):
    from visa_hf.trainer import VisaTrainer

    step = VisaTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(VisaTrainer, "training_step", interrupted)
    assert train(write(), "-o", tmp_path / "out") == 130
    expected = f"visa: interrupted. The same command goes on from `{tmp_path / 'out' / 'checkpoint-2'}`."
    assert expected in capsys.readouterr().err
    assert train(write(arguments__save_steps=4), "-o", tmp_path / "new") == 130
    assert "The same command begins again: there is no whole checkpoint yet." in capsys.readouterr().err


def test_a_model_with_a_tracker_is_trained_and_keeps_it(write, tmp_path):
    assert train(write(model__options={}, schedule__steps_per_epoch=1), "-o", tmp_path / "out") == 0
    # Moved together, the adapter still finds its base.
    (tmp_path / "out").rename(tmp_path / "moved")
    assert cli.main(["merge", str(tmp_path / "moved" / "final"), "-o", str(tmp_path / "merged")]) == 0
    assert AutoModel.from_pretrained(tmp_path / "merged").tracker is not None


def test_options_that_do_not_fit_the_model_are_named(write, tmp_path, capsys):
    assert train(write(model__options={"bce_loss_wieght": 1.0}), "-o", tmp_path / "out") == 2
    assert "bce_loss_weight" in capsys.readouterr().err


def test_a_killed_training_continues(write, finished, tmp_path):
    """A real process, kill -9 in the middle."""
    recipe = write(arguments__save_steps=1, schedule__steps_per_epoch=NUM_STEPS)
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
    assert losses(tmp_path / "out" / "checkpoint-4") == losses(finished / "checkpoint-4")


def test_parts_of_another_model_are_taken(finished, world, cache, tmp_path):
    """Here the tower of a model that began with another seed; it stays as it is, since it is not trained."""
    changes = {
        "model__parts": {"vision_tower": str(finished / "base")},
        "trained__language_model": "full",
        "arguments__seed": 6,
        "schedule__steps_per_epoch": 1,
    }
    assert train(write_recipe(tmp_path / "recipe.yaml", world, cache, changes), "-o", tmp_path / "out") == 0
    given, base, made = (
        AutoModel.from_pretrained(folder).model.vision_tower.state_dict()
        for folder in (finished / "base", tmp_path / "out" / "base", tmp_path / "out" / "final")
    )
    assert all(torch.equal(made[name], given[name]) for name in given)
    assert not all(torch.equal(base[name], given[name]) for name in given)


def test_parts_of_another_size_are_refused(finished, world, cache, tmp_path, capsys):
    vision = {"hidden_size": 48, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    changes = {
        "model__options": {"tracker_config": None, "vision_config": vision},
        "model__parts": {"vision_tower": str(finished / "base")},
        "trained__language_model": "full",
    }
    assert train(write_recipe(tmp_path / "recipe.yaml", world, cache, changes), "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "`parts`: the `vision_tower` of" in error and "is of another size or kind than the model's" in error


def test_parts_under_zero_3_are_refused_before_anything_is_made(write, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("visa_hf.trainer.run.is_deepspeed_zero3_enabled", lambda: True)
    recipe = write(model__parts={"vision_tower": str(finished / "base")}, trained__language_model="full")
    assert train(recipe, "-o", tmp_path / "out") == 2
    assert (
        "`parts` are given under ZeRO-3, which splits weights before they can be replaced" in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / "base").exists()
