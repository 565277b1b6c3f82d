"""Frames are decoded as Pillow and PyAV decode them, only those asked for, and what cannot be read is named."""

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media import decode_naively, read_code, test_frame, write_constant_rate
from visa_hf.datasets_scripts import frame_store as module
from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.frame_store import FrameError, FrameStore, MissingFrameError


def write_images(root: Path) -> dict[str, np.ndarray]:
    """One image of each kind; returns what Pillow makes of them."""
    (root / "set").mkdir()
    picture = Image.fromarray(test_frame(5))
    picture.save(root / "set/a.jpg", quality=70)
    picture.convert("L").save(root / "set/grey.png")
    picture.quantize(16).save(root / "set/palette.png")
    picture.convert("CMYK").save(root / "set/cmyk.jpg")
    picture.convert("RGBA").save(root / "set/alpha.png")
    names = ["a.jpg", "grey.png", "palette.png", "cmyk.jpg", "alpha.png"]
    return {f"set/{name}": np.array(Image.open(root / "set" / name).convert("RGB")) for name in names}


def test_images_are_what_pillow_gives_in_the_order_asked(tmp_path: Path) -> None:
    expected = write_images(tmp_path)
    names = [*reversed(expected), *expected]
    for name, frame in zip(names, FrameStore(tmp_path).read(names), strict=True):
        assert frame.dtype == np.uint8 and frame.flags.writeable
        np.testing.assert_array_equal(frame, expected[name], err_msg=name)


def test_an_image_with_an_orientation_is_turned_upright(tmp_path: Path) -> None:
    picture = Image.fromarray(test_frame(9, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    (frame,) = FrameStore(tmp_path).read(["turned.png"])
    np.testing.assert_array_equal(frame, np.rot90(test_frame(9, 40, 60), -1))


def test_frames_of_videos_and_images_come_together(tmp_path: Path) -> None:
    write_images(tmp_path)
    write_constant_rate(tmp_path / "clip.mp4", 30)
    write_constant_rate(tmp_path / "set" / "other.mp4", 10)
    names = ["clip.mp4#17", "set/other.mp4#9", "set/a.jpg", "clip.mp4#0", "clip.mp4#29", "clip.mp4#17"]
    frames = FrameStore(tmp_path).read(names)
    naive, other = decode_naively(tmp_path / "clip.mp4"), decode_naively(tmp_path / "set" / "other.mp4")
    for frame, expected in zip(frames, [naive[17], other[9], None, naive[0], naive[29], naive[17]], strict=True):
        if expected is not None:
            np.testing.assert_array_equal(frame, expected)
    assert [read_code(frame) for frame in (frames[0], frames[3], frames[4])] == [17, 0, 29]
    assert frames[0] is frames[5], "a frame named twice is decoded once"


def test_only_the_frames_asked_for_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        Image.fromarray(test_frame(number)).save(tmp_path / f"{number}.png")
    opened: list[str] = []
    original = module._read_image
    monkeypatch.setattr(module, "_read_image", lambda path, name: opened.append(name) or original(path, name))
    FrameStore(tmp_path).read(["3.png", "1.png", "3.png"])
    assert opened == ["3.png", "1.png"]


def test_no_frames_are_no_work(tmp_path: Path) -> None:
    assert FrameStore(tmp_path).read([]) == []


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    store = FrameStore(tmp_path)
    with pytest.raises(MissingFrameError, match=r"Frame `v/00001.jpg` is missing: there is no file `.*v/00001.jpg`"):
        store.read(["v/00001.jpg"])
    with pytest.raises(FileNotFoundError, match=r"Frame 4 of `.*clip.mp4` is missing"):
        store.read(["clip.mp4#4"])
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        FrameStore(tmp_path / "nowhere")


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_images(tmp_path)
    data = (tmp_path / "set/a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    store = FrameStore(tmp_path)
    for name in ("cut.jpg", "text.png", "folder.png"):
        with pytest.raises(FrameError, match=rf"Frame `{name}` of `.*{name}` cannot be read \(.+\)"):
            store.read([name])
    with pytest.raises(FrameError, match='mode is "I;16", and 8 bits per channel are needed'):
        store.read(["deep.png"])
    with pytest.raises(FrameError, match=r"`.*broken.mp4` cannot be read at frames 2, 0"):
        store.read(["broken.mp4#2", "broken.mp4#0"])


def test_a_frame_beyond_its_video_is_named(tmp_path: Path) -> None:
    write_constant_rate(tmp_path / "clip.mp4", 10)
    with pytest.raises(FrameError, match="Frame 10 of .*clip.mp4.*the video has 10 frames, counted from 0"):
        FrameStore(tmp_path).read(["clip.mp4#3", "clip.mp4#10"])


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.png", "a/../../outside.png", "", "../clip.mp4#3"])
def test_names_that_lead_out_of_the_root_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    Image.fromarray(test_frame(1)).save(tmp_path / "outside.png")
    with pytest.raises(AnnotationError, match="is refused|is not text|is empty|path"):
        FrameStore(tmp_path / "root").read([name])


def test_a_relative_root_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    store = FrameStore(".")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    np.testing.assert_array_equal(store.read(["set/a.jpg"])[0], expected["set/a.jpg"])


def test_a_store_that_has_read_a_video_works_in_another_process(tmp_path: Path) -> None:
    """After a fork; that a spawned process draws the same samples is tested with the samples (it takes seconds)."""
    write_constant_rate(tmp_path / "clip.mp4", 30)
    store = FrameStore(tmp_path)
    here = store.read(["clip.mp4#20"])
    with multiprocessing.get_context("fork").Pool(1) as pool:
        there = pool.apply_async(store.read, (["clip.mp4#20"],)).get(timeout=300)
    np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read(["clip.mp4#20"]), here)
