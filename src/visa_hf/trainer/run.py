"""Doing what a recipe says: sources, model, trainer, and the finished folder. `visa train` is a thin door to this.

The order matters: arguments before the model (DeepSpeed's ZeRO-3 wants to know of it when weights are loaded), data
before the model (bad data should cost no minutes of loading).
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Trainer, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from visa_hf.datasets_scripts.mixture import TrainingSamples
from visa_hf.datasets_scripts.training_sources import load_sources
from visa_hf.evaluation.benchmarks import open_benchmark
from visa_hf.modeling.configuration_visa import VisaConfig
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.trainer.checkpoints import find_last_checkpoint
from visa_hf.trainer.clip_evaluation import ClipEvaluation, check_weights_are_whole
from visa_hf.trainer.lora import TOWERS, prepare_for_training, quantization_config
from visa_hf.trainer.recipe import RANDOM, CommonRecipe, DataRecipe, Recipe, ScheduleRecipe
from visa_hf.trainer.training_arguments import VisaTrainingArguments
from visa_hf.trainer.visa_trainer import VisaTrainer
from visa_hf.trainer.visual_words_trainer import VisualWordsTrainer

logger = logging.getLogger(__name__)

_TOKENIZER = Path(__file__).parents[1] / "assets" / "tokenizer_synthetic"
# What `run_recipe` writes beside checkpoints.
RECIPE_FILE, BASE_FOLDER, FINAL_FOLDER = "recipe.yaml", "base", "final"
# What may be another when a training is continued: it changes neither samples nor steps.
_MAY_DIFFER = (
    "data.cache_dir",
    "data.folders",
    "data.num_proc",
    "arguments.dataloader_",
    "arguments.disable_tqdm",
    "arguments.logging_",
    "arguments.num_overlays",
    "arguments.report_to",
    "arguments.run_name",
    "arguments.save_",
    "arguments.use_cpu",
    "evaluation",
    "arguments.eval_",
    "arguments.per_device_eval_batch_size",
)
# Parts that `model.attn_implementation` is for; the tracker has one of its own.
_ATTENTION_PARTS = ("", "vision_config", "text_config", "sam_config")


def model_config(recipe: Recipe) -> VisaConfig:
    """Return the configuration of the model that a recipe trains, without loading its weights.

    Raises:
        ValueError: `model.options` do not fit it, or its folder holds an adapter only.
        OSError: there is no such checkpoint.
    """
    model = recipe.model
    folder = Path(str(model.weights))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{recipe.place('model')}: `weights` is `{folder}`, which holds an adapter only. Fold it into its model "
            f"first, and begin with that: `visa merge {folder} -o MERGED`."
        )
    try:
        if model.weights in (None, RANDOM):
            return getattr(VisaConfig, model.preset)(**model.options)
        return VisaConfig.from_pretrained(str(model.weights), **model.options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{recipe.place('model')}: `options`: {error}") from error


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a training from nothing."""
    return PreTrainedTokenizerFast.from_pretrained(recipe.model.tokenizer or _TOKENIZER)


def run_recipe(recipe: Recipe, output_dir: str | os.PathLike[str]) -> Path:
    """Train.

    A training that was stopped goes on where its newest whole checkpoint is, if its recipe is the same.

    Args:
        recipe ([`Recipe`]): as read.
        output_dir (path): folder of checkpoints and logs; the result is in `final` inside.

    Returns:
        `Path`: the folder of the result: an adapter with its processor, or a whole model.

    Raises:
        ValueError: the recipe has no weights, does not fit the number of processes, or another training is in
            `output_dir`.
        AnnotationError: data cannot be used.
    """
    output = Path(output_dir)
    require_weights(recipe, recipe.model.weights)
    # 1) arguments
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = recipe.training_arguments(output, world_size)
    if recipe.evaluation is not None and recipe.evaluation.num_clips:
        with at_place(recipe.place("evaluation")):
            check_weights_are_whole()
    if recipe.model.parts and is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{recipe.place('model')}: `parts` are given under ZeRO-3, which splits weights before they can be "
            "replaced. Take ZeRO-2, or save a model with these parts first."
        )
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="preparing the folder"):
        if arguments.process_index == 0:
            claim_folder(output, recipe)
    # 2) data: prepared by the first process, found in the cache by the others
    with arguments.main_process_first(desc="preparing data"):
        train_set, eval_set = _samples(recipe, arguments)
        clips = _clips(recipe)
    # 3) model
    model, processor = _model(recipe, arguments, output)
    prepared = prepare_for_training(model, recipe.trained)
    # 4) training
    make_trainer = VisualWordsTrainer if arguments.objective == "visual_words" else VisaTrainer
    trainer = make_trainer(
        prepared, arguments, processor, train_dataset=train_set, eval_dataset=eval_set, clip_evaluation=clips
    )
    last = find_last_checkpoint(output)
    trainer.train(resume_from_checkpoint=last)
    return save_final(trainer, output)


def require_weights(recipe: CommonRecipe, weights: str | None) -> None:
    """Refuse a recipe that does not say what to begin with."""
    if weights is None:
        raise ValueError(
            f"{recipe.place('model')}: `weights` is missing. Give the checkpoint to begin with, such as `--override "
            f"model.weights=FOLDER`, or `model.weights={RANDOM}` to begin from nothing."
        )


def save_final(trainer: Trainer, output: Path) -> Path:
    """Save the result; its folder appears when it is complete."""
    final, temporary = output / FINAL_FOLDER, output / f".{FINAL_FOLDER}.tmp"
    if trainer.args.should_save:
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    return final


def claim_folder(output: Path, recipe: CommonRecipe) -> None:
    """Leave the recipe in the folder, or refuse the folder of another training."""
    kept = output / RECIPE_FILE
    text = yaml.safe_dump(recipe.content, sort_keys=False, allow_unicode=True)
    has_checkpoints = find_last_checkpoint(output) is not None
    if kept.is_file():
        earlier = yaml.safe_load(kept.read_text(encoding="utf-8"))
        different = sorted(_differences(earlier, yaml.safe_load(text)))
        if not different:
            return
        if has_checkpoints:
            raise ValueError(
                f"`{output}` holds a training with another recipe: {', '.join(f'`{name}`' for name in different[:5])} "
                "differs. Give another folder, or the same recipe to continue."
            )
        # It came to nothing: the corrected recipe begins again.
        shutil.rmtree(output / BASE_FOLDER, ignore_errors=True)
    elif has_checkpoints:
        raise ValueError(f"`{output}` holds checkpoints of a training without a recipe. Give another folder.")
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f"{RECIPE_FILE}.{os.getpid()}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(kept)


def _differences(one: Any, other: Any, name: str = "") -> set[str]:
    """Names of the values that differ between two recipes and may not."""
    if name.startswith(_MAY_DIFFER):
        return set()
    if isinstance(one, dict) and isinstance(other, dict):
        return {
            found
            for key in {*one, *other}
            for found in _differences(one.get(key), other.get(key), f"{name}.{key}" if name else str(key))
        }
    return set() if one == other else {name}


def loading_options(data: DataRecipe) -> dict[str, Any]:
    """Return how data sets are prepared, as `load_sources` takes it."""
    return {"cache_dir": data.cache_dir, "num_proc": data.num_proc, "on_error": data.on_error}


def draws_of(
    data: DataRecipe, schedule: ScheduleRecipe, sources: Mapping[str, Any], arguments: VisaTrainingArguments
) -> TrainingSamples:
    """Return all draws of a training from `sources`, by their names."""
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    return TrainingSamples(
        sources,
        data.mixture,
        seed,
        schedule.num_draws,
        on_error=data.on_error,
        renormalise=data.renormalise,
    )


def _samples(recipe: Recipe, arguments: VisaTrainingArguments) -> tuple[TrainingSamples, TrainingSamples | None]:
    """Prepare the data sets; return the draws of the training and those of the evaluation."""
    data = recipe.data
    options = loading_options(data)
    with at_place(recipe.place("data")):
        sources = load_sources(data.mixture, data.folders, renormalise=data.renormalise, **options)
    train_set = draws_of(recipe.data, recipe.schedule, sources, arguments)
    if recipe.evaluation is None:
        return train_set, None
    evaluation = recipe.evaluation
    mixture = evaluation.mixture()
    with at_place(recipe.place("evaluation")):
        sources = load_sources(mixture, with_foregrounds=True, **options)
    return train_set, TrainingSamples(sources, mixture, evaluation.seed, evaluation.num_samples)


def _clips(recipe: Recipe) -> ClipEvaluation | None:
    """Choose the whole clips of the evaluation, if there are to be any."""
    evaluation = recipe.evaluation
    if evaluation is None or not evaluation.num_clips:
        return None
    with at_place(recipe.place("evaluation")):
        folder = Path(evaluation.folder).expanduser()
        questions = open_benchmark(evaluation.dataset, folder, evaluation.split, cache_dir=recipe.data.cache_dir)
        return ClipEvaluation(questions, evaluation.num_clips, seed=evaluation.seed)


@contextmanager
def at_place(place: str) -> Iterator[None]:
    """Let the errors of a recipe's values begin with their place."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _model(
    recipe: Recipe, arguments: VisaTrainingArguments, output: Path
) -> tuple[VisaForVideoSegmentation, VisaProcessor]:
    """Load the checkpoint to begin with; for a training from nothing make it first, in `base`."""
    weights = str(recipe.model.weights)
    if weights == RANDOM:
        # Kept, because an adapter is of no use without the weights below it, and resuming wants the same ones.
        weights = str(output / BASE_FOLDER)
        with arguments.main_process_first(desc="making the model"):
            if arguments.process_index == 0 and not Path(weights).is_dir():
                with _without_deepspeed(arguments):
                    _make_base(recipe, Path(weights), arguments.seed)
    quantized = quantization_config(recipe.trained)
    placement: dict[str, Any] = {} if quantized is None else {"quantization_config": quantized}
    config = model_config(recipe) if recipe.model.weights != RANDOM else None
    model = VisaForVideoSegmentation.from_pretrained(
        weights,
        dtype=recipe.model.dtype,
        attn_implementation=dict.fromkeys(_ATTENTION_PARTS, recipe.model.attn_implementation),
        **({} if config is None else {"config": config}),
        **placement,
    )
    _take_parts(model, recipe)
    processor = VisaProcessor.from_pretrained(weights)
    # `model.options` may say into how many tokens frames are merged.
    processor.num_visual_tokens = model.config.num_visual_tokens
    return model, processor


def _take_parts(model: VisaForVideoSegmentation, recipe: Recipe) -> None:
    """Replace the weights of some parts by those of other models."""
    for part, folder in recipe.model.parts.items():
        other = VisaForVideoSegmentation.from_pretrained(folder, dtype=model.dtype)
        name = TOWERS[part]
        try:
            model.get_submodule(name).load_state_dict(other.get_submodule(name).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{recipe.place('model')}: `parts`: the `{part}` of `{folder}` is of another size or kind than the "
                f"model's: {error}"
            ) from error


@contextmanager
def _without_deepspeed(arguments: VisaTrainingArguments) -> Iterator[None]:
    """Let one process alone make a model: ZeRO-3 would split it among all."""
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if arguments.deepspeed:
            set_hf_deepspeed_config(arguments.hf_deepspeed_config)


def _make_base(recipe: Recipe, folder: Path, seed: int) -> None:
    """Save a model of random weights and its processor; the folder appears when it is complete."""
    config = model_config(recipe)
    processor = VisaProcessor.from_config(config, load_tokenizer(recipe))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisaForVideoSegmentation(config)
        _draw_weights(model)
    temporary = folder.with_name(f".{folder.name}.tmp")
    # What a killed run left.
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    temporary.rename(folder)


@torch.no_grad()
def _draw_weights(model: VisaForVideoSegmentation) -> None:
    """Draw the weights of a training from nothing so that every layer passes on as much as it gets.

    transformers draws SAM's image encoder at a ten-billionth, since it is always loaded, and the others for widths
    of thousands: a small model would wait long before its parts hear of each other. The tracker has a way of its own.
    """
    for module in model.model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.ConvTranspose2d):
            # Its kernels do not overlap, so an output hears of each input channel once.
            nn.init.normal_(module.weight, std=module.in_channels**-0.5)
    positions = model.model.vision_tower.get_submodule("embeddings").position_embedding.weight
    positions[1:] = _waves(*positions[1:].shape)


def _waves(num_patches: int, num_channels: int) -> torch.Tensor:
    """Sines and cosines of the row and the column of each patch, (patches, channels), half as large as patches.

    So that neighbours look alike from the first step on. What it gains was not measured by itself.
    """
    side = round(num_patches**0.5)
    frequencies = 1.5 * 100 ** (-torch.arange(num_channels // 4) / (num_channels // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    waves = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return 0.7 * F.pad(waves, (0, num_channels - waves.shape[1]))
