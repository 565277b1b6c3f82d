"""Which frames the language model sees: the target frame and the reference frames around it.

The Global-Local sampling of VISA (https://huggingface.co/papers/2407.11325, section 4.1). The paper leaves order,
overlap and short clips open; what is chosen here is written at each function. This module only counts: it reads no
frame and asks no model. Samplers that look at the query return the same [`FrameSelection`].
"""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from operator import index

from .outputs_visa import FrameSelection

STRATEGIES = ("global_local", "global", "local", "none", "stride")
# References of the released evaluation: at most so many, at equal distances.
MAX_STRIDE_REFERENCES = 11


def spread_frames(num_frames: int, count: int) -> tuple[int, ...]:
    """Return the middle frame of each of `count` equal parts of the video: ascending, none twice.

    A video shorter than `count` frames gives all of them.
    """
    if num_frames <= count:
        return tuple(range(num_frames))
    return tuple((2 * part + 1) * num_frames // (2 * count) for part in range(count))


def frames_around(num_frames: int, target_idx: int, count: int) -> tuple[int, ...]:
    """Return `count` contiguous frames around `target_idx`, shifted inward at the ends of the video.

    The target has as many frames before it as after it, one more before it when `count` is even. A video shorter than
    `count` frames gives all of them.
    """
    count = min(count, num_frames)
    start = min(max(target_idx - count // 2, 0), num_frames - count)
    return tuple(range(start, start + count))


def stride_references(num_frames: int, target_idx: int) -> tuple[int, ...]:
    """Return every s-th frame, s = ceil(T / 11), shifted so that the target is among them.

    The references of VISA's released evaluation: they depend on `target_idx % s` alone, so that targets share them.
    """
    stride = math.ceil(num_frames / MAX_STRIDE_REFERENCES)
    return tuple(range(target_idx % stride, num_frames, stride))


def frame_at_share(num_frames: int, share: float) -> int:
    """Return the frame at `share` in [0, 1] of a video, min(int(T * share), T - 1), as VISA counts.

    Raises:
        ValueError: if `share` is outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"`share` is {share} but must be from 0, the first frame, to 1, the last one.")
    return min(int(num_frames * share), num_frames - 1)


def reference_frames_for(num_frames: int, target_idx: int, count: int, strategy: str) -> tuple[int, ...]:
    """Return the reference frames of one target: ascending, none twice, `min(count, num_frames)` of them.

    Args:
        num_frames (`int`): frames of the video.
        target_idx (`int`): the target frame. It may be among the references, as in training.
        count (`int`): references wanted.
        strategy (`str`): `"global"` spreads them over the video, `"local"` takes the frames around the target,
            `"global_local"` takes half of each (an odd one is local), `"none"` takes none. Where the two halves
            overlap, the local one grows until there are `count` different frames. `"stride"` takes the published
            ones, however many they are.
    """
    if strategy == "stride":
        return stride_references(num_frames, target_idx)
    if strategy == "none" or count == 0:
        return ()
    if strategy == "global":
        return spread_frames(num_frames, count)
    if strategy == "local":
        return frames_around(num_frames, target_idx, count)
    spread = spread_frames(num_frames, count // 2)
    wanted = min(count, num_frames)
    chosen: set[int] = set()
    num_local = count - count // 2
    while len(chosen) < wanted:  # a window one frame longer adds at most one frame, so `wanted` is met exactly
        chosen = {*spread, *frames_around(num_frames, target_idx, num_local)}
        num_local += 1
    return tuple(sorted(chosen))


def select_frames(
    num_frames: int,
    *,
    target_frame: int | None = None,
    reference_frames: Sequence[int] | None = None,
    num_reference_frames: int = 12,
    strategy: str = "global_local",
    start: int = 0,
    stop: int | None = None,
) -> FrameSelection:
    """Choose the target frame and the reference frames of a video, or of the part `[start, stop)` of it.

    Args:
        num_frames (`int`): frames of the video. A video of one frame is its own reference, as images are in training.
        target_frame (`int`, *optional*): the target; the middle frame, number `T // 2` of the T frames, by default.
        reference_frames (`Sequence[int]`, *optional*): the references, in any order; chosen by `strategy` by default.
            An empty sequence means none.
        num_reference_frames (`int`, defaults to 12): references that `strategy` picks; short videos give fewer.
        strategy (`str`, defaults to `"global_local"`): `"global_local"`, `"global"`, `"local"`, `"none"` or
            `"stride"`.
        start, stop (`int`, *optional*): first frame of the part to choose from, and the frame after its last. Frames
            are counted from the beginning of the video in any case.

    Returns:
        [`FrameSelection`]: with the references in time order.

    Raises:
        ValueError: if there is no frame, a frame lies outside the part or is named twice, or the strategy or the
            number of references is not one that exists.
    """
    stop = num_frames if stop is None else stop
    if not 0 <= start < stop <= num_frames:
        raise ValueError(
            f"Frames {start} to {stop - 1} of {num_frames} were chosen, but at least one frame inside the video is "
            "needed. Check the file, or the part chosen of it."
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"`strategy` is {strategy!r} but must be one of {', '.join(map(repr, STRATEGIES))}.")
    if num_reference_frames < 0:
        raise ValueError(f"`num_reference_frames` is {num_reference_frames} but must be at least 0.")
    available = range(start, stop)
    if target_frame is None:
        target_idx, reason = start + len(available) // 2, "the middle frame"
    else:
        target_idx, reason = _checked("target_frame", target_frame, available), "a given target"
    if reference_frames is None:
        chosen = reference_frames_for(len(available), target_idx - start, num_reference_frames, strategy)
        references = tuple(start + idx for idx in chosen)
        reason += f", {len(references)} references chosen by {strategy!r}"
    else:
        references = tuple(sorted(_checked("reference_frames", idx, available) for idx in reference_frames))
        repeated = [idx for idx, following in pairwise(references) if idx == following]
        if repeated:
            raise ValueError(f"`reference_frames` names frame {repeated[0]} twice. Give each frame once.")
        reason += f", {len(references)} given references"
    return FrameSelection(target_idx, references, num_frames, reason)


def frames_between(
    num_frames: int,
    timestamps: Sequence[float] | None,
    start: float | str | None = None,
    end: float | str | None = None,
) -> tuple[int, int]:
    """Turn a part of a video, `[start, end)`, into frame numbers `(first, stop)`; `stop` is the first one left out.

    Args:
        num_frames (`int`): frames of the video.
        timestamps (`Sequence[float]` or `None`): seconds at which each frame is shown, ascending, on the clock that
            `start` and `end` are on.
        start, end (`float` or `str`, *optional*): seconds (`2.5` or `"2.5"`), or frame numbers (`"120f"`). A part ends
            before `end`; an end beyond the video means its end.

    Raises:
        ValueError: if a value is neither, is negative, is in seconds for a video without times, or no frame lies
            between the two.
    """
    first = 0 if start is None else _frame_at("start", start, num_frames, timestamps)
    stop = num_frames if end is None else _frame_at("end", end, num_frames, timestamps)
    if first >= stop:
        seconds = "" if timestamps is None else f", the last of them at {timestamps[-1]:.3f} s"
        raise ValueError(
            f"No frame lies between `start` {start} and `end` {end}: the video has {num_frames} frames{seconds}. "
            "`end` is left out, and must be later than `start`."
        )
    return first, stop


def _frame_at(name: str, position: float | str, num_frames: int, timestamps: Sequence[float] | None) -> int:
    """Return the first frame at or after `position`; `num_frames` if there is none."""
    if isinstance(position, str) and re.fullmatch(r"\d+f", position):
        return min(int(position[:-1]), num_frames)
    try:
        seconds = float(position)
    except ValueError:
        seconds = -1.0
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f'`{name}` is {position!r} but must be seconds, like 2.5, or a frame number, like "120f".')
    if timestamps is None:
        raise ValueError(
            f"`{name}` is {position} seconds, but this video has no times. Give a frame number, like "
            f'"{int(seconds)}f", or the frame rate.'
        )
    # Half a microsecond of tolerance: 0.1 s must find a frame shown at the fraction nearest to it.
    return bisect_left(timestamps, seconds - 5e-7)


def _checked(name: str, frame_idx: int, available: range) -> int:
    """Return `frame_idx` as an int after refusing one that is not available."""
    frame_idx = index(frame_idx)
    if frame_idx not in available:
        frames = f"frame {available[0]}" if len(available) == 1 else f"frames {available[0]} to {available[-1]}"
        raise ValueError(
            f"`{name}` is {frame_idx} but the video, or the part chosen of it, has {frames}. Give one of those."
        )
    return frame_idx
