"""Sharing work among processes, and what identifies a checkpoint or a video."""

import pytest
from PIL import Image

from tests.media import test_frame, write_constant_rate, write_folder, write_sound_only, write_video
from visa_hf.processes import Processes, checkpoint_fingerprint, estimate_frames, share_work, video_fingerprint


def test_work_is_divided_evenly_and_always_the_same():
    work = {"a": 5, "b": 9, "c": 4, "d": 4, "e": 1}
    shares = share_work(work, 2)
    assert shares == [["b", "d"], ["a", "c", "e"]]  # 13 and 10: the largest first, each to who has least
    assert share_work(work, 1) == [list(work)]
    assert share_work(dict(reversed(work.items())), 2) == [list(reversed(share)) for share in shares]
    assert share_work({"a": 1}, 3) == [["a"], [], []]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".gif"])
def test_the_frames_of_a_video_are_estimated_from_its_header(tmp_path, suffix):
    codec = {".gif": {"codec": "gif", "pix_fmt": "rgb8"}, ".avi": {"codec": "mpeg4"}}.get(suffix, {})
    path = write_video(tmp_path / f"clip{suffix}", 50, **codec)
    assert estimate_frames(path) in range(49, 52)


def test_images_folders_and_what_is_no_video_have_a_number_of_frames_too(tmp_path):
    Image.fromarray(test_frame(1)).save(tmp_path / "one.png")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert estimate_frames(tmp_path / "one.png") == 1
    assert estimate_frames(write_folder(tmp_path / "walk", 4)) == 4
    assert estimate_frames(tmp_path / "bad.mp4") == 1
    assert estimate_frames(write_sound_only(tmp_path / "sound.mp4")) == 1


def test_a_video_is_known_by_what_it_holds_and_not_by_its_place(tmp_path):
    write_folder(tmp_path / "walk", 3)
    first = video_fingerprint(tmp_path / "walk")
    (tmp_path / "walk").rename(tmp_path / "moved")
    assert video_fingerprint(tmp_path / "moved") == first
    (tmp_path / "moved" / "frame2.png").rename(tmp_path / "moved" / "frame4.png")
    renamed = video_fingerprint(tmp_path / "moved")
    Image.fromarray(test_frame(9)).save(tmp_path / "moved" / "frame1.png")
    file = write_constant_rate(tmp_path / "clip.mp4", 5)
    original = video_fingerprint(file)
    data = file.read_bytes()
    (tmp_path / "copy.mp4").write_bytes(data)
    assert video_fingerprint(tmp_path / "copy.mp4") == original
    (tmp_path / "copy.mp4").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    changed = {
        first,
        renamed,
        video_fingerprint(tmp_path / "moved"),
        original,
        video_fingerprint(tmp_path / "copy.mp4"),
    }
    assert len(changed) == 5


def test_a_model_that_is_no_folder_is_known_by_its_name():
    assert checkpoint_fingerprint("somebody/model") is None


def test_one_process_is_alone_and_waits_for_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    processes = Processes("cpu")
    assert (processes.rank, processes.count, processes.device) == (0, 1, "cpu")
    processes.wait()
    processes.close()
