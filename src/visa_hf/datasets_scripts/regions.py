"""Regions of an image as run lengths: polygons, COCO segmentations and label images.

Two ways of filling a polygon are in use and differ at the border: COCO's (pycocotools; RefCOCO, PACO-LVIS,
PASCAL-Part) and OpenCV's `fillPoly` (ReasonSeg; the published masks are what it draws, LISA
`utils/data_processing.py`). OpenCV's is done here in numpy, so that the package need not have it. Builders read files.
"""

import math
from typing import Any

import numpy as np
from pycocotools import mask as coco

from visa_hf.rle import RLE

from .annotations import AnnotationError, check_rle
from .brief import brief

# A polygon may leave the image by this share of a side, as hands slip over the border; beyond, it is of another.
_TOLERANCE = 0.1

_FIXED = 16  # OpenCV's crossings are 16.16 fixed point


def segmentation_rle(segmentation: Any, height: int, width: int, **where: Any) -> RLE | None:
    """Turn the `segmentation` of a COCO annotation into one mask.

    Args:
        segmentation: a list of polygons `[x0, y0, x1, y1, ...]` (pixels), a run-length mask with `counts` as COCO's
            string or as a list of runs, or a list of such masks; their union is taken.
        height (`int`): of the image.
        width (`int`): of the image.
        where: `file`, `video`, `expression`: what an error names.

    Returns:
        The mask, or `None` when it has no pixels.

    Raises:
        AnnotationError: it is none of these, of another size, or a polygon has an odd number of coordinates, fewer
            than three points, or lies far outside the image.
    """
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, list) or not all(isinstance(part, list | dict) for part in parts):
        raise AnnotationError.at(
            f"`segmentation` is {brief(segmentation)}; a list of polygons or a run-length mask is needed.", **where
        )
    rles = []
    for part in parts:
        if isinstance(part, dict):
            rles.append(_coco_rle(part, height, width, where))
        else:
            check_polygon(part, height, width, **where)
            rles += coco.frPyObjects([part], height, width)
    if not rles:
        return None
    merged = rles[0] if len(rles) == 1 else coco.merge(rles)
    if not coco.area(merged):
        return None
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def check_polygon(coordinates: Any, height: int, width: int, **where: Any) -> None:
    """Check a polygon `[x0, y0, x1, y1, ...]`: whole points, three at least, finite, inside the image or nearly so.

    Raises:
        AnnotationError: it is not so; `where` (`file`, `video`, `expression`) is named.
    """
    if not isinstance(coordinates, list) or not _are_finite(coordinates):
        raise AnnotationError.at(f"A polygon is {brief(coordinates)}; a list of finite numbers is needed.", **where)
    if len(coordinates) % 2:
        raise AnnotationError.at(
            f"A polygon has {len(coordinates)} coordinates, an odd number; x and y of each point are needed.", **where
        )
    if len(coordinates) < 6:  # with 4 numbers pycocotools would take it for a box
        raise AnnotationError.at(f"A polygon has {len(coordinates) // 2} points; at least 3 are needed.", **where)
    for axis, length in (("x", width), ("y", height)):
        values = coordinates[0::2] if axis == "x" else coordinates[1::2]
        slack = max(2.0, _TOLERANCE * length)
        if min(values) < -slack or max(values) > length + slack:
            raise AnnotationError.at(
                f"A polygon reaches from {axis} = {min(values):g} to {max(values):g}, far outside the image of "
                f"{height} x {width} (H x W). The polygon or the image is of another size.",
                **where,
            )


def label_rles(labels: np.ndarray) -> dict[int, RLE]:
    """Cut a label image into one mask for each value that occurs.

    All masks are made in one pass over the runs of the image, much faster than encoding `labels == value` for each.

    Args:
        labels (`np.ndarray` of shape `(H, W)`, any integer type).

    Returns:
        `dict[int, RLE]` in ascending order of the value.
    """
    height, width = labels.shape
    pixels = labels.ravel(order="F")
    starts = np.concatenate(([0], np.flatnonzero(pixels[1:] != pixels[:-1]) + 1))
    ends = np.append(starts[1:], pixels.size)
    values = pixels[starts]
    order = np.argsort(values, kind="stable")
    borders = np.flatnonzero(np.diff(values[order])) + 1
    masks = {}
    for runs in np.split(order, borders):
        edges = np.stack((starts[runs], ends[runs]), axis=1).ravel()
        counts = np.diff(edges, prepend=0, append=pixels.size)
        if counts[-1] == 0:  # COCO writes no empty last run
            counts = counts[:-1]
        encoded = coco.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
        masks[int(values[runs[0]])] = RLE(size=[height, width], counts=encoded["counts"].decode("ascii"))
    return masks


def fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fill a polygon as OpenCV's `fillPoly` does: the inside (even-odd) and the border lines.

    Args:
        points (`np.ndarray` of shape `(P, 2)`, integer): x and y in pixels; may lie outside the image.
        height (`int`): of the image.
        width (`int`): of the image.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool.
    """
    corners = [(int(x), int(y)) for x, y in points]
    mask = np.zeros((height, width), dtype=np.bool_)
    rows, crossings = [], []
    for first, second in zip([corners[-1], *corners[:-1]], corners, strict=True):
        start, end, is_inside = _clip_line(first, second, height, width)
        if is_inside:
            _draw_line(mask, start, end)
        if first[1] != second[1]:
            edge_rows, edge_crossings = _edge_crossings(first, second, start, end, height)
            rows.append(edge_rows)
            crossings.append(edge_crossings)
    if rows:
        _fill_spans(mask, np.concatenate(rows), np.concatenate(crossings))
    return mask


def _coco_rle(rle: dict[str, Any], height: int, width: int, where: dict[str, Any]) -> dict[str, Any]:
    """Check a run-length mask of any of COCO's spellings; return it as pycocotools takes it."""
    counts = rle.get("counts")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", errors="replace")
    if not isinstance(counts, list):
        check_rle({"size": rle.get("size"), "counts": counts}, height, width, **where)
        return {"size": [height, width], "counts": str(counts).encode("ascii")}
    if rle.get("size") != [height, width]:
        raise AnnotationError.at(
            f"A run-length mask has size {rle.get('size')}, but the image has {[height, width]} (H, W).", **where
        )
    if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
        raise AnnotationError.at(
            f"The runs {brief(counts)} of a mask must be whole numbers from 0 on that add up to {height * width}, "
            "the pixels of the image. The mask is damaged or of another size.",
            **where,
        )
    encoded: dict[str, Any] = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return encoded


def _edge_crossings(
    first: tuple[int, int], second: tuple[int, int], start: tuple[int, int], end: tuple[int, int], height: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the image that an edge crosses (its lower end not counted), and x there, 16.16 fixed point.

    The slope is that of the clipped line from `start` to `end`, as in OpenCV; it is extended over all rows.
    """
    start_y, end_y = (start[1], end[1]) if start[1] != end[1] else (first[1], second[1])
    slope = _divide((end[0] - start[0]) << _FIXED, end_y - start_y)
    x, y = (start[0], start_y) if first[1] < second[1] else (end[0], end_y)
    rows = np.arange(max(min(first[1], second[1]), 0), min(max(first[1], second[1]), height), dtype=np.int64)
    return rows, (x << _FIXED) + (rows - y) * slope


def _fill_spans(mask: np.ndarray, rows: np.ndarray, crossings: np.ndarray) -> None:
    """Fill `mask` `(H, W)` between each crossing with odd and the next with even place in its row."""
    width = mask.shape[1]
    order = np.lexsort((crossings, rows))
    rows, crossings = rows[order], crossings[order]
    lefts = (crossings[0::2] + (1 << _FIXED) - 1) >> _FIXED
    rights = crossings[1::2] >> _FIXED
    for row, left, right in zip(rows[0::2].tolist(), lefts.tolist(), rights.tolist(), strict=True):
        if left < width and right >= 0:
            mask[row, max(left, 0) : right + 1] = True


def _draw_line(mask: np.ndarray, start: tuple[int, int], end: tuple[int, int]) -> None:
    """Draw an 8-connected line into `mask` `(H, W)`, from left to right as OpenCV's `LineIterator`."""
    if end[0] < start[0]:
        start, end = end, start
    (x, y), run, rise = start, end[0] - start[0], abs(end[1] - start[1])
    direction = 1 if end[1] >= y else -1
    longer, shorter = max(run, rise), min(run, rise)
    if longer == 0:
        mask[y, x] = True
        return
    along = np.arange(longer + 1)
    across = (2 * shorter * along + longer - 1) // (2 * longer)
    if rise > run:
        mask[y + direction * along, x + across] = True
    else:
        mask[y + direction * across, x + along] = True


def _clip_line(
    start: tuple[int, int], end: tuple[int, int], height: int, width: int
) -> tuple[tuple[int, int], tuple[int, int], bool]:
    """Clip a line at the border as OpenCV's `clipLine`; also say whether any of it lies inside."""
    (x1, y1), (x2, y2) = start, end
    right, bottom = width - 1, height - 1

    def side(x: int) -> int:
        return (x < 0) + (x > right) * 2

    first = side(x1) + (y1 < 0) * 4 + (y1 > bottom) * 8
    second = side(x2) + (y2 < 0) * 4 + (y2 > bottom) * 8
    if first & second or not first | second:
        return start, end, not first | second
    if first & 12:
        border = 0 if first < 8 else bottom
        x1 += int((border - y1) * (x2 - x1) / (y2 - y1))
        y1 = border
        first = side(x1)
    if second & 12:
        border = 0 if second < 8 else bottom
        x2 += int((border - y2) * (x2 - x1) / (y2 - y1))
        y2 = border
        second = side(x2)
    if not first & second and first | second:
        if first:
            border = 0 if first == 1 else right
            y1 += int((border - x1) * (y2 - y1) / (x2 - x1))
            x1 = border
        if second:
            border = 0 if second == 1 else right
            y2 += int((border - x2) * (y2 - y1) / (x2 - x1))
            x2 = border
        first = second = 0
    return (x1, y1), (x2, y2), not first | second


def _divide(numerator: int, denominator: int) -> int:
    """Divide as C does: towards zero."""
    quotient = abs(numerator) // abs(denominator)
    return quotient if (numerator < 0) == (denominator < 0) else -quotient


def _are_finite(values: list[Any]) -> bool:
    """Say whether all values are numbers, and finite ones; quick, because polygons are long."""
    try:
        return set(map(type, values)) <= {int, float} and all(map(math.isfinite, values))
    except OverflowError:  # a whole number beyond all floats
        return False
