"""One video, several queries: the state of a session.

`VisaVideoSession` holds the video or stream, the queries with their masks on the target frames, and what was computed
once for all of them. The verbs are the model's: asking in video_asking_visa.py, tracking in video_tracking_visa.py,
named after the video sessions of transformers' SAM 2. What is asked is checked in session_requests_visa.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .frame_sampling_visa import frames_between
from .frame_source_visa import FrameSource, open_frames
from .outputs_visa import FrameSelection, PackedFrame, VideoSegmentation
from .session_cache_visa import SessionCache
from .session_requests_visa import check_query as check_query
from .session_requests_visa import check_sampler, whole_number
from .session_requests_visa import is_blank as is_blank
from .stream_frames_visa import StreamFrames

SessionMode = Literal["shared", "published"]

# Frames tracked at most where nobody says otherwise: hours of computing should not begin by mistake.
DEFAULT_MAX_FRAMES = 10_000


@dataclass(frozen=True)
class SessionQuery:
    """One query of a session, and what the model made of it on the target frame.

    Args:
        query_id (`int`): number of the query in its session, from 0; never given twice.
        query (`str`): the sentence, as given; empty for a mask given without one.
        answer (`str`): the model's text; empty when a first mask was given.
        frame_selection (`FrameSelection`): target and reference frames, counted in the whole video.
        target_masks (`torch.Tensor` of shape `(K, H, W)`, bool, CPU): masks on the target frame, in pixels of the
            source video, one per [SEG] of the answer; they do not overlap.
        target_probs (`torch.Tensor` of shape `(K, H, W)`, float32, in [0, 1], CPU): the same as probabilities;
            `None` unless the session wants them.
        target_frame_scores (`torch.Tensor` of shape `(K,)`, float32, CPU): how sure each of these masks is, as of
            [`VideoFrameOutput`].
        scores (`tuple[float, ...]`): the model's estimate of each mask's IoU; 1.0 for masks that were given.
    """

    query_id: int
    query: str
    answer: str
    frame_selection: FrameSelection
    target_masks: Tensor = field(repr=False)
    target_probs: Tensor | None = field(repr=False)
    target_frame_scores: Tensor = field(repr=False)
    scores: tuple[float, ...]


class VisaVideoSession:
    """A video opened for segmentation, with the queries asked about it. State only: the model has the verbs.

    Frames are counted from the beginning of the video, also when only a part of it is used. The video is read when it
    is needed; at most `max_cached_frames` of its frames are in memory. Visual tokens, SAM's features and the language
    model's prefix depend on frames alone: they are computed once, kept within the bounds below, and freed by `close`.

    Args:
        video: what `open_frames` takes: a path of a video, image or folder, an array, a list of images. `None` with
            `streaming`.
        processor (`VisaProcessor`): makes the model's inputs and reads its answers.
        start, end (`float` or `str`, *optional*): part of the video to use, `[start, end)`: seconds, or frame numbers
            like `"120f"`.
        every (`int`, defaults to 1): use each N-th frame only, counted so that the target frame is among them. The
            language model may still look at other frames as references.
        max_frames (`int`, *optional*): refuse a video of which more frames would be tracked.
        threshold (`float`, defaults to 0.5): probability, in (0, 1), above which a pixel of the target frame belongs
            to an object. In the other frames the most probable of objects and background wins.
        want_probs (`bool`, defaults to `False`): yield probabilities beside the masks. Those of the frames before the
            target wait in a temporary file, rounded to 1/65535: less than 0.00001 from the exact ones.
        fps (`float`, *optional*): frames per second of frames that have no rate of their own.
        allow_truncated (`bool`, defaults to `False`): use the frames before the damage of a damaged video.
        max_cached_frames (`int`, defaults to 64): decoded frames held at any time; in a stream, those that references
            are taken from.
        streaming (`bool`, defaults to `False`): frames come one by one, with `model.step`, and never come back.
        mode (`str`, defaults to `"shared"`): `"published"` follows VISA's released evaluation step by step, without
            sharing anything: the language model is asked on every frame, with the published references and answer,
            and only the mask of the target is used; the tracker goes through the video for each query by itself.
        sampler (*optional*): chooses the target frame of queries that name none: a callable, as of `add_query`, or
            `"visa"`; the middle frame by default. Not for streams.
        max_queries_per_batch (`int`, defaults to 8): queries that are answered, or go through the tracker's networks,
            together; it bounds the memory that is needed at once.
        max_tracked_queries (`int`, defaults to 64): queries whose memory the tracker holds at once. With more of them
            the video is gone through several times.
        max_cached_features (`int`, defaults to 256): frames whose visual tokens are kept.
        max_cached_targets (`int`, defaults to 16): target frames whose SAM features are kept.
        max_cached_prefixes (`int`, defaults to 2): sets of frames whose keys and values in the language model are
            kept: references alone, and with a target. 0 shares none, also among queries that are asked together.
        max_cached_tracker_frames (`int`, defaults to 1): frames between the first and the last target, through which
            both sweeps go, whose tracker features the backward sweep leaves for the forward one.
        cache_device, cache_dtype (*optional*): where and what visual tokens, SAM's features and prefixes are kept as;
            by default as they were computed. Any other dtype than the model's may change masks.

    Attributes:
        source (`FrameSource`): the whole video, or what is held of a stream.
        first_frame, stop_frame (`int`): the part that is used, `[first_frame, stop_frame)`; of a stream, what came.
        queries (`list[SessionQuery]`): the queries that were added and not removed, oldest first.
        cache (`SessionCache`): what was computed once.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError: if the video cannot be opened, or an option is outside
            its range.
    """

    def __init__(
        self,
        video: Any,
        processor: Any,
        *,
        start: float | str | None = None,
        end: float | str | None = None,
        every: int = 1,
        max_frames: int | None = None,
        threshold: float = 0.5,
        want_probs: bool = False,
        fps: float | None = None,
        allow_truncated: bool = False,
        max_cached_frames: int = 64,
        streaming: bool = False,
        mode: SessionMode = "shared",
        sampler: Any = None,
        max_queries_per_batch: int = 8,
        max_tracked_queries: int = 64,
        max_cached_features: int = 256,
        max_cached_targets: int = 16,
        max_cached_prefixes: int = 2,
        max_cached_tracker_frames: int = 1,
        cache_device: torch.device | str | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(threshold, int | float | np.number):
            raise TypeError(f"`threshold` is {threshold!r} but must be a number between 0 and 1.")
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is {threshold} but must be a probability between 0 and 1, both left out.")
        every = whole_number("every", every)
        if every < 1:
            raise ValueError(f"`every` is {every} but must be at least 1: 1 tracks all frames, 2 every other one.")
        if max_frames is not None:
            max_frames = whole_number("max_frames", max_frames)
        for name, position in (("start", start), ("end", end)):
            if not (position is None or isinstance(position, str | int | float | np.number)):
                raise TypeError(f'`{name}` is {position!r} but must be seconds, like 2.5, or a frame, like "120f".')
        if mode not in ("shared", "published"):
            raise ValueError(f'`mode` is {mode!r} but must be "shared" or "published".')
        if cache_dtype is not None and not (isinstance(cache_dtype, torch.dtype) and cache_dtype.is_floating_point):
            raise TypeError(f"`cache_dtype` is {cache_dtype!r} but must be a floating dtype, like `torch.float16`.")
        check_sampler(sampler)
        if streaming:
            _check_stream(
                video, mode, {"start": start, "end": end, "max_frames": max_frames, "sampler": sampler}, every
            )
        self.processor = processor
        self.every = every
        self.threshold = threshold
        self.want_probs = want_probs
        self.is_streaming = streaming
        self.mode = mode
        self.sampler = sampler
        self.max_queries_per_batch = _at_least(1, "max_queries_per_batch", max_queries_per_batch)
        self.max_tracked_queries = _at_least(1, "max_tracked_queries", max_tracked_queries)
        self.max_cached_tracker_frames = _at_least(0, "max_cached_tracker_frames", max_cached_tracker_frames)
        self.cache = SessionCache(
            max_frames=_at_least(0, "max_cached_features", max_cached_features),
            max_targets=_at_least(0, "max_cached_targets", max_cached_targets),
            max_prefixes=_at_least(0, "max_cached_prefixes", max_cached_prefixes),
            device=None if cache_device is None else torch.device(cache_device),
            dtype=cache_dtype,
        )
        self.queries: list[SessionQuery] = []
        # What a stream's tracker knows; made and changed by `model.step`.
        self.stream_state: Any = None
        self._num_queries_ever = 0
        self._anchor: int | None = None
        self.source: FrameSource
        if streaming:
            self.source = StreamFrames(_at_least(4, "max_cached_frames", max_cached_frames), fps)
            self._first_frame, self._stop_frame = 0, 0
            return
        self.source = open_frames(video, fps=fps, allow_truncated=allow_truncated, max_cached_frames=max_cached_frames)
        try:
            self._first_frame, self._stop_frame = frames_between(
                self.source.num_frames, self.source.timestamps, start, end
            )
            num_tracked = math.ceil((self.stop_frame - self.first_frame) / self.every)
            if max_frames is not None and num_tracked > max_frames:
                raise ValueError(
                    f"{num_tracked} frames would be tracked but `max_frames` is {max_frames}. Track fewer with "
                    "`every` (`--every`), take a part with `start` and `end`, or raise `max_frames` (`--max-frames`)."
                )
        except BaseException:
            self.close()
            raise

    @property
    def first_frame(self) -> int:
        """First frame of the part that is used."""
        return self._first_frame

    @property
    def stop_frame(self) -> int:
        """The frame after the last one that is used; of a stream, the one that comes next."""
        return self.source.num_frames if self.is_streaming else self._stop_frame

    @property
    def height(self) -> int:
        """Height of the frames, pixels."""
        return self.source.height

    @property
    def width(self) -> int:
        """Width of the frames, pixels."""
        return self.source.width

    @property
    def anchor_frame(self) -> int | None:
        """Target of the query that was added first, which decides the frames of `every`; `None` before it."""
        return self._anchor

    @property
    def frame_indices(self) -> range:
        """Frames that are segmented, ascending: all of the part, or each N-th around the target.

        Raises:
            RuntimeError: if `every` is above 1 and there was no query yet: its target decides which frames these are.
        """
        if self.every == 1:
            return range(self.first_frame, self.stop_frame)
        if self._anchor is None:
            raise RuntimeError("Which frames are tracked depends on the target frame. Call `add_query` first.")
        return range(self.first_frame + (self._anchor - self.first_frame) % self.every, self.stop_frame, self.every)

    @property
    def backward_indices(self) -> range:
        """Frames of the backward sweep, descending: from the latest target that has a mask to the first frame."""
        return self.backward_indices_of(self.queries)

    def backward_indices_of(self, queries: Sequence[SessionQuery]) -> range:
        """Frames of the backward sweep of some queries."""
        first = self.frame_indices[0]
        targets = [query.frame_selection.target_idx for query in queries if query.target_masks.any()]
        latest = max(targets, default=first)
        return range(latest, first - 1 if latest > first else latest, -self.every)

    @property
    def rounds(self) -> list[list[SessionQuery]]:
        """The queries that are tracked together: those with the same target beside each other, in bounded numbers."""
        size = 1 if self.mode == "published" else self.max_tracked_queries
        queries = self.queries
        if len(queries) > size:
            queries = sorted(queries, key=lambda query: query.frame_selection.target_idx)
        return [queries[start : start + size] for start in range(0, len(queries), size)]

    @property
    def num_steps(self) -> int:
        """Frames that propagation goes through, in all sweeps."""
        return sum(len(self.backward_indices_of(queries)) + len(self.frame_indices) for queries in self.rounds)

    def find_query(self, query_id: int) -> SessionQuery:
        """Return the query of that number.

        Raises:
            ValueError: if there is none, or it was removed.
        """
        for query in self.queries:
            if query.query_id == query_id:
                return query
        known = ", ".join(str(query.query_id) for query in self.queries) or "none"
        raise ValueError(f"`query_id` is {query_id!r} but the session has the queries {known}. Give one of those.")

    def remove_query(self, query_id: int) -> None:
        """Take a query out: from the next frame on, it is neither tracked nor yielded.

        What was computed of frames stays, so that asking again costs little. The number is not given again.

        Raises:
            ValueError: if there is no such query.
        """
        self.queries.remove(self.find_query(query_id))

    def append_query(self, **values: Any) -> int:
        """Add an answered query, made of the fields of [`SessionQuery`] but its number; return its number."""
        query = SessionQuery(query_id=self._num_queries_ever, **values)
        self._num_queries_ever += 1
        if self._anchor is None:
            self._anchor = query.frame_selection.target_idx
        self.queries.append(query)
        return query.query_id

    def finish(self) -> None:
        """End a stream: there will be no frame and no query any more.

        Raises:
            RuntimeError: if this is no stream.
        """
        if not isinstance(self.source, StreamFrames):
            raise RuntimeError("Only a stream is finished. Use `close` to release the video.")
        self.source.is_finished = True

    def close(self) -> None:
        """Release the video and free what was kept. Using the session afterwards is an error; closing twice is not."""
        self.cache.clear()
        self.stream_state = None
        self.source.close()

    def __enter__(self) -> "VisaVideoSession":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def make_results(session: VisaVideoSession, frames: Sequence[PackedFrame]) -> list[VideoSegmentation]:
    """Gather the packed masks of `session.frame_indices` into one result for each query."""
    return [
        VideoSegmentation(
            query=query.query,
            answer=query.answer,
            frame_selection=query.frame_selection,
            frame_indices=tuple(session.frame_indices),
            object_masks=tuple(frame.masks[position] for frame in frames),
            scores=query.scores,
            frame_scores=tuple(frame.scores[position] for frame in frames),
            height=session.height,
            width=session.width,
            fps=session.source.fps,
            video=session.source.name,
        )
        for position, query in enumerate(session.queries)
    ]


def _at_least(minimum: int, name: str, value: Any) -> int:
    """Return `value` as an int after refusing one below `minimum`."""
    number = whole_number(name, value)
    if number < minimum:
        raise ValueError(f"`{name}` is {number} but must be at least {minimum}.")
    return number


def _check_stream(video: Any, mode: str, parts: dict[str, Any], every: int) -> None:
    """Refuse options that make no sense while it is unknown what comes."""
    if video is not None:
        raise ValueError("A `video` is given with `streaming`. Leave it out: frames are given to `model.step`.")
    if mode != "shared":
        raise ValueError(f'`mode` is {mode!r}, which needs a whole video. A stream has the mode "shared".')
    given = [name for name, value in parts.items() if value is not None] + (["every"] if every != 1 else [])
    if given:
        raise ValueError(f"`{given[0]}` is given with `streaming`. Leave it out: give `model.step` what is wanted.")
