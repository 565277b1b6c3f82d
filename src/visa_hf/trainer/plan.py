"""What a training will be, before anything is loaded: parameters by part, memory, steps, samples by source.

The model is built on the meta device, so a plan for 13 billion parameters takes seconds and no memory. The memory is
an estimate from sizes (ZeRO, https://huggingface.co/papers/1910.02054, section 3), not a measurement.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from visa_hf.modeling.configuration_visa import VisaConfig
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.trainer.lora import plain_name, prepare_for_training
from visa_hf.trainer.recipe import Recipe
from visa_hf.trainer.recipe_sections import BUNDLED_DEEPSPEED

_GIB = 2**30
# Beginning of a parameter's name -> part; the first that fits counts.
_PARTS = {
    "model.vision_tower": "visual tower (CLIP)",
    "model.mm_projector": "projector",
    "model.language_model.embed_tokens": "embeddings and head",
    "lm_head": "embeddings and head",
    "model.language_model": "language model",
    "model.text_hidden_fcs": "text_hidden_fcs",
    "model.sam.mask_decoder": "SAM mask decoder",
    "model.sam": "SAM encoders",
    "model.shared_image_embedding": "SAM encoders",
    "tracker": "tracker (XMem)",
}
# Adam in mixed precision: gradient, float32 copy, two moments; bytes of one trained parameter.
_GRADIENT_BYTES, _OPTIMIZER_BYTES = 4, 8
# Frames of a long sample: 12 references and the target; and the words around them.
_FRAMES, _WORDS = 13, 200


@dataclass(frozen=True)
class TrainingPlan:
    """Numbers of a training.

    Attributes:
        parameters (`dict[str, tuple[int, int]]`): of each part, all and trained ones.
        memory (`dict[str, float]`): bytes on each device, estimated, by what they hold.
        num_steps, world_size, per_device_batch_size, accumulation_steps, global_batch_size (`int`).
        num_draws (`int`): samples of the whole training.
        samples (`dict[str, float]`): expected samples from each source.
    """

    parameters: dict[str, tuple[int, int]]
    memory: dict[str, float]
    num_steps: int
    world_size: int
    per_device_batch_size: int
    accumulation_steps: int
    global_batch_size: int
    num_draws: int
    samples: dict[str, float]

    def __str__(self) -> str:
        width = max(map(len, [*self.parameters, *self.samples, *self.memory]))
        total, trained = (sum(counts) for counts in zip(*self.parameters.values(), strict=True))
        lines = [f"{'part':<{width}} {'parameters':>15} {'trained':>13}"]
        lines += [f"{part:<{width}} {counts[0]:>15,} {counts[1]:>13,}" for part, counts in self.parameters.items()]
        lines += [f"{'all':<{width}} {total:>15,} {trained:>13,}  ({trained / total:.2%})", ""]
        lines += [
            f"steps: {self.num_steps:,} of {self.global_batch_size} samples = {self.world_size} processes x "
            f"{self.per_device_batch_size} samples x {self.accumulation_steps} micro-batches; "
            f"{self.num_draws:,} samples in all",
            "",
            f"{'source':<{width}} {'samples':>15} {'share':>13}",
        ]
        lines += [
            f"{name:<{width}} {count:>15,.0f} {count / self.num_draws:>13.2%}" for name, count in self.samples.items()
        ]
        lines += ["", "memory of each device, estimated from sizes:"]
        lines += [f"{name:<{width}} {size / _GIB:>11.2f} GiB" for name, size in self.memory.items()]
        lines += [f"{'all':<{width}} {sum(self.memory.values()) / _GIB:>11.2f} GiB"]
        return "\n".join(lines)


def make_plan(recipe: Recipe, config: VisaConfig, world_size: int = 1) -> TrainingPlan:
    """Work out what a recipe comes to.

    Args:
        recipe ([`Recipe`]): as read.
        config ([`VisaConfig`]): of the model, see `model_config` in run.py.
        world_size (`int`, defaults to 1): processes.

    Raises:
        ValueError: the batch cannot be cut for so many processes, or the options do not fit the model.
    """
    accumulation = recipe.accumulation_steps(world_size)
    with torch.device("meta"):
        model = VisaForVideoSegmentation(config)
    # On the meta device nothing is in 4 bits.
    prepared = prepare_for_training(model, replace(recipe.trained, is_4bit=False))
    parameters: dict[str, tuple[int, int]] = dict.fromkeys(dict.fromkeys(_PARTS.values()), (0, 0))
    num_copied = 0
    for name, parameter in prepared.named_parameters():
        part = _part_of(plain_name(name))
        # PEFT keeps the frozen original beside a module that is trained; it counts in memory, not as a parameter.
        if ".original_module." in name:
            num_copied += parameter.numel()
            continue
        everything, trained = parameters.get(part, (0, 0))
        count = parameter.numel()
        parameters[part] = everything + count, trained + count * parameter.requires_grad
    mixture = recipe.data.mixture
    at_hand = mixture.with_folders(recipe.data.folders)
    samples = mixture.counts(recipe.schedule.num_draws, at_hand, renormalise=recipe.data.renormalise)
    per_device = recipe.arguments.get("per_device_train_batch_size", 8)
    return TrainingPlan(
        parameters={part: counts for part, counts in parameters.items() if counts[0]},
        memory=_memory(recipe, config, parameters, num_copied, world_size, per_device),
        num_steps=recipe.schedule.num_steps,
        world_size=world_size,
        per_device_batch_size=per_device,
        accumulation_steps=accumulation,
        global_batch_size=recipe.schedule.global_batch_size,
        num_draws=recipe.schedule.num_draws,
        samples=samples,
    )


def _part_of(name: str) -> str:
    return next((part for beginning, part in _PARTS.items() if name.startswith(beginning)), "other")


def _memory(
    recipe: Recipe,
    config: VisaConfig,
    parameters: Mapping[str, tuple[int, int]],
    num_copied: int,
    world_size: int,
    per_device: int,
) -> dict[str, float]:
    """Estimate the bytes on each device; `num_copied` parameters are there once more, frozen."""
    stage = _zero_stage(recipe)
    is_half = recipe.model.dtype == "bfloat16"
    total, trained = (sum(counts) for counts in zip(*parameters.values(), strict=True))
    total += num_copied
    frozen_bytes = 2 if is_half else 4
    if recipe.trained.is_4bit:
        language = parameters["language model"][0]
        weights = language * 0.56 + (total - language - trained) * frozen_bytes
    else:
        weights = float((total - trained) * frozen_bytes)
    # DeepSpeed keeps the trained weights in half precision beside the float32 copies of the optimiser.
    weights += trained * (2 if stage and is_half else 4)
    optimizer = float(trained * (_OPTIMIZER_BYTES + (4 if stage and is_half else 0)))
    gradients = float(trained * _GRADIENT_BYTES)
    if stage >= 2:
        gradients, optimizer = gradients / world_size, optimizer / world_size
    if stage == 3:
        weights /= world_size
    return {
        "weights": weights,
        "gradients": gradients,
        "optimiser": optimizer,
        "activations": _activations(recipe, config, per_device),
    }


def _zero_stage(recipe: Recipe) -> int:
    """Return the stage of DeepSpeed's ZeRO, 0 without it."""
    given = recipe.arguments.get("deepspeed")
    if given in BUNDLED_DEEPSPEED:
        return int(given[-1])
    if isinstance(given, str):
        given = json.loads(Path(given).read_text(encoding="utf-8"))
    return int((given or {}).get("zero_optimization", {}).get("stage", 0))


def _activations(recipe: Recipe, config: VisaConfig, per_device: int) -> float:
    """Estimate the bytes of activations that one micro-batch keeps for the backward pass."""
    text = config.text_config
    tokens = per_device * 3 * (_FRAMES * config.num_visual_tokens + _WORDS)  # up to three expressions a sample
    value = 2 if recipe.arguments.get("bf16") else 4
    layer = tokens * (34 * text.hidden_size + 3 * text.intermediate_size) * value / 2  # as in arXiv 2205.05198
    if recipe.arguments.get("activation_checkpointing") or recipe.arguments.get("gradient_checkpointing"):
        layers = text.num_hidden_layers * tokens * text.hidden_size * value + layer
    else:
        layers = text.num_hidden_layers * layer
    logits = tokens * text.vocab_size * 4 * 2  # float32, and their gradient
    return float(layers + logits)
