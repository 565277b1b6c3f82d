"""Doing what a recipe of a tracker says, telling it beforehand, and putting a trained tracker into a VISA."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, set_seed

from visa_hf.datasets_scripts.mixture import TrainingSamples
from visa_hf.datasets_scripts.training_sources import load_sources
from visa_hf.modeling.configuration_visa import VisaConfig, XMemConfig
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.modeling_xmem import XMemModel
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.trainer.checkpoints import find_last_checkpoint, merge_adapter
from visa_hf.trainer.recipe import RANDOM
from visa_hf.trainer.run import at_place, claim_folder, draws_of, loading_options, require_weights, save_final
from visa_hf.trainer.tracker_recipe import TrackerRecipe
from visa_hf.trainer.tracker_samples import ClipSource, clip_sources
from visa_hf.trainer.tracker_trainer import TrackedVideos, XMemTrainer
from visa_hf.trainer.training_arguments import VisaTrainingArguments

_TRACKER_TYPE = XMemConfig.model_type
_PARTS = {"key_encoder": "key encoder", "value_encoder": "value encoder", "decoder": "decoder"}


@dataclass(frozen=True)
class TrackerPlan:
    """Numbers of a training.

    Attributes:
        parameters (`dict[str, int]`): of each part; all are trained.
        recipe ([`TrackerRecipe`]): where the other numbers are from.
        world_size, accumulation_steps (`int`): processes, and micro-batches of each in a step.
        samples (`dict[str, float]`): expected clips from each source.
    """

    parameters: dict[str, int]
    recipe: TrackerRecipe
    world_size: int
    accumulation_steps: int
    samples: dict[str, float]

    def __str__(self) -> str:
        schedule, clips = self.recipe.schedule, self.recipe.clips
        per_device = schedule.global_batch_size // self.world_size // self.accumulation_steps
        width = max(map(len, [*self.parameters, *self.samples]))
        lines = [f"{'part':<{width}} {'parameters':>15}"]
        lines += [f"{part:<{width}} {count:>15,}" for part, count in self.parameters.items()]
        lines += [
            f"{'all':<{width}} {sum(self.parameters.values()):>15,}",
            "",
            f"steps: {schedule.num_steps:,} of {schedule.global_batch_size} clips = {self.world_size} processes x "
            f"{per_device} clips x {self.accumulation_steps} micro-batches; {schedule.num_draws:,} clips in all",
            f"clips: {clips.num_frames_at(0)} to {clips.num_frames} frames of {clips.size} x {clips.size} pixels, at "
            f"most {clips.max_gap_at(0)} to {clips.max_gap} apart, with up to {clips.max_objects} objects",
            "",
            f"{'source':<{width}} {'clips':>15} {'share':>13}",
        ]
        lines += [
            f"{name:<{width}} {count:>15,.0f} {count / schedule.num_draws:>13.2%}"
            for name, count in self.samples.items()
        ]
        return "\n".join(lines)


def tracker_config(recipe: TrackerRecipe) -> XMemConfig:
    """Return the configuration of the tracker that a recipe trains, without loading its weights.

    Raises:
        ValueError: `model.options` do not fit it, or the checkpoint is of something else.
        OSError: there is no such checkpoint.
    """
    model = recipe.model
    place = recipe.place("model")
    try:
        if model.weights in (None, RANDOM):
            return XMemConfig.tiny(**model.options) if model.preset == "tiny" else XMemConfig(**model.options)
        config: Any = AutoConfig.from_pretrained(str(model.weights))
        if config.model_type == VisaConfig.model_type:
            if config.tracker_config is None:
                raise ValueError(f"The VISA `{model.weights}` has no tracker. Begin with one, or from nothing.")
            config = config.tracker_config
        if config.model_type != _TRACKER_TYPE:
            raise ValueError(f"`{model.weights}` is a {config.model_type!r}; an XMem or a VISA with one is needed.")
        return XMemConfig(**{**config.to_dict(), **model.options})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}") from error


def make_tracker_plan(recipe: TrackerRecipe, world_size: int = 1) -> TrackerPlan:
    """Work out what a recipe comes to.

    Raises:
        ValueError: the batch cannot be cut for so many processes, or the options do not fit the tracker.
    """
    accumulation = recipe.accumulation_steps(world_size)
    with torch.device("meta"):
        model = XMemModel(tracker_config(recipe))
    parameters = dict.fromkeys(_PARTS.values(), 0)
    for name, parameter in model.named_parameters():
        parameters[_PARTS[name.partition(".")[0]]] += parameter.numel()
    data = recipe.data
    at_hand = data.mixture.with_folders(data.folders)
    samples = data.mixture.counts(recipe.schedule.num_draws, at_hand, renormalise=data.renormalise)
    return TrackerPlan(parameters, recipe, world_size, accumulation, samples)


def run_tracker_recipe(recipe: TrackerRecipe, output_dir: str | os.PathLike[str]) -> Path:
    """Train. A training that was stopped goes on where its newest whole checkpoint is, if its recipe is the same.

    Args:
        recipe ([`TrackerRecipe`]): as read.
        output_dir (path): folder of checkpoints and logs; the result is in `final` inside.

    Returns:
        `Path`: the folder of the result, for `XMemModel.from_pretrained`.

    Raises:
        ValueError: the recipe has no weights, does not fit the number of processes, or another training is in
            `output_dir`.
        AnnotationError: data cannot be used.
    """
    output = Path(output_dir)
    require_weights(recipe, recipe.model.weights)
    arguments = recipe.training_arguments(output, int(os.environ.get("WORLD_SIZE", "1")))
    config = tracker_config(recipe)
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="preparing the folder"):
        if arguments.process_index == 0:
            claim_folder(output, recipe)
    with arguments.main_process_first(desc="preparing data"):
        train_set, eval_set = _samples(recipe, arguments)
    trainer = XMemTrainer(_model(recipe, config, arguments.seed), arguments, recipe.losses, train_set, eval_set)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(output))
    return save_final(trainer, output)


def replace_tracker(
    folder: str | os.PathLike[str],
    tracker: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put a tracker into a VISA, in the place of the one that it had, and save a folder for `from_pretrained`.

    Args:
        folder (path): a whole VISA with its processor, or the adapter of a training, which is folded in first.
        tracker (path): an `XMemModel`, such as the `final` of a tracker's training.
        output (path): folder to make; it appears when it is complete.
        base, dtype: as of [`merge_adapter`]; `base` is for an adapter only.

    Raises:
        FileNotFoundError: `tracker` is not the folder of a tracker, or the adapter's base is not where it was.
        ValueError: `output` is there and not empty, or `base` is given for a whole model.
    """
    folder, output, tracker = Path(folder), Path(output), Path(tracker)
    if not (tracker / "config.json").is_file() or AutoConfig.from_pretrained(tracker).model_type != _TRACKER_TYPE:
        raise FileNotFoundError(f"`{tracker}` holds no tracker. Give the folder `final` of a tracker's training.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`{output}` exists already and is not empty. Give another folder, or remove it.")
    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        if (folder / "adapter_config.json").is_file():
            whole = temporary / "whole"
            merge_adapter(folder, whole, base=base, dtype=dtype)
        elif base is not None:
            raise ValueError(f"A base is given, but `{folder}` holds no adapter. Leave the base out.")
        else:
            whole = folder
        model = VisaForVideoSegmentation.from_pretrained(whole, dtype="auto" if dtype is None else dtype)
        new: Any = XMemModel.from_pretrained(tracker, dtype=model.dtype)
        model.tracker, model.config.tracker_config = new, new.config
        model.save_pretrained(temporary / "made")
        VisaProcessor.from_pretrained(whole).save_pretrained(temporary / "made")
        if output.exists():
            output.rmdir()
        (temporary / "made").rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _samples(recipe: TrackerRecipe, arguments: VisaTrainingArguments) -> tuple[TrainingSamples, TrackedVideos | None]:
    """Prepare the data sets; return the draws of the training and the videos of the evaluation."""
    data = recipe.data
    options = loading_options(data)
    with at_place(recipe.place("data")):
        loaded = load_sources(data.mixture, data.folders, renormalise=data.renormalise, **options)
        sources = clip_sources(loaded, recipe.clips, recipe.schedule.num_draws)
    train_set = draws_of(data, recipe.schedule, sources, arguments)
    evaluation = recipe.evaluation
    if evaluation is None:
        return train_set, None
    with at_place(recipe.place("evaluation")):
        made = clip_sources(load_sources(evaluation.mixture(), **options), recipe.clips)
    source: ClipSource = made[evaluation.dataset]
    numbers = np.random.default_rng(evaluation.seed).permutation(len(source))[: evaluation.num_videos]
    return train_set, TrackedVideos(source, [int(number) for number in numbers])


def _model(recipe: TrackerRecipe, config: XMemConfig, seed: int) -> XMemModel:
    """Load the tracker to begin with, in float32, or make one of random weights."""
    weights = str(recipe.model.weights)
    if weights != RANDOM:
        # Of a whole VISA, `base_model_prefix` finds the tracker's part.
        return XMemModel.from_pretrained(weights, config=config, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return XMemModel(config)
