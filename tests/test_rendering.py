"""What is written is read back with the project's own reader, with PyAV and with Pillow."""

import errno
import json
import os
import resource
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from tests import media
from visa_hf import rendering
from visa_hf.modeling.frame_source_visa import open_frames
from visa_hf.rendering import (
    OVERLAY_COLORS,
    VideoWriter,
    contact_sheet,
    davis_palette,
    overlay_masks,
    save_cutout_png,
    save_palette_png,
    save_probability_png,
    write_json_lines,
)

GREY = np.full((12, 16, 3), 100, np.uint8)


def left_half() -> np.ndarray:
    mask = np.zeros((1, 12, 16), bool)
    mask[:, 2:10, :6] = True
    return mask


# --- pictures ---


def test_a_mask_is_blended_and_its_contour_is_opaque() -> None:
    drawn = overlay_masks(GREY, left_half(), alpha=0.25, colors=[(200, 0, 40)])
    assert np.array_equal(GREY, np.full((12, 16, 3), 100))
    inner, contour = drawn[3:9, :5], np.concatenate([drawn[2, :6], drawn[9, :6], drawn[2:10, 5]])
    assert (inner == [125, 75, 85]).all()  # 0.75 * 100 + 0.25 * colour
    assert (contour == [200, 0, 40]).all()  # none along the edge of the picture, where the object goes on
    outside = ~left_half()[0]
    assert (drawn[outside] == 100).all()
    plain = overlay_masks(GREY, left_half(), alpha=0.25, colors=[(200, 0, 40)], contour=False)
    assert (plain[~outside] == [125, 75, 85]).all()


def test_overlays_equal_a_plain_computation_over_the_whole_picture() -> None:
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (40, 50, 3), np.uint8)
    y, x = np.mgrid[:40, :50]
    masks = np.stack(
        [rng.random((40, 50)) < 0.5, (y - 5) ** 2 + (x - 44) ** 2 < 200, np.zeros((40, 50), bool), y < 99]
    )
    expected = frame.copy()
    for mask, color in zip(masks, OVERLAY_COLORS, strict=False):
        padded = np.pad(mask, 1, mode="edge")
        inner = mask & padded[2:, 1:-1] & padded[:-2, 1:-1] & padded[1:-1, 2:] & padded[1:-1, :-2]
        blend = np.rint(expected * 0.5 + color * 0.5).astype(np.uint8)
        expected = np.where(inner[..., None], blend, np.where(mask[..., None], color, expected))
    assert np.array_equal(overlay_masks(frame, masks), expected)


def test_no_masks_and_empty_masks_leave_the_frame_as_it_is() -> None:
    for count in (0, 3):
        drawn = overlay_masks(GREY, np.zeros((count, 12, 16), bool))
        assert np.array_equal(drawn, GREY) and drawn is not GREY


def test_colours_repeat_after_the_last_one() -> None:
    masks = np.repeat(left_half(), 8, axis=0)
    assert np.array_equal(overlay_masks(GREY, masks, alpha=1)[5, 2], OVERLAY_COLORS[0])
    assert len({tuple(color) for color in OVERLAY_COLORS.tolist()}) == 7


@pytest.mark.parametrize(
    ("frame", "masks", "settings", "error", "text"),
    [
        (GREY.astype(float), left_half(), {}, TypeError, "A frame must be a numpy array of uint8"),
        (GREY[..., 0], left_half(), {}, ValueError, r"shape \(12, 16\); \(H, W, 3\)"),
        (GREY, left_half().astype(np.uint8), {}, TypeError, "`masks` must be a numpy array of bool"),
        (GREY, left_half()[0], {}, ValueError, r"`masks` has shape \(12, 16\); \(N, 12, 16\)"),
        (GREY, np.zeros((1, 16, 12), bool), {}, ValueError, r"shape \(1, 16, 12\)"),
        (GREY, left_half(), {"alpha": 1.5}, ValueError, "`alpha` is 1.5"),
        (GREY, np.repeat(left_half(), 2, axis=0), {"colors": [(1, 2, 3)]}, ValueError, r"`colors` has shape \(1, 3\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    frame: np.ndarray, masks: np.ndarray, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        overlay_masks(frame, masks, **settings)


def test_a_contact_sheet_holds_all_frames_in_rows() -> None:
    frames = [np.full((12, 16, 3), 10 * number, np.uint8) for number in range(5)]
    empty = np.zeros((0, 12, 16), bool)
    sheet = contact_sheet(frames, [empty, left_half(), empty, empty, empty], columns=3)
    assert sheet.shape == (2 * 16 - 4, 3 * 20 - 4, 3)
    assert (sheet[:12, 40:56] == 20).all() and (sheet[16:, 20:36] == 40).all()
    assert np.array_equal(sheet[:12, 20:36], overlay_masks(frames[1], left_half()))
    assert (sheet[16:, 40:] == 255).all() and (sheet[12:16] == 255).all()
    assert contact_sheet(frames[:2], [empty, empty], columns=9).shape == (12, 36, 3)
    with pytest.raises(ValueError, match="5 frames, 1 masks and 3 columns"):
        contact_sheet(frames, [empty], columns=3)


def test_label_maps_keep_their_labels_and_get_the_colours_of_davis(tmp_path: Path) -> None:
    labels = (np.arange(12 * 16).reshape(12, 16) % 5).astype(np.uint8)
    save_palette_png(tmp_path / "labels.png", labels)
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
        colors = np.asarray(image.convert("RGB"))
    known = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]  # as in the DAVIS annotations
    assert np.array_equal(colors, np.array(known, np.uint8)[labels])
    assert davis_palette()[[20, 255]].tolist() == [[0, 64, 128], [224, 224, 192]]  # PASCAL VOC's
    with pytest.raises(TypeError, match="`label_map` must be a numpy array of uint8"):
        save_palette_png(tmp_path / "other.png", labels.astype(int))
    with pytest.raises(ValueError, match=r"shape \(1, 12, 16\)"):
        save_palette_png(tmp_path / "other.png", labels[None])


def test_probabilities_become_grey_values(tmp_path: Path) -> None:
    save_probability_png(tmp_path / "p.png", np.array([[0, 0.5, 1], [0.2, 0.001, 0.999]], np.float32))
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "L" and np.asarray(image).tolist() == [[0, 128, 255], [51, 0, 255]]
    for bad in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            save_probability_png(tmp_path / "q.png", np.array([[0.5, bad]]))
    with pytest.raises(TypeError, match="floating point"):
        save_probability_png(tmp_path / "q.png", np.array([[0, 1]]))
    assert os.listdir(tmp_path) == ["p.png"]


def test_a_cutout_is_opaque_on_the_object_only(tmp_path: Path) -> None:
    save_cutout_png(tmp_path / "c.png", GREY, left_half()[0])
    with Image.open(tmp_path / "c.png") as image:
        assert image.mode == "RGBA"
        pixels = np.asarray(image)
    assert np.array_equal(pixels[..., 3] == 255, left_half()[0])
    assert (pixels[left_half()[0]] == [100, 100, 100, 255]).all() and (pixels[~left_half()[0]] == 0).all()
    with pytest.raises(ValueError, match=r"`mask` has shape \(1, 12, 16\); \(12, 16\)"):
        save_cutout_png(tmp_path / "d.png", GREY, left_half())


def test_json_lines_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"query": "das größte Tier", "scores": [0.5]}, {"mask": None}]
    write_json_lines(path, rows)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows

    def failing() -> Any:
        yield rows[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_json_lines(path, failing())
    with pytest.raises(ValueError, match="JSON"):
        write_json_lines(path, [{"score": float("nan")}])
    assert os.listdir(tmp_path) == ["rows.jsonl"] and len(path.read_text(encoding="utf-8").splitlines()) == 2


# --- videos ---


def write_numbers(path: Path, count: int, *, size: tuple[int, int] = (64, 96), **settings: Any) -> None:
    with VideoWriter(path, height=size[0], width=size[1], **settings) as writer:
        for number in range(count):
            writer.write(media.test_frame(number, *size))


def probe(path: Path) -> tuple[Any, ...]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream.codec_context.name, stream.format.name, stream.height, stream.width


@pytest.mark.parametrize(
    ("size", "pix_fmt"), [((64, 96), "yuv420p"), ((65, 96), "yuv444p"), ((64, 97), "yuv444p"), ((31, 33), "yuv444p")]
)
def test_videos_are_h264_of_the_size_of_the_frames(size: tuple[int, int], pix_fmt: str, tmp_path: Path) -> None:
    write_numbers(tmp_path / "out.mp4", 30, size=size, fps=Fraction(30000, 1001))
    assert probe(tmp_path / "out.mp4") == ("h264", pix_fmt, *size)
    assert os.listdir(tmp_path) == ["out.mp4"]
    with open_frames(tmp_path / "out.mp4") as source:
        assert source.fps == Fraction(30000, 1001) and source.num_frames == 30
        assert source.time_range == pytest.approx((0, 30 * 1001 / 30000), abs=1e-9)
        for index, frame in source.iterate():
            assert media.read_code(frame) == index


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """Not so with x264's macroblock tree, where processors have AVX-512: seen at 19 of 27 widths from 16 to 1280."""
    rng = np.random.default_rng(0)
    frames = [media.test_frame(number, 64, 96) for number in range(12)]
    noisy = [np.clip(frame + rng.integers(-9, 10, frame.shape), 0, 255).astype(np.uint8) for frame in frames]
    written = set()
    for _ in range(20):
        with VideoWriter(tmp_path / "out.mp4", height=64, width=96, fps=10) as writer:
            for frame in noisy:
                # Memory that is given back and taken again holds something else each time.
                _ = [rng.integers(0, 256, rng.integers(100, 100_000), dtype=np.uint8) for _ in range(3)]
                writer.write(frame)
        written.add((tmp_path / "out.mp4").read_bytes())
    assert len(written) == 1


def test_colours_survive(tmp_path: Path) -> None:
    frame = np.zeros((64, 64, 3), np.uint8)
    frame[:32, :32], frame[:32, 32:], frame[32:, :32], frame[32:, 32:] = (
        (220, 30, 30),
        (30, 200, 40),
        (40, 60, 210),
        128,
    )
    with VideoWriter(tmp_path / "out.mp4", height=64, width=64, fps=25, crf=1) as writer:
        writer.write(frame)
    with open_frames(tmp_path / "out.mp4") as source:
        difference = np.abs(source[0].astype(int) - frame)
    difference[30:34], difference[:, 30:34] = 0, 0  # colours are stored at half the size
    assert difference.max() <= 5


def test_the_index_comes_before_the_pictures(tmp_path: Path) -> None:
    write_numbers(tmp_path / "out.mp4", 5, fps=25)
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_uneven_timing_is_kept_exactly(suffix: str, tmp_path: Path) -> None:
    path, times = media.write_variable_rate(tmp_path / f"clip.{suffix}")
    with (
        open_frames(path) as source,
        VideoWriter(tmp_path / "out.mp4", height=64, width=96, timestamps=source.timestamps) as writer,
    ):
        for _, frame in source.iterate():
            writer.write(frame)
    with open_frames(tmp_path / "out.mp4") as written:
        assert written.timestamps == pytest.approx(times, abs=1e-12)
        assert [media.read_code(frame) for _, frame in written.iterate()] == list(range(40))


def test_timestamps_of_any_kind_are_kept_to_the_microsecond(tmp_path: Path) -> None:
    times = list(np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 20)) - 0.01)
    write_numbers(tmp_path / "out.mp4", 20, timestamps=times)
    with open_frames(tmp_path / "out.mp4") as written:
        distances = np.diff(written.timestamps)
        assert distances == pytest.approx(np.diff(times), abs=1.1e-6)


@pytest.mark.parametrize("seconds", [10, 20_000])
@pytest.mark.parametrize("tick", [Fraction(1, 12800), Fraction(1001, 30000), Fraction(1, 90000), Fraction(1, 1000)])
def test_the_time_base_is_found_again_from_the_seconds(tick: Fraction, seconds: int) -> None:
    ticks = sorted({int(part) for part in np.random.default_rng(0).integers(0, seconds / tick, 200)})
    base, found, _ = rendering._timing_of([float(number * tick) for number in ticks])
    assert [number * base for number in found] == [number * tick for number in ticks]


@pytest.mark.parametrize(
    ("suffix", "audio", "kept"),
    [
        ("mp4", "aac", "aac"),
        ("mkv", "libmp3lame", "mp3float"),
        ("mkv", "ac3", "ac3"),
        ("webm", "libopus", "aac"),
        ("mkv", "pcm_s16le", "aac"),
        ("mkv", "pcm_s16le at an odd rate", "aac"),
        ("mkv", "flac", "aac"),
    ],
)
def test_sound_is_copied_or_encoded_again(suffix: str, audio: str, kept: str, tmp_path: Path) -> None:
    codec = "libvpx" if suffix == "webm" else "libx264"
    rate = 50000 if "odd" in audio else 48000 if audio == "libopus" else 44100
    path = media.write_video(tmp_path / f"clip.{suffix}", 50, codec=codec, audio=audio.split()[0], audio_rate=rate)
    write_numbers(tmp_path / "out.mp4", 50, fps=25, audio_from=path)
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.audio[0].codec_context.name == kept
        new_rate = container.streams.audio[0].rate
    original, written = listen(path), listen(tmp_path / "out.mp4")
    if new_rate != rate:
        original = np.interp(np.arange(0, len(original), rate / new_rate), np.arange(len(original)), original)
    assert abs(len(written) - len(original)) / rate < 0.06
    assert abs(delay_between(original, written)) / rate < 0.002


def test_packets_of_sound_that_can_be_kept_are_not_touched(tmp_path: Path) -> None:
    path = media.real_clip("bigbuckbunny.mp4")
    write_numbers(tmp_path / "out.mp4", 132, fps=25, audio_from=path)

    def packets(file: Path) -> list[tuple[int | None, bytes]]:
        with av.open(str(file)) as container:
            return [(packet.pts, bytes(packet)) for packet in container.demux(audio=0) if packet.size]

    assert packets(tmp_path / "out.mp4") == packets(path)


@pytest.mark.parametrize(("suffix", "audio"), [("mp4", "aac"), ("mkv", "pcm_s16le")])
def test_sound_of_a_part_stays_in_step_with_the_pictures(suffix: str, audio: str, tmp_path: Path) -> None:
    path = media.write_video(tmp_path / f"clip.{suffix}", 100, audio=audio)
    with open_frames(path) as source:
        window = source.window(35, 75)
        with VideoWriter(
            tmp_path / "out.mp4",
            height=64,
            width=96,
            timestamps=window.timestamps,
            audio_from=window.path,
            audio_range=window.time_range,
        ) as writer:
            for _, frame in window.iterate():
                writer.write(frame)
    original = listen(path)[int(1.4 * 44100) : int(3.0 * 44100)]
    written = listen(tmp_path / "out.mp4")
    assert abs(len(written) / 44100 - 1.6) < 0.06
    assert abs(delay_between(original, written)) / 44100 < 0.002
    with open_frames(tmp_path / "out.mp4") as source:
        assert source.timestamps == pytest.approx([0.04 * number for number in range(40)], abs=1e-9)


def listen(path: Path) -> np.ndarray:
    """Samples of the first channel, from time 0 of the file on, silence where there are none."""
    with av.open(str(path)) as container:
        start, rate = Fraction(container.start_time or 0, 1_000_000), container.streams.audio[0].rate
        samples = np.zeros(10 * rate, np.float32)
        end = 0
        for frame in container.decode(audio=0):
            values = frame.to_ndarray()[0].reshape(-1).astype(np.float32)
            if frame.format.name.startswith("s16"):
                values /= 32768
            first = round((frame.pts * frame.time_base - start) * rate)
            values = values[max(-first, 0) :]
            end = max(first, 0) + len(values)
            samples[max(first, 0) : end] = values
    return samples[:end]


def delay_between(first: np.ndarray, second: np.ndarray) -> int:
    """Samples by which the second of two recordings of one rising tone comes later."""
    length = min(len(first), len(second), 65536)
    spectra = [np.fft.rfft(sound[:length], 2 * length) for sound in (first, second)]
    correlation = np.fft.irfft(spectra[1] * spectra[0].conj())
    delay = int(correlation.argmax())
    return delay - 2 * length if delay > length else delay


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"path": "out.avi"}, "does not end in `.mp4`"),
        ({"height": 0}, "at least 1x1"),
        ({"fps": None}, "either `timestamps` or `fps`"),
        ({"timestamps": [0.0]}, "either `timestamps` or `fps`"),
        ({"fps": 0}, "`fps` is 0"),
        ({"fps": None, "timestamps": []}, "`timestamps` is empty"),
        ({"fps": None, "timestamps": [0.0, 0.0]}, "must ascend"),
        ({"fps": None, "timestamps": [0.0, float("nan")]}, "numbers of seconds"),
        ({"fps": None, "timestamps": [-1.0, 0.0]}, "not negative"),
        ({"fps": None, "timestamps": [0.0, 1e-9]}, "closer together"),
        ({"crf": 60}, "`crf` is 60"),
        ({"audio_range": (2.0, 1.0)}, r"`audio_range` is \(2.0, 1.0\)"),
    ],
)
def test_settings_that_make_no_video_are_refused(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    arguments = {"path": "out.mp4", "height": 64, "width": 96, "fps": 25, **settings}
    with pytest.raises(ValueError, match=text):
        VideoWriter(tmp_path / arguments.pop("path"), **arguments)


def test_frames_that_do_not_fit_leave_no_video(tmp_path: Path) -> None:
    cases = [
        ([media.test_frame(0, 64, 64)], {"fps": 25}, r"Frame 0 has shape \(64, 64, 3\); \(64, 96, 3\) is needed"),
        ([], {"fps": 25}, "No frame was written"),
        ([media.test_frame(0)], {"timestamps": [0.0, 0.1]}, "1 frames were written, but 2 `timestamps`"),
        ([media.test_frame(0)] * 2, {"timestamps": [0.0]}, r"than there are `timestamps` \(1\)"),
    ]
    for frames, settings, text in cases:
        with (
            pytest.raises(ValueError, match=text),
            VideoWriter(tmp_path / "out.mp4", height=64, width=96, **settings) as writer,
        ):
            for frame in frames:
                writer.write(frame)
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, FileNotFoundError])
def test_an_interruption_leaves_the_older_file_and_nothing_else(stop: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("older")
    with pytest.raises(stop, match="^in between$"), VideoWriter(path, height=64, width=96, fps=25) as writer:
        for number in range(30):
            writer.write(media.test_frame(number))
        raise stop("in between")
    assert os.listdir(tmp_path) == ["out.mp4"] and path.read_text() == "older"


def test_a_source_without_sound_is_refused(tmp_path: Path) -> None:
    clip = media.write_constant_rate(tmp_path / "clip.mp4", 5)
    with pytest.raises(ValueError, match="has no sound to keep"):
        write_numbers(tmp_path / "out.mp4", 5, fps=25, audio_from=clip)
    with pytest.raises(ValueError, match="The sound of .*missing.mp4` cannot be read: No such file"):
        write_numbers(tmp_path / "out.mp4", 5, fps=25, audio_from=tmp_path / "missing.mp4")
    assert os.listdir(tmp_path) == ["clip.mp4"]


@pytest.mark.parametrize(("suffix", "audio"), [("mp4", "aac"), ("mkv", "pcm_s16le")])
def test_the_sound_of_a_truncated_video_is_kept_up_to_the_damage(suffix: str, audio: str, tmp_path: Path) -> None:
    faststart = {"movflags": "+faststart"} if suffix == "mp4" else None
    clip = media.write_video(tmp_path / f"clip.{suffix}", 100, audio=audio, container_options=faststart)
    broken = media.cut_off(clip, tmp_path / f"broken.{suffix}", 0.6)
    with open_frames(broken, allow_truncated=True) as source:
        write_numbers(tmp_path / "out.mp4", source.num_frames, timestamps=source.timestamps, audio_from=broken)
    original, written = listen(clip), listen(tmp_path / "out.mp4")
    assert 0.5 * 44100 < len(written) < len(original)
    assert abs(delay_between(original[: len(written)], written)) / 44100 < 0.002


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        for write in (
            lambda path: write_numbers(path.with_suffix(".mp4"), 1, fps=25),
            lambda path: save_palette_png(path, np.zeros((4, 4), np.uint8)),
            lambda path: write_json_lines(path, []),
        ):
            with pytest.raises(OSError, match=rf"Cannot write `{folder}/out") as caught:
                write(folder / "out.png")
            assert caught.value.errno in (errno.ENOENT, errno.ENOTDIR)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files can grow to 20 kB only: then writing fails as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_fills_up_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)

    def write_video(path: Path) -> None:
        with VideoWriter(path, height=256, width=256, fps=25) as writer:
            for number in range(100):
                writer.write(np.roll(noise, 7 * number, axis=1))

    for name, write in {
        "out.mp4": write_video,
        "out.png": lambda path: save_cutout_png(path, noise, noise[..., 0] > 9),
        "out.jsonl": lambda path: write_json_lines(path, [{"text": "x" * 30_000}]),
    }.items():
        with pytest.raises(OSError, match=rf"Cannot write `{tmp_path / name}`: File too large") as caught:
            write(tmp_path / name)
        assert caught.value.errno == errno.EFBIG and os.listdir(tmp_path) == []
