"""Recipes of trackers: `task: tracker` and the sections `model`, `data`, `clips`, `losses`, `schedule`, ...

Their keys are the fields of the classes below, of `ClipOptions` (`clips`), `TrackerLosses` (`losses`) and
`VisaTrainingArguments` (`arguments`); `data` and `schedule` are as in recipes of a VISA (recipe.py). What a recipe
says is done in tracker_run.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import yaml

from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.mixture import GroupConfig, MixtureConfig, SourceConfig
from visa_hf.trainer.recipe import CommonRecipe, DataRecipe, ScheduleRecipe
from visa_hf.trainer.recipe_sections import (
    check_evaluation,
    check_folders,
    make,
    open_recipe,
    read_arguments,
    read_evaluation,
    read_fields,
    read_mixture,
    read_section,
    require_sections,
)
from visa_hf.trainer.tracker_samples import ClipOptions
from visa_hf.trainer.tracker_trainer import TrackerLosses
from visa_hf.yaml_files import YamlFile, nearest

TASK = "tracker"
PRESETS = ("xmem", "tiny")
# Arguments that mean nothing to a tracker.
_NOT_FOR_TRACKERS = ("num_overlays", "deepspeed")


@dataclass(frozen=True)
class TrackerModelRecipe:
    """The tracker that is trained.

    Attributes:
        preset (`str`): `"xmem"` or `"tiny"`: the architecture of a training from nothing.
        weights (`str`, *optional*): folder or Hub id of an `XMemModel`, or of a VISA whose tracker is taken; or
            `"random"` to begin from nothing.
        options (`dict`): fields of `XMemConfig` that differ from the checkpoint's or the preset's.
    """

    preset: str = "xmem"
    weights: str | None = None
    options: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` is {self.preset!r} but must be one of {', '.join(PRESETS)}.")


@dataclass(frozen=True)
class TrackerEvaluation:
    """Videos that are tracked from their true first masks during the training, for J and F.

    Attributes:
        dataset (`str`): its name, such as `revos` or `own_data`.
        folder (`str`): where it is.
        split (`str`): the builder's name of it.
        num_videos (`int`): how many are drawn, at most.
        seed (`int`): what they are drawn with; not the training's.
    """

    dataset: str
    folder: str
    split: str = "valid"
    num_videos: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_videos < 1:
            raise ValueError(f"`num_videos` is {self.num_videos} but must be at least 1.")
        if self.dataset not in KNOWN_DATASETS:
            raise ValueError(f"`dataset` is {self.dataset!r}. {nearest(self.dataset, KNOWN_DATASETS)}")

    def mixture(self) -> MixtureConfig:
        """Return the mixture of its one source."""
        source = SourceConfig(self.dataset, 1.0, self.dataset, self.split, self.folder)
        return MixtureConfig((GroupConfig("evaluation", 1.0, (source,)),))


@dataclass(frozen=True)
class TrackerRecipe(CommonRecipe):
    """A checked recipe of a tracker.

    Attributes:
        model ([`TrackerModelRecipe`]), data ([`DataRecipe`]), clips ([`ClipOptions`]), losses ([`TrackerLosses`]),
            evaluation ([`TrackerEvaluation`], *optional*): its sections, besides those of every recipe.
    """

    model: TrackerModelRecipe
    data: DataRecipe
    clips: ClipOptions
    losses: TrackerLosses
    evaluation: TrackerEvaluation | None


def is_tracker_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> bool:
    """Return whether a recipe is one of a tracker: whether it has a `task`, which recipes of a VISA have not.

    Raises:
        FileNotFoundError, ValueError: as [`read_tracker_recipe`].
    """
    file = open_recipe(name, overrides)
    return any(key.value == "task" for key, _ in file.root.value)


def read_tracker_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> TrackerRecipe:
    """Read a recipe and check everything that can be checked without its model and its data.

    Args:
        name (path or `str`): a YAML file, or the name of a bundled recipe.
        overrides (sequence of `str`): values to replace, such as `"arguments.learning_rate=1e-4"`.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a key is unknown, a value has a wrong type or range, or a folder does not exist; file and line, or
            the override, are named.
    """
    file = open_recipe(name, overrides)
    names = {f.name for f in fields(TrackerRecipe)} - {"path", "content", "places"}
    sections = file.mapping(file.root, "the recipe", {"task", *names})
    task = sections.pop("task", None)
    if task is None or file.text(task, "task") != TASK:
        raise file.error(task or file.root, f"`task` must be `{TASK}`, or be left out in a recipe of a VISA.")
    require_sections(file, sections)
    arguments_node = sections.get("arguments")
    arguments = {} if arguments_node is None else read_arguments(file, arguments_node)
    for key in _NOT_FOR_TRACKERS:
        if key in arguments:
            node = file.mapping(sections["arguments"], "`arguments`")[key]
            raise file.error(node, f"`arguments.{key}` does nothing for a tracker. Remove it.")
    evaluation: TrackerEvaluation | None = read_evaluation(file, sections, TrackerEvaluation)
    check_evaluation(file, sections, arguments, evaluation)
    return TrackerRecipe(
        path=file.path,
        schedule=read_section(file, sections, "schedule", ScheduleRecipe),
        arguments=arguments,
        content=file.value(file.root, "the recipe"),
        places={name: str(file.error(node, f"`{name}`")) for name, node in sections.items()},
        model=read_section(file, sections, "model", TrackerModelRecipe),
        data=_data(file, sections["data"]),
        clips=read_section(file, sections, "clips", ClipOptions),
        losses=read_section(file, sections, "losses", TrackerLosses),
        evaluation=evaluation,
    )


def _data(file: YamlFile, node: yaml.Node) -> DataRecipe:
    data = dict(read_fields(file, node, "data", DataRecipe, {"mixture"}))
    mixture = file.mapping(node, "`data`").get("mixture")
    if mixture is None:
        raise file.error(node, "`data` has no `mixture`. Say which data sets with masks are drawn from.")
    data["mixture"] = read_mixture(file, mixture)
    check_folders(file, node, data)
    return make(file, node, DataRecipe, data)
