"""One video, several queries: the state of a session, and the verbs that a model works on it with.

`VisaVideoSession` holds the video, the queries and their masks on the target frames; `VisaVideoMixin` gives the model
`add_query` and `propagate_in_video_iterator`, named after the video sessions of transformers' SAM 2. The mask of a
target frame is carried through the video in both directions by XMem (https://huggingface.co/papers/2207.07115), fed
as in its own evaluation. Writing files and drawing are not done here.
"""

import dataclasses
import math
import operator
import tempfile
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .frame_sampling_visa import frames_between, select_frames
from .frame_source_visa import open_frames
from .outputs_visa import FrameSelection, PackedMask, VideoFrameOutput

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class SessionQuery:
    """One query of a session, and what the model made of it on the target frame.

    Args:
        query_id (`int`): number of the query in its session, from 0.
        query (`str`): the sentence, as given; empty for a mask given without one.
        answer (`str`): the model's text; empty when a first mask was given.
        frame_selection (`FrameSelection`): target and reference frames, counted in the whole video.
        target_masks (`torch.Tensor` of shape `(K, H, W)`, bool, CPU): masks on the target frame, in pixels of the
            source video, one per [SEG] of the answer; they do not overlap.
        target_probs (`torch.Tensor` of shape `(K, H, W)`, float32, in [0, 1], CPU): the same as probabilities;
            `None` unless the session wants them.
        scores (`tuple[float, ...]`): the model's estimate of each mask's IoU; 1.0 for masks that were given.
    """

    query_id: int
    query: str
    answer: str
    frame_selection: FrameSelection
    target_masks: Tensor = field(repr=False)
    target_probs: Tensor | None = field(repr=False)
    scores: tuple[float, ...]


class VisaVideoSession:
    """A video opened for segmentation, with the queries asked about it. State only: the model has the verbs.

    Frames are counted from the beginning of the video, also when only a part of it is used. The video is read when it
    is needed; at most `max_cached_frames` of its frames are in memory.

    Args:
        video: what `open_frames` takes: a path of a video, image or folder, an array, a list of images.
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
        max_cached_frames (`int`, defaults to 64): decoded frames held at any time.

    Attributes:
        source (`FrameSource`): the whole video.
        first_frame, stop_frame (`int`): the part that is used, `[first_frame, stop_frame)`.
        queries (`list[SessionQuery]`): the queries so far; a query's number is its place here.

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
    ) -> None:
        if not isinstance(threshold, int | float | np.number):
            raise TypeError(f"`threshold` is {threshold!r} but must be a number between 0 and 1.")
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is {threshold} but must be a probability between 0 and 1, both left out.")
        every = _whole_number("every", every)
        if every < 1:
            raise ValueError(f"`every` is {every} but must be at least 1: 1 tracks all frames, 2 every other one.")
        if max_frames is not None:
            max_frames = _whole_number("max_frames", max_frames)
        for name, position in (("start", start), ("end", end)):
            if not (position is None or isinstance(position, str | int | float | np.number)):
                raise TypeError(f'`{name}` is {position!r} but must be seconds, like 2.5, or a frame, like "120f".')
        self.processor = processor
        self.every = every
        self.threshold = threshold
        self.want_probs = want_probs
        self.queries: list[SessionQuery] = []
        self.source = open_frames(video, fps=fps, allow_truncated=allow_truncated, max_cached_frames=max_cached_frames)
        try:
            self.first_frame, self.stop_frame = frames_between(
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
    def height(self) -> int:
        """Height of the frames, pixels."""
        return self.source.height

    @property
    def width(self) -> int:
        """Width of the frames, pixels."""
        return self.source.width

    @property
    def frame_indices(self) -> range:
        """Frames that are segmented, ascending: all of the part, or each N-th around the target.

        Raises:
            RuntimeError: if `every` is above 1 and there is no query yet, whose target decides which frames these are.
        """
        if self.every == 1:
            return range(self.first_frame, self.stop_frame)
        if not self.queries:
            raise RuntimeError("Which frames are tracked depends on the target frame. Call `add_query` first.")
        target_idx = self.queries[0].frame_selection.target_idx
        return range(self.first_frame + (target_idx - self.first_frame) % self.every, self.stop_frame, self.every)

    @property
    def backward_indices(self) -> range:
        """Frames of the backward sweep, descending: from the latest target that has a mask to the first frame."""
        first = self.frame_indices[0]
        targets = [query.frame_selection.target_idx for query in self.queries if query.target_masks.any()]
        latest = max(targets, default=first)
        return range(latest, first - 1 if latest > first else latest, -self.every)

    @property
    def num_steps(self) -> int:
        """Frames that propagation goes through, in both sweeps."""
        return len(self.backward_indices) + len(self.frame_indices)

    def close(self) -> None:
        """Release the video. Using the session afterwards is an error; closing twice is not."""
        self.source.close()

    def __enter__(self) -> "VisaVideoSession":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class VisaVideoMixin:
    """The verbs of a video session, for the model, whose `tracker` and `generate_masks` they use."""

    @torch.no_grad()
    def add_query(
        self: Any,
        session: VisaVideoSession,
        query: str | None = None,
        *,
        target_frame: int | None = None,
        reference_frames: Sequence[int] | None = None,
        num_reference_frames: int | None = None,
        first_mask: Tensor | np.ndarray | None = None,
        **generate_kwargs: Any,
    ) -> int:
        """Ask a query about the session's video, and keep its masks on the target frame.

        Args:
            session (`VisaVideoSession`): the video.
            query (`str`, *optional*): what to segment. With a `first_mask` it is only a name.
            target_frame (`int`, *optional*): frame that is segmented by the model; the middle one by default, the
                first one with a `first_mask`.
            reference_frames (`Sequence[int]`, *optional*): frames that the model sees besides; chosen by the
                configuration's sampler by default.
            num_reference_frames (`int`, *optional*): how many the sampler chooses; the configuration's by default.
            first_mask (`torch.Tensor` or `np.ndarray` of shape `(H, W)` or `(K, H, W)`, bool or two values of which
                one is 0, *optional*): masks of K objects on the target frame, which must not overlap. The language
                model is then not asked.
            generate_kwargs: for `generate_masks` (`max_new_tokens`, `do_sample`, ...); greedy decoding by default.

        Returns:
            `int`: the query's number in the session.

        Raises:
            ValueError: for frames outside the video, a query or mask that cannot be used, or a tracker that is needed
                but missing.
            TypeError: for a query that is no string, or a frame that is no whole number.
            RuntimeError: if the model computes numbers that are not finite.
        """
        _check_words(query, first_mask is not None)
        selection = _selected(
            session,
            target_frame,
            reference_frames,
            num_reference_frames,
            first_mask is not None,
            default_number=self.config.num_reference_frames,
            strategy=self.config.reference_strategy,
        )
        _check_target(session, self.tracker, selection)
        if first_mask is not None:
            masks = _given_masks(first_mask, session.height, session.width)
            answer, probs, scores = "", masks.float(), (1.0,) * len(masks)
        else:
            output = self._ask(session, query, selection, generate_kwargs)
            mask_logits = output.mask_logits[0].float().cpu()
            answer = session.processor.batch_decode(output.answer_ids)[0]
            masks, probs = masks_from_logits(mask_logits, session.threshold), mask_logits.sigmoid()
            scores = tuple(output.iou_scores[0].tolist())
            _check_finite(mask_logits, scores)
        query_id = len(session.queries)
        kept_probs = probs if session.want_probs else None
        session.queries.append(SessionQuery(query_id, query or "", answer, selection, masks, kept_probs, scores))
        return query_id

    def _ask(
        self: Any,
        session: VisaVideoSession,
        query: str | None,
        selection: FrameSelection,
        generate_kwargs: dict[str, Any],
    ) -> Any:
        """Return the `VisaGenerateOutput` of one query about the selected frames."""
        *references, target = session.source.get_many([*selection.reference_idx, selection.target_idx])
        inputs = session.processor(target_frame=target, reference_frames=references, query=query)
        return self.generate_masks(**inputs, **generate_kwargs)

    def propagate_in_video_iterator(
        self: Any, session: VisaVideoSession, *, on_frame: Callable[[int], None] | None = None
    ) -> Iterator[VideoFrameOutput]:
        """Carry the masks of all queries through the video and yield its frames in order, each complete.

        First backward from the latest target to the first frame, keeping only packed masks, then forward. The target
        frame of a query has the model's own masks.

        Args:
            session (`VisaVideoSession`): with at least one query.
            on_frame (`Callable[[int], None]`, *optional*): called with its index after each frame of either sweep;
                there are `session.num_steps` of them.

        Returns:
            An iterator of [`VideoFrameOutput`], one per frame of `session.frame_indices`. The session may gain
            queries, or be propagated again, afterwards.

        Raises:
            RuntimeError: if the session has no query.
            ValueError: while iterating, if a frame of the video is damaged.
        """
        if not session.queries:
            raise RuntimeError("The session has no query. Call `add_query` first.")
        return self._propagate(session, tuple(session.queries), on_frame or _ignore)

    @torch.no_grad()
    def _propagate(
        self: Any, session: VisaVideoSession, queries: tuple[SessionQuery, ...], on_frame: Callable[[int], None]
    ) -> Iterator[VideoFrameOutput]:
        with _EarlierFrames(session.want_probs) as earlier:
            # 1) Backward, for the frames before each target.
            for frame_idx, results in _sweep(self.tracker, session, queries, session.backward_indices):
                for query in queries:
                    if frame_idx < query.frame_selection.target_idx and query.query_id in results:
                        earlier.put(query.query_id, frame_idx, *results[query.query_id])
                on_frame(frame_idx)
            # 2) Forward over all frames, taking the earlier ones out again.
            for frame_idx, results in _sweep(self.tracker, session, queries, session.frame_indices):
                for query in queries:
                    if query.query_id not in results:
                        results[query.query_id] = earlier.pop(query, frame_idx)
                ordered = [results[query.query_id] for query in queries]
                on_frame(frame_idx)
                yield VideoFrameOutput(
                    frame_idx=frame_idx,
                    query_ids=tuple(query.query_id for query in queries),
                    masks=[masks for masks, _ in ordered],
                    mask_probs=[probs for _, probs in ordered if probs is not None] if session.want_probs else None,
                )


def check_query(
    session: VisaVideoSession,
    query: str | None = None,
    *,
    target_frame: int | None = None,
    reference_frames: Sequence[int] | None = None,
    num_reference_frames: int | None = None,
    first_mask: Tensor | np.ndarray | None = None,
) -> None:
    """Refuse what `add_query` would refuse, as far as that can be known without a model.

    Args: as of `VisaVideoMixin.add_query`. The session is left as it is.

    Raises:
        ValueError, TypeError: as `add_query` does.
    """
    has_mask = first_mask is not None
    _check_words(query, has_mask)
    _selected(session, target_frame, reference_frames, num_reference_frames, has_mask)
    if first_mask is not None:
        _given_masks(first_mask, session.height, session.width)


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: it is empty, or all blanks, control characters or invisible ones."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text)


def masks_from_logits(mask_logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the masks of one query's objects on the target frame: a pixel belongs to one object at most.

    Args:
        mask_logits (`torch.Tensor` of shape `(K, H, W)`): any real values.
        threshold (`float`, defaults to 0.5): probability in (0, 1) above which a pixel belongs to an object. Where
            several objects claim it, the one with the largest logit has it.

    Returns:
        `torch.Tensor` of shape `(K, H, W)`, bool.
    """
    masks = mask_logits > math.log(threshold / (1 - threshold))  # 0.0 at the default
    if len(masks) < 2:
        return masks
    objects = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks & (mask_logits.argmax(dim=0) == objects)


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


def _resized(planes: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Resize (C, H, W) to (C, *size)."""
    if planes.shape[-2:] == size or not len(planes):
        return planes
    align_corners = False if mode == "bilinear" else None
    return F.interpolate(planes[None], size, mode=mode, align_corners=align_corners)[0]


class _Track:
    """The objects of one query on their way through the video in one direction, with a memory of their own."""

    def __init__(self, tracker: Any, target_masks: Tensor, size: tuple[int, int]) -> None:
        masks = _resized(target_masks.to(tracker.device, torch.float32), size, mode="nearest")
        # An object without a pixel cannot be tracked; it stays empty beside the others.
        self.rows = [row for row in range(len(masks)) if masks[row].any()]
        self._masks = masks[self.rows]
        self._shape = target_masks.shape
        self._tracker = tracker
        self._memory = tracker.init_memory()

    def begin(self, frame: Tensor, features: Any) -> None:
        """Memorise the target frame, (3, h, w), with its masks."""
        object_ids = [row + 1 for row in self.rows]
        self._tracker.step(self._memory, frame, self._masks, object_ids, features=features)

    def advance(self, frame: Tensor, features: Any, is_last: bool) -> tuple[Tensor, Tensor]:
        """Track into the next frame, (3, h, w). Returns masks, bool, and probabilities, float32: (K, H, W), CPU."""
        step_probs = self._tracker.step(self._memory, frame, is_last=is_last, features=features)
        step_probs = _resized(step_probs, (self._shape[1], self._shape[2]))  # (1 + tracked, H, W)
        owner = highest_plane(step_probs).cpu()
        masks, probs = self.empty()
        for channel, row in enumerate(self.rows, start=1):
            masks[row] = owner == channel
            probs[row] = step_probs[channel]
        return masks, probs

    def empty(self) -> tuple[Tensor, Tensor]:
        """Masks and probabilities of a frame where nothing is: (K, H, W), CPU."""
        return torch.zeros(self._shape, dtype=torch.bool), torch.zeros(self._shape)


def _sweep(
    tracker: Any, session: VisaVideoSession, queries: tuple[SessionQuery, ...], frame_indices: range
) -> Iterator[tuple[int, dict[int, tuple[Tensor, Tensor | None]]]]:
    """Track all queries through `frame_indices`, ascending or descending.

    Yields each frame's index, and masks and probabilities, (K, H, W), of the queries whose target has been reached, by
    their number. Frames are read from the first one that something is tracked from.
    """
    tracks: dict[int, _Track] = {}
    frames: Iterator[tuple[int, np.ndarray]] | None = None
    for frame_idx in frame_indices:
        is_last = frame_idx == frame_indices[-1]
        results: dict[int, tuple[Tensor, Tensor | None]] = {}
        starting = [query for query in queries if query.frame_selection.target_idx == frame_idx]
        for query in starting:
            target_probs = None if query.target_probs is None else query.target_probs.clone()
            results[query.query_id] = query.target_masks.clone(), target_probs
            if not is_last:
                size = tracking_size(session.height, session.width, tracker.config.input_size)
                tracks[query.query_id] = _Track(tracker, query.target_masks, size)
        if any(track.rows for track in tracks.values()):
            if frames is None:
                frames = session.source.iterate(frame_idx, frame_indices.stop, frame_indices.step)
            # The key encoder's features depend on the frame alone: one computation for all queries.
            frame = prepare_tracker_frame(next(frames)[1], size, tracker.device, tracker.dtype)
            features = tracker.encode_frame(frame)
        for query_id, track in tracks.items():
            if not track.rows:
                results.setdefault(query_id, track.empty())
            elif query_id in results:
                track.begin(frame, features)
            else:
                results[query_id] = track.advance(frame, features, is_last)
        yield frame_idx, results


class _EarlierFrames:
    """What the backward sweep found, until the forward sweep comes by: packed masks, and probabilities in a file.

    Probabilities are kept as 16-bit numbers, rounded to 1/65535.
    """

    def __init__(self, want_probs: bool) -> None:
        self._masks: dict[tuple[int, int], list[PackedMask]] = {}
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._file: Any = None
        if want_probs:
            with _temporary_file_errors():
                self._file = tempfile.TemporaryFile()

    def __enter__(self) -> "_EarlierFrames":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            with _temporary_file_errors():
                self._file.close()

    def put(self, query_id: int, frame_idx: int, masks: Tensor, probs: Tensor | None) -> None:
        """Keep masks (K, H, W), bool, and, if they are wanted, probabilities (K, H, W), float32."""
        self._masks[query_id, frame_idx] = [PackedMask.pack(mask) for mask in masks.numpy()]
        if self._file is not None and probs is not None:
            data = zlib.compress(np.rint(probs.numpy() * 65535).astype(np.uint16).tobytes(), 1)
            with _temporary_file_errors():
                self._places[query_id, frame_idx] = self._file.seek(0, 2), len(data)
                self._file.write(data)

    def pop(self, query: SessionQuery, frame_idx: int) -> tuple[Tensor, Tensor | None]:
        """Take masks and probabilities out again; empty ones for a query that was not tracked."""
        masks = torch.zeros_like(query.target_masks)
        probs = None if self._file is None else torch.zeros(masks.shape)
        for row, packed in enumerate(self._masks.pop((query.query_id, frame_idx), [])):
            masks[row] = torch.from_numpy(packed.unpack())
        place = self._places.pop((query.query_id, frame_idx), None)
        if self._file is not None and place is not None:
            with _temporary_file_errors():
                self._file.seek(place[0])
                data = self._file.read(place[1])
            values = np.frombuffer(zlib.decompress(data), dtype=np.uint16).astype(np.float32) / 65535
            probs = torch.from_numpy(values).reshape(masks.shape)
        return masks, probs


@contextmanager
def _temporary_file_errors() -> Iterator[None]:
    """Say which folder is full or cannot be written, which the system's own message does not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Probabilities cannot be kept in the folder for temporary files, `{tempfile.gettempdir()}`: "
            f"{error.strerror or error}. Free space there, or name another folder in the variable `TMPDIR`."
        ) from error


def _check_words(query: Any, has_mask: bool) -> None:
    """Refuse a query that is no text, or says nothing; beside a mask it is a name, and may be empty."""
    if query is None:
        if not has_mask:
            raise ValueError("Neither `query` nor `first_mask` is given. Say what to segment, or give its mask.")
        return
    if not isinstance(query, str):
        raise TypeError(f"`query` is a {type(query).__name__} but must be a string.")
    if not has_mask and is_blank(query):
        raise ValueError(f"`query` is empty ({query!r}). Say in words what is meant.")


def _check_finite(mask_logits: Tensor, scores: tuple[float, ...]) -> None:
    """Refuse an answer in numbers that are none: its masks would be empty, and look like an answer."""
    if not (mask_logits.isfinite().all() and all(map(math.isfinite, scores))):
        raise RuntimeError(
            "The model gave NaN or infinite numbers instead of masks, as happens where float16 overflows or weights "
            "are damaged. Load it in another number format: try float32 or bfloat16 (`dtype`)."
        )


def _whole_number(name: str, value: Any) -> int:
    """Return `value` as an int after refusing what is no whole number."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"`{name}` is {value!r} but must be a whole number.") from error


def _selected(
    session: VisaVideoSession,
    target_frame: int | None,
    reference_frames: Sequence[int] | None,
    num_reference_frames: int | None,
    has_mask: bool,
    *,
    default_number: int = 12,
    strategy: str = "global_local",
) -> FrameSelection:
    """Check the frames that a query names, and choose the others inside the session's part of the video."""
    part: dict[str, Any] = {"start": session.first_frame, "stop": session.stop_frame}
    if target_frame is not None:
        target_frame = _whole_number("target_frame", target_frame)
    if has_mask and (reference_frames is not None or num_reference_frames is not None):
        raise ValueError(
            "Reference frames and a `first_mask` are given, but with a mask the model is not asked, and looks at no "
            "reference. Leave one of the two out."
        )
    if reference_frames is not None and num_reference_frames is not None:
        raise ValueError(
            f"`reference_frames` and `num_reference_frames` ({num_reference_frames}) are both given, but the number "
            "is for references that are chosen automatically. Leave one of the two out."
        )
    if has_mask:
        target_frame = session.first_frame if target_frame is None else target_frame
        selection = select_frames(session.source.num_frames, target_frame=target_frame, reference_frames=(), **part)
        return dataclasses.replace(selection, reason="a given mask")
    if reference_frames is not None:
        if not isinstance(reference_frames, Iterable):
            raise TypeError(f"`reference_frames` is {reference_frames!r} but must be a list of frame numbers.")
        reference_frames = [_whole_number("reference_frames", idx) for idx in reference_frames]
    if num_reference_frames is not None:
        default_number = _whole_number("num_reference_frames", num_reference_frames)
    return select_frames(
        session.source.num_frames,
        target_frame=target_frame,
        reference_frames=reference_frames,
        num_reference_frames=default_number,
        strategy=strategy,
        **part,
    )


def _check_target(session: VisaVideoSession, tracker: Any, selection: FrameSelection) -> None:
    """Refuse a target that the session's other queries cannot share, and tracking without a tracker."""
    if session.every > 1 and session.queries and selection.target_idx not in session.frame_indices:
        raise ValueError(
            f"The target frame {selection.target_idx} is not among the tracked frames, which are every "
            f"{session.every} frames around frame {session.queries[0].frame_selection.target_idx}, the target of the "
            "session's first query. Give one of those, or open another session."
        )
    if tracker is None and session.stop_frame - session.first_frame > 1:
        raise ValueError(
            f"The model has no tracker, but the video has {session.stop_frame - session.first_frame} frames to carry "
            "masks through. Load a checkpoint with a `tracker_config`, or give a single frame."
        )


def _given_masks(first_mask: Tensor | np.ndarray, height: int, width: int) -> Tensor:
    """Check masks given by a user: (H, W) or (K, H, W) of two values -> (K, H, W), bool, CPU."""
    values = first_mask.detach().cpu().numpy() if isinstance(first_mask, Tensor) else np.asarray(first_mask)
    if values.ndim not in (2, 3) or values.shape[-2:] != (height, width):
        raise ValueError(
            f"`first_mask` has shape {values.shape} but the frames are {height} x {width} pixels (height x width). "
            f"Give a mask of shape ({height}, {width}), or (K, {height}, {width}) for K objects."
        )
    masks = values.reshape(-1, height, width) != 0
    if not len(masks):
        raise ValueError("`first_mask` holds no mask. Give at least one, which may be empty.")
    distinct = np.unique(values[values != 0])
    if len(distinct) > 1 or not (distinct > 0).all():
        raise ValueError(
            f"`first_mask` has the values {', '.join(map(str, distinct[:4]))} beside 0, but one positive value is "
            "needed. Give one bool mask per object."
        )
    if (masks.sum(axis=0) > 1).any():
        raise ValueError("The masks of `first_mask` overlap, but a pixel can belong to one object only.")
    return torch.from_numpy(masks)


def _ignore(_: int) -> None:
    """Do nothing with a frame's index."""
