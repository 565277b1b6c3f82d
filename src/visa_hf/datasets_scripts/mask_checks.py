"""Whether many run-length masks fill their frames, all at once: one by one it would take longer than reading them.

What a single mask is, and what exactly is wrong with it, `visa_hf.rle` says; here is only a fast yes or no.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

# 7 groups of 5 bits: more than any picture has pixels, as in `visa_hf.rle`.
_MAX_GROUPS = 7


def all_fill(rles: Sequence[Any], height: int, width: int) -> bool:
    """Return whether every mask has that size and runs that fill it exactly.

    The counts of all masks are decoded as one array (for the format, see `visa_hf.rle`). `False` for anything that is
    no mask, too.
    """
    if not rles:
        return True
    for rle in rles:
        if not isinstance(rle, dict) or rle.get("size") != [height, width] or not isinstance(rle.get("counts"), str):
            return False
        # `True == 1`, so that equality alone would let a bool through.
        if type(rle["size"][0]) is not int or type(rle["size"][1]) is not int:
            return False
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        return False
    texts = [rle["counts"] for rle in rles]
    joined = "".join(texts)
    if not joined.isascii() or not all(texts):
        return False
    groups = np.frombuffer(joined.encode("ascii"), dtype=np.uint8) - np.uint8(48)  # below "0" wraps to above 63
    if groups.max() > 63:
        return False
    text_ends = np.cumsum([len(text) for text in texts])
    if (groups[text_ends - 1] & 0x20).any():  # a number would go on in the next mask
        return False
    last = np.flatnonzero(groups < 0x20)
    if last[0] >= _MAX_GROUPS or (len(last) > 1 and np.diff(last).max() > _MAX_GROUPS):
        return False
    ends = np.searchsorted(last, text_ends)  # behind the last number of each mask
    runs = _undo_differences(_numbers(groups, last), ends)
    starts = np.concatenate(([0], ends[:-1]))
    # Each run by itself first: sums of huge ones would wrap around to anything.
    num_pixels = height * width
    return bool(runs.min() >= 0 and runs.max() <= num_pixels and (np.add.reduceat(runs, starts) == num_pixels).all())


def _numbers(groups: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Return the numbers that groups of 5 bits make, the lowest first; bit 4 of the last one is the sign. int64.

    Args:
        groups (`np.ndarray` of shape `(G,)`, uint8): the characters, less "0".
        last (`np.ndarray` of shape `(L,)`): where the last group of each number is.
    """
    first = np.concatenate(([0], last[:-1] + 1))
    num_groups = last - first + 1
    values = (groups[first] & 0x1F).astype(np.int64)
    longer = np.flatnonzero(num_groups > 1)
    for place in range(1, int(num_groups.max())):
        values[longer] |= (groups[first[longer] + place] & 0x1F).astype(np.int64) << (5 * place)
        longer = longer[num_groups[longer] > place + 1]
    negative = np.flatnonzero(groups[last] & 0x10)
    values[negative] -= np.int64(1) << (5 * num_groups[negative])
    return values


def _undo_differences(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return run lengths; from the fourth number of a mask on, the difference to the number two before is written.

    Args:
        values (`np.ndarray` of shape `(L,)`, int64): the numbers of all masks.
        ends (`np.ndarray` of shape `(N,)`): behind the last number of each mask.
    """
    runs = values.copy()
    for start, end in zip(np.concatenate(([0], ends[:-1])).tolist(), ends.tolist(), strict=True):
        values[start + 1 : end : 2].cumsum(out=runs[start + 1 : end : 2])
        values[start + 2 : end : 2].cumsum(out=runs[start + 2 : end : 2])
    return runs
