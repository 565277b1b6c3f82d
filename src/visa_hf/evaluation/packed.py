"""Masks at 8 pixels a byte, and what the measures ask of them: counts, boundaries, and how near one is to another.

A mask is cut into 8 vertical strips that lie on top of each other, bit b of a byte being strip b, column by column as
in COCO's run lengths. Neighbouring pixels are neighbouring bytes, so that moving a mask takes a slice of a flat array
and no shifting of bits. Counts are those of the classical way with full-frame maps and a disk
(`tests/evaluation/davis_reference.py`). The measures are in `metrics`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..rle import NUM_STRIPS, RLE, decode_strips, stack_strips


@dataclass(frozen=True, eq=False)
class PackedMask:
    """One mask.

    Args:
        strips (`np.ndarray` of shape `(columns, H)`, uint8): bit b of `[x, y]` is the pixel in row y and column
            `b * columns + x`; `columns` is an eighth of the width, rounded up; bits beyond the frame are 0.
        width (`int`): W.
    """

    strips: np.ndarray
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.strips.shape[1], self.width


def pack_mask(mask: np.ndarray) -> PackedMask:
    """Pack a mask of shape `(H, W)`, bool: fastest where it lies in memory column by column."""
    return PackedMask(stack_strips(mask.T), mask.shape[1])


def pack_rle(rle: RLE) -> PackedMask:
    """Pack a run-length mask; raises what `decode_mask` raises."""
    return PackedMask(decode_strips(rle), rle["size"][1])


def pack_nothing(size: tuple[int, int]) -> PackedMask:
    """Return an empty mask of size (H, W)."""
    height, width = size
    return PackedMask(np.zeros((-(-width // NUM_STRIPS), height), dtype=np.uint8), width)


def unite_packed(masks: Sequence[PackedMask]) -> PackedMask:
    """Return the union of at least one mask, all of one size."""
    if len(masks) == 1:
        return masks[0]
    return PackedMask(np.bitwise_or.reduce([mask.strips for mask in masks]), masks[0].width)


def count(bits: np.ndarray) -> int:
    """Count the pixels in strips of any shape, uint8."""
    flat = bits.reshape(-1)
    whole = len(flat) // 8 * 8
    words = int(np.bitwise_count(flat[:whole].view(np.uint64)).sum(dtype=np.int64))
    return words + int(np.bitwise_count(flat[whole:]).sum(dtype=np.int64))


def match_boundaries(pred: PackedMask, true: PackedMask, radius: int) -> tuple[int, int, int, int]:
    """Count boundary pixels, and those that have a pixel of the other boundary at most `radius` pixels away.

    Returns:
        Matched and all boundary pixels of `pred`, then of `true`.
    """
    # 1) cut to the rows around both masks: nothing beyond them has a boundary
    height = pred.strips.shape[1]
    rows = np.flatnonzero(np.bitwise_or.reduce(pred.strips | true.strips, axis=0))
    if len(rows) == 0:
        return 0, 0, 0, 0
    top, bottom = max(int(rows[0]) - 1, 0), min(int(rows[-1]) + 2, height)  # a boundary runs one pixel above a mask
    # 2) boundaries, and all that is near them
    boundaries = _boundary(np.stack([pred.strips[:, top:bottom], true.strips[:, top:bottom]]), pred.width)
    num_pred, num_true = count(boundaries[0]), count(boundaries[1])
    if num_pred == 0 or num_true == 0:
        return 0, num_pred, 0, num_true
    near = _dilate(boundaries, radius)
    # 3) matched pixels
    return count(boundaries[0] & near[1]), num_pred, count(boundaries[1] & near[0]), num_true


def _boundary(strips: np.ndarray, width: int) -> np.ndarray:
    """Return the boundaries of masks `(N, columns, rows)`: the right, lower or lower right neighbour differs.

    The last column of the frame has no right neighbour, the last row no lower one.
    """
    right = np.empty_like(strips)  # the right neighbour of every pixel
    right[:, :-1] = strips[:, 1:]
    right[:, -1] = strips[:, 0] >> np.uint8(1)  # the first column of the next strip
    last_strip, last_column = divmod(width - 1, strips.shape[1])
    is_last = np.uint8(1 << last_strip)
    right[:, last_column] = (right[:, last_column] & ~is_last) | (strips[:, last_column] & is_last)
    boundary = strips ^ right
    boundary[:, :, :-1] |= strips[:, :, :-1] ^ strips[:, :, 1:]
    boundary[:, :, :-1] |= strips[:, :, :-1] ^ right[:, :, 1:]
    return boundary


def _dilate(maps: np.ndarray, radius: int) -> np.ndarray:
    """Dilate maps `(N, columns, rows)` with a disk: all pixels at most `radius` away from a set one.

    The disk is a stack of vertical bars, 2 * span(dx) + 1 high in column dx. From the outermost column inwards the
    bars get higher; each is made from the one before.
    """
    num_maps, num_columns, num_rows = maps.shape
    # Columns of the neighbouring strips to the left and right, and zeros below every column, which take up what is
    # moved out of it: every move is one slice of a flat array.
    padded = np.zeros((num_maps, num_columns + 2 * radius, num_rows + radius), dtype=np.uint8)
    for step in range(-NUM_STRIPS + 1, NUM_STRIPS):  # strip b + step lies beside strip b
        begin, end = max(step * num_columns, -radius), min((step + 1) * num_columns, num_columns + radius)
        if begin < end:
            block = maps[:, begin - step * num_columns : end - step * num_columns]
            moved = block >> np.uint8(step) if step >= 0 else block << np.uint8(-step)
            padded[:, radius + begin : radius + end, :num_rows] = moved
    bars, column_step = padded.reshape(-1), padded.shape[2]
    dilated, spare, length = np.zeros_like(bars), np.empty_like(bars), 1
    for dx in range(radius, -1, -1):
        span = math.isqrt(radius**2 - dx**2)
        while length < 2 * span + 1:
            step = min(2 * span + 1 - length, length)  # a longer step would leave holes
            np.bitwise_or(bars[step:], bars[:-step], out=spare[step:])
            spare[:step] = bars[:step]
            bars, spare, length = spare, bars, length + step
        # A bar hangs down from its pixel: centred by moving it up.
        for move in {span - dx * column_step, span + dx * column_step}:
            if move > 0:
                dilated[:-move] |= bars[move:]
            else:
                dilated[-move:] |= bars[: len(bars) + move]
    return dilated.reshape(padded.shape)[:, radius : radius + num_columns, :num_rows]
