"""Frames against a plain decoding of the whole file, which is slow and keeps everything, but cannot be wrong."""

import contextlib
import gc
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests import media
from visa_hf.modeling import frame_source_visa
from visa_hf.modeling.frame_source_visa import open_frames

X264 = {
    "closed groups": {"g": "12", "bf": "3"},
    "open groups": {"x264-params": "open-gop=1:keyint=15:bframes=3:scenecut=0"},
    "intra refresh": {"x264-params": "intra-refresh=1:keyint=15"},
    "interlaced": {"x264-params": "interlaced=1:keyint=15"},
    "one group": {"g": "1000", "sc_threshold": "0"},
    "key frames only": {"g": "1"},
}
FILES: dict[str, Callable[[Path], Path]] = {
    "mp4": lambda folder: media.write_constant_rate(folder / "clip.mp4"),
    "mov": lambda folder: media.write_constant_rate(folder / "clip.mov"),
    "mkv": lambda folder: media.write_constant_rate(folder / "clip.mkv"),
    "mpeg-ts": lambda folder: media.write_constant_rate(folder / "clip.ts"),
    "flv": lambda folder: media.write_constant_rate(folder / "clip.flv"),
    "avi without pts": lambda folder: media.write_constant_rate(folder / "clip.avi"),
    "bare h264": lambda folder: media.write_constant_rate(folder / "clip.h264", container="h264"),
    "fragmented mp4": lambda folder: media.write_constant_rate(
        folder / "clip.mp4", container_options={"movflags": "frag_keyframe+empty_moov"}
    ),
    "late start": lambda folder: media.write_video(
        folder / "clip.mkv", 40, ticks=[1500 + 40 * i for i in range(40)], options={"g": "10"}
    ),
    "variable rate mp4": lambda folder: media.write_variable_rate(folder / "clip.mp4")[0],
    "variable rate mkv": lambda folder: media.write_variable_rate(folder / "clip.mkv")[0],
    "edit list": lambda folder: media.cut_with_edit_list(
        media.write_constant_rate(folder / "whole.mp4"), folder / "clip.mp4", 7 * 512
    ),
    "vp8 with hidden packets": lambda folder: media.write_video(
        folder / "clip.webm", 40, codec="libvpx", options={"g": "15", "auto-alt-ref": "1", "lag-in-frames": "10"}
    ),
    "vp9": lambda folder: media.write_video(
        folder / "clip.webm", 30, codec="libvpx-vp9", options={"g": "15", "deadline": "realtime", "cpu-used": "8"}
    ),
    "hevc": lambda folder: media.write_video(
        folder / "clip.mp4", 30, codec="libx265", options={"x265-params": "keyint=15:log-level=none"}
    ),
    "mpeg2": lambda folder: media.write_video(folder / "clip.mpg", 30, codec="mpeg2video", options={"bf": "2"}),
    "mpeg4 avi": lambda folder: media.write_video(folder / "clip.avi", 30, codec="mpeg4", options={"bf": "2"}),
    "mjpeg avi": lambda folder: media.write_video(folder / "clip.avi", 20, codec="mjpeg", pix_fmt="yuvj420p"),
    "16-bit grey": lambda folder: media.write_video(folder / "clip.mkv", 20, codec="ffv1", pix_fmt="gray16le"),
    "gif": lambda folder: media.write_gif(folder / "clip.gif"),
    "odd size": lambda folder: media.write_video(folder / "clip.mp4", 20, size=(65, 97), pix_fmt="yuv444p"),
    "one frame": lambda folder: media.write_video(folder / "clip.mp4", 1),
    **{
        f"h264 {name}": lambda folder, options=options: media.write_video(folder / "clip.mp4", 50, options=options)
        for name, options in X264.items()
    },
}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return media.write_constant_rate(tmp_path / "clip.mp4")


@pytest.fixture
def decoded_frames(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each frame that is turned into RGB from now on."""
    converted: list[int] = []
    to_rgb = frame_source_visa._frame_to_rgb

    def counting(frame: Any, display_matrix: tuple[int, ...] | None) -> np.ndarray:
        converted.append(frame.pts)
        return to_rgb(frame, display_matrix)

    monkeypatch.setattr(frame_source_visa, "_frame_to_rgb", counting)
    return converted


@pytest.mark.parametrize("kind", FILES)
def test_every_way_of_reading_gives_the_frames_of_a_plain_decoding(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](tmp_path)
    expected = media.decode_naively(path)
    count = len(expected)
    with open_frames(path, max_cached_frames=7) as source:
        assert (source.num_frames, source.height, source.width) == (count, *expected[0].shape[:2])
        assert source.timestamps is not None and len(source.timestamps) == count
        assert all(a < b for a, b in zip(source.timestamps, source.timestamps[1:], strict=False))
        orders = [range(count), range(count - 1, -1, -1), range(1, count, 3), range(count - 1, -1, -4)]
        orders += [range(count // 2, count), range(count // 2, -1, -1)]
        for order in orders:
            read = list(source.iterate(order.start, order.stop, order.step))
            assert [index for index, _ in read] == list(order)
            assert all(np.array_equal(frame, expected[index]) for index, frame in read), order
        indices = np.random.default_rng(0).integers(0, count, 25)
        assert all(np.array_equal(source[index], expected[index]) for index in indices)
        many = source.get_many(indices)
        assert all(np.array_equal(frame, expected[index]) for index, frame in zip(indices, many, strict=True))


def test_codes_in_the_pictures_tell_the_right_frames(clip: Path) -> None:
    """The same without a decoder's word: the number drawn in each picture."""
    with open_frames(clip) as source:
        assert [media.read_code(frame) for _, frame in source.iterate()] == list(range(60))
        assert [media.read_code(source[index]) for index in (59, 0, 31, 30)] == [59, 0, 31, 30]


def test_a_real_clip_with_sound() -> None:
    path = media.real_clip("bikes.mp4")
    expected = media.decode_naively(path)
    with open_frames(path) as source:
        assert (source.num_frames, source.height, source.width, source.fps) == (250, 272, 640, 25)
        assert not source.has_audio and source.name == "bikes" and source.path == path
        assert source.time_range == (0.0, 10.0)
        for index, frame in source.iterate(step=-1):
            assert np.array_equal(frame, expected[index])
        for index in (249, 0, 137, 136, 77):
            assert np.array_equal(source[index], expected[index])
    with open_frames(media.real_clip("bigbuckbunny.mp4")) as source:
        assert source.has_audio and source.num_frames == 132


def test_times_are_those_of_the_file(tmp_path: Path) -> None:
    path, times = media.write_variable_rate(tmp_path / "clip.mkv")
    with open_frames(path) as source:
        assert source.timestamps == pytest.approx(times, abs=1e-9)
        assert source.fps == Fraction(len(times) - 1) / Fraction(times[-1]).limit_denominator(1000)
        window = source.window(10, 30)
        assert window.timestamps == pytest.approx([time - times[10] for time in times[10:30]], abs=1e-9)
        assert window.time_range == pytest.approx((times[10], times[30]), abs=1e-9)
    with open_frames(media.write_video(tmp_path / "ntsc.mp4", fps=Fraction(30000, 1001))) as source:
        assert source.fps == Fraction(30000, 1001)
        assert source.timestamps == pytest.approx([i * 1001 / 30000 for i in range(30)], abs=1e-12)


def test_a_stream_that_starts_late_counts_time_from_the_start_of_the_file(tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "clip.mkv", 10, ticks=[1500 + 40 * i for i in range(10)])
    with open_frames(path) as source:
        assert source.timestamps == pytest.approx([0.04 * i for i in range(10)], abs=1e-9)


def turn_as_ffmpeg_does(path: Path) -> np.ndarray:
    """First frame, turned as the command line tool does (fftools/ffmpeg_filter.c)."""
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        stored, theta = frame.to_ndarray(format="rgb24"), -frame.rotation % 360
        matrix = np.frombuffer(bytes(frame.side_data["DISPLAYMATRIX"]), np.int32)
    if theta == 90:
        return stored.transpose(1, 0, 2) if matrix[3] > 0 else np.rot90(stored, -1)
    if theta == 270:
        return np.rot90(stored, -1)[::-1] if matrix[3] < 0 else np.rot90(stored, 1)
    if theta == 180:
        stored = stored[:, ::-1] if matrix[0] < 0 else stored
    return stored[::-1] if matrix[4] < 0 else stored


@pytest.mark.parametrize(("rotation", "hflip"), [(90, False), (180, False), (270, False), (0, True), (90, True)])
def test_rotation_and_mirroring_are_applied(rotation: int, hflip: bool, tmp_path: Path) -> None:
    path = media.write_video(tmp_path / "clip.mp4", 4, rotation=rotation, hflip=hflip)
    turned = turn_as_ffmpeg_does(path)
    with open_frames(path) as source:
        assert (source.height, source.width) == turned.shape[:2]
        assert np.array_equal(source[0], turned)
        assert all(np.array_equal(frame.shape, turned.shape) for _, frame in source.iterate(step=-1))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), [[1, 2, 3], [4, 5, 6]]),
        ((0, 1, 0, -1, 0, 0, 0, 0, 1), [[4, 1], [5, 2], [6, 3]]),  # a quarter turn clockwise, as a phone held upright
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), [[6, 5, 4], [3, 2, 1]]),
        ((0, -1, 0, 1, 0, 0, 0, 0, 1), [[3, 6], [2, 5], [1, 4]]),
        ((-1, 0, 0, 0, 1, 0, 0, 0, 1), [[3, 2, 1], [6, 5, 4]]),
        ((1, 0, 0, 0, -1, 0, 0, 0, 1), [[4, 5, 6], [1, 2, 3]]),
        ((0, 1, 0, 1, 0, 0, 0, 0, 1), [[1, 4], [2, 5], [3, 6]]),
    ],
)
def test_display_matrices_worked_out_by_hand(matrix: tuple[int, ...], expected: list[list[int]]) -> None:
    picture = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[..., None].repeat(3, axis=2)
    turned = frame_source_visa._orient(picture, matrix)
    assert turned[..., 0].tolist() == expected and turned.flags.c_contiguous


def test_transparent_parts_of_a_video_are_black(tmp_path: Path) -> None:
    def draw(number: int, height: int, width: int) -> np.ndarray:
        frame = np.full((height, width, 4), 200, np.uint8)  # A, R, G, B
        frame[:, : width // 2, 0], frame[:, width // 2 :, 0] = 0, 255
        frame[: height // 2, :, 0] //= 2
        return frame

    path = media.write_video(tmp_path / "c.mov", 3, codec="qtrle", pix_fmt="argb", draw=draw, array_format="argb")
    with open_frames(path) as source:
        frame = source[2]
    assert (frame[:, :48] == 0).all() and (frame[32:, 48:] == 200).all()
    assert (frame[:32, 48:] == (200 * 127 + 127) // 255).all()


def test_forward_reading_decodes_each_frame_once(clip: Path, decoded_frames: list[int]) -> None:
    with open_frames(clip) as source:
        decoded_frames.clear()
        assert sum(1 for _ in source.iterate()) == len(decoded_frames) == len(set(decoded_frames)) == 60


def test_decoded_frames_do_not_wait_for_the_garbage_collector(clip: Path) -> None:
    with open_frames(clip) as source:
        gc.collect()
        gc.disable()
        try:
            for _ in source.iterate():
                alive = sum(type(thing) is av.VideoFrame for thing in gc.get_objects())
                assert alive <= 24  # what frame threads hand over at the end of the file
        finally:
            gc.enable()


@pytest.mark.parametrize("limit", [1, 5, 64])
def test_backward_reading_never_holds_more_frames_than_the_limit(limit: int, tmp_path: Path) -> None:
    path = media.write_sparse_key_frames(tmp_path / "clip.mp4", 60, size=(256, 256))
    frame_bytes = 256 * 256 * 3
    with open_frames(path, max_cached_frames=limit) as source:
        source.get_many(range(12))  # remembered frames count, too
        list(source.window(0, 1).iterate())
        tracemalloc.start()
        try:
            codes = [media.read_code(frame) for _, frame in source.iterate(step=-1)]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert codes == list(range(59, -1, -1))
        # beside the held frames: the one just given, the one being made, and what `read_code` needs
        assert peak < (min(limit, 60) + 4) * frame_bytes + 1_000_000
        assert len(source._remembered) + source._max_backward <= limit


def test_readers_side_by_side_do_not_disturb_each_other(clip: Path) -> None:
    with open_frames(clip) as source:
        forward, backward = source.iterate(), source.iterate(step=-1)
        for number in range(60):
            assert media.read_code(next(forward)[1]) == number
            assert media.read_code(next(backward)[1]) == 59 - number
            assert media.read_code(source[(7 * number) % 60]) == (7 * number) % 60


def test_frames_are_the_callers_own(clip: Path) -> None:
    array = np.stack([media.test_frame(number) for number in range(3)])
    for video in (clip, array):
        with open_frames(video) as source:
            before = source[2].copy()
            source[2][:] = 0
            first, second = source.get_many([2, 2])
            first[:] = 0
            assert np.array_equal(second, before) and np.array_equal(source[2], before)
            for _, frame in source.iterate():
                frame[:] = 0
            assert np.array_equal(source[2], before)


def test_a_window_is_a_video_of_its_own(clip: Path) -> None:
    with open_frames(clip) as source:
        window = source.window(25, 45)
        assert (len(window), window.offset, window.path, window.name) == (20, 25, clip, "clip")
        assert [media.read_code(frame) for _, frame in window.iterate()] == list(range(25, 45))
        assert [(i, media.read_code(frame)) for i, frame in window.iterate(step=-3)] == [
            (i, 25 + i) for i in range(19, -1, -3)
        ]
        assert [media.read_code(frame) for frame in window.get_many([19, 0])] == [44, 25]
        inner = window.window(5, 7)
        assert (inner.offset, media.read_code(inner[1])) == (30, 31)
        assert inner.timestamps == pytest.approx([0, 0.04]) and inner.time_range == pytest.approx((1.2, 1.28))
        with pytest.raises(IndexError, match="Frame index 20 is outside the video, which has 20 frames."):
            window[20]
        window.close()
        assert media.read_code(source[3]) == 3
        for start, stop in ((5, 5), (-1, 4), (0, 61)):
            with pytest.raises(ValueError, match="does not lie in the video, which has 60 frames"):
                source.window(start, stop)


def test_indices_outside_the_video_are_refused(clip: Path) -> None:
    with open_frames(clip) as source:
        for index in (-1, 60):
            text = f"Frame index {index} is outside the video, which has 60 frames."
            for read in (source.__getitem__, lambda i: source.get_many([0, i]), source.iterate):
                with pytest.raises(IndexError) as caught:
                    read(index) if index < 0 or read != source.iterate else source.iterate(61)
                assert str(caught.value).startswith("Frame index") and "which has 60 frames." in str(caught.value)
            with pytest.raises(IndexError) as caught:
                source[index]
            assert str(caught.value) == text
        with pytest.raises(IndexError, match="Frame index 61"):
            source.iterate(0, 61)
        with pytest.raises(ValueError, match="`step` is 0"):
            source.iterate(step=0)
        assert list(source.iterate(60)) == [] and list(source.iterate(5, 5)) == []
    with pytest.raises(ValueError, match="is closed"):
        source[0]
    with pytest.raises(ValueError, match="is closed"):
        source.iterate()


# --- folders, images, arrays ---


def test_a_folder_is_read_in_natural_order(tmp_path: Path) -> None:
    folder = media.write_folder(tmp_path / "frames")
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame1.png").write_text("what some systems leave behind")
    with open_frames(folder) as source:
        assert [media.read_code(frame) for _, frame in source.iterate()] == list(range(12))
        assert [media.read_code(frame) for _, frame in source.iterate(step=-1)] == list(range(11, -1, -1))
        assert (source.fps, source.timestamps, source.time_range, source.has_audio) == (None, None, None, False)
        assert (source.name, source.path) == ("frames", folder)
    with open_frames(folder, fps=8) as source:
        assert source.fps == 8 and source.timestamps == [i / 8 for i in range(12)] and source.time_range == (0, 1.5)


def test_a_list_of_image_files_is_a_video(tmp_path: Path) -> None:
    folder = media.write_folder(tmp_path / "frames", suffix=".jpg")
    with open_frames([str(folder / "frame3.jpg"), folder / "frame12.jpg"]) as source:
        assert [media.read_code(frame) for _, frame in source.iterate()] == [2, 11]
        assert source.name == "video" and source.path is None


def test_images_of_all_modes_become_rgb(tmp_path: Path) -> None:
    grey = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
    rgb = np.stack([grey, grey[::-1], 255 - grey], axis=2)
    alpha = np.where(np.arange(20) < 10, 0, 255).astype(np.uint8)[None].repeat(12, axis=0)
    grey_rgb = grey[..., None].repeat(3, axis=2)
    palette = Image.fromarray(rgb).quantize(64)
    black = (np.arange(12 * 20).reshape(12, 20) % 3 == 0)[..., None].repeat(3, axis=2)
    cases = {
        "rgb.png": (Image.fromarray(rgb), rgb),
        "grey.png": (Image.fromarray(grey), grey_rgb),
        "rgba.png": (Image.fromarray(np.dstack([rgb, alpha])), rgb * (alpha > 0)[..., None]),
        "la.png": (Image.fromarray(np.dstack([grey, alpha]), "LA"), grey_rgb * (alpha > 0)[..., None]),
        "16bit.png": (Image.fromarray(grey.astype(np.uint16) * 257), grey_rgb),
        "bits.png": (Image.fromarray(black[..., 0]), black * np.uint8(255)),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "rgb.bmp": (Image.fromarray(rgb), rgb),
        "rgb.webp": (Image.fromarray(rgb), rgb),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        for video in (tmp_path / name, [image], image):
            with open_frames(video) as source:
                assert (source.num_frames, source.height, source.width) == (1, 12, 20)
                frame = source[0]
                assert frame.dtype == np.uint8 and np.array_equal(frame, expected), name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    picture = media.test_frame(5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "photo.png", exif=exif)
    upright = {
        1: picture,
        2: picture[:, ::-1],
        3: picture[::-1, ::-1],
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture, -1),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture, 1),
    }[orientation]
    with open_frames(tmp_path / "photo.png") as source:
        assert (source.height, source.width) == upright.shape[:2]
        assert np.array_equal(source[0], upright)


def test_arrays_tensors_and_lists_are_videos() -> None:
    frames = np.stack([media.test_frame(number) for number in range(4)])
    grey = frames[..., 0]
    opaque = np.concatenate([frames, np.full((*frames.shape[:3], 1), 255, np.uint8)], axis=3)
    grey_rgb = grey[..., None].repeat(3, axis=3)
    cases: list[tuple[Any, np.ndarray]] = [
        (frames, frames),
        (torch.from_numpy(frames), frames),
        (torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), frames),
        (frames[:, :, ::-1], frames[:, :, ::-1]),
        (opaque, frames),
        (grey, grey_rgb),
        (grey[..., None], grey_rgb),
        (list(frames), frames),
        (tuple(torch.from_numpy(frames)), frames),
        ([Image.fromarray(frame) for frame in frames], frames),
        (list(grey), grey_rgb),
        ([frames[0], Image.fromarray(frames[1]), torch.from_numpy(frames[2]), opaque[3]], frames),
    ]
    for video, expected in cases:
        with open_frames(video) as source:
            assert (source.num_frames, source.height, source.width) == (4, 64, 96)
            for index, frame in source.iterate(step=-1):
                assert frame.dtype == np.uint8 and frame.flags.c_contiguous and frame.flags.writeable
                assert np.array_equal(frame, expected[index])
            assert np.array_equal(source.window(1, 3)[1], expected[2])


FRAME = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "error", "text"),
    [
        (np.zeros((2, 4, 6, 3), np.float32), TypeError, r"dtype float32; uint8 .* is needed"),
        (torch.zeros(2, 4, 6, 3), TypeError, r"dtype torch.float32; uint8"),
        (np.zeros((2, 4, 6), bool), TypeError, "dtype bool"),
        (
            np.zeros((2, 3, 4, 6), np.uint8),
            ValueError,
            r"shape \(2, 3, 4, 6\); \(T, H, W, 3\).*Move the channels last",
        ),
        (np.zeros((2, 4, 6, 2), np.uint8), ValueError, r"shape \(2, 4, 6, 2\)"),
        (np.zeros((4, 6), np.uint8), ValueError, r"shape \(4, 6\)"),
        (FRAME, ValueError, r"shape \(4, 6, 3\), which could be one image.*image\[None\]"),
        (np.zeros((0, 4, 6, 3), np.uint8), ValueError, "no frames or no pixels"),
        (np.zeros((2, 0, 6, 3), np.uint8), ValueError, "no frames or no pixels"),
        ([], ValueError, "empty list"),
        ([FRAME, FRAME.astype(float)], TypeError, "Frame 1 of the list has dtype float64"),
        ([FRAME, np.zeros((4, 5, 3), np.uint8)], ValueError, "Frame 1 is 5x4, but Frame 0 is 6x4"),
        ([FRAME, None], TypeError, "Frame 1 of the list is of type NoneType"),
        ([FRAME, "frame.png"], TypeError, "Frame 1 of the list is of type str"),
        ([FRAME[..., :2]], ValueError, r"Frame 0 of the list has shape \(4, 6, 2\)"),
        ((frame for frame in [FRAME]), TypeError, r"generator, whose length is unknown.*`list\(frames\)`"),
        (5, TypeError, "of type int. Give a path"),
        (None, TypeError, "of type NoneType"),
    ],
)
def test_what_is_no_video_is_refused(video: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        open_frames(video)


def test_settings_that_make_no_sense_are_refused(clip: Path) -> None:
    with pytest.raises(ValueError, match="`max_cached_frames` is 0"):
        open_frames(clip, max_cached_frames=0)
    with pytest.raises(ValueError, match="a video file with its own"):
        open_frames(clip, fps=25)
    for fps in (0, -5, 1e-9, 9e-4, 2e5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"`fps` is {fps}; it must be .* between 0.001 and 100000\."):
            open_frames([FRAME], fps=fps)
    with pytest.raises(TypeError, match="`fps` is '25'; it must be a number of frames per second"):
        open_frames([FRAME], fps="25")
    for fps in (0.001, 1e5):
        with open_frames([FRAME], fps=fps) as source:
            assert float(source.fps) == fps


def test_folders_that_are_no_video_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no video at .*missing.mp4"):
        open_frames(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="holds no images"):
        open_frames(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no image at .*missing.png"):
        open_frames([tmp_path / "missing.png"])
    folder = media.write_folder(tmp_path / "frames", 3)
    Image.fromarray(media.test_frame(0, 64, 90)).save(folder / "frame2.png")
    with pytest.raises(ValueError, match=r"frame2.png` is 90x64, but .*frame1.png` is 96x64"):
        open_frames(folder)
    (folder / "frame2.png").write_text("no picture")
    with pytest.raises(ValueError, match="frame2.png` is not an image that can be read .*Give another file"):
        open_frames(folder)
    pictures = [Image.fromarray(media.test_frame(number)) for number in range(3)]
    pictures[0].save(tmp_path / "moving.png", save_all=True, append_images=pictures[1:])
    with pytest.raises(ValueError, match="moving.png` is a PNG file of 3 pictures"):
        open_frames(tmp_path / "moving.png")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_damaged_image_is_named_and_can_be_left_out(suffix: str, tmp_path: Path) -> None:
    folder = media.write_folder(tmp_path / "frames", 5, suffix=suffix)
    media.cut_off(folder / f"frame4{suffix}", folder / f"frame4{suffix}", 0.7)
    with (
        open_frames(folder) as source,
        pytest.raises(ValueError, match=r"Frame 3, .*frame4.*damaged.*allow-truncated"),
    ):
        list(source.iterate())
    with open_frames(folder, allow_truncated=True) as source:
        assert [media.read_code(frame) for _, frame in source.iterate()] == [0, 1, 2]


# --- files that are no video, or not a whole one ---


def test_files_that_are_no_video_are_refused(tmp_path: Path) -> None:
    text, empty = tmp_path / "text.mp4", tmp_path / "empty.mp4"
    text.write_text("This is not a video.\n" * 50)
    empty.touch()
    cases = [
        (text, "text.mp4` cannot be opened: it is not a video in a known format"),
        (empty, r"empty.mp4` cannot be opened: it is empty \(0 bytes\)"),
        (media.write_no_frames(tmp_path / "none.mp4"), "none.mp4` has no frames"),
        (media.write_sound_only(tmp_path / "sound.m4a"), "sound.m4a` has no frames: there is no video stream in it"),
    ]
    for path, message in cases:
        for allow_truncated in (False, True):
            with pytest.raises(ValueError, match=message):
                open_frames(path, allow_truncated=allow_truncated)


def test_an_mp4_without_its_index_cannot_be_opened(clip: Path, tmp_path: Path) -> None:
    broken = media.cut_off(clip, tmp_path / "broken.mp4", 0.6)
    for allow_truncated in (False, True):
        with pytest.raises(ValueError, match=r"broken.mp4` cannot be opened: it is truncated.*\(moov\)"):
            open_frames(broken, allow_truncated=allow_truncated)


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 0.97])
@pytest.mark.parametrize("kind", ["faststart mp4", "fragmented mp4", "mkv", "webm", "avi", "gif"])
def test_frames_before_a_break_are_used_only_if_that_is_allowed(kind: str, share: float, tmp_path: Path) -> None:
    def draw(number: int, height: int, width: int) -> np.ndarray:  # so much data that headers matter little
        return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)

    suffix = kind.split()[-1]
    whole = tmp_path / f"whole.{suffix}"
    if kind == "webm":
        options = {"g": "15", "deadline": "realtime", "cpu-used": "8"}
        media.write_video(whole, 30, codec="libvpx", options=options, draw=draw)
    elif kind == "gif":
        media.write_gif(whole, 30, draw=draw)
    elif kind == "avi":
        media.write_video(whole, 60, codec="mjpeg", pix_fmt="yuvj420p", draw=draw)
    else:
        flags = {"faststart mp4": "+faststart", "fragmented mp4": "frag_keyframe+empty_moov"}.get(kind)
        media.write_constant_rate(whole, draw=draw, container_options={"movflags": flags} if flags else None)
    expected = media.decode_naively(whole)
    broken = media.cut_off(whole, tmp_path / f"broken.{suffix}", share)
    with av.open(str(broken)) as container, contextlib.suppress(av.FFmpegError):
        careless = 0
        for _ in container.decode(video=0):
            careless += 1
    with pytest.raises(ValueError, match=r"broken.* breaks off at frame \d+\. Give `allow_truncated=True`"):
        open_frames(broken)
    with open_frames(broken, allow_truncated=True) as source:
        # nothing that may be spoilt, and not much less than a careless decoder gets out of it
        assert careless - 4 <= source.num_frames < len(expected)
        for index, frame in source.iterate():
            assert np.array_equal(frame, expected[index]), index
        for index, frame in source.iterate(step=-1):
            assert np.array_equal(frame, expected[index]), index


def test_damage_in_the_middle_is_named_and_the_frames_before_can_be_used(clip: Path, tmp_path: Path) -> None:
    expected = media.decode_naively(clip)
    broken = tmp_path / "broken.mp4"
    for ordinal in (5, 26, 33):
        number = media.damage_packet(clip, broken, ordinal, offset=8)
        with open_frames(broken) as source:
            assert source.num_frames == 60
            given = []
            with pytest.raises(ValueError, match=r"is damaged.*Give `allow_truncated=True`") as caught:
                for index, _ in source.iterate():
                    given.append(index)
        # up to 3 B-frames shown before the damaged one need it
        assert number - 3 <= len(given) <= number
        assert str(caught.value).startswith(f"Frame {len(given)} of `{broken}`")
        with open_frames(broken) as source, pytest.raises(ValueError, match="is damaged"):
            source[number + 1]
        with open_frames(broken) as source:
            assert np.array_equal(source[59], expected[59])  # a later group of pictures is whole
        with open_frames(broken, allow_truncated=True) as source:
            assert number - 3 <= source.num_frames <= number
            for index, frame in source.iterate():
                assert np.array_equal(frame, expected[index])
            assert np.array_equal(source[source.num_frames - 1], expected[source.num_frames - 1])


def test_allowing_truncation_changes_nothing_in_a_whole_video(clip: Path) -> None:
    with open_frames(clip, allow_truncated=True) as source:
        assert [media.read_code(frame) for _, frame in source.iterate()] == list(range(60))


def test_a_video_that_changes_its_size_is_refused_at_that_frame(tmp_path: Path) -> None:
    small = media.write_video(tmp_path / "small.h264", 5, container="h264")
    large = media.write_video(tmp_path / "large.h264", 5, container="h264", size=(80, 120))
    both = tmp_path / "both.h264"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    with (
        open_frames(both) as source,
        pytest.raises(ValueError, match="Frame 5 of .* is 120x80, but .* began as 96x64"),
    ):
        list(source.iterate())


def test_without_pyav_only_images_are_read(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_source_visa, "is_av_available", lambda: False)
    with pytest.raises(ImportError, match="Install it with `pip install av`"):
        open_frames(clip)
    with open_frames(media.write_folder(tmp_path / "frames")) as source:
        assert source.num_frames == 12


def test_reading_is_silent(clip: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.mp4"
    media.damage_packet(clip, broken, 20, offset=8)
    capfd.readouterr()
    with open_frames(broken, allow_truncated=True) as source:
        list(source.iterate())
    assert capfd.readouterr() == ("", "")
