"""Frames of a video, wherever they lie, as RGB arrays: in any order, exact to the frame, in bounded memory.

A video is a file (its decoding is in `video_file_visa`), a folder of images, one image, a list or an array;
`open_frames` makes the same `FrameSource` of each. This is our own work, not VISA's, which reads folders of images
only. It neither resizes nor normalises (the processor does) and reads no live streams. The file is long because every
kind of input is checked here, so that nothing behind it has to.
"""

import operator
import os
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.utils import is_av_available

from .video_file_visa import USE_TRUNCATED, VideoDecoder, index_video

IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"))

_MAX_REMEMBERED = 8

VideoInput = str | os.PathLike[str] | np.ndarray | torch.Tensor | Image.Image | Sequence[Any]
TimeRange = tuple[float, float]


def open_frames(
    video: VideoInput,
    *,
    fps: Fraction | float | None = None,
    allow_truncated: bool = False,
    max_cached_frames: int = 64,
) -> "FrameSource":
    """Open a video for reading frame by frame.

    Args:
        video: path of a video file (mp4, mov, mkv, webm, avi, gif, ...), of a folder of images (in natural order of
            their names: `2.png` before `10.png`) or of one image; a uint8 array or tensor of shape `(T, H, W, 3)`,
            `(T, H, W, 1)`, `(T, H, W, 4)` or `(T, H, W)`; one PIL image; or a list of PIL images, of uint8 arrays of
            shape `(H, W, 3 | 1 | 4)` or `(H, W)`, or of image paths.
        fps: frames per second of a folder, list or array, which have none of their own. A file brings its own.
        allow_truncated: use the frames before the first damaged one instead of refusing a damaged video. A file is
            then decoded once at opening, to find the damage.
        max_cached_frames: upper limit of the decoded frames held at any time (reading backward needs some).

    Returns:
        `FrameSource`: to be used as a context manager or closed with `close()`.

    Raises:
        FileNotFoundError: nothing lies at the path.
        ImportError: the video is a file and PyAV is not installed.
        TypeError: `video` is none of the above, or holds another dtype than uint8.
        ValueError: there is no frame in it, it is no video, it is damaged, or its frames differ in size.
    """
    max_cached_frames = operator.index(max_cached_frames)
    if max_cached_frames < 1:
        raise ValueError(f"`max_cached_frames` is {max_cached_frames}; at least 1 frame must be held.")
    rate = _checked_rate(fps)
    if isinstance(video, str | os.PathLike):
        path = Path(video)
        if not path.exists():
            raise FileNotFoundError(f"There is no video at `{path}`. Give the path of a video file, image or folder.")
        if path.is_dir():
            return _ImageFiles(image_files_of(path), path, rate, allow_truncated, max_cached_frames)
        if path.suffix.lower() in IMAGE_SUFFIXES:
            return _ImageFiles([path], path, rate, allow_truncated, max_cached_frames)
        if rate is not None:
            raise ValueError(
                f"`fps` is for frames without a rate, but `{path}` is a video file with its own: omit it."
            )
        return _VideoFile(path, allow_truncated, max_cached_frames)
    if isinstance(video, np.ndarray | torch.Tensor):
        return _ArrayFrames(_checked_array(video), rate)
    if isinstance(video, Image.Image):
        return _ArrayFrames([video], rate)
    if isinstance(video, list | tuple):
        if len(video) == 0:
            raise ValueError("The video is an empty list; at least one frame is needed.")
        if all(isinstance(frame, str | os.PathLike) for frame in video):
            files = [Path(frame) for frame in video]
            return _ImageFiles(files, None, rate, allow_truncated, max_cached_frames)
        return _ArrayFrames(video, rate)
    if isinstance(video, Iterator):
        raise TypeError(
            f"The video is a {type(video).__name__}, whose length is unknown and which can be read only once. "
            "Give a list of frames: `list(frames)`."
        )
    raise TypeError(
        f"The video is of type {type(video).__name__}. Give a path, a uint8 array or tensor of shape (T, H, W, 3), "
        "or a list of images."
    )


class FrameSource:
    """The frames of one video, read lazily; made by `open_frames`. Not safe for use from several threads at once.

    Every frame is an own, writable RGB array of shape `(H, W, 3)`, uint8. Rotation and mirroring stored in a file
    (display matrix, EXIF orientation) are applied. Grey becomes RGB, 16 bits become 8, transparent parts are drawn
    over black. The sample aspect ratio is ignored: pixels are taken as stored.

    Attributes:
        num_frames (`int`): exact number of frames.
        height, width (`int`): size of all frames, in pixels, after rotation.
        fps (`Fraction` or `None`): average frames per second.
        timestamps (`list[float]` or `None`): seconds at which each frame is shown, on the clock of the file (where 0
            is the start of whatever comes first, picture or sound); in a window, 0 is its first frame. `None` for
            images and arrays without a rate.
        time_range (`tuple[float, float]` or `None`): seconds, on the clock of the file, at which the first frame
            appears and the last one disappears.
        has_audio (`bool`): whether there is sound beside the pictures.
        path (`Path` or `None`): the file or folder.
        name (`str`): a name for outputs: the file's without suffix, the folder's, or "video".
        offset (`int`): index, in the whole video, of frame 0 of this window; 0 if this is no window.
    """

    def __init__(
        self,
        *,
        num_frames: int,
        height: int,
        width: int,
        fps: Fraction | None = None,
        timestamps: list[float] | None = None,
        time_range: TimeRange | None = None,
        has_audio: bool = False,
        path: Path | None = None,
        offset: int = 0,
        max_cached_frames: int = 64,
        remembers: bool = False,
    ) -> None:
        self.num_frames, self.height, self.width = num_frames, height, width
        self.fps, self.timestamps, self.time_range = fps, timestamps, time_range
        self.has_audio, self.path, self.offset = has_audio, path, offset
        self.name = "video" if path is None else (path.name if path.is_dir() else path.stem) or "video"
        # Frames asked for one by one are remembered, at most a quarter of the limit; the rest is for reading backward.
        self._max_remembered = min(_MAX_REMEMBERED, max_cached_frames // 4) if remembers else 0
        self._max_backward = max_cached_frames - self._max_remembered
        self._remembered: OrderedDict[int, np.ndarray] = OrderedDict()
        self._is_closed = False

    def __len__(self) -> int:
        return self.num_frames

    def __enter__(self) -> "FrameSource":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file. Reading a frame afterwards is an error; closing twice is not."""
        self._is_closed = True
        self._remembered.clear()

    def __getitem__(self, index: int) -> np.ndarray:
        return self.get_many([index])[0]

    def get_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Read some frames, decoding as little as possible.

        Args:
            indices (`Sequence[int]`): in any order, repeated or not; each within `[0, num_frames)`.

        Returns:
            `list[np.ndarray]`: arrays of shape `(H, W, 3)`, uint8, in the order of `indices`.

        Raises:
            IndexError: an index lies outside the video. Negative ones do.
        """
        self._require_open()
        asked = [self._checked_index(index) for index in indices]
        wanted = sorted(set(asked))
        frames = {index: self._remembered[index] for index in wanted if index in self._remembered}
        for index, frame in self._read([index for index in wanted if index not in frames]):
            frames[index] = frame
        if self._max_remembered:
            for index in wanted:
                self._remembered[index] = frames[index]
                self._remembered.move_to_end(index)
            while len(self._remembered) > self._max_remembered:
                self._remembered.popitem(last=False)
        return [frames[index].copy() for index in asked]

    def iterate(
        self, start: int | None = None, stop: int | None = None, step: int = 1
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Read frames one after the other, forward or backward, as `range(start, stop, step)` counts.

        Forward, each frame is decoded once. Backward (`step < 0`), one group of pictures after the other is decoded,
        in slices of at most `max_cached_frames` frames.

        Args:
            start (`int`, *optional*): first index; the first frame, or the last one when going backward.
            stop (`int`, *optional*): index to stop before; the end of the video, or its beginning when going backward
                (there -1 says the same).
            step (`int`, defaults to 1): distance between indices; not 0.

        Returns:
            An iterator of `(index, frame)`; `frame` of shape `(H, W, 3)`, uint8.

        Raises:
            IndexError: `start` or `stop` lies outside the video.
            ValueError: `step` is 0.
        """
        self._require_open()
        if step == 0:
            raise ValueError("`step` is 0; it must be positive (forward) or negative (backward).")
        forward = step > 0
        first = (0 if forward else self.num_frames - 1) if start is None else operator.index(start)
        end = (self.num_frames if forward else -1) if stop is None else operator.index(stop)
        indices = range(first, end, step)
        if start is not None and not (forward and first == self.num_frames):
            self._checked_index(first)
        if not (0 <= end <= self.num_frames or (end == -1 and not forward)):
            self._checked_index(end)
        return self._read(indices) if forward else self._read_backward(indices)

    def window(self, start: int = 0, stop: int | None = None) -> "FrameSource":
        """Return frames `start` to `stop - 1` as a video of its own, which reads through this one.

        Its indices and its timestamps begin at 0; `offset` and `time_range` tell where it lies. Closing it leaves this
        video open.

        Args:
            start (`int`): index of the first frame.
            stop (`int`, *optional*): index after the last frame; the end by default.

        Raises:
            ValueError: the window holds no frame or reaches beyond the video.
        """
        self._require_open()
        start = operator.index(start)
        stop = self.num_frames if stop is None else operator.index(stop)
        if not 0 <= start < stop <= self.num_frames:
            raise ValueError(
                f"The window [{start}, {stop}) does not lie in the video, which has {self.num_frames} frames. "
                "Give 0 <= start < stop <= number of frames."
            )
        return _Window(self, start, stop)

    def _checked_index(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.num_frames:
            raise IndexError(f"Frame index {index} is outside the video, which has {self.num_frames} frames.")
        return index

    def _require_open(self) -> None:
        if self._is_closed:
            raise ValueError(f"The video `{self.path or self.name}` is closed; open it again with `open_frames`.")

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(index, frame)` for ascending indices, which are inside the video."""
        raise AssertionError("each kind of source defines how it reads")

    def _group_start(self, index: int) -> int:
        """First frame that must be decoded in order to see frame `index`."""
        return index

    def _read_backward(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield `(index, frame)` for descending indices."""
        position = 0
        while position < len(indices):
            group_start = self._group_start(indices[position])
            part = [i for i in indices[position : position + self._max_backward] if i >= group_start]
            position += len(part)
            held = [frame for _, frame in self._read(part[::-1])]
            for index in part:
                yield index, held.pop()


class _Window(FrameSource):
    """Frames `start` to `stop - 1` of another source."""

    def __init__(self, whole: FrameSource, start: int, stop: int) -> None:
        timestamps, time_range = None, None
        if whole.timestamps is not None and whole.time_range is not None:
            shown = whole.timestamps[start:stop]
            file_start = whole.time_range[0] - whole.timestamps[0]  # 0 unless `whole` is itself a window
            end = whole.time_range[1] if stop == whole.num_frames else file_start + whole.timestamps[stop]
            timestamps, time_range = [time - shown[0] for time in shown], (file_start + shown[0], end)
        super().__init__(
            num_frames=stop - start,
            height=whole.height,
            width=whole.width,
            fps=whole.fps,
            timestamps=timestamps,
            time_range=time_range,
            has_audio=whole.has_audio,
            path=whole.path,
            offset=whole.offset + start,
        )
        self.name = whole.name
        self._whole, self._start = whole, start
        self._max_backward = whole._max_backward

    def get_many(self, indices: Sequence[int]) -> list[np.ndarray]:
        self._require_open()
        return self._whole.get_many([self._checked_index(index) + self._start for index in indices])

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        self._whole._require_open()
        for index, frame in self._whole._read([index + self._start for index in indices]):
            yield index - self._start, frame

    def _group_start(self, index: int) -> int:
        return max(0, self._whole._group_start(index + self._start) - self._start)


# --- arrays and images ---


class _ArrayFrames(FrameSource):
    """Frames that already lie in memory: one array or tensor, or a list of frames."""

    def __init__(self, frames: np.ndarray | torch.Tensor | Sequence[Any], rate: Fraction | None) -> None:
        if len(frames) == 0:
            raise ValueError("The video has no frames; at least one is needed.")
        is_list = isinstance(frames, list | tuple)
        sizes = [_size_of(frame, i) for i, frame in enumerate(frames)] if is_list else [_size_of(frames[0], 0)]
        _check_one_size(sizes, [f"Frame {i}" for i in range(len(sizes))])
        super().__init__(num_frames=len(frames), height=sizes[0][0], width=sizes[0][1], **_clock_of(rate, len(frames)))
        self._frames = frames

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            frame = self._frames[index]
            if isinstance(frame, Image.Image):
                yield index, _image_to_rgb(frame, f"Frame {index}")
            else:
                yield index, _array_to_rgb(frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame)


class _ImageFiles(FrameSource):
    """Frames that lie in image files, one each."""

    def __init__(
        self,
        files: list[Path],
        path: Path | None,
        rate: Fraction | None,
        allow_truncated: bool,
        max_cached_frames: int,
    ) -> None:
        sizes = [_image_size(file) for file in files]
        _check_one_size(sizes, [f"`{file}`" for file in files])
        self._files, self._size = files, sizes[0]
        if allow_truncated:
            files = files[: self._count_readable()]
        super().__init__(
            num_frames=len(files),
            height=sizes[0][0],
            width=sizes[0][1],
            path=path,
            max_cached_frames=max_cached_frames,
            remembers=True,
            **_clock_of(rate, len(files)),
        )

    def _count_readable(self) -> int:
        for index in range(len(self._files)):
            try:
                self._load(index)
            except ValueError:
                if index == 0:
                    raise
                return index
        return len(self._files)

    def _load(self, index: int) -> np.ndarray:
        file = self._files[index]
        try:
            with _quietly(), Image.open(file) as image:
                frame = _image_to_rgb(image, f"`{file}`")
        except (OSError, SyntaxError) as error:
            raise ValueError(f"Frame {index}, `{file}`, is damaged ({error}). {USE_TRUNCATED}") from error
        _check_one_size([self._size, frame.shape[:2]], ["Its header", f"Frame {index}, `{file}`,"])
        return frame

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            yield index, self._load(index)


def _checked_rate(fps: Fraction | float | None) -> Fraction | None:
    if fps is None:
        return None
    # Beyond these bounds it is a mistake, and rounding below would make it 0.
    if not isinstance(fps, Fraction | int | float | np.number):
        raise TypeError(f"`fps` is {fps!r}; it must be a number of frames per second.")
    if not 1e-3 <= fps <= 1e5:
        raise ValueError(f"`fps` is {fps}; it must be a number of frames per second, between 0.001 and 100000.")
    return Fraction(fps).limit_denominator(1_000_000)


def _clock_of(rate: Fraction | None, num_frames: int) -> dict[str, Any]:
    """`fps`, `timestamps` and `time_range` of frames with a constant rate, or with none."""
    if rate is None:
        return {"fps": None, "timestamps": None, "time_range": None}
    return {
        "fps": rate,
        "timestamps": [float(index / rate) for index in range(num_frames)],
        "time_range": (0.0, float(num_frames / rate)),
    }


def _checked_array(frames: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return the array if it is a uint8 video; `(T, H, W)`, or with 1, 3 or 4 channels last."""
    if isinstance(frames, torch.Tensor):
        frames = frames.detach()
    shape = tuple(frames.shape)
    _check_uint8(frames, "The video")
    if len(shape) == 3 and shape[2] in (1, 3, 4):
        raise ValueError(
            f"The video has shape {shape}, which could be one image. Give (T, H, W, C): for one image `image[None]`."
        )
    if not (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3, 4))):
        hint = " Move the channels last: `frames.transpose(0, 2, 3, 1)` or `.permute(0, 2, 3, 1)`."
        is_channels_first = len(shape) == 4 and shape[1] in (1, 3, 4)
        raise ValueError(
            f"The video has shape {shape}; (T, H, W, 3), (T, H, W, 1), (T, H, W, 4) or (T, H, W) is needed."
            + (hint if is_channels_first else "")
        )
    if shape[0] == 0 or shape[1] == 0 or shape[2] == 0:
        raise ValueError(f"The video has shape {shape}: it has no frames or no pixels.")
    return frames


def _check_uint8(values: np.ndarray | torch.Tensor, what: str) -> None:
    if values.dtype not in (np.uint8, torch.uint8):
        raise TypeError(
            f"{what} has dtype {values.dtype}; uint8 with values from 0 to 255 is needed. "
            "Convert it: `(frames * 255).round().astype('uint8')` if its values lie in [0, 1]."
        )


def _size_of(frame: object, index: int) -> tuple[int, int]:
    """(H, W) of one frame of a list, after checking what it is."""
    if isinstance(frame, Image.Image):
        return _oriented_size(frame)
    if not isinstance(frame, np.ndarray | torch.Tensor):
        raise TypeError(
            f"Frame {index} of the list is of type {type(frame).__name__}. "
            "Give PIL images, uint8 arrays of shape (H, W, 3), or (all of them) paths of images."
        )
    _check_uint8(frame, f"Frame {index} of the list")
    shape = tuple(frame.shape)
    if not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))) or 0 in shape:
        raise ValueError(
            f"Frame {index} of the list has shape {shape}; (H, W, 3), (H, W, 1), (H, W, 4) or (H, W) is needed."
        )
    return shape[0], shape[1]


def _check_one_size(sizes: list[tuple[int, int]], names: list[str]) -> None:
    for size, name in zip(sizes, names, strict=True):
        if size != sizes[0]:
            raise ValueError(
                f"{name} is {size[1]}x{size[0]}, but {names[0]} is {sizes[0][1]}x{sizes[0][0]} (width x height). "
                "All frames of a video must have one size."
            )


def image_files_of(folder: Path) -> list[Path]:
    """The images in a folder in natural order: numbers inside names count as numbers."""
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and f.name[0] != "." and f.is_file()]
    if not files:
        raise ValueError(
            f"The folder `{folder}` holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}). "
            "Give a folder of frames, or the path of a video file."
        )

    def natural(file: Path) -> tuple[list[tuple[int, int | str]], str]:
        pieces = re.split(r"([0-9]+)", file.name)
        return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces], file.name

    return sorted(files, key=natural)


def _quietly() -> warnings.catch_warnings:
    """Pillow warns of odd metadata that has no bearing on the pixels."""
    return warnings.catch_warnings(action="ignore")


def _image_size(file: Path) -> tuple[int, int]:
    """(H, W) of an image file after its EXIF orientation, read from the header."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no image at `{file}`.")
    try:
        with _quietly(), Image.open(file) as image:
            if image.format in ("PNG", "WEBP", "GIF", "TIFF"):
                num_pictures: int = image.n_frames  # type: ignore[attr-defined] # these formats have it
                if num_pictures > 1:
                    raise ValueError(
                        f"`{file}` is a {image.format} file of {num_pictures} pictures; one is needed for each frame. "
                        "A GIF can be opened as a video by its path; convert others to mp4."
                    )
            if image.format == "PNG" and "exif" not in image.info:  # asking further would decode the whole image
                return image.height, image.width
            return _oriented_size(image)
    except (OSError, SyntaxError) as error:  # Pillow reports some damaged files as a SyntaxError
        raise ValueError(f"`{file}` is not an image that can be read ({error}). Give another file.") from error


def _oriented_size(image: Image.Image) -> tuple[int, int]:
    with _quietly():
        turned = image.getexif().get(0x0112) in (5, 6, 7, 8)  # the EXIF orientations that swap the axes
    return (image.width, image.height) if turned else (image.height, image.width)


def _image_to_rgb(image: Image.Image, what: str) -> np.ndarray:
    """Make an `(H, W, 3)` uint8 array of any PIL image, upright, over black."""
    with _quietly():
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            values = np.asarray(image)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"{what} has values from {values.min()} to {values.max()}; at most 16 bits are read.")
            return _array_to_rgb((values >> 8).astype(np.uint8))
        if image.mode == "F":
            raise ValueError(f"{what} holds floating point values; an 8-bit or 16-bit image is needed.")
        has_alpha = "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info
        return _array_to_rgb(np.asarray(image.convert("RGBA" if has_alpha else "RGB")))


def _array_to_rgb(frame: np.ndarray) -> np.ndarray:
    """Make a new `(H, W, 3)` uint8 array of a uint8 one with 1, 3 or 4 channels, or none."""
    if frame.ndim == 2:
        frame = frame[..., None]
    if frame.shape[2] == 1:
        return np.repeat(frame, 3, axis=2)
    if frame.shape[2] == 4:
        alpha = frame[..., 3:].astype(np.uint16)
        return ((frame[..., :3] * alpha + 127) // 255).astype(np.uint8)
    return np.array(frame, order="C")


# --- video files ---


class _VideoFile(FrameSource):
    """Frames of a video file, read with PyAV."""

    def __init__(self, path: Path, allow_truncated: bool, max_cached_frames: int) -> None:
        self._av = _import_av(path)
        self._index = index_video(self._av, path, allow_truncated=allow_truncated)
        self._idle: VideoDecoder | None = VideoDecoder(self._av, self._index)
        try:
            frame = self._idle.read(0)
            # Asked once, since it is the file's and since an `av.VideoFrame` that was asked for side data is in a
            # reference cycle: frames would pile up until the garbage collector comes.
            matrix = frame.side_data.get("DISPLAYMATRIX")
            self._display_matrix = None if matrix is None else struct.unpack("=9i", bytes(matrix))
            first = _frame_to_rgb(frame, self._display_matrix)
        except BaseException:
            self._idle.close()
            raise
        super().__init__(
            num_frames=self._index.num_frames,
            height=first.shape[0],
            width=first.shape[1],
            fps=self._index.fps,
            timestamps=self._index.timestamps,
            time_range=(self._index.timestamps[0], self._index.end_time),
            has_audio=self._index.has_audio,
            path=path,
            max_cached_frames=max_cached_frames,
            remembers=True,
        )

    def close(self) -> None:
        super().close()
        if self._idle is not None:
            self._idle.close()
            self._idle = None

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        if len(indices) == 0:
            return
        # The idle decoder stands where the last reader left it. Readers that run side by side have one each.
        decoder, self._idle = self._idle or VideoDecoder(self._av, self._index), None
        try:
            for index in indices:
                self._require_open()
                frame = _frame_to_rgb(decoder.read(index), self._display_matrix)
                if frame.shape[:2] != (self.height, self.width):
                    raise ValueError(
                        f"Frame {index} of `{self.path}` is {frame.shape[1]}x{frame.shape[0]}, but the video began as "
                        f"{self.width}x{self.height}. Re-encode it to one size."
                    )
                yield index, frame
        finally:
            if self._idle is None and not self._is_closed:
                self._idle = decoder
            else:
                decoder.close()

    def _group_start(self, index: int) -> int:
        return self._index.group_start(index)


def _import_av(path: Path) -> Any:
    if is_av_available():
        import av

        return av
    raise ImportError(
        f"`{path}` is a video file, and PyAV, which reads these, is not installed. Install it with `pip install av`, "
        "or give a folder of images."
    )


def _frame_to_rgb(frame: Any, display_matrix: tuple[int, ...] | None) -> np.ndarray:
    """Make an `(H, W, 3)` uint8 array of an `av.VideoFrame`, turned and mirrored as its display matrix says."""
    has_alpha = frame.format.has_palette or any(component.is_alpha for component in frame.format.components)
    rgb = _array_to_rgb(frame.to_ndarray(format="rgba")) if has_alpha else frame.to_ndarray(format="rgb24")
    return rgb if display_matrix is None else _orient(rgb, display_matrix)


def _orient(rgb: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """Apply the right-angled part of a display matrix: (x, y) is shown at (a x + c y, b x + d y), y downward."""
    a, b, _, c, d = matrix[:5]
    if a == d == 0 and b and c:
        rgb, flip_x, flip_y = rgb.transpose(1, 0, 2), c < 0, b < 0
    elif b == c == 0 and a and d:
        flip_x, flip_y = a < 0, d < 0
    else:  # an angle in between: shown as stored
        return rgb
    return np.ascontiguousarray(rgb[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
