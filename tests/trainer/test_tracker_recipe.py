"""Recipes of trackers: what they may say, and that errors name the place."""

import pytest
import yaml

from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset
from visa_hf.trainer.tracker_recipe import is_tracker_recipe, read_tracker_recipe
from visa_hf.trainer.tracker_run import make_tracker_plan, tracker_config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "synthetic"
    write_dataset(folder, num_videos={"train": 1}, options=ClipOptions(size=(48, 64)), show_progress=False)
    return folder


@pytest.fixture
def write(world, tmp_path):
    """Write a recipe; `changes` are values by section and name, or whole sections."""

    def write(**changes):
        recipe = {
            "task": "tracker",
            "model": {"preset": "tiny", "weights": "random"},
            "data": {
                "mixture": {"groups": {"videos": {"weight": 1, "sources": {"revos": {"weight": 1}}}}},
                "folders": {"revos": str(world)},
            },
            "schedule": {"epochs": 2, "steps_per_epoch": 5, "global_batch_size": 4},
            "arguments": {"per_device_train_batch_size": 2, "use_cpu": True},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                recipe.setdefault(section, {})[name] = value
            else:
                recipe[section] = value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: section for name, section in recipe.items() if section is not None}))
        return path

    return write


def line_of(path, text):
    return next(number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line)


def test_the_bundled_recipe_is_one_of_a_small_tracker(world):
    overrides = [f"data.folders.revos={world}", f"evaluation.folder={world}"]
    assert is_tracker_recipe("tiny_xmem", overrides) and not is_tracker_recipe("tiny_synthetic")
    recipe = read_tracker_recipe("tiny_xmem", overrides)
    config = tracker_config(recipe)
    assert config.train_batch_norm and config.input_size == 128
    plan = make_tracker_plan(recipe)
    assert sum(plan.parameters.values()) <= 2_000_000
    assert f"{recipe.schedule.num_draws:,} clips in all" in str(plan)


def test_a_recipe_without_sections_takes_xmems_own_numbers(write):
    recipe = read_tracker_recipe(write())
    assert (recipe.clips.num_frames, recipe.clips.size, recipe.clips.max_objects) == (8, 384, 3)
    assert recipe.losses.hard_share == 0.15 and recipe.evaluation is None
    arguments = recipe.training_arguments("out", 1)
    assert arguments.max_steps == 10 and arguments.gradient_accumulation_steps == 2


def test_the_plan_says_what_the_training_comes_to(write):
    plan = str(make_tracker_plan(read_tracker_recipe(write(clips__size=64, clips__max_objects=2)), world_size=2))
    assert "steps: 10 of 4 clips = 2 processes x 2 clips x 1 micro-batches; 40 clips in all" in plan
    assert "clips: 8 to 8 frames of 64 x 64 pixels, at most 5 to 15 apart, with up to 2 objects" in plan
    assert "value encoder" in plan and "revos" in plan


@pytest.mark.parametrize(
    ("changes", "where", "message"),
    [
        ({"task": "tracking"}, "task:", "`task` must be `tracker`, or be left out in a recipe of a VISA."),
        ({"clips__num_frmaes": 3}, "num_frmaes", "`clips` has the unknown key `num_frmaes`. Did you mean"),
        ({"clips__size": 100}, "size: 100", "`size` is 100 but must be a multiple of 16."),
        ({"clips__jitter": "much"}, "jitter", "`clips.jitter` is 'much' but must be a number."),
        ({"losses__hard_share": 0.0}, "hard_share", "`hard_share` is 0.0 but must lie in (0, 1]."),
        ({"losses__hard_start": 0.7}, "hard_start", "`hard_start` is 0.7 and `hard_end` 0.5, but 0 <= hard_start"),
        ({"losses__ce_weight": -1.0}, "ce_weight", "`ce_weight` is -1.0 but must be at least 0."),
        ({"model__preset": "big"}, "preset", "`preset` is 'big' but must be one of xmem, tiny."),
        ({"arguments__num_overlays": 2}, "num_overlays", "`arguments.num_overlays` does nothing for a tracker."),
        ({"arguments__max_steps": 2}, "max_steps", "`arguments.max_steps` follows from `schedule`."),
        ({"trained": {}}, "trained", "the recipe has the unknown key `trained`."),
        ({"schedule": None}, "arguments", "the section `schedule` is missing."),
        ({"data__mixture": None}, "folders", "`data` has no `mixture`."),
        ({"arguments__eval_strategy": "steps"}, "eval_strategy", "there is no section `evaluation` to measure on."),
        (
            {"evaluation": {"dataset": "revos", "folder": "nowhere"}, "arguments__eval_strategy": "steps"},
            "nowhere",
            "There is no folder `nowhere`.",
        ),
        (
            {"evaluation": {"dataset": "revo", "folder": "."}, "arguments__eval_strategy": "steps"},
            "dataset: revo",
            "`dataset` is 'revo'. Did you mean `revos`?",
        ),
        (
            {"evaluation": {"dataset": "revos", "folder": ".", "num_videos": 0}, "arguments__eval_strategy": "steps"},
            "num_videos",
            "`num_videos` is 0 but must be at least 1.",
        ),
    ],
)
def test_errors_name_file_and_line(write, changes, where, message):
    if changes.get("data__mixture", "") is None:
        path = write()
        content = yaml.safe_load(path.read_text())
        del content["data"]["mixture"]
        path.write_text(yaml.safe_dump(content))
    else:
        path = write(**changes)
    with pytest.raises(ValueError) as error:
        read_tracker_recipe(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}, line ")
    first = int(str(error.value).split("line ")[1].split(":")[0])
    assert first in (1, line_of(path, where), line_of(path, where) - 1)


def test_errors_of_overrides_name_them(write):
    with pytest.raises(ValueError, match=r"^--override clips.size=100: `size` is 100 but must be a multiple of 16"):
        read_tracker_recipe(write(), ["clips.size=100"])


def test_a_configuration_that_does_not_fit_is_named(write, tmp_path):
    with pytest.raises(ValueError, match=r"recipe.yaml, line \d+: `model`: `key_dmi` is not a field"):
        tracker_config(read_tracker_recipe(write(model__options={"key_dmi": 3})))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"`model`: `.*bert` is a 'bert'; an XMem or a VISA with one is needed"):
        tracker_config(read_tracker_recipe(write(model__weights=str(tmp_path / "bert"))))


def test_the_kind_is_told_from_the_file_alone(write):
    path = write(task=None)
    assert not is_tracker_recipe(path) and is_tracker_recipe(path, ["task=tracker"])
