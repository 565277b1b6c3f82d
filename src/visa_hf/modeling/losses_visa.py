"""Losses of VISA: next-token cross-entropy of the answer, binary cross-entropy and DICE of the masks.

Section 3.3 of https://huggingface.co/papers/2407.11325, constants as in LISA
(https://huggingface.co/papers/2308.00692). Each loss comes as a sum and a number, or as one value per mask, so that
the caller chooses what to average over: a micro-batch or a whole optimiser step. Weights are the caller's too.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

# Labels that are not learnt: the prompt, visual tokens, padding.
IGNORE_INDEX = -100
# LISA divides the sums in DICE by this before it adds `_DICE_EPS`.
_DICE_SCALE = 1000.0
_DICE_EPS = 1e-6


def text_loss_sum_and_count(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the cross-entropy of the learnt tokens, each predicted from the position before it.

    Args:
        logits (`torch.Tensor` of shape `(N, S, V)`, floating point): next-token logits of the expanded sequence.
        labels (`torch.Tensor` of shape `(N, S)`, int64): token ids, -100 where nothing is learnt. Not shifted.

    Returns:
        `(loss_sum, num_learnt)`: float32 and int64 tensors of shape `()`. Without a learnt token the sum is 0 and
        still differentiable.
    """
    next_labels = labels[:, 1:]
    is_learnt = next_labels != IGNORE_INDEX
    return token_loss_sum(logits[:, :-1][is_learnt], next_labels[is_learnt]), is_learnt.sum()


def token_loss_sum(logits: Tensor, tokens: Tensor) -> Tensor:
    """Sum the cross-entropy of the learnt tokens, given their own logits alone.

    Args:
        logits (`torch.Tensor` of shape `(K, V)`, floating point): of the position before each token.
        tokens (`torch.Tensor` of shape `(K,)`, int64): what is learnt.

    Returns:
        `torch.Tensor` of shape `()`, float32; 0 without a token, and still differentiable.
    """
    # Only what is learnt is upcast: an answer is short, its prompt holds a thousand visual tokens.
    return F.cross_entropy(logits.float(), tokens, reduction="sum")


def mask_bce_loss(mask_logits: Sequence[Tensor], mask_labels: Sequence[Tensor]) -> Tensor:
    """Binary cross-entropy of each mask, averaged over its own pixels.

    Args:
        mask_logits (list of `torch.Tensor` of shape `(K_n, H_n, W_n)`): logits at the frame's own size. Sizes may
            differ and K_n may be 0.
        mask_labels (list of `torch.Tensor` of the same shapes, values 0 and 1, any dtype): the true masks.

    Returns:
        `torch.Tensor` of shape `(sum of K_n,)`, float32: one value per mask, in order. Empty, and still
        differentiable, when there is no mask.
    """
    losses = [
        F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(dim=(1, 2))
        for logits, labels in _stacks(mask_logits, mask_labels)
    ]
    return torch.cat(losses) if losses else torch.zeros(0)


def mask_dice_loss(mask_logits: Sequence[Tensor], mask_labels: Sequence[Tensor]) -> Tensor:
    """DICE loss of each mask: 1 - (2 sum(pt) / s + eps) / (sum(p) / s + sum(t) / s + eps), s = 1000, eps = 1e-6.

    Args:
        mask_logits (list of `torch.Tensor` of shape `(K_n, H_n, W_n)`): logits at the frame's own size. Sizes may
            differ and K_n may be 0.
        mask_labels (list of `torch.Tensor` of the same shapes, values 0 and 1, any dtype): the true masks.

    Returns:
        `torch.Tensor` of shape `(sum of K_n,)`, float32, in [0, 1]: one value per mask, in order. Empty, and still
        differentiable, when there is no mask.
    """
    losses = []
    for logits, labels in _stacks(mask_logits, mask_labels):
        mask_probs, masks = logits.float().sigmoid().flatten(1), labels.float().flatten(1)
        overlap = (mask_probs / _DICE_SCALE * masks).sum(dim=1)
        area = (mask_probs / _DICE_SCALE).sum(dim=1) + (masks / _DICE_SCALE).sum(dim=1)
        losses.append(1 - (2 * overlap + _DICE_EPS) / (area + _DICE_EPS))
    return torch.cat(losses) if losses else torch.zeros(0)


def _stacks(mask_logits: Sequence[Tensor], mask_labels: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and labels of neighbours of one size together, in order."""
    pairs = zip(mask_logits, mask_labels, strict=True)
    for _, group in groupby(pairs, key=lambda pair: (pair[0].shape[1:], pair[1].shape[1:])):
        logits, labels = zip(*group, strict=True)
        yield torch.cat(logits), torch.cat(labels)


def mean_loss(loss_sum: Tensor, count: Tensor | int) -> Tensor:
    """Divide a sum of losses by how many there are; 0 of them give 0, not NaN.

    Args:
        loss_sum (`torch.Tensor` of shape `()`): sum over the items of this micro-batch.
        count (`int` or `torch.Tensor` of shape `()`): items of the micro-batch, or of the whole optimiser step.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    return loss_sum / torch.as_tensor(count, device=loss_sum.device).clamp(min=1)
