"""J, F, A and R of masks, per frame and per clip; their averages over ReVOS; cIoU and gIoU over image sets.

J and F are those of DAVIS (Perazzi et al., CVPR 2016, section 5), A and R those of the VISA paper (arXiv 2407.11325).
Pixels are counted in packed masks (`packed`). Reads no files, and knows neither model nor trainer nor data set. Begin
at `score_clip`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..rle import RLE, decode_mask
from .packed import PackedMask, count, match_boundaries, pack_mask, pack_nothing, pack_rle, unite_packed

BOUNDARY_TOLERANCE = 0.008  # DAVIS: share of the frame's diagonal, rounded up to pixels
PERCENT_DECIMALS = 2  # ReVOS: figures of one expression are rounded before they are averaged
REFERRING, REASONING, NO_OBJECT = 0, 1, 2  # `type_id` of ReVOS

Frame = np.ndarray | Mapping | PackedMask | None
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
    return _per_frame(lambda pred, true: _ratio(*_overlap(pred, true)), {"pred": pred, "true": true})


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

    return _per_frame(lambda pred, true: _boundary_f(pred, true, bound_th), {"pred": pred, "true": true})


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
    return _per_frame(lambda pred, true: _accuracy(*_overlap(pred, true), pred.shape), {"pred": pred, "true": true})


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
    return _per_frame(_robustness, clips)


def intersection_and_union(pred: Masks, true: Masks) -> np.ndarray:
    """Count the pixels in both masks and in either, for every frame (or image: sizes may differ between them).

    Args:
        pred, true: as for [`region_similarity`].

    Returns:
        `np.ndarray` of shape `(T, 2)`, int64: intersection and union; `(2,)` when both inputs are a single mask.

    Raises:
        ValueError, TypeError: as for [`region_similarity`].
    """
    return _per_frame(_overlap, {"pred": pred, "true": true}, dtype=np.int64)


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

    def measure(pred: PackedMask, true: PackedMask, *foreground: PackedMask) -> list[float]:
        overlap = _overlap(pred, true)
        robust = [_robustness(pred, true, masks) for masks in foreground]
        return [_ratio(*overlap), _boundary_f(pred, true, bound_th), _accuracy(*overlap, pred.shape), *robust]

    def measure_as_published(pred: np.ndarray, true: np.ndarray, *foreground: np.ndarray) -> list[float]:
        similarity, boundary, *_ = measure(pack_mask(pred != 0), pack_mask(true != 0))
        robust = [_published_robustness(pred, true, masks) for masks in foreground]
        return [similarity, boundary, _published_accuracy(pred, true), *robust]

    if published_compat:
        rows = [measure_as_published(*masks) for masks in _aligned_frames(clips, _as_grey_levels)]
    else:
        rows = [measure(*masks) for masks in _packed_frames(clips)]
    frames = np.array(rows)  # (T, 3 or 4)
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


def unite_packed_objects(objects: Sequence[Masks], size: tuple[int, int]) -> list[PackedMask]:
    """Unite the masks of several objects as [`unite_objects`] does, but leave them packed, which is faster to score.

    Returns:
        One [`PackedMask`] for each frame: a form of mask that all measures take.
    """
    return [unite_packed(masks) for masks in _packed_frames(_as_clips(objects), _as_size(size), turn=False)]


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


def _per_frame(
    measure: Callable, clips: dict[str, Masks], *, read: Callable | None = None, dtype: type = float
) -> Any:
    """Call `measure` with the masks of each frame: `(T, ...)`, or `(...)` if every clip is a single mask."""
    values = [measure(*masks) for masks in (_aligned_frames(clips, read) if read else _packed_frames(clips))]
    is_single = all(_is_single(masks) for masks in clips.values())
    return np.array(values[0] if is_single else values, dtype=dtype)[()]


def _no_pixels(size: tuple[int, int]) -> np.ndarray:
    return np.zeros(size, dtype=bool)


def _packed_frames(
    clips: dict[str, Masks], size: tuple[int, int] | None = None, *, turn: bool = True
) -> Iterator[list[PackedMask]]:
    """Yield the clips' masks frame by frame, packed.

    Where all of a frame are arrays, they may come with rows and columns exchanged (`turn`): no measure depends on it,
    and arrays, which lie in memory row by row, are packed faster.
    """
    for masks in _aligned_frames(clips, _as_binary_or_packed, size, empty=pack_nothing):
        is_turned = turn and all(isinstance(mask, np.ndarray) for mask in masks)
        yield [mask if isinstance(mask, PackedMask) else pack_mask(mask.T if is_turned else mask) for mask in masks]


def _aligned_frames(
    clips: dict[str, Masks],
    read: Callable[[Any, str], Any],
    size: tuple[int, int] | None = None,
    *,
    empty: Callable[[tuple[int, int]], Any] = _no_pixels,
) -> Iterator[list[Any]]:
    """Yield the clips' masks frame by frame, as `read` makes them of arrays, of run-length or of packed masks.

    One frame at a time, so that memory stays small. `None` becomes an `empty` mask of `size`, or of the size of the
    others in that frame.
    """
    frames_of = {name: _split(masks, name) for name, masks in clips.items()}
    lengths = {name: len(frames) for name, frames in frames_of.items()}
    if len(set(lengths.values())) > 1:
        given = ", ".join(f"`{name}` has {length}" for name, length in lengths.items())
        raise ValueError(f"Numbers of frames differ: {given}. Give one mask, or None, for each frame.")
    if 0 in lengths.values():
        raise ValueError("The clip has no frames. Give at least one.")
    for position, frames in enumerate(zip(*frames_of.values(), strict=True)):
        masks = {
            name: None if frame is None else read(_checked(frame, name, position), name)
            for name, frame in zip(clips, frames, strict=True)
        }
        sizes = {name: mask.shape for name, mask in masks.items() if mask is not None}
        if size is not None:
            sizes["size"] = size
        if len(set(sizes.values())) > 1:
            given = ", ".join(f"`{name}` is {other}" for name, other in sizes.items())
            raise ValueError(
                f"Sizes (H, W) differ in frame {position}: {given}. Bring all masks to the size of the video."
            )
        # Where every mask is absent the size is unknown, and no measure depends on it.
        nothing = empty(next(iter(sizes.values()), (1, 1)))
        yield [read(nothing, name) if mask is None else mask for name, mask in masks.items()]


def _is_frame(entry: object) -> bool:
    return entry is None or isinstance(entry, Mapping | PackedMask) or np.ndim(cast(Any, entry)) == 2


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


def _checked(frame: Frame, name: str, position: int) -> np.ndarray | Mapping | PackedMask:
    """Return the mask, arrays checked for their form."""
    if isinstance(frame, Mapping | PackedMask):
        return frame
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


def _as_binary_or_packed(mask: np.ndarray | Mapping | PackedMask, name: str) -> np.ndarray | PackedMask:
    if isinstance(mask, PackedMask):
        return mask
    return pack_rle(cast(RLE, mask)) if isinstance(mask, Mapping) else _as_binary(mask, name)


def _as_binary(mask: np.ndarray | Mapping, name: str) -> np.ndarray:
    """Return the mask as bool, refusing anything but 0 and 1."""
    array = decode_mask(cast(RLE, mask)) if isinstance(mask, Mapping) else mask
    if array.dtype == bool:
        return array
    is_other = (array != 0) & (array != 1)
    if is_other.any():
        raise ValueError(
            f"`{name}` holds {array[is_other][0]} but masks are 0/1. Make them so, for example with `{name} > 0`; "
            "grey levels as the released tool read them need `published_compat=True`."
        )
    return array.astype(bool)


def _as_grey_levels(mask: np.ndarray | Mapping, name: str) -> np.ndarray:
    """Return the bytes that the released tool saw: predictions are saved as 0/255."""
    array = decode_mask(cast(RLE, mask)) if isinstance(mask, Mapping) else mask
    if array.dtype == bool:
        return array.astype(np.uint8) * np.uint8(255 if name == "pred" else 1)
    if array.dtype.kind not in "ui" or array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"`{name}` holds {array.dtype} from {array.min()} to {array.max()}, but `published_compat` works on "
            "bytes. Give a bool array, a run-length mask, or integers from 0 to 255."
        )
    return array.astype(np.uint8)


def _as_clips(objects: Sequence[Masks]) -> dict[str, Masks]:
    if not len(objects):
        raise ValueError("`objects` is empty, so the number of frames is unknown. Give at least one object.")
    return {f"objects[{index}]": masks for index, masks in enumerate(objects)}


def _as_size(size: Sequence[int]) -> tuple[int, int]:
    height, width = size
    return int(height), int(width)


def _merge(objects: Sequence[Masks], size: tuple[int, int], operation: np.ufunc, dtype: type) -> np.ndarray:
    """Combine the objects' masks frame by frame: `(T, H, W)` of `dtype`."""
    frames = _aligned_frames(_as_clips(objects), _as_binary, _as_size(size))
    return np.stack([operation.reduce([mask.astype(dtype) for mask in masks], dtype=dtype) for masks in frames])


# The measures


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


def _overlap(pred: PackedMask, true: PackedMask) -> tuple[int, int]:
    """Count the pixels of the intersection and of the union."""
    return count(pred.strips & true.strips), count(pred.strips | true.strips)


def _accuracy(intersection: int, union: int, size: tuple[int, int]) -> float:
    num_pixels = size[0] * size[1]
    return (num_pixels - (union - intersection)) / num_pixels


def _robustness(pred: PackedMask, true: PackedMask, foreground: PackedMask) -> float:
    return max(0.0, 1 - count(pred.strips & ~true.strips) / (count(foreground.strips) + 1e-6))


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


def _boundary_f(pred: PackedMask, true: PackedMask, bound_th: float) -> float:
    radius = _radius(pred.shape, bound_th)
    matched_pred, num_pred, matched_true, num_true = match_boundaries(pred, true, radius)
    if num_pred == 0 or num_true == 0:
        return float(num_pred == num_true)
    precision, recall = matched_pred / num_pred, matched_true / num_true
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)
