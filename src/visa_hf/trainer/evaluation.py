"""Masks measured during a training: J, F, A and R of target frames, the true answers given.

The measures are those of `visa_hf.evaluation.metrics`. Every mask's figures are kept, never a mask, and sums of them
are exact before they are rounded: neither the order of the batches nor the number of processes shows in any digit.
Whole clips, answered by the model itself, are measured in clip_evaluation.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from visa_hf.datasets_scripts.samples import Sample
from visa_hf.evaluation.metrics import ClipScore, GroupScore, average_scores, score_clip
from visa_hf.evaluation.tables import TYPE_NAMES

FIGURES = ("J", "F", "JF", "A", "R")


@dataclass(frozen=True)
class Facts:
    """What is known of a conversation beside what the model is given.

    Args:
        type_id (`int`, *optional*): 0 referring, 1 reasoning, 2 no such object.
        foreground (`np.ndarray` of shape `(H, W)`, uint8, *optional*): all objects of the target frame together.
    """

    type_id: int | None
    foreground: np.ndarray | None


@dataclass(frozen=True)
class MaskScore:
    """What one mask scored: J, F, A, R in [0, 1], R being `None` without a foreground; and the type, if known."""

    type_id: int | None
    score: ClipScore


def facts_of(samples: Sequence[Sample]) -> list[Facts]:
    """Return the facts of all conversations of a batch, in the order of the batch."""
    return [Facts(each.type_id, sample.foreground) for sample in samples for each in sample.conversations]


def score_masks(
    mask_logits: Sequence[Tensor], mask_labels: Sequence[Tensor], facts: Sequence[Facts]
) -> list[MaskScore]:
    """Score the masks of N conversations.

    Args:
        mask_logits, mask_labels (lists of N `torch.Tensor` of shape `(K_n, H, W)`): found, above 0, and true.
        facts (list of N [`Facts`]): of the conversations.
    """
    scores = []
    for logits, labels, known in zip(mask_logits, mask_labels, facts, strict=True):
        if len(labels) == 0:
            continue
        masks, true_masks = (logits > 0).cpu().numpy(), (labels > 0).cpu().numpy()
        foreground = None
        if known.foreground is not None:
            foreground = np.broadcast_to(known.foreground, masks.shape)
        # As if they were frames of a clip: one pass over each.
        figures = score_clip(masks, true_masks, foreground).per_frame
        for row in zip(*(figures[letter].tolist() for letter in figures), strict=True):
            scores.append(MaskScore(known.type_id, ClipScore(**dict(zip(figures, row, strict=True)))))
    return scores


def mask_metrics(scores: Sequence[MaskScore]) -> dict[str, float]:
    """Put the scores of all masks together; every mask counts the same.

    Returns:
        `dict` of means in [0, 1]: `J`, `F`, `JF`, `A` over all masks, and with a name before them over those of one
        type: `referring_J`, `reasoning_J`, `no_object_J`, ...; `overall_J`, ... is the mean of referring and
        reasoning, if both are there. `R`, ... are there if all masks have a foreground. Nothing is rounded. Empty
        without a mask.
    """
    if any(each.score.R is None for each in scores):  # reported for all or for none
        scores = [replace(each, score=replace(each.score, R=None)) for each in scores]
    if not scores:
        return {}
    metrics = _figures(average_scores((each.score for each in scores), decimals=None))
    rows = {}
    for type_id, name in TYPE_NAMES.items():
        group = [each.score for each in scores if each.type_id == type_id]
        if group:
            rows[name] = _figures(average_scores(group, decimals=None))
    halves = [rows[name] for name in (TYPE_NAMES[0], TYPE_NAMES[1]) if name in rows]
    if len(halves) == 2:
        rows["overall"] = {figure: (halves[0][figure] + halves[1][figure]) / 2 for figure in halves[0]}
    for name, figures in rows.items():
        metrics |= {metric_name(name, figure): value for figure, value in figures.items()}
    return metrics


def possible_metrics() -> set[str]:
    """Return all names that `mask_metrics` may give."""
    rows = [*TYPE_NAMES.values(), "overall"]
    return {*FIGURES, *(metric_name(row, figure) for row in rows for figure in FIGURES)}


def metric_name(row: str, figure: str) -> str:
    """Return the name of a figure of a table's row among the metrics of a training."""
    return f"{row}_{figure}".replace("-", "_").replace(" ", "_").replace("&", "")


def _figures(group: GroupScore) -> dict[str, float]:
    """Means in [0, 1]."""
    values = (getattr(group, figure) for figure in FIGURES)
    return {figure: value / 100 for figure, value in zip(FIGURES, values, strict=True) if value is not None}


class Shard(Dataset):
    """Every `world_size`-th sample from `rank` on; where a process would have one less, its last place is no sample.

    Items are `(sample, is_counted)`.
    """

    def __init__(self, samples: Any, rank: int, world_size: int) -> None:
        self.samples, self.rank, self.world_size = samples, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.world_size)

    def __getitem__(self, position: int) -> tuple[Any, bool]:
        number = self.rank + position * self.world_size
        is_counted = number < len(self.samples)
        return self.samples[number if is_counted else 0], is_counted


class ShardCollator:
    """Makes a batch of the samples that count, and their facts; or of one that does not, and `None`."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, items: Sequence[tuple[Any, bool]]) -> tuple[dict[str, Any], list[Facts] | None]:
        """Make the batch."""
        counted = [sample for sample, is_counted in items if is_counted]
        return self.collator(counted or [items[0][0]]), facts_of(counted) if counted else None
