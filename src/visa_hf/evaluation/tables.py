"""From the scores of single expressions to a benchmark's table, and how sure its figures are.

ReVOS averages by type of expression, after rounding; Ref-DAVIS17 by annotator; image sets have cIoU and gIoU. The
averages themselves are in `metrics`. Confidence intervals are ours: no published table has them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .benchmarks import Benchmark, Expression
from .metrics import PERCENT_DECIMALS, ClipScore, GroupScore, ImageSetScore, average_scores, summarize_revos

Table = dict[str, dict[str, float]]

TYPE_NAMES = {0: "referring", 1: "reasoning", 2: "no-object"}
NUM_RESAMPLES, RESAMPLING_SEED, CONFIDENCE = 1000, 0, 0.95


@dataclass(frozen=True)
class ExpressionScore:
    """What one expression scored.

    Args:
        expression ([`Expression`]): which one.
        clip ([`ClipScore`], *optional*): J, F, A, R in [0, 1]; `None` in an image set.
        counts (`tuple[int, int]`, *optional*): pixels of intersection and union, in an image set.
        object_share (`float`): mean share of the frame that is true, in [0, 1], over the frames that show the object;
            0 if none does.
        num_zeroed (`int`): frames whose prediction could not be used and counts as zero.
    """

    expression: Expression
    clip: ClipScore | None = None
    counts: tuple[int, int] | None = None
    object_share: float = 0.0
    num_zeroed: int = 0

    @property
    def value(self) -> float:
        """The figure that expressions are ranked by, in [0, 1]: J&F, or IoU."""
        if self.clip is not None:
            return self.clip.JF
        assert self.counts is not None
        return _iou(self.counts)


def _decimals(benchmark: Benchmark) -> int | None:
    """Figures of one expression are rounded before they are averaged in ReVOS' table only."""
    return PERCENT_DECIMALS if benchmark.summary == "types" else None


def groups_of(benchmark: Benchmark, scores: Iterable[ExpressionScore]) -> dict[str, list[ExpressionScore]]:
    """Return the expressions of each row of the table that is no mean of other rows."""
    scores = list(scores)
    groups: dict[str, list[ExpressionScore]] = {}
    for score in scores:
        expression = score.expression
        if benchmark.summary == "annotators":
            name = f"annotator {(expression.annotator or 0) + 1}"
        elif benchmark.is_image_set:
            name = "" if expression.is_sentence is None else "long" if expression.is_sentence else "short"
        else:
            name = TYPE_NAMES[expression.type_id]
        groups.setdefault(name, []).append(score)
    if benchmark.summary == "annotators":
        return dict(sorted(groups.items()))
    if benchmark.summary == "types":
        return {name: groups[name] for name in TYPE_NAMES.values() if name in groups}
    parts = dict(sorted(groups.items())) if len(groups) > 1 else {}
    return {**parts, "overall": scores}


def _means_of(benchmark: Benchmark, names: Sequence[str]) -> list[str]:
    """Return the rows whose plain mean is the row "overall", if that is how it is made."""
    if benchmark.summary == "annotators":
        return list(names)
    if benchmark.summary == "types":
        halves = [TYPE_NAMES[0], TYPE_NAMES[1]]
        return halves if set(halves) <= set(names) else []
    return []


def make_table(
    benchmark: Benchmark, scores: list[ExpressionScore], published_compat: bool
) -> tuple[Table, float | None]:
    """Put the scores of all expressions together the way the benchmark does.

    Args:
        benchmark ([`Benchmark`]): whose table it is.
        scores: one [`ExpressionScore`] per expression; R must be there for all or for none.
        published_compat (`bool`): whether they come from `score_clip` with that switch.

    Returns:
        The table, per row its figures in percent and `num_expressions`, and ReVOS' robustness, in percent, or `None`.
    """
    groups = groups_of(benchmark, scores)
    if benchmark.is_image_set:
        images = {
            name: ImageSetScore.from_counts(np.array([score.counts for score in group]))
            for name, group in groups.items()
        }
        return {
            name: {"num_expressions": image.num_images, "cIoU": 100 * image.ciou, "gIoU": 100 * image.giou}
            for name, image in images.items()
        }, None
    clips = {name: [score.clip for score in group if score.clip] for name, group in groups.items()}
    table = {name: _figures(average_scores(group, decimals=_decimals(benchmark))) for name, group in clips.items()}
    if benchmark.summary == "types":
        type_ids = [score.expression.type_id for score in scores]
        summary = summarize_revos(
            [score.clip for score in scores if score.clip], type_ids, published_compat=published_compat
        )
        if summary.overall:
            table["overall"] = _figures(summary.overall)
        return table, summary.robustness
    means = _means_of(benchmark, list(table))
    if means:
        table["overall"] = {
            name: math.fsum(table[row][name] for row in means) / len(means) for name in table[means[0]]
        } | {"num_expressions": len(scores)}
    return table, None


def _figures(group: GroupScore) -> dict[str, float]:
    figures = {"num_expressions": group.num_expressions, "J": group.J, "F": group.F, "J&F": group.JF, "A": group.A}
    return figures if group.R is None else figures | {"R": group.R}


# Confidence intervals


def confidence_intervals(
    benchmark: Benchmark, scores: list[ExpressionScore], table: Table
) -> dict[str, dict[str, list[float]]]:
    """Return the ends of each figure's 95% confidence interval, in percent, for the rows of a table.

    Videos are drawn with replacement, 1000 times with a fixed seed, and the table is computed again. Whole videos,
    because expressions of one video are not independent (a cluster bootstrap, percentile method). Empty if there is
    only one video.
    """
    videos = sorted({score.expression.video for score in scores})
    if len(videos) < 2:
        return {}
    rng = np.random.Generator(np.random.PCG64(RESAMPLING_SEED))
    draws = rng.multinomial(len(videos), np.full(len(videos), 1 / len(videos)), size=NUM_RESAMPLES)  # (draws, videos)
    place = {video: position for position, video in enumerate(videos)}
    groups = groups_of(benchmark, scores)
    estimates: dict[str, dict[str, np.ndarray]] = {}
    for row, group in groups.items():
        positions = np.array([place[score.expression.video] for score in group])
        estimates[row] = {}
        for figure, parts, wholes in _terms(benchmark, group):
            totals = [np.bincount(positions, values, minlength=len(videos)) for values in (parts, wholes)]
            # Not a matrix product, whose last digits depend on the number of threads.
            part, whole = ((draws * total).sum(axis=1) for total in totals)
            estimates[row][figure] = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    means = _means_of(benchmark, list(groups))
    if means:
        estimates["overall"] = {
            figure: np.mean([estimates[row][figure] for row in means], axis=0) for figure in estimates[means[0]]
        }
    ends = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
    return {
        row: {
            figure: [float(end) for end in np.percentile(values[np.isfinite(values)], ends)]
            for figure, values in estimates[row].items()
        }
        for row in table
    }


def _terms(benchmark: Benchmark, group: Sequence[ExpressionScore]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each figure, in percent, as what is summed over expressions above and below the bar."""
    ones = np.ones(len(group))
    if benchmark.is_image_set:
        counts = np.array([score.counts for score in group], dtype=np.float64)
        yield "cIoU", 100 * counts[:, 0], counts[:, 1]
        yield "gIoU", np.array([100 * score.value for score in group]), ones
        return
    clips = [score.clip for score in group if score.clip]
    values = {
        "J": [clip.J for clip in clips],
        "F": [clip.F for clip in clips],
        "J&F": [clip.JF for clip in clips],
        "A": [clip.A for clip in clips],
        "R": [clip.R for clip in clips if clip.R is not None],
    }
    decimals = _decimals(benchmark)
    for figure, numbers in values.items():
        if numbers:
            percent = 100 * np.array(numbers)
            yield figure, percent if decimals is None else np.round(percent, decimals), ones


def _iou(counts: tuple[int, int]) -> float:
    return counts[0] / counts[1] if counts[1] else 1.0
