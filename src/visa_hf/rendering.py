"""Masks made visible: overlays, videos, palette images, cut-outs, JSON lines. Everything goes frame by frame.

Every file appears whole or not at all: it is written under a temporary name in the same folder and renamed at the end.
Reading frames is done in `modeling/frame_source_visa.py`, run lengths in `rle`.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

# The colours of Okabe and Ito, told apart with every kind of colour vision (https://jfly.uni-koeln.de/color/), without
# black and grey, the strongest ones on natural pictures first.
OVERLAY_COLORS = np.array(
    [(213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 158, 115), (204, 121, 167), (230, 159, 0), (0, 114, 178)],
    dtype=np.uint8,
)

# Audio codecs that mp4 can hold and common players play; others are re-encoded to AAC.
_MP4_AUDIO = frozenset(("aac", "mp3", "mp3float", "ac3", "eac3", "alac"))
_AAC_RATES = frozenset((96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350))
_MAX_TIME_BASE = 1_000_000


def overlay_masks(
    frame: np.ndarray,
    masks: np.ndarray,
    *,
    alpha: float = 0.5,
    colors: np.ndarray | Sequence[tuple[int, int, int]] | None = None,
    contour: bool = True,
) -> np.ndarray:
    """Draw masks over a frame, one colour each, with an opaque contour just inside their border.

    Args:
        frame (`np.ndarray` of shape `(H, W, 3)`, uint8): RGB.
        masks (`np.ndarray` of shape `(N, H, W)`, bool): later ones lie on top; N may be 0.
        alpha (`float`): how much of the colour covers the object, in [0, 1].
        colors (`(N or more, 3)`, uint8, *optional*): RGB of each mask; by default colours that people with any kind
            of colour vision can tell apart, repeated after the seventh.
        contour (`bool`): whether to draw the contour.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8: a new array.

    Raises:
        TypeError: `frame` is not uint8 or `masks` not bool.
        ValueError: shapes do not fit, or `alpha` is outside [0, 1].
    """
    height, width = _checked_frame(frame)
    if not isinstance(masks, np.ndarray) or masks.dtype != np.bool_:
        raise TypeError("`masks` must be a numpy array of bool, of shape (N, H, W). Give `masks > threshold`.")
    if masks.ndim != 3 or masks.shape[1:] != (height, width):
        raise ValueError(f"`masks` has shape {masks.shape}; (N, {height}, {width}) is needed for this frame.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is {alpha}; it must lie in [0, 1].")
    if colors is None:
        palette = OVERLAY_COLORS[np.arange(len(masks)) % len(OVERLAY_COLORS)]
    else:
        palette = np.asarray(colors)
        if palette.ndim != 2 or palette.shape[1] != 3 or len(palette) < len(masks):
            raise ValueError(f"`colors` has shape {palette.shape}; ({len(masks)}, 3) or more colours are needed.")
    drawn = frame.copy()
    thickness = max(1, round(min(height, width) / 240))
    for mask, color in zip(masks, palette, strict=False):
        rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if len(rows) == 0:
            continue
        # One more pixel on each side, so that the contour knows what lies beyond.
        box = np.s_[max(rows[0] - 1, 0) : rows[-1] + 2, max(cols[0] - 1, 0) : cols[-1] + 2]
        inside, region = mask[box], drawn[box]
        blended = np.rint(np.arange(256)[:, None] * (1 - alpha) + color.astype(float) * alpha).astype(np.uint8)
        pixels = region[inside]  # (number of pixels, 3)
        region[inside] = np.stack([blended[pixels[:, c], c] for c in range(3)], axis=1)
        if contour:
            region[inside & ~_erode(inside, thickness)] = color
    return drawn


def contact_sheet(
    frames: Sequence[np.ndarray], masks: Sequence[np.ndarray], *, columns: int = 4, gap: int = 4
) -> np.ndarray:
    """Arrange frames with their masks in rows, on white.

    Args:
        frames: pictures of shape `(H, W, 3)`, uint8, all of one size.
        masks: for each frame an array of shape `(N, H, W)`, bool.
        columns (`int`): frames in a row.
        gap (`int`): pixels between frames.

    Returns:
        `np.ndarray` of shape `(rows * (H + gap) - gap, columns * (W + gap) - gap, 3)`, uint8.
    """
    if len(frames) == 0 or len(frames) != len(masks) or columns < 1:
        raise ValueError(
            f"There are {len(frames)} frames, {len(masks)} masks and {columns} columns; "
            "at least one frame and one column, and as many masks as frames, are needed."
        )
    columns = min(columns, len(frames))
    rows = math.ceil(len(frames) / columns)
    height, width = frames[0].shape[:2]
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for place, (frame, frame_masks) in enumerate(zip(frames, masks, strict=True)):
        if frame.shape != frames[0].shape:
            raise ValueError(f"Frame {place} has shape {frame.shape}, but frame 0 has {frames[0].shape}.")
        top, left = (place // columns) * (height + gap), (place % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = overlay_masks(frame, frame_masks)
    return sheet


def save_palette_png(path: str | os.PathLike[str], label_map: np.ndarray) -> None:
    """Write a label map as a PNG in palette mode, in the colours of DAVIS.

    Args:
        path: file to write.
        label_map (`np.ndarray` of shape `(H, W)`, uint8): 0 for the background, 1 and up for objects.
    """
    if not isinstance(label_map, np.ndarray) or label_map.dtype != np.uint8:
        raise TypeError("`label_map` must be a numpy array of uint8: 0 for background, 1 and up for objects.")
    if label_map.ndim != 2:
        raise ValueError(f"`label_map` has shape {label_map.shape}; (H, W) is needed.")
    image = Image.fromarray(label_map, mode="P")
    image.putpalette(davis_palette().tobytes())
    _save_png(path, image)


def save_probability_png(path: str | os.PathLike[str], probs: np.ndarray) -> None:
    """Write probabilities as an 8-bit grey PNG: 0 is black, 1 is white.

    Args:
        path: file to write.
        probs (`np.ndarray` of shape `(H, W)`, floating point, in [0, 1]): of one object.
    """
    if not isinstance(probs, np.ndarray) or not np.issubdtype(probs.dtype, np.floating):
        raise TypeError("`probs` must be a numpy array of floating point numbers in [0, 1].")
    if probs.ndim != 2 or probs.size == 0:
        raise ValueError(f"`probs` has shape {probs.shape}; (H, W) is needed.")
    if not (probs.min() >= 0 and probs.max() <= 1):  # written so that NaN is refused, too
        raise ValueError(f"`probs` reach from {probs.min()} to {probs.max()}; they must lie in [0, 1].")
    _save_png(path, Image.fromarray(np.rint(probs * 255).astype(np.uint8)))


def save_cutout_png(path: str | os.PathLike[str], frame: np.ndarray, mask: np.ndarray) -> None:
    """Write the object of a frame on a transparent background.

    Args:
        path: file to write.
        frame (`np.ndarray` of shape `(H, W, 3)`, uint8): RGB.
        mask (`np.ndarray` of shape `(H, W)`, bool): `True` where the object is.
    """
    size = _checked_frame(frame)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_:
        raise TypeError("`mask` must be a numpy array of bool, of shape (H, W). Give `mask > threshold`.")
    if mask.shape != size:
        raise ValueError(f"`mask` has shape {mask.shape}; {size} is needed for this frame.")
    cutout = np.dstack([frame * mask[..., None], mask.astype(np.uint8) * 255])
    _save_png(path, Image.fromarray(cutout))


def write_json_lines(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, in UTF-8."""
    with _appearing_whole(Path(path)) as temporary, _naming(Path(path)), temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def davis_palette() -> np.ndarray:
    """Return the 256 colours of DAVIS annotations, shape `(256, 3)`, uint8.

    They are PASCAL VOC's: bit 3j of a label goes to bit 7 - j of red, 3j + 1 to that of green, 3j + 2 of blue.
    """
    labels = np.arange(256)[:, None]
    colors = np.zeros((256, 3), dtype=np.uint8)
    for j in range(3):
        colors |= (((labels >> (3 * j + np.arange(3))) & 1) << (7 - j)).astype(np.uint8)
    return colors


class VideoWriter:
    """Write an H.264 mp4 frame by frame, with the timing of the original and its sound; a context manager.

    Pictures are stored as yuv420p, which every player shows, if height and width are even. With an odd height or
    width they are stored as yuv444p, to keep the size: browsers and some players do not show that.
    The index of the file comes first (faststart). Leaving the context with an exception leaves no file.

    Args:
        path: file to write, ending in `.mp4`; an existing one is replaced at the end.
        height, width (`int`): size of the frames, in pixels.
        timestamps (`Sequence[float]`, *optional*): seconds at which each frame is shown, ascending, one per frame.
        fps (`Fraction` or `float`, *optional*): frames per second, in place of `timestamps`.
        audio_from (path, *optional*): video whose sound is kept: copied if mp4 can hold its codec, else as mono or
            stereo AAC; where it is damaged, it ends.
        audio_range (`tuple[float, float]`, *optional*): seconds of that sound to keep, `[start, end)`; `start` is
            heard with time 0 of the pictures. All of it by default.
        crf (`int`): quality of x264, 0 (lossless) to 51.

    Raises:
        OSError: the file cannot be written; the message names it.
        TypeError: a frame is not uint8.
        ValueError: the arguments or a frame's shape do not fit, or fewer or more frames are written than there are
            timestamps.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        height: int,
        width: int,
        timestamps: Sequence[float] | None = None,
        fps: Fraction | float | None = None,
        audio_from: str | os.PathLike[str] | None = None,
        audio_range: tuple[float, float] | None = None,
        crf: int = 18,
    ) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"`{self.path}` does not end in `.mp4`, the only kind of video that is written.")
        if min(height, width) < 1:
            raise ValueError(f"The video would be {width}x{height} pixels; at least 1x1 is needed.")
        if (timestamps is None) == (fps is None):
            raise ValueError("Give either `timestamps` or `fps`, and not both.")
        if not 0 <= crf <= 51:
            raise ValueError(f"`crf` is {crf}; it must lie in [0, 51].")
        if audio_range is not None and not 0 <= audio_range[0] < audio_range[1]:
            raise ValueError(f"`audio_range` is {audio_range}; (start, end) with 0 <= start < end is needed.")
        self._height, self._width, self._crf = height, width, crf
        self._audio_from, self._audio_range = audio_from, audio_range
        self._num_expected = None if timestamps is None else len(timestamps)
        self._num_written = 0
        if timestamps is None:
            if not 0 < float(fps or 0) < math.inf:
                raise ValueError(f"`fps` is {fps}; it must be a positive number of frames per second.")
            self._rate = Fraction(fps or 0).limit_denominator(_MAX_TIME_BASE)
            self._tick, self._ticks = 1 / self._rate, None
        else:
            self._tick, self._ticks, self._rate = _timing_of(timestamps)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        try:
            temporary = self._stack.enter_context(_appearing_whole(self.path))
            self._open(temporary)
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException as failure:
                self._stack.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._stack.__exit__(kind, error, trace)

    def write(self, frame: np.ndarray) -> None:
        """Append a frame, `(H, W, 3)`, uint8, RGB."""
        if _checked_frame(frame) != (self._height, self._width):
            raise ValueError(
                f"Frame {self._num_written} has shape {frame.shape}; ({self._height}, {self._width}, 3) is needed."
            )
        if self._num_expected is not None and self._num_written >= self._num_expected:
            raise ValueError(f"More frames are written than there are `timestamps` ({self._num_expected}).")
        picture = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture.pts = self._num_written if self._ticks is None else self._ticks[self._num_written]
        picture.time_base = self._tick
        with self._naming_errors():
            self._container.mux(self._stream.encode(picture))
            if self._audio is not None:
                self._audio.copy_until(picture.pts * self._tick)
        self._num_written += 1

    def _open(self, temporary: Path) -> None:
        import av  # only here: `import visa_hf` must not load it

        self._av = av
        is_odd = self._height % 2 or self._width % 2
        with self._naming_errors():
            self._container = av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"})
            self._stack.callback(self._give_up)
            # The same frames must give the same bytes. With more threads they depend on the number of cores; with
            # x264's macroblock tree and AVX-512 they differ from run to run, at most widths that 128 does not divide.
            options = {"crf": str(self._crf), "preset": "veryfast", "threads": "1", "mbtree": "0"}
            self._stream = self._container.add_stream("libx264", rate=self._rate, options=options)
            self._stream.width, self._stream.height = self._width, self._height
            self._stream.pix_fmt = "yuv444p" if is_odd else "yuv420p"
            self._stream.time_base = self._stream.codec_context.time_base = self._tick
            self._audio = None
            if self._audio_from is not None:
                self._audio = _AudioCopy(av, self._container, Path(self._audio_from), self._audio_range)
                self._stack.callback(self._audio.close)
            self._container.start_encoding()

    def _finish(self) -> None:
        if self._num_written == 0:
            raise ValueError(f"No frame was written to `{self.path}`; a video needs at least one.")
        if self._num_expected not in (None, self._num_written):
            raise ValueError(f"{self._num_written} frames were written, but {self._num_expected} `timestamps` given.")
        with self._naming_errors():
            self._container.mux(self._stream.encode(None))
            if self._audio is not None:
                self._audio.copy_until(None)
            self._container.close()

    def _give_up(self) -> None:
        """Close what is still open. Its errors say no more than the one that led here."""
        with suppress(self._av.FFmpegError):
            self._container.close()

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            raise OSError(error.errno, f"Cannot write `{self.path}`: {error.strerror}") from error


class _AudioCopy:
    """The sound of another video, handed to a container bit by bit."""

    def __init__(self, av: Any, output: Any, path: Path, time_range: tuple[float, float] | None) -> None:
        self._av, self._output = av, output
        try:
            self._input = av.open(str(path), metadata_errors="ignore")
        except av.FFmpegError as error:
            raise ValueError(f"The sound of `{path}` cannot be read: {error.strerror}.") from error
        self._source = self._input.streams.best("audio")
        if self._source is None or self._source.codec_context is None:
            self._input.close()
            raise ValueError(f"`{path}` has no sound to keep, or in an unknown codec. Leave out `audio_from`.")
        file_start = Fraction(self._input.start_time or 0, 1_000_000)
        self._start, self._end = (0.0, math.inf) if time_range is None else time_range
        self._shift = file_start + Fraction(self._start)
        self._is_copied = self._source.codec_context.name in _MP4_AUDIO
        self._units = self._read()
        self._waiting: Any = None
        if self._is_copied:
            self._stream = output.add_stream_from_template(self._source)
        else:
            rate = self._source.rate
            self._stream = output.add_stream("aac", rate=rate if rate in _AAC_RATES else 48000)
            self._stream.layout = "mono" if self._source.channels == 1 else "stereo"

    def close(self) -> None:
        self._input.close()

    def _read(self) -> Iterator[Any]:
        """Packets or decoded frames, up to the end or the first damage."""
        with suppress(self._av.FFmpegError):
            for packet in self._input.demux(self._source):
                if packet.size and packet.is_corrupt:
                    return
                if not self._is_copied:
                    yield from packet.decode()
                elif packet.size:
                    yield packet

    def copy_until(self, seconds: Fraction | None) -> None:
        """Hand over the sound before a time of the output; all that is left, if `None`."""
        while (unit := self._waiting or next(self._units, None)) is not None:
            self._waiting = None
            if unit.pts is None:  # a moment that is not known cannot be kept
                continue
            time = unit.pts * unit.time_base - self._shift
            if time + Fraction(self._start) >= self._end:
                break
            if seconds is not None and time > seconds:
                self._waiting = unit
                return
            if time >= 0 or self._start == 0:  # before 0 lies what AAC needs to begin with
                self._hand_over(unit)
        if seconds is None and not self._is_copied:
            self._output.mux(self._stream.encode(None))

    def _hand_over(self, unit: Any) -> None:
        ticks = round(self._shift / unit.time_base)
        unit.pts -= ticks
        if not self._is_copied:
            self._output.mux(self._stream.encode(unit))
            return
        unit.dts = unit.pts if unit.dts is None else unit.dts - ticks
        unit.stream = self._stream
        self._output.mux(unit)


def _timing_of(timestamps: Sequence[float]) -> tuple[Fraction, list[int], Fraction]:
    """A time base in which all timestamps are whole numbers, these numbers, and the average rate.

    Timestamps of a video are multiples of its time base, which is found again from the floats. If there is none of at
    most a millionth of a second, microseconds are taken.
    """
    times = [float(time) for time in timestamps]
    if not times:
        raise ValueError("`timestamps` is empty; a video needs at least one frame.")
    if not all(math.isfinite(time) and time >= 0 for time in times):
        raise ValueError("`timestamps` must be numbers of seconds, not negative.")
    if any(later <= earlier for earlier, later in zip(times, times[1:], strict=False)):
        raise ValueError("`timestamps` must ascend: each frame is shown after the one before.")
    exact = [Fraction(time).limit_denominator(_MAX_TIME_BASE) for time in times]
    denominator = 1
    for time in exact:
        denominator = min(math.lcm(denominator, time.denominator), _MAX_TIME_BASE)
    ticks = [round(time * denominator) for time in exact]
    if any(later <= earlier for earlier, later in zip(ticks, ticks[1:], strict=False)):
        raise ValueError("`timestamps` lie closer together than a millionth of a second.")
    span = exact[-1] - exact[0]
    rate = ((len(times) - 1) / span).limit_denominator(_MAX_TIME_BASE) if span else Fraction(25)
    return Fraction(1, denominator), ticks, rate


def _checked_frame(frame: np.ndarray) -> tuple[int, int]:
    """Return (H, W) of an RGB frame."""
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8:
        raise TypeError("A frame must be a numpy array of uint8, of shape (H, W, 3), with values from 0 to 255.")
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise ValueError(f"A frame has shape {frame.shape}; (H, W, 3) is needed.")
    return frame.shape[0], frame.shape[1]


def _erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """Take `radius` pixels off the border of a `(H, W)` mask; the edge of the picture is no border."""
    for _ in range(radius):
        padded = np.pad(mask, 1, mode="edge")
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def _save_png(path: str | os.PathLike[str], image: Image.Image) -> None:
    with _appearing_whole(Path(path)) as temporary, _naming(Path(path)):
        image.save(temporary, format="PNG")


@contextmanager
def _appearing_whole(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path`; on success it takes its place, on any failure it vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        with _naming(path):
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # gone already on success; on failure the first error counts
            temporary.unlink()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"Cannot write `{path}`: {error.strerror or error}") from error
