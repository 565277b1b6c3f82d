"""Recipes: YAML files that say all of a training, checked before anything is loaded.

A recipe has the sections `model`, `trained`, `data`, `schedule`, `evaluation` and `arguments`; their keys are the
fields of the classes below, of `TrainingOptions` (`trained`) and of `VisaTrainingArguments` (`arguments`). The recipes
of the paper (VISA, https://huggingface.co/papers/2407.11325, appendix) are in `recipes/`. What a recipe says is done
in run.py, and told beforehand in plan.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.mixture import GroupConfig, MixtureConfig, SourceConfig
from visa_hf.datasets_scripts.sampling import SamplingRecipe
from visa_hf.evaluation.benchmarks import BENCHMARKS
from visa_hf.trainer.lora import TOWERS, TrainingOptions
from visa_hf.trainer.recipe_sections import (
    BUNDLED_DEEPSPEED,
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
from visa_hf.trainer.training_arguments import VisaTrainingArguments
from visa_hf.yaml_files import nearest

DEEPSPEED = Path(__file__).parent / "deepspeed"
PRESETS = ("visa_7b", "visa_13b", "tiny")
# `model.weights` of a training from nothing.
RANDOM = "random"


@dataclass(frozen=True)
class ModelRecipe:
    """The model that is trained.

    Attributes:
        preset (`str`): `"visa_7b"`, `"visa_13b"` or `"tiny"`: the architecture of a training from nothing, and what a
            plan is made for as long as there are no weights.
        weights (`str`, *optional*): folder or Hub id for `from_pretrained` (a converted Chat-UniVi with SAM, a
            published VISA, or one of yours), or `"random"` to begin from nothing.
        parts (`dict[str, str]`): `vision_tower`, `mm_projector` or `sam` (its image encoder) -> folder or Hub id of
            another VISA, whose weights of that part are taken instead.
        options (`dict`): fields of `VisaConfig` that differ from the checkpoint's or the preset's, such as weights of
            losses.
        tokenizer (`str`, *optional*): folder or Hub id of the tokenizer of a training from nothing; by default the
            bundled one with the words of the synthetic world, which fits the preset `"tiny"`.
        dtype (`str`): `"float32"`, `"bfloat16"` or `"auto"`: how frozen weights are kept.
        attn_implementation (`str`): `"sdpa"`, `"eager"` or another of transformers', for CLIP, the language model and
            SAM.
    """

    preset: str = "visa_7b"
    weights: str | None = None
    parts: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    tokenizer: str | None = None
    dtype: str = "auto"
    attn_implementation: str = "sdpa"

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"`preset` is {self.preset!r} but must be one of {', '.join(PRESETS)}.")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"`dtype` is {self.dtype!r} but must be auto, float32 or bfloat16.")
        for part, folder in self.parts.items():
            if part not in TOWERS:
                raise ValueError(f"`parts` names {part!r} but knows only {', '.join(map(repr, TOWERS))}.")
            if not isinstance(folder, str):
                raise ValueError(f"`parts` gives {part!r} {folder!r}, but the folder of a VISA is needed.")


@dataclass(frozen=True)
class DataRecipe:
    """What is trained on.

    Attributes:
        mixture (`MixtureConfig`): in the file either `published`, a mixture's YAML file, or `groups:` as in one.
        folders (`dict[str, str]`): where data sets are, by the name of a source, a data set or a group.
        cache_dir (`str`, *optional*): where prepared rows are kept.
        num_proc (`int`, *optional*): processes that prepare a data set.
        on_error (`str`): `"raise"`, or `"skip"` what cannot be used, and count it.
        renormalise (`bool`): do without sources that have no folder.
    """

    mixture: MixtureConfig = field(default_factory=MixtureConfig.published)
    folders: dict = field(default_factory=dict)
    cache_dir: str | None = None
    num_proc: int | None = None
    on_error: str = "raise"
    renormalise: bool = False

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"`on_error` is {self.on_error!r} but must be raise or skip.")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"`num_proc` is {self.num_proc} but must be at least 1.")


@dataclass(frozen=True)
class ScheduleRecipe:
    """How long and in what portions.

    Attributes:
        epochs, steps_per_epoch (`int`): their product is the number of optimiser steps. An epoch is only a number of
            steps: samples are drawn.
        global_batch_size (`int`): samples of one optimiser step on all processes together. What processes times
            `per_device_train_batch_size` does not reach is accumulated.
    """

    epochs: int
    steps_per_epoch: int
    global_batch_size: int

    def __post_init__(self) -> None:
        for name in ("epochs", "steps_per_epoch", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)} but must be at least 1.")

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return self.epochs * self.steps_per_epoch

    @property
    def num_draws(self) -> int:
        """Samples of the whole training."""
        return self.num_steps * self.global_batch_size


@dataclass(frozen=True)
class EvaluationRecipe:
    """What masks are measured on during the training: a fixed set of samples, and a fixed choice of whole clips.

    Attributes:
        dataset (`str`): its name, such as `revos` or `own_data`.
        folder (`str`): where it is.
        split (`str`): the builder's name of it.
        num_samples (`int`): how many samples are drawn. Their target frames are measured, the true answers given.
        num_clips (`int`): how many expressions are chosen that the model answers by itself, about whole videos, as in
            `visa evaluate`; 0 for none. See [`ClipEvaluation`].
        seed (`int`): what they are drawn with; not the training's.
        sampling (`dict`): fields of `SamplingRecipe` that differ from the data set's, as in a mixture. No target frame
            comes from another video and no sample is text alone, unless they say so.
    """

    dataset: str
    folder: str
    split: str = "valid"
    num_samples: int = 200
    num_clips: int = 0
    seed: int = 0
    sampling: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("num_clips", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` is {getattr(self, name)} but must be at least {least}.")
        if self.dataset not in KNOWN_DATASETS:
            raise ValueError(f"`dataset` is {self.dataset!r}. {nearest(self.dataset, KNOWN_DATASETS)}")
        if self.num_clips and self.dataset not in BENCHMARKS:
            raise ValueError(
                f"`num_clips` is {self.num_clips}, but `visa evaluate` does not know how to measure on "
                f"`{self.dataset}`. Leave it out, or take one of {', '.join(BENCHMARKS)}."
            )
        unknown = sorted(set(self.sampling) - {one.name for one in fields(SamplingRecipe)})
        if unknown:
            hint = nearest(unknown[0], [one.name for one in fields(SamplingRecipe)])
            raise ValueError(f"`sampling` has the unknown key `{unknown[0]}`. {hint}")
        try:
            self.mixture()
        except (TypeError, ValueError) as error:
            raise ValueError(f"`sampling`: {error}") from error

    def mixture(self) -> MixtureConfig:
        """Return the mixture of its one source."""
        usual = KNOWN_DATASETS[self.dataset].recipe
        sampling = replace(usual, **{"foreign_probability": 0.0, "text_only_probability": 0.0, **self.sampling})
        source = SourceConfig(self.dataset, 1.0, self.dataset, self.split, self.folder, sampling)
        return MixtureConfig((GroupConfig("evaluation", 1.0, (source,)),))


@dataclass(frozen=True)
class CommonRecipe:
    """What recipes of all kinds have, keyword arguments only.

    Attributes:
        path (`Path`): the file.
        schedule ([`ScheduleRecipe`]): its section.
        arguments (`dict`): fields of [`VisaTrainingArguments`].
        content (`dict`): all of it as plain data, overrides included, to be compared and kept with the training.
        places (`dict[str, str]`): file, line and name of each section, with which errors begin that come up later.
    """

    path: Path
    schedule: ScheduleRecipe
    arguments: dict
    content: dict
    places: dict

    def place(self, section: str) -> str:
        """Return where a section is, or would be."""
        return self.places.get(section, f"{self.path}: `{section}`")

    def accumulation_steps(self, world_size: int) -> int:
        """Return how many micro-batches each of `world_size` processes accumulates in a step.

        Raises:
            ValueError: the global batch cannot be cut so.
        """
        per_device = self.arguments.get("per_device_train_batch_size", 8)
        at_once = per_device * world_size
        if self.schedule.global_batch_size % at_once:
            possible = [n for n in range(1, 129) if self.schedule.global_batch_size % (per_device * n) == 0]
            numbers = ", ".join(map(str, possible)) or "no number of"
            raise ValueError(
                f"{self.place('schedule')}: `global_batch_size` is {self.schedule.global_batch_size}, but "
                f"{world_size} processes of `per_device_train_batch_size` {per_device} take {at_once} samples at "
                f"once, of which it is no multiple. With this size {numbers} processes would do; or change one of the "
                "two sizes."
            )
        return self.schedule.global_batch_size // at_once

    def training_arguments(self, output_dir: str | os.PathLike[str], world_size: int) -> VisaTrainingArguments:
        """Make the arguments of the trainer.

        Args:
            output_dir (path): folder of the training.
            world_size (`int`): number of processes.

        Raises:
            ValueError: they do not go together, or the batch cannot be cut.
        """
        values = dict(self.arguments)
        if values.get("deepspeed") in BUNDLED_DEEPSPEED:
            values["deepspeed"] = str(DEEPSPEED / f"{values['deepspeed']}.json")
        try:
            return VisaTrainingArguments(
                output_dir=os.fspath(output_dir),
                max_steps=self.schedule.num_steps,
                gradient_accumulation_steps=self.accumulation_steps(world_size),
                **values,
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.place('arguments')}: {error}") from error


@dataclass(frozen=True)
class Recipe(CommonRecipe):
    """A checked recipe of a VISA.

    Attributes:
        model ([`ModelRecipe`]), trained ([`TrainingOptions`]), data ([`DataRecipe`]), evaluation
            ([`EvaluationRecipe`], *optional*): its sections, besides those of every recipe.
    """

    model: ModelRecipe
    trained: TrainingOptions
    data: DataRecipe
    evaluation: EvaluationRecipe | None


_OUR_OWN = ("path", "content", "places")


def read_recipe(name: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
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
    sections = file.mapping(file.root, "the recipe", tuple(f.name for f in fields(Recipe) if f.name not in _OUR_OWN))
    require_sections(file, sections)
    data = dict(read_fields(file, sections["data"], "data", DataRecipe, {"mixture"}))
    data_node = sections["data"]
    given_mixture = file.mapping(data_node, "`data`").get("mixture")
    if given_mixture is not None:
        data["mixture"] = read_mixture(file, given_mixture)
    check_folders(file, data_node, data)
    evaluation: EvaluationRecipe | None = read_evaluation(file, sections, EvaluationRecipe)
    arguments_node = sections.get("arguments")
    arguments = {} if arguments_node is None else read_arguments(file, arguments_node)
    check_evaluation(file, sections, arguments, evaluation)
    model: ModelRecipe = read_section(file, sections, "model", ModelRecipe)
    trained: TrainingOptions = read_section(file, sections, "trained", TrainingOptions)
    if model.parts and trained.language_model == "lora":
        raise file.error(
            file.mapping(sections["model"], "`model`")["parts"],
            "`model.parts` are given for a training with LoRA, whose adapter would be folded into a model without "
            "them. Set `trained.language_model` to full or frozen, or save a model with these parts first.",
        )
    return Recipe(
        path=file.path,
        model=model,
        trained=trained,
        data=make(file, data_node, DataRecipe, data),
        schedule=read_section(file, sections, "schedule", ScheduleRecipe),
        evaluation=evaluation,
        arguments=arguments,
        content=file.value(file.root, "the recipe"),
        places={name: str(file.error(node, f"`{name}`")) for name, node in sections.items()},
    )
