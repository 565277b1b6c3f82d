"""Scores of predictions on a benchmark: per expression, as a table, and how sure the table is.

The measures themselves are in `metrics`, the protocols in `benchmarks`. Videos are scored one by one, in this process
or in several, and only their scores are kept; sums are exact before they are rounded, so that neither the number of
processes nor the order of the videos shows in any digit.
"""

import csv
import io
import json
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .benchmarks import EvaluationSet, Expression
from .metrics import (
    ClipScore,
    Masks,
    intersection_and_union,
    score_clip,
    sum_objects,
    unite_objects,
    unite_packed_objects,
)
from .packed import PackedMask, count
from .predictions import Predictions, Problem, describe_problems, write_whole
from .tables import (
    CONFIDENCE,
    NUM_RESAMPLES,
    RESAMPLING_SEED,
    TYPE_NAMES,
    ExpressionScore,
    Table,
    confidence_intervals,
    make_table,
)

Missing = Literal["error", "zero"]

SCORES_JSON, SCORES_CSV = "scores.json", "scores.csv"

# True masks of one video that are kept for its other expressions; what is more than this is made again.
_MAX_KEPT_BYTES = 2**28


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of a whole split.

    Args:
        benchmark, split (`str`): what was evaluated.
        published_compat (`bool`): whether A and R are those of the released tool.
        scores (`list[ExpressionScore]`): one per expression, in the order of the set.
        problems (`list[Problem]`): what was counted as zero, or ignored.
        table (`dict[str, dict[str, float]]`): per row, figures in percent and `num_expressions`.
        intervals (`dict[str, dict[str, list[float]]]`): per row and figure the ends of the 95% confidence interval, in
            percent: videos are drawn with replacement, and the table is computed again, 1000 times.
        robustness (`float` or `None`): ReVOS' R, in percent: over the expressions of type 2.
    """

    benchmark: str
    split: str
    published_compat: bool
    scores: list[ExpressionScore] = field(repr=False)
    problems: list[Problem] = field(repr=False)
    table: Table
    intervals: dict[str, dict[str, list[float]]]
    robustness: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return everything but the single expressions, for scores.json."""
        return {
            "dataset": self.benchmark,
            "split": self.split,
            "published_compat": self.published_compat,
            "num_videos": len({score.expression.video for score in self.scores}),
            "num_expressions": len(self.scores),
            "scores": self.table,
            "robustness": self.robustness,
            "confidence_intervals": {
                "level": CONFIDENCE,
                "resampled": "videos",
                "resamples": NUM_RESAMPLES,
                "seed": RESAMPLING_SEED,
                "intervals": self.intervals,
            },
            "num_zeroed_expressions": sum(score.num_zeroed > 0 for score in self.scores),
            "problems": [str(problem) for problem in self.problems],
        }


def score_predictions(
    evaluation_set: EvaluationSet,
    predictions: Predictions,
    *,
    missing: Missing = "error",
    published_compat: bool = False,
    num_workers: int = 0,
    on_video: Callable[[str], None] | None = None,
) -> EvaluationResult:
    """Score predictions on a benchmark.

    Args:
        evaluation_set ([`EvaluationSet`]): expressions and true masks.
        predictions ([`Predictions`]): see `open_predictions`.
        missing (`str`): `"error"` refuses predictions that are incomplete or damaged; `"zero"` counts every frame
            whose prediction cannot be used as 0 in all measures, and ignores what was not asked for.
        published_compat (`bool`): A and R as the released tool computed them (`score_clip`), predictions as 0/255.
        num_workers (`int`): further processes to score in; 0 scores in this one. The figures are the same.
        on_video (`Callable[[str], None]`, *optional*): called with its name after each video.

    Returns:
        [`EvaluationResult`].

    Raises:
        ValueError: if predictions are missing or damaged and `missing` is `"error"`, if the set has no true masks, or
            if a true mask is damaged, or for `published_compat` on an image set.
    """
    if missing not in ("error", "zero"):
        raise ValueError(f'`missing` is {missing!r} but must be "error" or "zero".')
    if num_workers < 0:
        raise ValueError(f"`num_workers` is {num_workers} but must be 0 or more.")
    if not evaluation_set.has_masks:
        raise ValueError(
            f"The split `{evaluation_set.split}` of `{evaluation_set.benchmark.name}` has no public masks. Its server "
            "scores submission.zip; score a split with masks here."
        )
    if published_compat and evaluation_set.benchmark.is_image_set:
        raise ValueError("`published_compat` is about A and R of videos; image sets have cIoU and gIoU. Leave it out.")
    problems = predictions.check(evaluation_set)
    if problems and missing == "error":
        raise _refusal(problems)
    scores: list[ExpressionScore] = []
    for video, (video_scores, video_problems) in zip(
        evaluation_set.videos, _scored_videos(evaluation_set, predictions, published_compat, num_workers), strict=True
    ):
        scores += video_scores
        problems += video_problems
        if on_video is not None:
            on_video(video)
    problems = list(dict.fromkeys(problems))  # what a check by names finds missing is met again when it is read
    if problems and missing == "error":
        raise _refusal(problems)
    return make_result(evaluation_set, scores, problems, published_compat=published_compat)


def make_result(
    evaluation_set: EvaluationSet,
    scores: list[ExpressionScore],
    problems: Sequence[Problem] = (),
    *,
    published_compat: bool = False,
) -> EvaluationResult:
    """Put the scores of all expressions together to a table, the way the benchmark does."""
    benchmark = evaluation_set.benchmark
    if any(score.clip is not None and score.clip.R is None for score in scores):  # R is reported for all or for none
        scores = [_without_robustness(score) for score in scores]
    table, robustness = make_table(benchmark, scores, published_compat)
    return EvaluationResult(
        benchmark=benchmark.name,
        split=evaluation_set.split,
        published_compat=published_compat,
        scores=scores,
        problems=list(problems),
        table=table,
        intervals=confidence_intervals(benchmark, scores, table),
        robustness=robustness,
    )


def _without_robustness(score: ExpressionScore) -> ExpressionScore:
    return score if score.clip is None else replace(score, clip=replace(score.clip, R=None))


def write_scores(result: EvaluationResult, out: Path, details: dict[str, Any] | None = None) -> None:
    """Write `scores.json` and `scores.csv` (a row per expression, figures in [0, 1]) to the folder `out`.

    Args:
        result ([`EvaluationResult`]): the scores.
        out (`Path`): an existing folder; earlier files of these names are replaced.
        details (`dict`, *optional*): put before the scores, such as the name of the model.
    """
    is_image_set = any(score.counts is not None for score in result.scores)
    figures = ["IoU", "intersection", "union"] if is_image_set else ["J", "F", "J&F", "A", "R"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["video", "expression_id", "expression", "type", "num_frames", "object_share", *figures, "num_zeroed_frames"]
    )
    for score in result.scores:
        expression, clip = score.expression, score.clip
        if clip is not None:
            values = [clip.J, clip.F, clip.JF, clip.A, "" if clip.R is None else clip.R]
        else:
            values = [score.value, *(score.counts or ())]
        writer.writerow(
            [
                expression.video,
                expression.expression_id,
                expression.text,
                TYPE_NAMES[expression.type_id],
                len(expression.frames),
                score.object_share,
                *values,
                score.num_zeroed,
            ]
        )
    write_whole(out / SCORES_CSV, text.getvalue())
    summary = {**(details or {}), **result.as_json()}
    write_whole(out / SCORES_JSON, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _refusal(problems: Sequence[Problem]) -> ValueError:
    return ValueError(
        f"The predictions do not fit the data set. {describe_problems(problems)} Correct them, or count what is "
        "missing or damaged as zero (and ignore what was not asked for) with `--missing zero`."
    )


# One video


class _Truth:
    """True masks of one video, ready to be scored; they are kept, within bounds, for its other expressions."""

    def __init__(self, evaluation_set: EvaluationSet, video: str, published_compat: bool) -> None:
        self._set, self._is_compat = evaluation_set, published_compat
        self._kept: dict[tuple[str, ...], tuple[Masks, float]] = {}
        self._num_bytes = 0
        first = evaluation_set.videos[video][0]
        self.size = (first.height, first.width)
        foreground = evaluation_set.foreground_of(video)
        unite = unite_objects if published_compat else unite_packed_objects
        self.foreground: Masks | None = None if foreground is None else unite([foreground], self.size)

    def of(self, expression: Expression) -> tuple[Masks, float]:
        """Return the masks of what an expression means, one per frame, and its mean share of the frame."""
        if not expression.anno_ids:
            return [None] * len(expression.frames), 0.0
        if expression.anno_ids in self._kept:
            return self._kept[expression.anno_ids]
        objects = self._set.objects_of(expression)
        masks: Masks = (sum_objects if self._is_compat else unite_packed_objects)(objects, self.size)
        areas = [_area(mask) / (self.size[0] * self.size[1]) for mask in masks]
        shown = [area for area in areas if area]
        share = math.fsum(shown) / len(shown) if shown else 0.0
        num_bytes = sum(mask.strips.nbytes if isinstance(mask, PackedMask) else mask.nbytes for mask in masks)
        if self._num_bytes + num_bytes <= _MAX_KEPT_BYTES:
            self._kept[expression.anno_ids] = masks, share
            self._num_bytes += num_bytes
        return masks, share


def _area(mask: Any) -> int:
    return count(mask.strips) if isinstance(mask, PackedMask) else int(np.count_nonzero(mask))


def score_video(
    evaluation_set: EvaluationSet, predictions: Predictions, video: str, *, published_compat: bool = False
) -> tuple[list[ExpressionScore], list[Problem]]:
    """Score all expressions of one video; what cannot be used counts as zero and is named."""
    truth = _Truth(evaluation_set, video, published_compat)
    scores, problems = [], []
    for expression in evaluation_set.videos[video]:
        if not expression.scored_frames:
            raise ValueError(f"No frame of {expression.place} is annotated, so it cannot be scored. Leave it out.")
        read = predictions.read(expression)
        frames = [read[number] for number in expression.scored_frames]
        wrong = [frame for frame in frames if isinstance(frame, Problem)]
        problems += wrong
        pred = [None if isinstance(frame, Problem) else frame for frame in frames]
        is_zero = np.array([isinstance(frame, Problem) for frame in frames])
        try:
            true, share = truth.of(expression)
            foreground = truth.foreground
            if expression.annotated is not None:
                true, foreground = _only(true, expression), _only(foreground, expression)
            if evaluation_set.benchmark.is_image_set:
                ignored = evaluation_set.ignored_of(expression)
                scored: dict[str, Any] = {"counts": _image_counts(pred, true, ignored, truth.size, is_zero)}
            else:
                clip = score_clip(pred, true, foreground, published_compat=published_compat)
                scored = {"clip": _with_zeros(clip, is_zero)}
        except (ValueError, TypeError) as error:
            raise ValueError(f"The true masks of {expression.place} cannot be used: {error}") from error
        scores.append(ExpressionScore(expression, object_share=share, num_zeroed=len(wrong), **scored))
    return scores, problems


def _only(masks: Any, expression: Expression) -> Any:
    """Return the masks of the frames that are scored."""
    return None if masks is None else [masks[number] for number in expression.scored_frames]


def _with_zeros(clip: ClipScore, is_zero: np.ndarray) -> ClipScore:
    """Return the score with 0 for some frames, `is_zero` of shape `(T,)`, bool; without the single frames."""
    if not is_zero.any():
        return ClipScore(clip.J, clip.F, clip.A, clip.R)
    means = {
        letter: math.fsum(np.where(is_zero, 0.0, values)) / len(values) for letter, values in clip.per_frame.items()
    }
    return ClipScore(means["J"], means["F"], means["A"], means.get("R"))


def _image_counts(
    pred: list, true: Masks, ignored: list | None, size: tuple[int, int], is_zero: np.ndarray
) -> tuple[int, int]:
    """Return intersection and union of an image, without the ignored region."""
    truth, masks = (unite_packed_objects([each], size) for each in (true, pred))
    if ignored is not None:
        for position, region in enumerate(unite_packed_objects([ignored], size)):
            for clip in (truth, masks):
                clip[position] = replace(clip[position], strips=clip[position].strips & ~region.strips)
    intersection, union = intersection_and_union(masks, truth).sum(axis=0)
    # An image without the object would otherwise score full marks for no prediction at all.
    return (0, max(int(union), 1)) if is_zero.any() else (int(intersection), int(union))


# Several processes

_shared: list[Any] = []


def _scored_videos(
    evaluation_set: EvaluationSet, predictions: Predictions, published_compat: bool, num_workers: int
) -> Iterator[tuple[list[ExpressionScore], list[Problem]]]:
    """Yield the scores of each video, in order."""
    if num_workers == 0:
        for video in evaluation_set.videos:
            yield score_video(evaluation_set, predictions, video, published_compat=published_compat)
        return
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=_fresh_processes(),
        initializer=_share,
        initargs=(evaluation_set, predictions, published_compat),
    )
    try:
        yield from pool.map(_score_shared, evaluation_set.videos)
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or an interruption the rest need not be scored


def _fresh_processes() -> Any:
    """Return a way to start processes that are no copies of this one: a copy could hold locks of threads it lacks."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, for all of them
    return context


def _share(*values: Any) -> None:
    _shared[:] = values


def _score_shared(video: str) -> tuple[list[ExpressionScore], list[Problem]]:
    evaluation_set, predictions, published_compat = _shared
    return score_video(evaluation_set, predictions, video, published_compat=published_compat)
