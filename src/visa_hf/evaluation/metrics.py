"""J, F, A and R of masks, per frame and per clip; their averages over ReVOS; cIoU and gIoU over image sets.

J and F are those of DAVIS (Perazzi et al., CVPR 2016, section 5), A and R those of the VISA paper (arXiv 2407.11325).
Masks are packed to 64 pixels a word, and boundaries are compared by shifting words: the same counts as the classical
way with full-frame maps and a disk (`tests/evaluation/davis_reference.py`), at a fraction of its time.
Reads no files, and knows neither model nor trainer nor data set. Begin at `score_clip`. All in one file, longer than
most, because nothing in it is of use without the rest: averages need scores, scores need the packed masks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..rle import RLE, decode_mask

BOUNDARY_TOLERANCE = 0.008  # DAVIS: share of the frame's diagonal, rounded up to pixels
PERCENT_DECIMALS = 2  # ReVOS: figures of one expression are rounded before they are averaged
REFERRING, REASONING, NO_OBJECT = 0, 1, 2  # `type_id` of ReVOS

Reader = Callable[[np.ndarray, str], np.ndarray]  # checks the mask of that name
Frame = np.ndarray | Mapping | None
Masks = np.ndarray | Mapping | Sequence
"""One mask `(H, W)`, a clip `(T, H, W)`, one COCO run-length mask, or a list with a mask, a run-length mask or None
(nothing in this frame) for each of T frames."""


# Measures of a frame or of a clip


def region_similarity(pred: Masks, true: Masks) -> np.ndarray:
    """Return J of every frame: the intersection of the two masks over their union, 1 where both are empty.

    Args:
        pred, true (`np.ndarray` of shape `(H, W)` or `(T, H, W)`, bool or 0/1; or list of T): the masks. A list holds
            an `(H, W)` array, a COCO run-length mask `{"size": [H, W], "counts": ...}` or `None`, which is an empty
            mask, for each frame.

    Returns:
        `np.ndarray` of shape `(T,)`, float64, in [0, 1]; a scalar when both inputs are a single mask.

    Raises:
        ValueError: if a value is not 0 or 1, if sizes or numbers of frames differ, or if there is no frame.
        TypeError: if a mask is neither an array, a run-length mask nor `None`.
    """
    return _per_frame(lambda pred, true: _ratio(*_overlap(_pack(pred), _pack(true))), {"pred": pred, "true": true})


def boundary_f(pred: Masks, true: Masks, bound_th: float = BOUNDARY_TOLERANCE) -> np.ndarray:
    """Return F of every frame: how well the boundaries of the two masks agree, 1 where neither has one.

    A boundary pixel counts as matched when the other boundary has a pixel at most a tolerance away (a disk). Precision
    is the matched share of the predicted boundary, recall that of the true one, and F their harmonic mean. A mask that
    covers the whole frame has no boundary, as in DAVIS.

    Args:
        pred, true: as for [`region_similarity`].
        bound_th (`float`): tolerance; below 1 a share of the diagonal, rounded up to whole pixels; from 1 on a whole
            number of pixels.

    Returns:
        `np.ndarray` of shape `(T,)`, float64, in [0, 1]; a scalar when both inputs are a single mask.

    Raises:
        ValueError: as for [`region_similarity`], or if `bound_th` is negative or a broken number of pixels.
        TypeError: as for [`region_similarity`].
    """
    _check_tolerance(bound_th)

    def measure(pred: np.ndarray, true: np.ndarray) -> float:
        return _boundary_f(_pack(pred), _pack(true), pred.shape[1], _radius(pred.shape, bound_th))

    return _per_frame(measure, {"pred": pred, "true": true})


def pixel_accuracy(pred: Masks, true: Masks, *, published_compat: bool = False) -> np.ndarray:
    """Return A of every frame: the share of pixels on which the two masks agree.

    Args:
        pred, true: as for [`region_similarity`].
        published_compat (`bool`): compute what the released tool computes, see [`score_clip`].

    Returns:
        `np.ndarray` of shape `(T,)`, float64, in [0, 1]; a scalar when both inputs are a single mask.

    Raises:
        ValueError, TypeError: as for [`region_similarity`].
    """
    if published_compat:
        return _per_frame(_published_accuracy, {"pred": pred, "true": true}, read=_as_grey_levels)

    def measure(pred: np.ndarray, true: np.ndarray) -> float:
        return _accuracy(*_overlap(_pack(pred), _pack(true)), pred.size)

    return _per_frame(measure, {"pred": pred, "true": true})


def robustness(pred: Masks, true: Masks, foreground: Masks, *, published_compat: bool = False) -> np.ndarray:
    """Return R of every frame: 1 less the falsely predicted pixels, relative to everything that could be predicted.

    R = max(0, 1 - |predicted and not true| / (|foreground| + 1e-6)). The paper means it for expressions to which no
    object belongs (`type_id` 2).

    Args:
        pred, true: as for [`region_similarity`].
        foreground: the same form: all objects of the frame, whichever the expression means.
        published_compat (`bool`): compute what the released tool computes, see [`score_clip`].

    Returns:
        `np.ndarray` of shape `(T,)`, float64, in [0, 1]; a scalar when all inputs are a single mask.

    Raises:
        ValueError, TypeError: as for [`region_similarity`].
    """
    clips = {"pred": pred, "true": true, "foreground": foreground}
    if published_compat:
        return _per_frame(_published_robustness, clips, read=_as_grey_levels)
    return _per_frame(lambda pred, true, foreground: _robustness(_pack(pred), _pack(true), _pack(foreground)), clips)


def intersection_and_union(pred: Masks, true: Masks) -> np.ndarray:
    """Count the pixels in both masks and in either, for every frame (or image: sizes may differ between them).

    Args:
        pred, true: as for [`region_similarity`].

    Returns:
        `np.ndarray` of shape `(T, 2)`, int64: intersection and union; `(2,)` when both inputs are a single mask.

    Raises:
        ValueError, TypeError: as for [`region_similarity`].
    """

    def measure(pred: np.ndarray, true: np.ndarray) -> tuple[int, int]:
        return _overlap(_pack(pred), _pack(true))

    return _per_frame(measure, {"pred": pred, "true": true}, dtype=np.int64)


# One clip at once


@dataclass(frozen=True)
class ClipScore:
    """Scores of one clip and expression: means over the frames, in [0, 1].

    Args:
        J (`float`): region similarity.
        F (`float`): boundary measure.
        A (`float`): pixel accuracy.
        R (`float` or `None`): robustness; `None` when no foreground was given.
        per_frame (`dict[str, np.ndarray]`): the same letters, each of shape `(T,)`, float64.
    """

    J: float
    F: float
    A: float
    R: float | None = None
    per_frame: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    @property
    def JF(self) -> float:  # noqa: N802 - J&F is its name in every table
        """Mean of J and F."""
        return (self.J + self.F) / 2


def score_clip(
    pred: Masks,
    true: Masks,
    foreground: Masks | None = None,
    *,
    bound_th: float = BOUNDARY_TOLERANCE,
    published_compat: bool = False,
) -> ClipScore:
    """Compute all four measures of a clip in one pass.

    `published_compat=True` gives A and R as VISA's released evaluation tool computed them, in order to compare with
    published tables; J and F are the same. The tool reads predictions saved as 0/255 (or as the grey levels of a
    palette) without making them 0/1, adds overlapping true objects up to 2, and computes in bytes that wrap around: a
    predicted pixel hardly ever agrees with a true one, which lowers A, and each false pixel counts 255 times, which
    lowers R, mostly to 0. These are no measures of anything; use them for nothing else.
    In this mode, arrays of integers are taken as the bytes that the tool saw: 0/255 for `pred`, sums of objects for
    `true` ([`sum_objects`]). Bool arrays and run-length masks are taken as 0/255 in `pred` and as 0/1 elsewhere.

    Args:
        pred, true: as for [`region_similarity`].
        foreground: the same form, or `None` to leave R out: all objects of the frame, whichever the expression means.
        bound_th (`float`): tolerance of F, see [`boundary_f`].
        published_compat (`bool`): A and R as released, see above.

    Returns:
        [`ClipScore`].

    Raises:
        ValueError, TypeError: as for [`boundary_f`].
    """
    _check_tolerance(bound_th)
    clips = {"pred": pred, "true": true}
    if foreground is not None:
        clips["foreground"] = foreground

    def measure(pred: np.ndarray, true: np.ndarray, *foreground: np.ndarray) -> list[float]:
        pred_bits, true_bits = _pack(pred), _pack(true)
        overlap = _overlap(pred_bits, true_bits)
        similarity = _ratio(*overlap)
        boundary = _boundary_f(pred_bits, true_bits, pred.shape[1], _radius(pred.shape, bound_th))
        if published_compat:
            robust = [_published_robustness(pred, true, masks) for masks in foreground]
            return [similarity, boundary, _published_accuracy(pred, true), *robust]
        robust = [_robustness(pred_bits, true_bits, _pack(masks)) for masks in foreground]
        return [similarity, boundary, _accuracy(*overlap, pred.size), *robust]

    read = _as_grey_levels if published_compat else _as_binary
    frames = np.array([measure(*masks) for masks in _aligned_frames(clips, read)])  # (T, 3 or 4)
    per_frame = dict(zip("JFAR", frames.T, strict=False))
    return ClipScore(**{letter: _mean(values) for letter, values in per_frame.items()}, per_frame=per_frame)


def unite_objects(objects: Sequence[Masks], size: tuple[int, int]) -> np.ndarray:
    """Unite the masks of several objects: what an expression means when it names them all.

    Args:
        objects: at least one clip, each in a form of [`region_similarity`], all with the same number of frames.
        size (`tuple[int, int]`): (H, W), for frames in which no object has a mask.

    Returns:
        `np.ndarray` of shape `(T, H, W)`, bool.

    Raises:
        ValueError: if there is no object, or a mask has another size.
        TypeError: as for [`region_similarity`].
    """
    return _merge(objects, size, np.logical_or, bool)


def sum_objects(objects: Sequence[Masks], size: tuple[int, int]) -> np.ndarray:
    """Add the masks of several objects up, as the released tool does; only for `published_compat`.

    Args:
        objects, size: as for [`unite_objects`].

    Returns:
        `np.ndarray` of shape `(T, H, W)`, uint8: how many objects cover each pixel.

    Raises:
        ValueError, TypeError: as for [`unite_objects`].
    """
    return _merge(objects, size, np.add, np.uint8)


# Averages over expressions


@dataclass(frozen=True)
class GroupScore:
    """Averages over expressions, in percent.

    Args:
        num_expressions (`int`): how many.
        J, F, JF, A (`float`): means; `JF` is J&F, the mean of J and F.
        R (`float` or `None`): mean robustness; `None` when the scores have none.
    """

    num_expressions: int
    J: float
    F: float
    JF: float
    A: float
    R: float | None


@dataclass(frozen=True)
class RevosSummary:
    """ReVOS' table, in percent; a group without expressions is `None`.

    Args:
        referring, reasoning, no_object ([`GroupScore`] or `None`): expressions of `type_id` 0, 1 and 2.
        overall ([`GroupScore`] or `None`): the mean of referring and reasoning, each counting half; `None` unless
            both are there.
        robustness (`float` or `None`): R over `type_id` 2; with `published_compat`, R of `overall`.
    """

    referring: GroupScore | None
    reasoning: GroupScore | None
    no_object: GroupScore | None
    overall: GroupScore | None
    robustness: float | None


def average_scores(scores: Iterable[ClipScore], *, decimals: int | None = PERCENT_DECIMALS) -> GroupScore:
    """Average clip scores, each expression counting the same.

    The sums are exact before they are rounded, so that the order of the expressions never shows.

    Args:
        scores: at least one [`ClipScore`]; R must be there for all or for none.
        decimals (`int` or `None`): figures of one expression (J, F, J&F, A, R, in percent) are rounded to so many
            decimals before they are averaged, as ReVOS' tool does; `None` does not round.

    Returns:
        [`GroupScore`].

    Raises:
        ValueError: if there is no score, or if only some have R.
    """
    scores = list(scores)
    if not scores:
        raise ValueError("There are no scores to average. Give at least one `ClipScore`.")
    num_without_r = sum(score.R is None for score in scores)
    if 0 < num_without_r < len(scores):
        raise ValueError(
            f"{num_without_r} of {len(scores)} scores have no R. Give `score_clip` a `foreground` for all or for none."
        )

    def mean(values: Iterable[float]) -> float:
        percent = 100 * np.array(list(values), dtype=np.float64)
        return _mean(percent if decimals is None else np.round(percent, decimals))

    return GroupScore(
        num_expressions=len(scores),
        J=mean(score.J for score in scores),
        F=mean(score.F for score in scores),
        JF=mean(score.JF for score in scores),
        A=mean(score.A for score in scores),
        R=None if num_without_r else mean(score.R for score in scores if score.R is not None),
    )


def summarize_revos(
    scores: Sequence[ClipScore], type_ids: Sequence[int], *, published_compat: bool = False
) -> RevosSummary:
    """Average clip scores the way ReVOS' table does: by type of expression, overall from the first two types.

    Args:
        scores: N [`ClipScore`]s.
        type_ids: N numbers: 0 referring, 1 reasoning, 2 no such object.
        published_compat (`bool`): report as robustness what the released tool reports, R over types 0 and 1. Scores
            must come from [`score_clip`] with the same switch.

    Returns:
        [`RevosSummary`].

    Raises:
        ValueError: if the lengths differ, a `type_id` is unknown, there is no score, or only some have R.
    """
    if len(scores) != len(type_ids):
        raise ValueError(f"There are {len(scores)} scores but {len(type_ids)} `type_ids`. Give one for each score.")
    unknown = sorted(set(type_ids) - {REFERRING, REASONING, NO_OBJECT})
    if unknown:
        raise ValueError(f"`type_ids` holds {unknown}. ReVOS has 0 (referring), 1 (reasoning) and 2 (no such object).")
    if not len(scores):
        raise ValueError("There are no scores to average. Give at least one `ClipScore`.")
    groups = {
        type_id: [score for score, other in zip(scores, type_ids, strict=True) if other == type_id]
        for type_id in (REFERRING, REASONING, NO_OBJECT)
    }
    referring, reasoning, no_object = (average_scores(group) if group else None for group in groups.values())
    overall = _mean_of_groups(referring, reasoning)
    source_of_robustness = overall if published_compat else no_object
    return RevosSummary(
        referring=referring,
        reasoning=reasoning,
        no_object=no_object,
        overall=overall,
        robustness=source_of_robustness.R if source_of_robustness else None,
    )


# Image sets


@dataclass(frozen=True)
class ImageSetScore:
    """IoU over a set of images, in [0, 1].

    Args:
        num_images (`int`): how many.
        ciou (`float`): cumulative IoU: all intersections over all unions; large objects weigh more.
        giou (`float`): mean of the images' IoU, 1 for an image where both masks are empty (ReasonSeg's "gIoU").
    """

    num_images: int
    ciou: float
    giou: float

    @classmethod
    def from_counts(cls, counts: np.ndarray) -> "ImageSetScore":
        """Make the score from pixel counts, `np.ndarray` of shape `(N, 2)`: see [`intersection_and_union`]."""
        counts = np.asarray(counts)
        if counts.ndim != 2 or counts.shape[1] != 2 or not len(counts):
            raise ValueError(
                f"`counts` has shape {counts.shape} but must be (N, 2), N at least 1: intersection and union of each "
                "image, as `intersection_and_union` returns them."
            )
        counts = counts.astype(np.int64)
        intersection, union = counts.sum(axis=0)
        return cls(
            num_images=len(counts),
            ciou=_ratio(intersection, union),
            giou=_mean(_ratio(*row) for row in counts),
        )


def score_image_set(pred: Masks, true: Masks) -> ImageSetScore:
    """Compute cIoU and gIoU of a set of images, whose sizes may differ.

    Args:
        pred, true (list of N): as for [`region_similarity`], one mask for each image.

    Returns:
        [`ImageSetScore`].

    Raises:
        ValueError, TypeError: as for [`region_similarity`].
    """
    return ImageSetScore.from_counts(np.atleast_2d(intersection_and_union(pred, true)))


# Reading masks


def _per_frame(measure: Callable, clips: dict[str, Masks], *, read: Reader | None = None, dtype: type = float) -> Any:
    """Call `measure` with the masks `(H, W)` of each frame: `(T, ...)`, or `(...)` if every clip is a single mask."""
    values = [measure(*masks) for masks in _aligned_frames(clips, read or _as_binary)]
    is_single = all(_is_single(masks) for masks in clips.values())
    return np.array(values[0] if is_single else values, dtype=dtype)[()]


def _aligned_frames(
    clips: dict[str, Masks], read: Reader, size: tuple[int, int] | None = None
) -> Iterator[list[np.ndarray]]:
    """Yield the clips' masks `(H, W)` frame by frame; decoded one frame at a time, so that memory stays small.

    `None` becomes an empty mask of `size`, or of the size of the others in that frame.
    """
    frames_of = {name: _split(masks, name) for name, masks in clips.items()}
    lengths = {name: len(frames) for name, frames in frames_of.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"`{name}` has {length}" for name, length in lengths.items())
        raise ValueError(f"Numbers of frames differ: {given}. Give one mask, or None, for each frame.")
    if 0 in lengths.values():
        raise ValueError("The clip has no frames. Give at least one.")
    for position, frames in enumerate(zip(*frames_of.values(), strict=True)):
        arrays = [_decode(frame, name, position) for name, frame in zip(clips, frames, strict=True)]
        sizes = {name: array.shape for name, array in zip(clips, arrays, strict=True) if array is not None}
        if size is not None:
            sizes["size"] = size
        if len(set(sizes.values())) > 1:
            given = ", ".join(f"`{name}` is {other}" for name, other in sizes.items())
            raise ValueError(
                f"Sizes (H, W) differ in frame {position}: {given}. Bring all masks to the size of the video."
            )
        # Where every mask is absent the size is unknown, and no measure depends on it.
        size_of_frame = next(iter(sizes.values()), (1, 1))
        yield [
            read(np.zeros(size_of_frame, dtype=bool) if array is None else array, name)
            for name, array in zip(clips, arrays, strict=True)
        ]


def _is_frame(entry: object) -> bool:
    return entry is None or isinstance(entry, Mapping) or np.ndim(cast(Any, entry)) == 2


def _is_list_of_frames(masks: Masks) -> bool:
    """Tell a list of frames from an array that is written as nested lists."""
    return isinstance(masks, list | tuple) and any(_is_frame(entry) for entry in masks)


def _is_single(masks: Masks) -> bool:
    return not _is_list_of_frames(masks) and _is_frame(masks)


def _split(masks: Masks, name: str) -> Sequence[Frame]:
    """Return the frames of `masks`, not yet decoded."""
    if isinstance(masks, Mapping):
        return [masks]
    if isinstance(masks, str | bytes) or not isinstance(masks, Sized):
        raise TypeError(f"`{name}` is {masks!r:.40}. Give an array, a run-length mask, or a list of them.")
    if _is_list_of_frames(masks) or len(masks) == 0:
        return cast(Sequence, masks)
    array = np.asarray(masks)
    if array.ndim not in (2, 3):
        raise ValueError(f"`{name}` has shape {array.shape} but must be (H, W) or (T, H, W).")
    return [array] if array.ndim == 2 else list(array)


def _decode(frame: Frame, name: str, position: int) -> np.ndarray | None:
    if frame is None:
        return None
    if isinstance(frame, Mapping):
        return decode_mask(cast(RLE, frame))
    array = np.asarray(frame)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(
            f"`{name}` of frame {position} has shape {array.shape} but must be (H, W), with at least one pixel."
        )
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"`{name}` of frame {position} holds {array.dtype}. Give numbers, a run-length mask, or None for no mask."
        )
    return array


def _as_binary(array: np.ndarray, name: str) -> np.ndarray:
    """Return the mask as bool, refusing anything but 0 and 1."""
    if array.dtype == bool:
        return array
    is_other = (array != 0) & (array != 1)
    if is_other.any():
        raise ValueError(
            f"`{name}` holds {array[is_other][0]} but masks are 0/1. Make them so, for example with `{name} > 0`; "
            "grey levels as the released tool read them need `published_compat=True`."
        )
    return array.astype(bool)


def _as_grey_levels(array: np.ndarray, name: str) -> np.ndarray:
    """Return the bytes that the released tool saw: predictions are saved as 0/255."""
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255 if name == "pred" else 1)
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"`{name}` holds {array.dtype} from {array.min()} to {array.max()}, but `published_compat` works on "
            "bytes. Give a bool array, a run-length mask, or integers from 0 to 255."
        )
    return array.astype(np.uint8)


def _merge(objects: Sequence[Masks], size: tuple[int, int], operation: np.ufunc, dtype: type) -> np.ndarray:
    """Combine the objects' masks frame by frame: `(T, H, W)` of `dtype`."""
    if not len(objects):
        raise ValueError("`objects` is empty, so the number of frames is unknown. Give at least one object.")
    height, width = size
    clips = {f"objects[{index}]": masks for index, masks in enumerate(objects)}
    frames = _aligned_frames(clips, _as_binary, (int(height), int(width)))
    return np.stack([operation.reduce([mask.astype(dtype) for mask in masks], dtype=dtype) for masks in frames])


# The measures on 0/1 masks, 64 pixels a word


def _pack(mask: np.ndarray) -> np.ndarray:
    """Pack a mask `(H, W)` to `(H, words)`, uint64: column c is bit c % 64 of word c // 64, the rest is 0."""
    height, width = mask.shape
    packed = np.zeros((height, -(-width // 64) * 8), dtype=np.uint8)
    packed[:, : -(-width // 8)] = np.packbits(mask, axis=1, bitorder="little")
    return packed.view("<u8")


def _count(bits: np.ndarray) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else 1.0


def _mean(values: Iterable[float]) -> float:
    values = [float(value) for value in values]
    return math.fsum(values) / len(values)  # exact before rounding: any order, any split gives the same


def _mean_of_groups(first: GroupScore | None, second: GroupScore | None) -> GroupScore | None:
    if first is None or second is None:
        return None
    return GroupScore(
        num_expressions=first.num_expressions + second.num_expressions,
        J=(first.J + second.J) / 2,
        F=(first.F + second.F) / 2,
        JF=(first.JF + second.JF) / 2,
        A=(first.A + second.A) / 2,
        R=None if first.R is None or second.R is None else (first.R + second.R) / 2,
    )


def _overlap(pred: np.ndarray, true: np.ndarray) -> tuple[int, int]:
    """Count the pixels of the intersection and of the union of two packed masks."""
    return _count(pred & true), _count(pred | true)


def _accuracy(intersection: int, union: int, num_pixels: int) -> float:
    return (num_pixels - (union - intersection)) / num_pixels


def _robustness(pred: np.ndarray, true: np.ndarray, foreground: np.ndarray) -> float:
    return max(0.0, 1 - _count(pred & ~true) / (_count(foreground) + 1e-6))


def _published_accuracy(pred: np.ndarray, true: np.ndarray) -> float:
    return float((pred == true).mean())


def _published_robustness(pred: np.ndarray, true: np.ndarray, foreground: np.ndarray) -> float:
    # Bytes wrap around: 1 - 2 is 255 where two objects overlap, and 255 * 255 is 1.
    false_pixels = pred * (np.uint8(1) - true)
    return max(0.0, 1 - float(false_pixels.sum(dtype=np.int64)) / (float(foreground.sum(dtype=np.int64)) + 1e-6))


def _check_tolerance(bound_th: float) -> None:
    if not (0 <= bound_th < 1 or (1 <= bound_th < math.inf and bound_th == int(bound_th))):
        raise ValueError(
            f"`bound_th` is {bound_th}. Give a share of the diagonal in [0, 1), such as {BOUNDARY_TOLERANCE}, or a "
            "whole number of pixels."
        )


def _radius(size: tuple[int, ...], bound_th: float) -> int:
    """Return the tolerance in pixels for frames of size (H, W)."""
    return int(bound_th) if bound_th >= 1 else math.ceil(bound_th * float(np.linalg.norm(size)))


def _boundary_f(pred: np.ndarray, true: np.ndarray, width: int, radius: int) -> float:
    """Return F of two packed masks `(H, words)` that are `width` pixels wide."""
    # 1) cut to the rows and words around both masks: nothing beyond them has a boundary
    is_used = (pred | true) != 0
    rows, words = np.flatnonzero(is_used.any(axis=1)), np.flatnonzero(is_used.any(axis=0))
    if len(rows) == 0:
        return 1.0
    top, left = max(rows[0] - 1, 0), max(words[0] - 1, 0)  # a boundary runs one pixel outside on these two sides
    around = (slice(top, rows[-1] + 2), slice(left, words[-1] + 1))
    # 2) boundaries, and all that is near them
    boundaries = _boundary(np.stack([pred[around], true[around]]), width - 64 * int(left))
    num_pred, num_true = _count(boundaries[0]), _count(boundaries[1])
    if num_pred == 0 or num_true == 0:
        return float(num_pred == num_true)
    reach = _dilate(boundaries, radius)
    # 3) matched pixels
    precision = _count(boundaries[0] & reach[1]) / num_pred
    recall = _count(boundaries[1] & reach[0]) / num_true
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def _boundary(bits: np.ndarray, width: int) -> np.ndarray:
    """Return the boundaries of packed masks `(N, rows, words)`: the right, lower or lower right neighbour differs.

    The last column (`width - 1`, if it is in `bits`) has no right neighbour, the last row no lower one.
    """
    right = bits >> np.uint64(1)  # the right neighbour of every pixel
    right[:, :, :-1] |= bits[:, :, 1:] << np.uint64(63)
    boundary = bits ^ right
    boundary[:, :-1] |= bits[:, :-1] ^ right[:, 1:]
    last_word, last_bit = divmod(width - 1, 64)
    if last_word < bits.shape[2]:
        boundary[:, :, last_word] &= np.uint64((1 << last_bit) - 1)
    boundary[:, :-1] |= bits[:, :-1] ^ bits[:, 1:]
    return boundary


def _dilate(maps: np.ndarray, radius: int) -> np.ndarray:
    """Dilate packed maps `(N, rows, words)` with a disk: all pixels at most `radius` away from a set one.

    The disk is a stack of horizontal bars, 2 * span(dy) + 1 wide in row dy. From the outermost row inwards the bars
    get wider; each is made from the one before.
    """
    num_maps, num_rows, num_words = maps.shape
    # Zeros to the right of and below each map take up what is shifted out of it: every shift is one flat slice.
    padded = np.zeros((num_maps, num_rows + radius, num_words + -(-radius // 64)), dtype=np.uint64)
    padded[:, :num_rows, :num_words] = maps
    bars = padded.reshape(-1)
    dilated = np.zeros_like(bars)
    span = 0
    for dy in range(radius, 0, -1):
        bars, span = _widen(bars, span, math.isqrt(radius**2 - dy**2))
        offset = dy * padded.shape[2]
        dilated[offset:] |= bars[:-offset]
        dilated[:-offset] |= bars[offset:]
    bars, span = _widen(bars, span, radius)
    dilated |= bars
    return dilated.reshape(padded.shape)[:, :num_rows, :num_words]


def _widen(bars: np.ndarray, span: int, wanted: int) -> tuple[np.ndarray, int]:
    """Widen bars of `span` pixels to either side, in packed words `(L,)`, to `wanted` pixels; return them and that."""
    while span < wanted:
        step = min(wanted - span, 2 * span + 1, 63)  # a longer step would leave holes, or reach beyond the next word
        near, far = np.uint64(step), np.uint64(64 - step)
        widened = bars | (bars << near)
        widened |= bars >> near
        widened[1:] |= bars[:-1] >> far
        widened[:-1] |= bars[1:] << far
        bars, span = widened, span + step
    return bars, span
