"""Batches that make all processes of a training run the same modules in the same order.

ZeRO-3 keeps a part of each weight in each process and fetches it whole when a module runs, all processes together. A
process without a frame or a [SEG] would not run SAM or the visual tower, and the others would wait for it for ever.
Such batches are filled up with blank conversations, which take part in no loss. Backward it does the same for every
output that a gradient comes from, so the loss is the only one. Any training of these towers needs the same, so that
their weights always have a gradient. Otherwise the model's own idle loss gives one to all that is trained.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visa_hf.modeling.losses_visa import mask_bce_loss, mask_dice_loss, mean_loss, text_loss_sum_and_count
from visa_hf.modeling.outputs_visa import VisaOutput
from visa_hf.modeling.processing_visa import VisaProcessor


@dataclass(frozen=True)
class LockstepForward:
    """Stands for the model's `forward` and takes `num_targets` besides its arguments.

    Args:
        forward (callable): the model's own.
        processor ([`VisaProcessor`]): of the model.
        weights (`tuple[float, ...]`): of the text, BCE and DICE loss.
    """

    forward: Callable[..., VisaOutput]
    processor: VisaProcessor
    weights: tuple[float, ...]

    def __call__(self, *, num_targets: int | None = None, **arguments: Any) -> VisaOutput:
        """Run the model so that SAM runs `num_targets` times; without that number, as ever."""
        if num_targets is None:
            return self.forward(**arguments)
        labels, mask_labels = arguments.pop("labels"), arguments.pop("mask_labels")
        counts = arguments.pop("num_items_in_batch", None), arguments.pop("num_masks_in_batch", None)
        outputs = self.forward(**pad_targets(arguments, num_targets, self.processor))
        return step_losses(outputs, labels, mask_labels, self.weights, *counts)


def targets_of(batch: dict[str, Any], seg_token_id: int) -> int:
    """Number of videos of a batch of which a mask is asked for: SAM runs once for each."""
    has_seg = (batch["input_ids"] == seg_token_id).any(dim=1)
    return len(set(batch["conversation_to_video"][has_seg].tolist()))


def pad_targets(inputs: dict[str, Any], num_targets: int, processor: VisaProcessor) -> dict[str, Any]:
    """Add blank videos, each with a conversation of one [SEG], until there are `num_targets` with a [SEG].

    Args:
        inputs (`dict`): arguments of the model without `labels` and `mask_labels`, right-padded. Others stay.
        num_targets (`int`): how many there shall be, at least as many as there are.
        processor ([`VisaProcessor`]): knows the tokens.

    Returns:
        `dict` of the same tensors with rows added at the end; texts may have become longer.
    """
    num_blank = num_targets - targets_of(inputs, processor.seg_token_id)
    if num_blank <= 0:
        return inputs
    device, num_videos = inputs["input_ids"].device, len(inputs["num_frames"])
    visual = [processor.image_token_id] * processor.num_visual_tokens
    blank = torch.tensor([[*visual, processor.seg_token_id]] * num_blank, device=device)
    ones = torch.ones(num_blank, dtype=torch.int64, device=device)
    return {
        **inputs,
        "input_ids": _stack_rows(inputs["input_ids"], blank, processor.tokenizer.pad_token_id),
        "attention_mask": _stack_rows(inputs["attention_mask"], torch.ones_like(blank), 0),
        "pixel_values": _add_rows(inputs["pixel_values"], num_blank, 0),
        "num_frames": torch.cat([inputs["num_frames"], ones]),
        "conversation_to_video": torch.cat([inputs["conversation_to_video"], ones.cumsum(0) - 1 + num_videos]),
        "sam_pixel_values": _add_rows(inputs["sam_pixel_values"], num_blank, 0),
        "original_sizes": _add_rows(inputs["original_sizes"], num_blank, 1),
        "reshaped_input_sizes": _add_rows(inputs["reshaped_input_sizes"], num_blank, 1),
    }


def step_losses(
    outputs: VisaOutput,
    labels: Tensor,
    mask_labels: Sequence[Tensor],
    weights: Sequence[float],
    num_tokens: Tensor | int | None,
    num_masks: Tensor | int | None,
) -> VisaOutput:
    """Compute the model's losses of the first conversations of `outputs`, those that have labels.

    The others are blank: they add 0, with gradients. Nothing but the loss has any.

    Args:
        outputs ([`VisaOutput`]): of the padded inputs.
        labels (`torch.Tensor` of shape `(N, S)`), mask_labels (list of N): of the inputs before padding.
        weights: of text, BCE and DICE.
        num_tokens, num_masks (`int`): what sums are divided by; their own numbers with `None`.
    """
    num_conversations, length = labels.shape
    mask_logits = outputs.mask_logits or []
    logits = outputs.logits[:num_conversations, :length]  # type: ignore[index]
    text_sum, num_learnt = text_loss_sum_and_count(logits, labels)
    text = mean_loss(text_sum, num_learnt if num_tokens is None else num_tokens)
    real, blank = mask_logits[:num_conversations], mask_logits[num_conversations:]
    pairs = [(ours, true) for ours, true in zip(real, mask_labels, strict=True) if len(true)]
    bce = dice = text.new_zeros(())
    if pairs:
        ours, true = zip(*pairs, strict=True)
        values = mask_bce_loss(ours, true), mask_dice_loss(ours, true)
        count = len(values[0]) if num_masks is None else num_masks
        bce, dice = (mean_loss(value.sum(), count) for value in values)
    loss = sum(weight * part for weight, part in zip(weights, (text, bce, dice), strict=True))
    idle = sum((0.0 * masks.sum() for masks in blank), start=text.new_zeros(()))
    return VisaOutput(
        loss=loss + idle,  # type: ignore[arg-type]
        text_loss=text.detach(),  # type: ignore[arg-type]
        bce_loss=bce.detach(),  # type: ignore[arg-type]
        dice_loss=dice.detach(),  # type: ignore[arg-type]
        logits=logits.detach(),  # type: ignore[arg-type]
        mask_logits=[masks.detach() for masks in real],  # type: ignore[misc]
    )


def _add_rows(tensor: Tensor, num_rows: int, value: int) -> Tensor:
    return torch.cat([tensor, tensor.new_full((num_rows, *tensor.shape[1:]), value)])


def _stack_rows(rows: Tensor, others: Tensor, padding: int) -> Tensor:
    """Put rows of two lengths, both int64, below each other, padded on the right."""
    length = max(rows.shape[1], others.shape[1])
    return torch.cat([F.pad(one, (0, length - one.shape[1]), value=padding) for one in (rows, others)])
