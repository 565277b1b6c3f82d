"""Clips to train a tracker on: some frames of a video in order, and the masks of some objects of its first one.

Rows are those of any builder's configs "expressions" (which frames a video has) and "masks". What a clip shows is
drawn from the generator that it is given, so that `TrainingSamples` makes clip n a function of (seed, n). How far
frames lie apart, and how many there are, grows with n (https://huggingface.co/papers/2207.07115, appendix).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor

from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.frame_store import FrameStore
from visa_hf.datasets_scripts.row_index import join_masks
from visa_hf.datasets_scripts.samples import ExpressionSource, Source
from visa_hf.modeling.video_tracking_visa import IMAGENET_MEAN, IMAGENET_STD
from visa_hf.rle import decode_mask, mask_area

# An object of fewer pixels, in the first frame as it is cut out, teaches nothing.
_MIN_PIXELS = 16
_MAX_TRIES = 10
# Of uint8; other objects of a frame are background.
_MOST_LABELS = 255


@dataclass(frozen=True)
class ClipOptions:
    """What clips are like. The defaults are XMem's for videos.

    Attributes:
        num_frames (`int`): frames of a clip, at least 2.
        first_num_frames (`int`, *optional*): frames of the first clips; their number grows to `num_frames` over
            `growth` of the training. By default it does not grow.
        max_gap (`int`): greatest step from a frame to the next; at the ends of a video a clip turns round.
        first_max_gap (`int`): the same, of the first clips; it grows likewise.
        growth (`float`, in [0, 1]): share of the training in which both grow.
        max_objects (`int`): most objects of a clip; others are background.
        num_memory_frames (`int`): most frames of a clip that are memorised, the first one included.
        size (`int`): side of the square that is cut out, in pixels; a multiple of 16.
        min_scale (`float`, in (0, 1]): least side of the square, before it is resized, in parts of the frame's
            shorter side; the greatest is 1.
        flip_probability (`float`, in [0, 1]): share of the clips that are mirrored.
        jitter (`float`, in [0, 1)): brightness, contrast and saturation of a clip change by up to this factor.
    """

    num_frames: int = 8
    first_num_frames: int | None = None
    max_gap: int = 15
    first_max_gap: int = 5
    growth: float = 0.3
    max_objects: int = 3
    num_memory_frames: int = 4
    size: int = 384
    min_scale: float = 0.5
    flip_probability: float = 0.5
    jitter: float = 0.1

    def __post_init__(self) -> None:
        least = {"num_frames": 2, "first_num_frames": 2, "max_gap": 1, "first_max_gap": 1, "max_objects": 1}
        for name, bound in {**least, "num_memory_frames": 1, "size": 16}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"`{name}` is {value} but must be at least {bound}.")
        if self.size % 16:
            raise ValueError(f"`size` is {self.size} but must be a multiple of 16.")
        if self.first_num_frames is not None and self.first_num_frames > self.num_frames:
            raise ValueError(f"`first_num_frames` is {self.first_num_frames}, more than `num_frames`.")
        for name in ("growth", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)} but must lie in [0, 1].")
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"`min_scale` is {self.min_scale} but must lie in (0, 1].")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"`jitter` is {self.jitter} but must lie in [0, 1).")

    def num_frames_at(self, progress: float) -> int:
        """Return how many frames a clip has, `progress` in [0, 1] being the share of the training before it."""
        first = self.num_frames if self.first_num_frames is None else self.first_num_frames
        return _grown(first, self.num_frames, progress, self.growth)

    def max_gap_at(self, progress: float) -> int:
        """Return the greatest step between two frames, likewise."""
        return _grown(self.first_max_gap, self.max_gap, progress, self.growth)


@dataclass(frozen=True)
class Clip:
    """One training sample of a tracker.

    Attributes:
        draw (`int`): its number.
        source, video_id (`str`): where it comes from.
        frame_idx (`tuple[int, ...]`): its T frames, as indices into the video.
        frames (`np.ndarray` of shape `(T, S, S, 3)`, uint8): RGB.
        labels (`np.ndarray` of shape `(T, S, S)`, uint8): 0 for the background, 1..N for the objects.
        num_objects (`int`): N; each is to be seen in the first frame.
        memory_frames (`tuple[int, ...]`): which of the T frames are memorised, ascending; the first one is.
        attempt (`int`): how many times the draw failed before, when unreadable frames are skipped.
    """

    draw: int
    source: str
    video_id: str
    frame_idx: tuple[int, ...]
    frames: np.ndarray
    labels: np.ndarray
    num_objects: int
    memory_frames: tuple[int, ...]
    attempt: int = 0


@dataclass(frozen=True)
class TrackedVideo:
    """A whole video with the masks of all its objects, to be scored.

    Attributes:
        video_id (`str`): its name.
        frames (list of T `np.ndarray` of shape `(H, W, 3)`, uint8): RGB.
        masks (`np.ndarray` of shape `(N, T, H, W)`, bool).
        known (`tuple[int, ...]`): frames whose masks are known, ascending.
    """

    video_id: str
    frames: list[np.ndarray]
    masks: np.ndarray
    known: tuple[int, ...]


class ClipSource:
    """Clips of one data set.

    Args:
        name (`str`): goes into clips and errors.
        expressions (`datasets.Dataset`): a builder's config "expressions".
        masks (`datasets.Dataset`): its config "masks", of the same split.
        root (path): the folder that frames are relative to.
        options ([`ClipOptions`]): what clips are like.
        num_draws (`int`): clips of the whole training: what `draw` is measured by.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no video has an object and two frames whose masks are known. Other videos are left out.
    """

    def __init__(
        self,
        name: str,
        expressions: Dataset,
        masks: Dataset,
        root: str | os.PathLike[str],
        options: ClipOptions,
        num_draws: int = 1,
    ) -> None:
        self.name, self.options, self.num_draws = name, options, num_draws
        self.store = FrameStore(root)
        self._expressions, self._masks = expressions.with_format(None), masks.with_format(None)
        joined = join_masks(expressions, masks)
        rows: dict[str, list[int]] = {}
        objects: dict[str, dict[int, None]] = {}
        for row, video_id in enumerate(self._expressions["video_id"]):
            rows.setdefault(video_id, []).append(row)
            # Each object once, in the order of the expressions.
            objects.setdefault(video_id, {}).update((int(mask_row), None) for mask_row in joined[row])
        videos = [_Video(video_id, tuple(rows[video_id]), tuple(objects[video_id])) for video_id in rows]
        self._videos = [video for video in videos if video.objects and len(self._frames_of(video)[1]) > 1]
        if not self._videos:
            raise ValueError(
                f"Source `{name}` has no video of two frames or more whose masks are known. Check its split and its "
                "folder; still images show no movement."
            )

    def __len__(self) -> int:
        return len(self._videos)

    def __repr__(self) -> str:
        return f"ClipSource({self.name!r}, {len(self)} videos)"

    def video(self, number: int) -> TrackedVideo:
        """Read one whole video; of objects whose masks are all the same, as in own data, only the first.

        Raises:
            FrameError, AnnotationError: a frame or a mask cannot be used.
        """
        video = self._videos[number]
        names, known = self._frames_of(video)
        frames = self._read(video, names)
        rles = self._rles_of(video, len(names))
        masks = np.zeros((len(rles), len(frames), *frames[0].shape[:2]), dtype=bool)
        for idx in known:
            for mask, of_object in zip(masks, rles, strict=True):
                mask[idx] = self._decoded(video, of_object[idx], frames[idx].shape[:2], names[idx])
        different = [n for n, mask in enumerate(masks) if not any(np.array_equal(mask, one) for one in masks[:n])]
        return TrackedVideo(video.video_id, frames, masks[different], known)

    def sample(self, rng: np.random.Generator, draw: int) -> Clip:
        """Draw a clip.

        A video, one of its objects, and a frame on which that is to be seen are drawn first; then steps forward or
        backward in time; then up to `max_objects` objects of the first frame.

        Args:
            rng (`np.random.Generator`): source of every choice.
            draw (`int`): its number.

        Raises:
            FrameError, AnnotationError: a frame or a mask cannot be used.
        """
        options, progress = self.options, draw / self.num_draws
        video = self._videos[int(rng.integers(len(self)))]
        names, known = self._frames_of(video)
        rles = self._rles_of(video, len(names))
        anchor, starts = self._draw_anchor(rng, video, rles, known)
        start = starts[int(rng.integers(len(starts)))]
        num_frames = options.num_frames_at(progress)
        walk = _draw_walk(rng, start, len(known), num_frames, options.max_gap_at(progress))
        frame_idx = tuple(known[place] for place in walk)
        memory_frames = _draw_memory_frames(rng, num_frames, options.num_memory_frames)
        others = [number for number in range(len(rles)) if number != anchor]
        order = [anchor, *(int(number) for number in rng.permutation(others))][:_MOST_LABELS]

        pictures = self._read(video, [names[idx] for idx in frame_idx])
        labels = np.stack(
            [self._labels(video, [rles[n][idx] for n in order], picture.shape[:2], names[idx])
             for idx, picture in zip(frame_idx, pictures, strict=True)]
        )  # fmt: skip
        frames, labels = _cut_out(rng, np.stack(pictures), labels, options)
        labels, num_objects = _keep_first(labels, options.max_objects)
        return Clip(draw, self.name, video.video_id, frame_idx, frames, labels, num_objects, memory_frames)

    def _frames_of(self, video: "_Video") -> tuple[list[str], tuple[int, ...]]:
        """Return the names of a video's frames, and which of them have masks that are known for all objects."""
        row = self._expressions[video.rows[0]]
        names = row["frames"]
        if "annotated" not in row:
            return names, tuple(range(len(names)))
        annotated = [set(each) for each in self._expressions[list(video.rows)]["annotated"]]
        return names, tuple(sorted(set.intersection(*annotated)))

    def _read(self, video: "_Video", names: Sequence[str]) -> list[np.ndarray]:
        frames = self.store.read(names)
        for name, frame in zip(names, frames, strict=True):
            if frame.shape != frames[0].shape:
                raise AnnotationError.at(
                    f"Source `{self.name}`: the picture has size {frame.shape[:2]} (H, W), but another frame of the "
                    f"same video {frames[0].shape[:2]}.",
                    video=video.video_id,
                    frame=name,
                )
        return frames

    def _rles_of(self, video: "_Video", num_frames: int) -> list[list[Any]]:
        rows = self._masks[list(video.objects)]
        for anno_id, rles in zip(rows["anno_id"], rows["rle"], strict=True):
            if len(rles) != num_frames:
                raise AnnotationError.at(
                    f"Source `{self.name}`: the mask {anno_id!r} has {len(rles)} entries for {num_frames} frames.",
                    video=video.video_id,
                )
        return list(rows["rle"])

    def _draw_anchor(
        self, rng: np.random.Generator, video: "_Video", rles: list[list[Any]], known: tuple[int, ...]
    ) -> tuple[int, list[int]]:
        """Draw an object; return its number and the places in `known` of the frames on which it is to be seen."""
        for number in rng.permutation(len(rles)):
            of_object = rles[number]
            starts = [place for place, idx in enumerate(known) if of_object[idx] and mask_area(of_object[idx])]
            if starts:
                return int(number), starts
        raise AnnotationError.at(
            f"Source `{self.name}`: no object is to be seen in any frame. Leave the video out.", video=video.video_id
        )

    def _labels(self, video: "_Video", rles: Sequence[Any], size: tuple[int, int], frame: str) -> np.ndarray:
        """Return a frame's objects as numbers from 1 on, (H, W) uint8; where they overlap, the first one counts."""
        labels = np.zeros(size, dtype=np.uint8)
        for number in range(len(rles), 0, -1):
            labels[self._decoded(video, rles[number - 1], size, frame)] = number
        return labels

    def _decoded(self, video: "_Video", rle: Any, size: tuple[int, int], frame: str) -> np.ndarray:
        """Return one mask, (H, W) bool."""
        if rle is None:
            return np.zeros(size, dtype=bool)
        place: dict[str, Any] = {"video": video.video_id, "frame": frame}
        if tuple(rle["size"]) != size:
            raise AnnotationError.at(
                f"Source `{self.name}`: a mask has size {tuple(rle['size'])} (H, W), but the picture {size}.", **place
            )
        try:
            return decode_mask(rle).astype(bool)
        except (TypeError, ValueError) as error:
            raise AnnotationError.at(f"Source `{self.name}`: a mask is damaged: {error}", **place) from error


@dataclass(frozen=True)
class _Video:
    """Rows of one video among the expressions and among the masks."""

    video_id: str
    rows: tuple[int, ...]
    objects: tuple[int, ...]


def clip_sources(sources: Mapping[str, Source], options: ClipOptions, num_draws: int = 1) -> dict[str, Any]:
    """Make sources of clips of those that `load_sources` gave.

    Raises:
        ValueError: a source has no masks.
    """
    made = {}
    for name, source in sources.items():
        if not isinstance(source, ExpressionSource) or source.masks is None:
            raise ValueError(f"Source `{name}` has no masks to learn from. Leave it out of the mixture.")
        made[name] = ClipSource(name, source.expressions, source.masks, source.store.root, options, num_draws)
    return made


class ClipCollator:
    """Makes a batch of clips: the arguments of `track_clips`, and `labels`.

    Clips are cut to the shortest; the memory frames are those of the first clip, for all.
    """

    def __call__(self, clips: Sequence[Clip]) -> dict[str, Any]:
        """Return `frames`, `labels` (B, T, S, S) int64, `is_object` and `memory_frames`."""
        num_frames = min(len(clip.frames) for clip in clips)
        num_objects = max(1, *(clip.num_objects for clip in clips))
        frames = torch.from_numpy(np.stack([clip.frames[:num_frames] for clip in clips]))
        labels = torch.from_numpy(np.stack([clip.labels[:num_frames] for clip in clips]))
        counts = torch.tensor([clip.num_objects for clip in clips])
        return {
            "frames": normalised(frames),
            "labels": labels.long(),
            "is_object": torch.arange(num_objects) < counts[:, None],
            "memory_frames": [idx for idx in clips[0].memory_frames if idx < num_frames],
        }


def normalised(frames: Tensor) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, normalised with ImageNet's mean and standard deviation."""
    pixels = frames.movedim(-1, -3).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def _grown(first: int, last: int, progress: float, growth: float) -> int:
    """Return an integer between two: the first at 0, the last from `growth` on."""
    if progress >= growth:
        return last
    return first + int((last - first) * progress / growth + 0.5)


def _draw_walk(rng: np.random.Generator, start: int, length: int, num_frames: int, max_gap: int) -> list[int]:
    """Draw places of frames, each 1..max_gap after the one before, in one direction; the ends turn it round."""
    gaps = rng.integers(1, max_gap + 1, num_frames - 1)
    direction = 1 if rng.random() < 0.5 else -1
    walk = [start]
    for gap in gaps:
        gap = min(int(gap), length - 1)
        if not 0 <= walk[-1] + direction * gap < length:
            direction = -direction
        if not 0 <= walk[-1] + direction * gap < length:  # in the middle of a short video
            gap = max(walk[-1], length - 1 - walk[-1])
            direction = 1 if walk[-1] + gap < length else -1
        walk.append(walk[-1] + direction * gap)
    return walk


def _draw_memory_frames(rng: np.random.Generator, num_frames: int, most: int) -> tuple[int, ...]:
    """Draw which frames are memorised: the first, and up to `most` - 1 others but the last."""
    others = list(range(1, num_frames - 1))
    count = int(rng.integers(0, min(most - 1, len(others)) + 1))
    return (0, *sorted(int(idx) for idx in rng.permutation(others)[:count]))


def _cut_out(
    rng: np.random.Generator, frames: np.ndarray, labels: np.ndarray, options: ClipOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the same square out of all frames, around a pixel of the first frame's first object; resize and colour it.

    (T, H, W, 3) and (T, H, W), uint8 -> (T, S, S, 3) and (T, S, S).
    """
    size = options.size
    shorter = min(labels.shape[1:])
    # Number 1 is the object that was drawn to be seen; where others overlap with it, it goes first.
    rows, columns = np.nonzero(labels[0] == 1)
    cut = labels
    for _ in range(_MAX_TRIES):
        side = max(int(shorter * rng.uniform(options.min_scale, 1)), 1)
        pixel = int(rng.integers(len(rows)))
        top, left = (
            int(rng.integers(max(place - side + 1, 0), min(length - side, place) + 1))
            for place, length in zip((rows[pixel], columns[pixel]), labels.shape[1:], strict=True)
        )
        box = (left, top, left + side, top + side)
        cut = _resized(labels, box, size, Image.Resampling.NEAREST)
        if np.count_nonzero(cut[0] == 1) >= _MIN_PIXELS:
            break
    pictures = _resized(frames, box, size, Image.Resampling.BILINEAR)
    if rng.random() < options.flip_probability:
        pictures, cut = pictures[:, :, ::-1], cut[:, :, ::-1]
    return _coloured(pictures, 1 + options.jitter * rng.uniform(-1, 1, 3)), np.ascontiguousarray(cut)


def _resized(planes: np.ndarray, box: tuple[int, int, int, int], size: int, how: Image.Resampling) -> np.ndarray:
    """Cut a box (left, top, right, bottom) out of T pictures and resize it to a square."""
    return np.stack([np.asarray(Image.fromarray(plane).resize((size, size), how, box=box)) for plane in planes])


def _coloured(frames: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Change brightness, contrast and saturation, all frames alike; (T, S, S, 3) uint8."""
    brightness, contrast, saturation = (np.float32(factor) for factor in factors)
    pixels = frames.astype(np.float32) * brightness
    mean = pixels.mean(dtype=np.float32)
    pixels = mean + (pixels - mean) * contrast
    grey = pixels.mean(axis=-1, keepdims=True)
    pixels = grey + (pixels - grey) * saturation
    return np.rint(pixels.clip(0, 255)).astype(np.uint8)


def _keep_first(labels: np.ndarray, most: int) -> tuple[np.ndarray, int]:
    """Renumber the objects of the first frame, in their order, 1..N; the others become background."""
    pixels = np.bincount(labels[0].ravel(), minlength=_MOST_LABELS + 1)
    kept = [number for number in range(1, _MOST_LABELS + 1) if pixels[number] >= _MIN_PIXELS][:most]
    table = np.zeros(_MOST_LABELS + 1, dtype=np.uint8)
    table[kept] = np.arange(1, len(kept) + 1)
    return table[labels], len(kept)
