"""Scores of predicted masks: the measures themselves, and the folder of the `evaluate` module.

Knows neither model nor trainer, and imports neither `evaluate` nor `datasets`.
"""

from pathlib import Path

from .metrics import (
    ClipScore,
    GroupScore,
    ImageSetScore,
    RevosSummary,
    average_scores,
    boundary_f,
    intersection_and_union,
    pixel_accuracy,
    region_similarity,
    robustness,
    score_clip,
    score_image_set,
    sum_objects,
    summarize_revos,
    unite_objects,
)

REVOS_METRIC = str(Path(__file__).parent / "revos_metric")
"""Folder to give to `evaluate.load`."""

__all__ = [
    "REVOS_METRIC",
    "ClipScore",
    "GroupScore",
    "ImageSetScore",
    "RevosSummary",
    "average_scores",
    "boundary_f",
    "intersection_and_union",
    "pixel_accuracy",
    "region_similarity",
    "robustness",
    "score_clip",
    "score_image_set",
    "sum_objects",
    "summarize_revos",
    "unite_objects",
]
