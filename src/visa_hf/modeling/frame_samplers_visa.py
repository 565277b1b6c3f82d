"""Frame samplers: whoever looks at a video and a query, and says which frame to segment.

One small interface: a sampler is any callable `sampler(view, query) -> FrameSelection`, where `view` is a
[`VideoView`]. Here are the interface and the samplers that ask no language model; those that do, as in VISA's paper
(section 3.2), are in text_guided_sampling_visa.py. How references are spread is counted in frame_sampling_visa.py.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .frame_sampling_visa import frame_at_share, select_frames, spread_frames
from .frame_source_visa import FrameSource
from .outputs_visa import FrameSelection
from .prompts_visa import fold_query


@dataclass(frozen=True)
class VideoView:
    """What a frame sampler is shown of a video; frames are counted from the beginning of the whole video.

    Args:
        source ([`FrameSource`]): the whole video, as `open_frames` returns it.
        first_frame, stop_frame (`int`): the part that is used, `[first_frame, stop_frame)`; all of it by default.
        num_reference_frames, strategy: how `select` chooses references, as of `select_frames`.
        targets (`range`, *optional*): frames of the part that can be a target; all by default.
        session (*optional*): the [`VisaVideoSession`] for which frames are chosen.
    """

    source: FrameSource
    first_frame: int = 0
    stop_frame: int | None = None
    num_reference_frames: int = 12
    strategy: str = "global_local"
    targets: range | None = None
    session: Any = None

    @property
    def frame_indices(self) -> range:
        """Frames of the part, ascending."""
        return range(self.first_frame, self.source.num_frames if self.stop_frame is None else self.stop_frame)

    @property
    def timestamps(self) -> list[float] | None:
        """Seconds at which each frame of the part is shown; `None` if the video has no times."""
        times, frames = self.source.timestamps, self.frame_indices
        return None if times is None else times[frames.start : frames.stop]

    def spread(self, count: int) -> tuple[int, ...]:
        """Return the middle frame of each of `count` equal parts of the part; all frames if it has fewer."""
        return tuple(self.first_frame + idx for idx in spread_frames(len(self.frame_indices), count))

    def frames(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Read frames: arrays of shape `(H, W, 3)`, uint8, RGB, in the order of `indices`."""
        return self.source.get_many(indices)

    def at_share(self, share: float) -> int:
        """Return the frame at `share` in [0, 1] of the part, as VISA counts: min(int(T * share), T - 1)."""
        return self.first_frame + frame_at_share(len(self.frame_indices), share)

    def select(self, target_idx: int, reason: str, scores: Sequence[tuple[int, float]] = ()) -> FrameSelection:
        """Return the selection of that target, or of the nearest frame that can be one, with references around it."""
        targets = self.frame_indices if self.targets is None else self.targets
        nearest = min(targets, key=lambda idx: (abs(idx - target_idx), idx))
        selection = select_frames(
            self.source.num_frames,
            target_frame=nearest,
            num_reference_frames=self.num_reference_frames,
            strategy=self.strategy,
            start=self.frame_indices.start,
            stop=self.frame_indices.stop,
        )
        if nearest != target_idx:
            reason += f", frame {nearest} is the nearest one that is tracked"
        return replace(selection, reason=reason, scores=tuple(scores))


FrameSampler = Callable[[VideoView, str], FrameSelection]


def sample_frames(sampler: FrameSampler, view: VideoView, query: str) -> FrameSelection:
    """Let a sampler choose, and refuse what it must not choose.

    Raises:
        TypeError: if it returns anything but a [`FrameSelection`].
        ValueError: if it chose for a video of another length, or a frame outside the part that is used.
    """
    selection = sampler(view, query)
    name = type(sampler).__name__
    if type(selection).__name__ != "FrameSelection":  # by name: remote code has a class of its own
        raise TypeError(
            f"The sampler `{name}` returned {selection!r} but must return a `FrameSelection`, as "
            "`view.select(target_idx, reason)` makes one."
        )
    if selection.num_frames != view.source.num_frames:
        raise ValueError(
            f"The sampler `{name}` chose frames of a video of {selection.num_frames} frames but this one has "
            f"{view.source.num_frames}. Count frames from the beginning of the whole video (`view.source.num_frames`)."
        )
    frames = view.frame_indices
    for what, idx in (("target", selection.target_idx), *(("reference", idx) for idx in selection.reference_idx)):
        if idx not in frames:
            raise ValueError(
                f"The sampler `{name}` chose frame {idx} as a {what} but the part of the video that is used has "
                f"frames {frames.start} to {frames.stop - 1}. Choose among `view.frame_indices`."
            )
    return selection


@dataclass(frozen=True)
class ShareFrameSampler:
    """The frame at a fixed share of the video, whatever the query: 0.0 is the first, 0.5 the middle, 1.0 the last.

    Args:
        share (`float`, defaults to 0.5): in [0, 1].

    Raises:
        ValueError: if `share` is outside [0, 1].
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        frame_at_share(1, self.share)

    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the frame at the share; `query` is not looked at."""
        return view.select(view.at_share(self.share), f"at {100 * self.share:g}% of the video")


class SimilarityFrameSampler:
    """The frame that is most similar to the query, to a model of images and texts such as CLIP or SigLIP.

    Scores are the softmax, over the frames looked at, of the model's `logits_per_image`. Simple and quick; it sees no
    order of frames and does not reason.

    Args:
        model (`CLIPModel`, `SiglipModel`, ...): of transformers; called with `input_ids`, `pixel_values`, ...
        processor (`CLIPProcessor`, `SiglipProcessor`, ...): of that model.
        max_frames (`int`, defaults to 256): frames looked at, at equal distances in longer videos.
        batch_size (`int`, defaults to 16): frames read and encoded together; it bounds the memory needed.

    Raises:
        ValueError: for a `max_frames` or `batch_size` below 1.
    """

    def __init__(self, model: Any, processor: Any, *, max_frames: int = 256, batch_size: int = 16) -> None:
        for name, value in (("max_frames", max_frames), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"`{name}` is {value} but must be at least 1.")
        self.model, self.processor = model, processor
        self.max_frames, self.batch_size = max_frames, batch_size

    @torch.no_grad()
    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the most similar frame, the first one of equals.

        Raises:
            RuntimeError: if the model gives NaN or infinite similarities.
        """
        frames = view.spread(self.max_frames)
        # As SigLIP was trained; CLIP masks its padding.
        text = self.processor.tokenizer(
            query.strip(),
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        logits = []
        for start in range(0, len(frames), self.batch_size):
            images = [Image.fromarray(frame) for frame in view.frames(frames[start : start + self.batch_size])]
            pixels = self.processor.image_processor(images, return_tensors="pt")
            pixels = pixels.to(self.model.device, self.model.dtype)
            logits.append(self.model(**text, **pixels).logits_per_image[:, 0].float().cpu())
        similarity = torch.cat(logits)
        if not similarity.isfinite().all():
            raise RuntimeError(
                "The similarity model gave NaN or infinite numbers. Load it in another number format: try float32 or "
                "bfloat16 (`dtype`)."
            )
        scores = similarity.softmax(dim=0)
        best = int(scores.argmax())
        reason = f"most similar of {len(frames)} frames (p={float(scores[best]):.2f})"
        return view.select(frames[best], reason, tuple(zip(frames, scores.tolist(), strict=True)))


class PercentagesFrameSampler:
    """Shares of videos that were computed before and stored in a JSON file.

    Two layouts. VISA's published one: `{"videos": {video: {"expressions": {id: {"exp": query, "tp": share}}}}}`, with
    shares in [0, 1]. And `{video: {query or expression id: number}}`: if all numbers of the file are at most 1 they
    are shares, else all are percentages. A query that is not there as it is, is compared lower-cased, with white space
    folded.

    Args:
        path (`str` or `Path`): the file, UTF-8. It is read once.
        video (`str`, *optional*): name of the video in the file; by default `source.name`, the name of the file
            without suffix, or of the folder.
        expression_id (`str`, *optional*): looked up instead of the query.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON of either layout, or holds a number outside the range.
    """

    def __init__(self, path: str | Path, *, video: str | None = None, expression_id: str | None = None) -> None:
        self.path, self.video, self.expression_id = Path(path), video, expression_id
        if not self.path.is_file():
            raise FileNotFoundError(f"There is no percentages file `{self.path}`. Check the path.")
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"`{self.path}` is not a JSON file in UTF-8: {error}.") from error
        self._expressions = _expressions_of(data, self.path)

    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the frame at the stored share.

        Raises:
            ValueError: if the file lacks the video or the query, or has several numbers for the query.
        """
        video = view.source.name if self.video is None else self.video
        if video not in self._expressions:
            raise ValueError(
                f"The percentages file `{self.path}` has no video {video!r}{_nearest(video, self._expressions)}. "
                "Add it, or name another one with `video`."
            )
        stored = self._expressions[video]
        if self.expression_id is not None:
            what, wanted, known = "expression", str(self.expression_id), [each.expression_id for each in stored]
            found = {each.share for each in stored if each.expression_id == wanted}
        else:
            what, wanted, known = "query", query, [each.query for each in stored]
            found = {each.share for each in stored if each.query == query}
            found = found or {each.share for each in stored if fold_query(each.query) == fold_query(query)}
        if not found:
            raise ValueError(
                f"The percentages file `{self.path}` has no {what} {wanted!r} for the video {video!r}"
                f"{_nearest(wanted, known)}. Add it, or name one with `expression_id`."
            )
        if len(found) > 1:
            raise ValueError(
                f"The percentages file `{self.path}` has {len(found)} numbers for the {what} {wanted!r} of the video "
                f"{video!r}: {', '.join(f'{share:g}' for share in sorted(found))}. Name one with `expression_id`."
            )
        (share,) = found
        target = view.at_share(share)
        return view.select(target, f"precomputed: {100 * share:.4g}%", ((target, 1.0),))


@dataclass(frozen=True)
class _Expression:
    """A stored share, in [0, 1], of a query."""

    expression_id: str
    query: str
    share: float


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (the nearest is {nearest[0]!r})" if nearest else ""


def _expressions_of(data: Any, path: Path) -> dict[str, list[_Expression]]:
    """Read both layouts: what is stored, by video."""
    if not isinstance(data, dict):
        raise ValueError(f"`{path}` holds a {type(data).__name__} but must hold an object: {{video: {{query: 70}}}}.")
    videos = data.get("videos")
    is_published = isinstance(videos, dict) and all(
        isinstance(video, dict) and "expressions" in video for video in videos.values()
    )
    by_video: dict[str, Any] = videos if is_published and videos is not None else data
    entries: list[tuple[str, str, str, Any]] = []  # video, expression id, query, number
    for video, content in by_video.items():
        expressions = content["expressions"] if is_published else content
        if not isinstance(expressions, dict):
            raise ValueError(
                f"Video {video!r} of `{path}` holds {expressions!r} but must hold an object: {{query: 70}}."
            )
        for name, value in expressions.items():
            if not is_published:
                entries.append((video, name, name, value))
            elif isinstance(value, dict) and isinstance(value.get("exp"), str) and "tp" in value:
                entries.append((video, name, value["exp"], value["tp"]))
            else:
                raise ValueError(f'Expression {name!r} of video {video!r} in `{path}` needs "exp" and "tp".')
    for video, name, _, value in entries:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
            raise ValueError(
                f"{name!r} of video {video!r} in `{path}` is {value!r} but must be a share from 0 to 1, or a "
                "percentage from 0 to 100."
            )
    largest = max((value for *_, value in entries), default=0)
    if is_published and largest > 1:
        raise ValueError(f'A "tp" in `{path}` is {largest} but must be a share from 0 to 1.')
    mixed = [(name, value) for _, name, _, value in entries if largest > 1 and 0 < value < 1]
    if mixed:
        raise ValueError(
            f"`{path}` holds percentages (up to {largest}), and {mixed[0][1]} for {mixed[0][0]!r}, which looks like a "
            "share. Write all as shares from 0 to 1, or all as percentages."
        )
    found: dict[str, list[_Expression]] = {video: [] for video in by_video}
    for video, expression_id, query, value in entries:
        found[video].append(_Expression(expression_id, query, value / 100 if largest > 1 else float(value)))
    return found
