"""Masks of target frames carried through a video, or along a stream, for all queries of a session.

`VisaTrackingMixin` gives the model `propagate_in_video_iterator` and `step`. The tracker is XMem
(https://huggingface.co/papers/2207.07115), fed as in its own evaluation. Its frame features are computed once a frame
and sweep, what it stores and reads of frames once for all queries with the same target; values, sensory memory and
aggregation are each query's own. Writing files and drawing are not done here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .earlier_frames_visa import EarlierFrames, Found
from .mask_scores_visa import mask_scores
from .outputs_visa import VideoFrameOutput
from .video_session_visa import SessionQuery, VisaVideoSession

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VisaTrackingMixin:
    """The verbs of tracking, for the model, whose `tracker` they use."""

    def propagate_in_video_iterator(
        self: Any, session: VisaVideoSession, *, on_frame: Callable[[int], None] | None = None
    ) -> Iterator[VideoFrameOutput]:
        """Carry the masks of all queries through the video and yield its frames in order, each complete.

        First backward from the latest target to the first frame, keeping only packed masks, then forward. The target
        frame of a query has the model's own masks. Queries that are added while this runs are there from the next
        frame on, with the masks that they would have had from the beginning; queries that are removed are not. With
        more than `session.max_tracked_queries` queries, all but the last of them go through the video beforehand, and
        their masks wait packed.

        Args:
            session (`VisaVideoSession`): with at least one query.
            on_frame (`Callable[[int], None]`, *optional*): called with its index after each frame of any sweep;
                there are `session.num_steps` of them.

        Returns:
            An iterator of [`VideoFrameOutput`], one per frame of `session.frame_indices`. The session may gain
            queries, or be propagated again, afterwards.

        Raises:
            RuntimeError: if the session has no query, or is a stream; while iterating, if more queries are added than
                are to be tracked at once.
            ValueError: while iterating, if a frame of the video is damaged.
        """
        if session.is_streaming:
            raise RuntimeError("A stream has no end to propagate to. Give its frames to `model.step`.")
        if not session.queries:
            raise RuntimeError("The session has no query. Call `add_query` first.")
        return self._propagate(session, on_frame or _ignore)

    @torch.no_grad()
    def _propagate(
        self: Any, session: VisaVideoSession, on_frame: Callable[[int], None]
    ) -> Iterator[VideoFrameOutput]:
        *waiting, live = session.rounds
        with EarlierFrames(session.want_probs) as earlier:
            # 1) Queries beyond those that are tracked at once: both ways, everything is kept.
            for queries in waiting:
                handover = _Handover(self.tracker, session, queries)
                indices = session.backward_indices_of(queries)
                _track_back(_Sweep(self.tracker, session, handover.leave), indices, queries, earlier, on_frame)
                sweep = _Sweep(self.tracker, session, handover.take)
                for frame_idx in session.frame_indices:
                    for query_id, found in sweep.visit(frame_idx, session.frame_indices, queries).items():
                        earlier.put(query_id, frame_idx, found)
                    on_frame(frame_idx)

            # 2) Backward, for the frames before each target.
            handover = _Handover(self.tracker, session, live)
            indices = session.backward_indices_of(live)
            _track_back(_Sweep(self.tracker, session, handover.leave), indices, live, earlier, on_frame)

            # 3) Forward over all frames, taking the earlier ones out again.
            done = {query.query_id for queries in waiting for query in queries}
            tracked = {query.query_id for query in live}
            sweep = _Sweep(self.tracker, session, handover.take)
            for frame_idx in session.frame_indices:
                added = [query for query in session.queries if query.query_id not in done | tracked]
                tracked |= {query.query_id for query in added}
                present = [query for query in session.queries if query.query_id in tracked]
                _check_number(session, present)
                self._catch_up(session, added, sweep, earlier, frame_idx)
                sweep.keep_queries({query.query_id for query in present})
                results = sweep.visit(frame_idx, session.frame_indices, present)
                for query in session.queries:
                    if query.query_id not in results:
                        results[query.query_id] = earlier.pop(query, frame_idx)
                on_frame(frame_idx)
                yield _frame_output(session, frame_idx, results)

    def _catch_up(
        self: Any,
        session: VisaVideoSession,
        added: Sequence[SessionQuery],
        sweep: "_Sweep",
        earlier: EarlierFrames,
        frame_idx: int,
    ) -> None:
        """Bring queries that were added on the way to where `sweep` is, before it visits `frame_idx`."""
        later = [query for query in added if query.frame_selection.target_idx > frame_idx]
        if later:
            latest = max(query.frame_selection.target_idx for query in later)
            indices = range(latest, frame_idx - 1, -session.every)
            _track_back(_Sweep(self.tracker, session), indices, later, earlier, _ignore)
        before = [query for query in added if query.frame_selection.target_idx < frame_idx]
        if before:
            ahead = _Sweep(self.tracker, session)
            first = min(query.frame_selection.target_idx for query in before)
            for idx in range(first, frame_idx, session.every):
                ahead.visit(idx, session.frame_indices[session.frame_indices.index(idx) :], before)
            sweep.join(ahead)

    @torch.no_grad()
    def step(self: Any, session: VisaVideoSession, frame: Any, *, is_last: bool = False) -> VideoFrameOutput:
        """Give a stream its next frame, and track the masks of its queries into it.

        Only frames that have come are looked at. A query that is added now has this frame as its target, and is
        tracked from the next one on; its own mask is in `session.queries`.

        Args:
            session (`VisaVideoSession`): opened with `streaming=True`.
            frame: RGB array or tensor of shape `(H, W, 3)`, uint8, or a PIL image; of one size in all of the stream.
            is_last (`bool`, defaults to `False`): finish the stream with this frame.

        Returns:
            [`VideoFrameOutput`]: of all queries that were added before this frame.

        Raises:
            RuntimeError: if the session is no stream, or the stream was finished.
            ValueError, TypeError: for a frame of another size, or something that is no frame; the stream goes on.
        """
        if not session.is_streaming:
            raise RuntimeError(
                "The session has a video of its own: use `propagate_in_video_iterator`. For live frames, open one "
                "with `streaming=True`."
            )
        _check_number(session, session.queries)
        source: Any = session.source
        pixels = source.append(frame)
        frame_idx = source.num_frames - 1
        if session.stream_state is None:
            session.stream_state = _Sweep(self.tracker, session)
        sweep: _Sweep = session.stream_state
        # Queries that the frame before was the target of begin there, now that something follows.
        starting = [query for query in session.queries if not sweep.knows(query)]
        if starting:
            before = source[frame_idx - 1]
            sweep.start(starting, *sweep.encoded(frame_idx - 1, lambda: before))
        sweep.keep_queries({query.query_id for query in session.queries})
        results = sweep.advance(frame_idx, lambda: pixels, is_last)
        if is_last:
            session.finish()
        return _frame_output(session, frame_idx, results)


def tracking_size(height: int, width: int, input_size: int | None) -> tuple[int, int]:
    """Return the size that the tracker sees a frame at: its shorter side becomes `input_size` pixels, if given."""
    if input_size is None:
        return height, width
    shorter = min(height, width)
    return int(height / shorter * input_size), int(width / shorter * input_size)


def prepare_tracker_frame(frame: np.ndarray, size: tuple[int, int], device: Any, dtype: torch.dtype) -> Tensor:
    """Return a frame as the tracker takes it.

    Args:
        frame (`np.ndarray` of shape `(H, W, 3)`, uint8): RGB.
        size (`tuple[int, int]`): height and width to resize to, bilinear, without antialiasing, as in XMem.
        device, dtype: where and what the result is.

    Returns:
        `torch.Tensor` of shape `(3, *size)`: normalised with ImageNet's mean and standard deviation.
    """
    pixels = torch.from_numpy(frame).to(device).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return _resized((pixels - mean) / std, size).to(dtype)


def highest_plane(planes: Tensor) -> Tensor:
    """Return `planes.argmax(dim=0)`, (C, H, W) -> (H, W), the first of equal ones.

    Plane by plane: PyTorch's own argmax over the first dimension costs half of a small tracker's step on a CPU.
    """
    highest = planes[0]
    owner = torch.zeros_like(highest, dtype=torch.int64)
    for idx in range(1, len(planes)):
        owner = owner.masked_fill(planes[idx] > highest, idx)
        highest = torch.maximum(highest, planes[idx])
    return owner


def _resized(planes: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize (C, H, W) to (C, *size)."""
    if planes.shape[-2:] == size or not len(planes):
        return planes
    align_corners = False if mode == "bilinear" else None
    return F.interpolate(planes[None], size, mode=mode, align_corners=align_corners)[0]


class _TrackGroup:
    """Queries with one target on their way in one direction: they share what is remembered of frames.

    Their memory frames are the same, hence keys, shrinkage, selection, what each position reads, how much each element
    is used, and so what is consolidated and dropped.
    """

    def __init__(self, tracker: Any, session: VisaVideoSession, queries: Sequence[SessionQuery]) -> None:
        size = tracking_size(session.height, session.width, tracker.config.input_size)
        self._tracker, self._session = tracker, session
        self._memory = tracker.init_memory()
        # Each query with the places of those of its objects that are tracked.
        self._tracked: list[tuple[SessionQuery, list[int]]] = []
        self._empty: list[SessionQuery] = []
        masks = []
        for query in queries:
            small = _resized(query.target_masks.to(tracker.device, torch.float32), size, mode="nearest")
            # An object without a pixel cannot be tracked; it stays empty beside the others.
            rows = [row for row in range(len(small)) if small[row].any()]
            if rows:
                self._tracked.append((query, rows))
                masks.append(small[rows])
            else:
                self._empty.append(query)
        self._masks = torch.cat(masks) if masks else None

    def __len__(self) -> int:
        return len(self._tracked) + len(self._empty)

    @property
    def is_tracking(self) -> bool:
        """Whether there is anything to track."""
        return bool(self._tracked)

    @property
    def _sizes(self) -> list[int]:
        return [len(rows) for _, rows in self._tracked]

    def begin(self, frame: Tensor, features: Any) -> None:
        """Memorise the target frame, (3, h, w), with the masks."""
        self._tracker.step_queries(
            self._memory,
            frame,
            self._sizes,
            self._masks,
            features=features,
            max_queries=self._session.max_queries_per_batch,
        )
        self._masks = None

    def keep(self, query_ids: Iterable[int]) -> None:
        """Forget all queries but these."""
        kept: list[tuple[SessionQuery, list[int]]] = []
        places: list[int] = []
        first = 0
        for query, rows in self._tracked:
            if query.query_id in query_ids:
                kept.append((query, rows))
                places += range(first, first + len(rows))
            first += len(rows)
        if kept and len(kept) < len(self._tracked):
            self._memory.keep_objects(places)
        self._tracked = kept
        self._empty = [query for query in self._empty if query.query_id in query_ids]

    def advance(self, frame: Tensor, features: Any, is_last: bool) -> dict[int, Found]:
        """Track into the next frame, (3, h, w); what is found of each query, on the CPU."""
        probs = self._tracker.step_queries(
            self._memory,
            frame,
            self._sizes,
            is_last=is_last,
            features=features,
            max_queries=self._session.max_queries_per_batch,
        )
        size = (self._session.height, self._session.width)
        probs = [_resized(of_query, size) for of_query in probs]  # (1 + tracked, H, W) each
        owners, scores = [], []
        for of_query in probs:
            owner = highest_plane(of_query)
            channels = torch.arange(1, len(of_query), device=owner.device)[:, None, None]
            owners.append(owner.short())
            scores.append(mask_scores(owner == channels, of_query[1:]))
        # One transfer each for all.
        all_owners = torch.stack(owners).cpu()
        all_scores = torch.cat(scores).cpu().split(self._sizes)
        results = {}
        for (query, rows), owner, score, of_query in zip(self._tracked, all_owners, all_scores, probs, strict=True):
            found = self._nothing(query)
            found.scores[rows] = score
            for channel, row in enumerate(rows, start=1):
                found.masks[row] = owner == channel
                if found.probs is not None:
                    found.probs[row] = of_query[channel]
            results[query.query_id] = found
        return results

    def nothing(self) -> dict[int, Found]:
        """What is found of queries without anything to track."""
        return {query.query_id: self._nothing(query) for query in self._empty}

    def _nothing(self, query: SessionQuery) -> Found:
        shape = query.target_masks.shape
        probs = torch.zeros(shape) if self._session.want_probs else None
        return Found(torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[0]), probs)


class _Sweep:
    """All queries of one direction on their way, each from its target on.

    Frames are read from the first one that something is tracked from. `features_of` makes the tracker's features of a
    frame, given its index and the frame, (3, h, w).
    """

    def __init__(
        self, tracker: Any, session: VisaVideoSession, features_of: Callable[[int, Tensor], Any] | None = None
    ) -> None:
        self._tracker, self._session = tracker, session
        self._features_of = features_of or (lambda _, frame: tracker.encode_frame(frame))
        self._groups: list[_TrackGroup] = []
        self._known: set[int] = set()
        self._frames: Iterator[tuple[int, np.ndarray]] | None = None
        self._encoded: tuple[int, Tensor, Any] | None = None

    def visit(self, frame_idx: int, frame_indices: range, queries: Sequence[SessionQuery]) -> dict[int, Found]:
        """Go on to a frame of `frame_indices`, where some of `queries` begin; return what is found of those begun.

        The target frame of a query has the model's own masks.
        """
        starting = [query for query in queries if query.frame_selection.target_idx == frame_idx]
        is_last = frame_idx == frame_indices[-1]

        def read() -> np.ndarray:
            return self._read(frame_idx, frame_indices)

        results = self.advance(frame_idx, read, is_last)
        for query in starting:
            probs = None if query.target_probs is None else query.target_probs.clone()
            results[query.query_id] = Found(query.target_masks.clone(), query.target_frame_scores.clone(), probs)
        if starting and not is_last:
            if any(query.target_masks.any() for query in starting):
                self.start(starting, *self.encoded(frame_idx, read))
            else:
                self._groups.append(_TrackGroup(self._tracker, self._session, starting))
        return results

    def start(self, queries: Sequence[SessionQuery], frame: Tensor, features: Any) -> None:
        """Begin with queries whose target is `frame`, (3, h, w)."""
        group = _TrackGroup(self._tracker, self._session, queries)
        if group.is_tracking:
            group.begin(frame, features)
        self._groups.append(group)
        self._known.update(query.query_id for query in queries)

    def knows(self, query: SessionQuery) -> bool:
        """Whether a query has begun."""
        return query.query_id in self._known

    def advance(self, frame_idx: int, read: Callable[[], np.ndarray], is_last: bool) -> dict[int, Found]:
        """Track all queries that have begun into a frame, which is read only if there is something to track."""
        results: dict[int, Found] = {}
        for group in self._groups:
            results |= group.nothing()
            if group.is_tracking:
                results |= group.advance(*self.encoded(frame_idx, read), is_last)
        return results

    def encoded(self, frame_idx: int, read: Callable[[], np.ndarray]) -> tuple[Tensor, Any]:
        """A frame as the tracker takes it, and its features: one computation for all queries."""
        if self._encoded is None or self._encoded[0] != frame_idx:
            tracker, session = self._tracker, self._session
            size = tracking_size(session.height, session.width, tracker.config.input_size)
            frame = prepare_tracker_frame(read(), size, tracker.device, tracker.dtype)
            self._encoded = frame_idx, frame, self._features_of(frame_idx, frame)
        return self._encoded[1], self._encoded[2]

    def keep_queries(self, query_ids: set[int]) -> None:
        """Forget the queries that have begun, but for these."""
        for group in self._groups:
            group.keep(query_ids)
        self._groups = [group for group in self._groups if len(group)]

    def join(self, other: "_Sweep") -> None:
        """Take over the queries of another sweep, which stands at the same frame."""
        self._groups += other._groups

    def _read(self, frame_idx: int, frame_indices: range) -> np.ndarray:
        if self._frames is None:
            self._frames = self._session.source.iterate(frame_idx, frame_indices.stop, frame_indices.step)
        # Frames in which nothing was tracked are passed over.
        return next(frame for idx, frame in self._frames if idx == frame_idx)


class _Handover:
    """Tracker features of frames that both sweeps go through: left by the backward one, taken by the forward one.

    Those are the frames from the first to the last target, of which a bounded number is left.
    """

    def __init__(self, tracker: Any, session: VisaVideoSession, queries: Sequence[SessionQuery]) -> None:
        targets = [query.frame_selection.target_idx for query in queries if query.target_masks.any()]
        self._tracker = tracker
        self._first = min(targets, default=0)
        self._room = 0 if session.mode == "published" else session.max_cached_tracker_frames
        self._left: dict[int, Any] = {}

    def leave(self, frame_idx: int, frame: Tensor) -> Any:
        """Compute the features of a frame, and leave them if the forward sweep will want them."""
        features = self._tracker.encode_frame(frame)
        if frame_idx >= self._first and len(self._left) < self._room:
            self._left[frame_idx] = features
        return features

    def take(self, frame_idx: int, frame: Tensor) -> Any:
        """Take the features of a frame, or compute them."""
        features = self._left.pop(frame_idx, None)
        return self._tracker.encode_frame(frame) if features is None else features


def _track_back(
    sweep: _Sweep,
    indices: range,
    queries: Sequence[SessionQuery],
    earlier: EarlierFrames,
    on_frame: Callable[[int], None],
) -> None:
    """Track backward through `indices`, and keep what is found before each target."""
    targets = {query.query_id: query.frame_selection.target_idx for query in queries}
    for frame_idx in indices:
        for query_id, found in sweep.visit(frame_idx, indices, queries).items():
            if frame_idx < targets[query_id]:
                earlier.put(query_id, frame_idx, found)
        on_frame(frame_idx)


def _frame_output(session: VisaVideoSession, frame_idx: int, results: dict[int, Found]) -> VideoFrameOutput:
    """Put what was found into the order of the session's queries."""
    query_ids = tuple(query.query_id for query in session.queries)
    ordered = [results[query_id] for query_id in query_ids]
    return VideoFrameOutput(
        frame_idx=frame_idx,
        query_ids=query_ids,
        masks=[found.masks for found in ordered],
        scores=[found.scores for found in ordered],
        mask_probs=[found.probs for found in ordered if found.probs is not None] if session.want_probs else None,
    )


def _check_number(session: VisaVideoSession, queries: Sequence[SessionQuery]) -> None:
    """Refuse more queries than the tracker is to hold at once."""
    if len(queries) > session.max_tracked_queries:
        advice = "Remove some" if session.is_streaming else "Propagate again, and they go through the video in turns"
        raise RuntimeError(
            f"{len(queries)} queries would be tracked at once, but `max_tracked_queries` is "
            f"{session.max_tracked_queries}. {advice}, or raise it if memory allows."
        )


def _ignore(_: int) -> None:
    """Do nothing with a frame's index."""
