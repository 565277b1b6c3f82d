"""Recipes: what they say, and that bad ones stop with the line before anything is loaded."""

import re
from pathlib import Path

import pytest
import yaml

from visa_hf.trainer.recipe import read_recipe
from visa_hf.trainer.recipe_sections import RECIPES, find_recipe
from visa_hf.trainer.tracker_recipe import is_tracker_recipe

GOOD = """\
model:
  preset: tiny
  weights: random
trained:
  lora_rank: 4
data:
  mixture:
    groups:
      own:
        weight: 1
        sources: {own_data: 1}
  folders:
    own_data: DATA
schedule:
  epochs: 2
  steps_per_epoch: 3
  global_batch_size: 8
arguments:
  per_device_train_batch_size: 2
  learning_rate: 2e-5
  report_to: none
"""


@pytest.fixture
def write(tmp_path):
    """Write a recipe with some text replaced."""
    (tmp_path / "data").mkdir()

    def write(*replacements):
        text = GOOD.replace("DATA", str(tmp_path / "data"))
        for old, new in replacements:
            assert old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_a_recipe_is_read_into_its_sections(write):
    recipe = read_recipe(write())
    assert recipe.model.weights == "random" and recipe.model.preset == "tiny"
    assert recipe.trained.lora_rank == 4 and recipe.trained.lora_targets == ("q_proj", "v_proj")
    assert [source.name for source in recipe.data.mixture.sources] == ["own_data"]
    assert recipe.schedule.num_steps == 6 and recipe.schedule.num_draws == 48
    assert recipe.arguments["learning_rate"] == 2e-5
    assert recipe.evaluation is None


def test_accumulation_follows_from_batch_and_processes(write, tmp_path):
    recipe = read_recipe(write())
    assert [recipe.accumulation_steps(n) for n in (1, 2, 4)] == [4, 2, 1]
    arguments = recipe.training_arguments(tmp_path / "out", 2)
    assert arguments.max_steps == 6 and arguments.gradient_accumulation_steps == 2
    assert arguments.learning_rate == 2e-5 and arguments.adam_beta2 == 0.95


def test_a_batch_that_cannot_be_cut_is_refused_with_numbers_that_can(write):
    with pytest.raises(ValueError, match="3 processes of `per_device_train_batch_size` 2 take 6 samples at once"):
        read_recipe(write()).accumulation_steps(3)
    with pytest.raises(ValueError, match="With this size 1, 2, 4 processes would do"):
        read_recipe(write()).accumulation_steps(3)


def test_overrides_replace_and_add_values(write):
    recipe = read_recipe(write(), ["arguments.learning_rate=1e-3", "trained.unfreeze=[sam]", "model.options={}"])
    assert recipe.arguments["learning_rate"] == 1e-3
    assert recipe.trained.unfreeze == ("sam",)
    assert recipe.content["arguments"]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("lora_rank: 4", "lora_rnak: 4", 5, "`trained` has the unknown key `lora_rnak`. Did you mean `lora_rank`?"),
        ("trained:", "trainde:", 4, "the recipe has the unknown key `trainde`. Did you mean `trained`?"),
        ("lora_rank: 4", "lora_rank: four", 5, "`trained.lora_rank` is 'four' but must be an integer."),
        ("lora_rank: 4", "lora_rank: 0", 5, "`lora_rank` is 0"),
        ("preset: tiny", "preset: huge", 2, "`preset` is 'huge' but must be one of visa_7b, visa_13b, tiny."),
        ("epochs: 2", "epochs: 0", 15, "`epochs` is 0 but must be at least 1."),
        ("epochs: 2\n", "epochs: 2\n  epochs: 2\n", 16, "`schedule` has the key `epochs` twice."),
        ("epochs: 2", "epochs: 2.5", 15, "`schedule.epochs` is 2.5 but must be an integer."),
        ("learning_rate: 2e-5", "learning_rat: 2e-5", 20, "Did you mean `learning_rate`?"),
        (
            "learning_rate: 2e-5",
            "learning_rate: fast",
            20,
            "`arguments.learning_rate` is 'fast' but must be a number.",
        ),
        ("learning_rate: 2e-5", "max_steps: 5", 20, "`arguments.max_steps` follows from `schedule`."),
        ("own_data: DATA", "own_data: /none", 13, "There is no folder `/none`."),
        ("own_data: DATA", "own_dat: /none", 13, "`data.folders` names `own_dat`, which is not drawn."),
        ("weight: 1", "weight: -1", 10, "weight"),
        ("sources: {own_data: 1}", "sources: {owndata: 1}", 11, "unknown data set `owndata`"),
        ("model:", "model: [", None, "this is not YAML"),
        ("batch_size: 2", "batch_size: 0", 19, "`arguments.per_device_train_batch_size` is 0 but must be at least 1."),
        ("report_to: none", "deepspeed: zero4", 21, "`arguments.deepspeed` is 'zero4' but must be zero2, zero3 or a"),
        ("report_to: none", "eval_strategy: steps", 21, "there is no section `evaluation` to measure on."),
        ("schedule:", "evaluation: {dataset: rvos, folder: .}\nschedule:", 14, "`dataset` is 'rvos'. Did you mean"),
        ("schedule:", "evaluation: {dataset: revos, folder: .}\nschedule:", 14, "nothing says when."),
        (
            "schedule:",
            "evaluation: {dataset: revos, folder: ., num_clips: -1}\nschedule:",
            14,
            "`num_clips` is -1 but must be at least 0.",
        ),
        (
            "schedule:",
            "evaluation: {dataset: lv_vis, folder: ., num_clips: 8}\nschedule:",
            14,
            "`num_clips` is 8, but `visa evaluate` does not know how to measure on `lv_vis`. Leave it out,",
        ),
        (
            "schedule:",
            "evaluation: {dataset: revos, folder: ., sampling: {min_frames: 1}}\nschedule:",
            14,
            "`sampling` has the unknown key `min_frames`.",
        ),
        (
            "schedule:",
            "evaluation: {dataset: revos, folder: ., sampling: {lower_case: 1}}\nschedule:",
            14,
            "`sampling`: `lower_case` is 1 but must be true or false.",
        ),
    ],
)
def test_a_bad_recipe_stops_with_file_and_line(write, tmp_path, old, new, line, message):
    path = write((old.replace("DATA", str(tmp_path / "data")), new))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_recipe(path)
    assert str(caught.value).startswith(f"{path}, line {line}: " if line else str(path))


def test_a_source_without_a_folder_is_named(write, tmp_path):
    path = write((f"  folders:\n    own_data: {tmp_path / 'data'}\n", ""))
    with pytest.raises(ValueError, match="draws from `own_data`, which is not at hand.*--override data.folders.NAME"):
        read_recipe(path)


def test_a_batch_error_names_the_line_of_the_schedule(write):
    path = write()
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 15: `schedule`: `global_batch_size` is 8")):
        read_recipe(path).accumulation_steps(3)


def test_a_bare_no_is_a_strategy(write):
    assert read_recipe(write(("report_to: none", "save_strategy: no"))).arguments["save_strategy"] == "no"


def test_an_evaluation_samples_as_it_says_and_never_from_other_videos(write):
    section = "evaluation:\n  dataset: revos\n  folder: .\n  split: train\n  sampling: {max_reference_frames: 9}\n"
    path = write(("schedule:", section + "schedule:"), ("report_to: none", "eval_strategy: steps\n  eval_steps: 2"))
    (source,) = read_recipe(path).evaluation.mixture().sources
    assert (source.name, source.dataset, source.split, source.data_dir) == ("revos", "revos", "train", ".")
    assert source.recipe.max_reference_frames == 9 and source.recipe.min_video_frames == 2
    assert source.recipe.foreign_probability == 0.0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("{tracker: x}", "`parts` names 'tracker' but knows only 'vision_tower', 'mm_projector', 'sam'."),
        ("{sam: 3}", "`parts` gives 'sam' 3, but the folder of a VISA is needed."),
        ("{sam: x}", "`model.parts` are given for a training with LoRA, whose adapter would be folded into a model"),
    ],
)
def test_bad_parts_are_named(write, parts, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(write(), [f"model.parts={parts}"])


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("arguments.learning_rat=1", "--override arguments.learning_rat=1: `arguments` has the unknown key"),
        ("learning_rate", "--override learning_rate: the form is `name.name=value`."),
        ("model.preset.more=1", "--override model.preset.more=1: `model.preset` is a value and has nothing below it."),
        ("schedule.epochs=[", "--override schedule.epochs=[, line 1: this is not YAML"),
    ],
)
def test_a_bad_override_is_named(write, assignment, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe(write(), [assignment])


def test_an_unknown_recipe_lists_the_bundled_ones():
    with pytest.raises(
        FileNotFoundError, match="finetune_own_data, overfit_synthetic, tiny_synthetic, .*tiny_xmem, visa_13b"
    ):
        find_recipe("visa_70b")


@pytest.mark.parametrize(
    ("name", "steps", "rate", "schedule"),
    [
        ("visa_7b", 15000, 2e-5, "cosine"),
        ("visa_13b", 15000, 2e-5, "cosine"),
        ("visa_7b_released", 15000, 3e-4, "linear"),
    ],
)
def test_the_published_recipes_are_the_published_ones(name, steps, rate, schedule, tmp_path):
    groups = ("sem_seg", "refer_seg", "vqa", "reason_seg", "chatunivi", "rvos")
    recipe = read_recipe(name, [f"data.folders.{group}={tmp_path}" for group in groups])
    assert recipe.schedule.num_steps == steps and recipe.schedule.global_batch_size == 128
    assert recipe.accumulation_steps(8) == 16
    assert recipe.arguments["learning_rate"] == rate and recipe.arguments["lr_scheduler_type"] == schedule
    assert recipe.arguments["deepspeed"] == "zero2" and recipe.arguments["bf16"] is True
    assert recipe.model.options["loss_reduction"] == "microbatch"
    assert (recipe.trained.lora_rank, recipe.trained.lora_alpha, recipe.trained.lora_dropout) == (8, 16, 0.05)
    assert recipe.arguments.get("warmup_steps", 0) == (100 if name == "visa_7b_released" else 0)


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(RECIPES.glob("*.yaml")) if not is_tracker_recipe(path)],
    ids=lambda path: path.stem,
)
def test_every_bundled_recipe_makes_arguments(path: Path, tmp_path):
    mixture = yaml.safe_load(path.read_text())["data"].get("mixture", "published")
    names = ["sem_seg", "refer_seg", "vqa", "reason_seg", "chatunivi", "rvos"]
    if mixture != "published":
        names = [source for group in mixture["groups"].values() for source in group["sources"]]
    folders = [f"data.folders.{name}={tmp_path}" for name in names]
    recipe = read_recipe(path.stem, [*folders, "arguments.bf16=false", "arguments.deepspeed=null"])
    arguments = recipe.training_arguments(tmp_path / "out", 1)
    assert arguments.max_steps == recipe.schedule.num_steps
