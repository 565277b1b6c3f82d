"""Masks as COCO run lengths and back: how masks are stored in data sets, predictions and sessions.

The compressed format of the COCO API (https://github.com/cocodataset/cocoapi, `common/maskApi.c`), with the counts as
a string so that it goes into JSON. pycocotools encodes; decoding is done here, because its C code trusts any string.
Drawing masks is done in `rendering`.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from pycocotools import mask as coco

NUM_STRIPS = 8  # bits of a byte

# 7 groups of 5 bits: more than any picture has pixels.
_MAX_GROUPS = 7


class RLE(TypedDict):
    """A mask as run lengths: `size` is `[H, W]`, `counts` COCO's compressed string of runs, column by column."""

    size: list[int]
    counts: str


def encode_mask(mask: np.ndarray) -> RLE:
    """Encode one mask.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, bool): `True` where the object is.

    Raises:
        TypeError: `mask` is not a bool array.
        ValueError: it has another number of dimensions, or no pixels.
    """
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        got = f"an array of {mask.dtype}" if isinstance(mask, np.ndarray) else f"of type {type(mask).__name__}"
        raise TypeError(f"`mask` is {got}; a bool array is needed. Give `mask > threshold`, as a numpy array.")
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"`mask` has shape {mask.shape}; (H, W) is needed, with H and W at least 1.")
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(length) for length in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def decode_mask(rle: RLE) -> np.ndarray:
    """Decode one mask.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool, C-contiguous.

    Raises:
        TypeError: `rle` is no dict with a `size` of two integers and `counts` as a string.
        ValueError: the counts are malformed or do not fill the size.
    """
    height, width = _checked_size(rle)
    # By way of strips, because turning rows and columns round costs more than all the rest: 8 pixels move at once.
    strips = np.ascontiguousarray(decode_strips(rle).T)  # (H, columns)
    columns = strips.shape[1]
    mask = np.empty((height, width), dtype=np.uint8)
    for bit in range(NUM_STRIPS):
        part = mask[:, bit * columns : (bit + 1) * columns]
        np.bitwise_and(strips[:, : part.shape[1]] >> np.uint8(bit), 1, out=part)
    return mask.view(np.bool_)


def decode_strips(rle: RLE) -> np.ndarray:
    """Decode one mask at 8 pixels a byte: 8 vertical strips of the frame, which lie on top of each other.

    Returns:
        `np.ndarray` of shape `(columns, H)`, uint8, `columns` an eighth of the width, rounded up: bit b of `[x, y]` is
        the pixel in row y and column `b * columns + x`; bits beyond the frame are 0.

    Raises:
        TypeError, ValueError: as for [`decode_mask`].
    """
    height, width = _checked_size(rle)
    runs = _checked_runs(rle)
    pixels = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return stack_strips(pixels.reshape(width, height))


def stack_strips(mask: np.ndarray) -> np.ndarray:
    """Cut a mask of shape `(N, M)`, bool, along N to 8 parts, and lay them on top of each other.

    Returns:
        `np.ndarray` of shape `(ceil(N / 8), M)`, uint8: part b is bit b.
    """
    pixels = mask.view(np.uint8)
    length = -(-len(pixels) // NUM_STRIPS)
    strips = np.zeros((length, pixels.shape[1]), dtype=np.uint8)
    for bit in reversed(range(NUM_STRIPS)):
        part = pixels[bit * length : (bit + 1) * length]
        strips += strips  # up by one bit; numpy adds bytes several times faster than it shifts them
        strips[: len(part)] |= part
    return strips


def encode_masks(masks: np.ndarray | Sequence[np.ndarray | None]) -> list[RLE | None]:
    """Encode the masks of many frames; `None` (no mask) stays `None`.

    Args:
        masks: array of shape `(T, H, W)`, bool, or a list of `(H, W)` masks and `None`.
    """
    return [None if mask is None else encode_mask(mask) for mask in masks]


def decode_masks(rles: Sequence[RLE | None], size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode the masks of many frames; `None` (no mask) becomes an empty mask.

    Args:
        rles: one entry a frame.
        size (`tuple[int, int]`, *optional*): (H, W) of the frames; needed when no entry tells it.

    Returns:
        `np.ndarray` of shape `(T, H, W)`, bool.

    Raises:
        ValueError: the size is unknown or an entry has another one.
    """
    sizes = [tuple(rle["size"]) for rle in rles if rle is not None]
    if size is None and not sizes:
        raise ValueError("No entry of `rles` holds a mask, so their size is unknown. Give `size=(H, W)`.")
    height, width = sizes[0] if size is None else size
    masks = np.zeros((len(rles), height, width), dtype=np.bool_)
    for index, rle in enumerate(rles):
        if rle is None:
            continue
        if tuple(rle["size"]) != (height, width):
            raise ValueError(
                f"Mask {index} has size {tuple(rle['size'])} (H, W), but ({height}, {width}) is needed. "
                "All masks of a video must have one size."
            )
        masks[index] = decode_mask(rle)
    return masks


def mask_area(rle: RLE) -> int:
    """Count the pixels of a mask without decoding it."""
    return int(_checked_runs(rle)[1::2].sum())


def mask_iou(first: RLE, second: RLE) -> float:
    """Return the intersection over union of two masks, in [0, 1]; 1 for two empty masks.

    Raises:
        ValueError: the masks differ in size.
    """
    if _checked_size(first) != _checked_size(second):
        raise ValueError(
            f"The masks have sizes {first['size']} and {second['size']} (H, W); they must be of one size to compare."
        )
    both = mask_area(first) + mask_area(second)  # checks them as well
    pair = [{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in (first, second)]
    intersection = int(coco.area(coco.merge(pair, intersect=True)))
    return intersection / (both - intersection) if both else 1.0


def _checked_size(rle: RLE) -> tuple[int, int]:
    """Return (H, W) of a mask whose parts have the right types."""
    if not isinstance(rle, dict) or set(rle) != {"size", "counts"}:
        got = f"a dict with keys {sorted(rle)}" if isinstance(rle, dict) else f"of type {type(rle).__name__}"
        raise TypeError(f"The mask is {got}; a dict with `size` and `counts` is needed.")
    size, counts = rle["size"], rle["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(length) is int for length in size):
        raise TypeError(f"The mask's `size` is {size!r}; [H, W] as two integers is needed.")
    if not isinstance(counts, str):
        raise TypeError(
            f"The mask's `counts` are of type {type(counts).__name__}; COCO's compressed string is needed. "
            "Bytes: `counts.decode('ascii')`. A list of runs: encode the mask with `encode_mask`."
        )
    if min(size) < 1:
        raise ValueError(f"The mask's `size` is {size!r}; height and width must be at least 1.")
    return size[0], size[1]


def _checked_runs(rle: RLE) -> np.ndarray:
    """Return the run lengths, which fill the mask exactly; background first, int64."""
    height, width = _checked_size(rle)
    runs = _run_lengths(rle["counts"])
    # In floating point: int64 would wrap around for runs made to add up to the right number.
    num_filled = runs.sum(dtype=np.float64)
    if num_filled != height * width:
        raise ValueError(
            f"The mask's `counts` fill {num_filled:.0f} pixels, but its size {[height, width]} has {height * width}. "
            "The mask is damaged or of another size."
        )
    return runs


def _run_lengths(counts: str) -> np.ndarray:
    """Read the numbers in `counts`.

    Each number is written in groups of 5 bits, the lowest first, as characters from "0" on; bit 6 says that more
    groups follow, bit 5 of the last group is the sign. From the fourth number on, the difference to the number two
    places before is written.
    """
    groups = np.frombuffer(counts.encode("utf-8"), dtype=np.uint8).astype(np.int64) - 48
    if len(groups) == 0 or groups.min() < 0 or groups.max() > 63:
        raise ValueError(f"The mask's `counts` {counts[:40]!r} are not COCO run lengths (characters '0' to 'o').")
    last = np.flatnonzero(groups & 0x20 == 0)
    if len(last) == 0 or last[-1] != len(groups) - 1:
        raise ValueError("The mask's `counts` end in the middle of a number: the mask is damaged.")
    first = np.concatenate(([0], last[:-1] + 1))
    num_groups = last - first + 1
    if num_groups.max() > _MAX_GROUPS:
        raise ValueError("The mask's `counts` hold a number that is too large: the mask is damaged.")
    place = np.arange(len(groups)) - np.repeat(first, num_groups)
    values = np.add.reduceat((groups & 0x1F) << (5 * place), first)
    values -= np.where(groups[last] & 0x10, np.int64(1) << (5 * num_groups), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    if values.min() < 0:
        raise ValueError("The mask's `counts` hold a run of negative length: the mask is damaged.")
    return values
