"""`visa segment`: what it writes, what it refuses, and that nothing is left behind when it does."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media import read_code, test_frame, write_constant_rate, write_folder, write_variable_rate, write_video
from tests.random_model import build_demo_checkpoint, make_demo_model
from visa_hf import cli, result_files, segment
from visa_hf.commands import segment as command
from visa_hf.modeling.frame_source_visa import open_frames
from visa_hf.rle import decode_mask


@pytest.fixture(scope="module")
def demo():
    return make_demo_model()


@pytest.fixture
def visa(demo, monkeypatch, capsys):
    """Run `visa segment ...` in this process with the demo model ready; returns code, stdout and stderr."""
    real = command.load_model
    monkeypatch.setattr(
        command, "load_model", lambda model, **options: demo if model is None else real(model, **options)
    )

    def run(*arguments):
        code = cli.main(["segment", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read_rows(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def png(path):
    with Image.open(path) as image:
        return image.mode, np.asarray(image)


def test_everything_is_written_and_agrees_with_segment(visa, demo, tmp_path):
    video = write_constant_rate(tmp_path / "clip.mp4", 6)
    out = tmp_path / "new" / "out"
    code, printed, errors = visa(video, "the block", "what moves?", "-o", out, "--soft", "--cutout")
    assert (code, errors) == (0, "")
    assert re.search(
        r"^\[0\] 'the block' -> 'It is \[SEG\]\.': [\d.]+% of the pixels, seen in \d of 6 frames$", printed, re.M
    )
    assert re.search(rf"^wrote {re.escape(str(out))} in [\d.]+ s$", printed, re.M)

    names = [f"{number:05d}.png" for number in range(6)]
    folders = ("Annotations", "Cutouts", "Probabilities")
    pngs = [f"{folder}/clip/{query}/{name}" for folder in folders for query in (0, 1) for name in names]
    assert files_in(out) == sorted([*pngs, "overlay.mp4", "predictions.jsonl"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]

    model, processor = demo
    results = segment(video, ["the block", "what moves?"], model=model, processor=processor)
    frames = open_frames(video)
    for row, result in zip(read_rows(out), results, strict=True):
        assert (row["video"], row["query"], row["answer"]) == ("clip", result.query, "It is [SEG].")
        assert row["target_frame"] == 3 and row["reference_frames"] == [0, 1, 2, 3, 4, 5]
        assert row["scores"] == list(result.scores)
        assert list(map(tuple, row["frame_scores"].values())) == list(result.frame_scores)
        assert list(row["frame_scores"]) == [str(number) for number in range(6)]
        assert list(row["masks"]) == [str(number) for number in range(6)]
        for number in range(6):
            place = f"clip/{row['expression_id']}/{number:05d}.png"
            mask = result.mask_of(number)
            assert np.array_equal(decode_mask(row["masks"][str(number)]), mask)
            mode, labels = png(out / "Annotations" / place)
            assert mode == "P" and np.array_equal(labels, mask)
            mode, cutout = png(out / "Cutouts" / place)
            assert mode == "RGBA" and np.array_equal(cutout[..., 3] == 255, mask)
            assert np.array_equal(cutout[mask][:, :3], frames[number][mask])
            mode, probs = png(out / "Probabilities" / place)
            assert mode == "L" and (probs[mask] > 100).all()


def test_the_overlay_keeps_size_timing_and_sound(visa, tmp_path):
    video, times = write_variable_rate(tmp_path / "clip.mp4", 10, audio="aac")
    assert visa(video, "the block", "-o", tmp_path / "out")[0] == 0
    with open_frames(tmp_path / "out" / "overlay.mp4") as overlay, open_frames(video) as original:
        assert (overlay.num_frames, overlay.height, overlay.width) == (10, 64, 96)
        np.testing.assert_allclose(np.diff(overlay.timestamps), np.diff(times), atol=1e-3)
        assert overlay.has_audio
        assert [read_code(original[number]) for number in (0, 9)] == [0, 9]
        assert not np.array_equal(overlay[5], original[5])


def test_a_part_and_every_third_frame(visa, tmp_path):
    video = write_constant_rate(tmp_path / "clip.mp4", 20)
    out = tmp_path / "out"
    code, printed, _ = visa(
        video, "it", "-o", out, "--start", "0.2", "--end", "15f", "--every", "3", "--target-frame", 9
    )
    assert code == 0 and "of 3 frames" in printed
    assert list(read_rows(out)[0]["masks"]) == ["6", "9", "12"]
    assert files_in(out / "Annotations") == [f"clip/0/{number:05d}.png" for number in (6, 9, 12)]
    with open_frames(out / "overlay.mp4") as overlay:
        assert overlay.num_frames == 10  # 5 to 14, at the rate of the original
        np.testing.assert_allclose(np.diff(overlay.timestamps), 0.04, atol=1e-3)


def test_the_overlay_holds_the_last_mask_between_tracked_frames(visa, tmp_path, monkeypatch):
    drawn = []
    real = result_files.overlay_masks
    monkeypatch.setattr(result_files, "overlay_masks", lambda frame, masks: drawn.append(masks) or real(frame, masks))
    out = tmp_path / "out"
    assert visa(write_folder(tmp_path / "frames", 7), "it", "-o", out, "--every", 3, "--target-frame", 4)[0] == 0
    masks = {int(number): decode_mask(rle) for number, rle in read_rows(out)[0]["masks"].items()}
    assert sorted(masks) == [1, 4]
    assert drawn[0].shape == (0, 64, 96)
    for number, shown in enumerate(drawn[1:], start=1):
        assert np.array_equal(shown.any(axis=0), masks[1 if number < 4 else 4])


def test_frames_of_a_folder_keep_their_names(visa, tmp_path):
    out = tmp_path / "out"
    assert visa(write_folder(tmp_path / "walk", 11), "it", "-o", out, "--no-overlay")[0] == 0
    assert files_in(out) == sorted([f"Annotations/walk/0/frame{n}.png" for n in range(1, 12)] + ["predictions.jsonl"])


def test_an_image_gives_one_frame(visa, tmp_path):
    Image.fromarray(test_frame(5)).save(tmp_path / "dog.png")
    out = tmp_path / "out"
    assert visa(tmp_path / "dog.png", "the dog", "-o", out)[0] == 0
    assert files_in(out) == ["Annotations/dog/0/00000.png", "overlay.mp4", "predictions.jsonl"]


def test_a_first_mask_needs_no_query(visa, tmp_path):
    labels = np.zeros((64, 96), dtype=np.uint8)
    labels[5:30, 5:30], labels[40:60, 50:90] = 1, 7
    image = Image.fromarray(labels, mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0] * 4)
    image.save(tmp_path / "mask.png")
    out = tmp_path / "out"
    video = write_folder(tmp_path / "frames", 3)
    code, printed, _ = visa(video, "--first-mask", tmp_path / "mask.png", "-o", out, "--no-overlay")
    (row,) = read_rows(out)
    assert (code, row["query"], row["answer"], row["target_frame"], row["scores"]) == (0, "", "", 0, [1.0, 1.0])
    assert np.array_equal(decode_mask(row["masks"]["0"]), labels > 0)


def test_masks_are_read_from_palette_grey_and_transparent_images(tmp_path):
    labels = np.array([[0, 3, 1], [255, 0, 3]], dtype=np.uint8)
    image = Image.fromarray(labels, mode="P")
    image.putpalette([0, 0, 0, 255, 0, 0] * 128)
    image.save(tmp_path / "palette.png")
    Image.fromarray(np.uint8(labels == 3) * 85).save(tmp_path / "grey.png")
    pixels = np.zeros((2, 3, 4), dtype=np.uint8)
    pixels[..., 3] = np.uint8(labels == 1) * 255
    Image.fromarray(pixels).save(tmp_path / "cutout.png")
    assert result_files.read_mask(tmp_path / "palette.png").tolist() == [
        (labels == 1).tolist(),
        (labels == 3).tolist(),
    ]
    assert result_files.read_mask(tmp_path / "grey.png").tolist() == [(labels == 3).tolist()]
    assert result_files.read_mask(tmp_path / "cutout.png").tolist() == [(labels == 1).tolist()]


def test_a_mask_of_several_greys_is_refused(tmp_path):
    Image.fromarray(np.array([[0, 120], [240, 0]], dtype=np.uint8)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match="has 2 grey levels beside black.* Give a black and white PNG, or a palette"):
        result_files.read_mask(tmp_path / "grey.png")


def test_quiet_prints_nothing(visa, tmp_path):
    Image.fromarray(test_frame(5)).save(tmp_path / "dog.png")
    assert visa(tmp_path / "dog.png", "the dog", "-o", tmp_path / "out", "-q") == (0, "", "")


def test_nothing_to_segment_is_a_normal_result(visa, tmp_path):
    video = write_folder(tmp_path / "frames", 3)
    out = tmp_path / "out"
    code, printed, _ = visa(video, "it", "-o", out, "--max-new-tokens", 1)
    assert code == 0
    assert "[0] 'it' -> 'It': nothing to segment, seen in 0 of 3 frames" in printed
    assert not any(decode_mask(rle).any() for rle in read_rows(out)[0]["masks"].values())


def test_an_earlier_result_is_replaced_only_when_asked_and_nothing_else(visa, tmp_path):
    video, out = write_folder(tmp_path / "frames", 3), tmp_path / "out"
    assert visa(video, "one", "-o", out, "--soft")[0] == 0
    (out / "notes.txt").write_text("mine")
    before = files_in(out)
    code, _, errors = visa(video, "two", "-o", out)
    assert code == 2
    assert errors == f"visa: error: The output folder `{out}` is not empty. Give another one, or --overwrite.\n"
    assert files_in(out) == before and read_rows(out)[0]["query"] == "one"
    assert visa(video, "two", "-o", out, "--overwrite", "--no-overlay")[0] == 0
    assert read_rows(out)[0]["query"] == "two"
    assert files_in(out) == [
        *(f"Annotations/frames/0/frame{n}.png" for n in (1, 2, 3)),
        "notes.txt",
        "predictions.jsonl",
    ]


def test_overwriting_spares_annotations_that_are_no_earlier_result(visa, tmp_path):
    video, out = write_folder(tmp_path / "frames", 2), tmp_path / "davis"
    (out / "Annotations").mkdir(parents=True)
    (out / "Annotations" / "true.png").write_bytes(b"precious")
    code, _, errors = visa(video, "it", "-o", out, "--overwrite")
    assert code == 2 and "holds Annotations but no predictions.jsonl" in errors
    assert files_in(out) == ["Annotations/true.png"]


def test_a_result_is_not_overwritten_with_masks_of_itself(visa, tmp_path):
    out = tmp_path / "out"
    assert visa(write_folder(tmp_path / "frames", 2), "it", "-o", out)[0] == 0
    before = files_in(out)
    code, _, errors = visa(out / "overlay.mp4", "it", "-o", out, "--overwrite")
    assert code == 2 and "is part of the result in" in errors
    assert files_in(out) == before


def test_an_interruption_while_results_are_swapped_brings_the_earlier_one_back(visa, tmp_path, monkeypatch):
    video, out = write_folder(tmp_path / "frames", 2), tmp_path / "out"
    assert visa(video, "one", "-o", out)[0] == 0
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    moves, replace = [], Path.replace

    def interrupted(source, target):
        moves.append(target)
        if len(moves) == 5:
            raise KeyboardInterrupt
        return replace(source, target)

    real = result_files._replace_results

    def swap(*places):
        monkeypatch.setattr(Path, "replace", interrupted)
        real(*places)

    monkeypatch.setattr(result_files, "_replace_results", swap)
    code, _, errors = visa(video, "two", "-o", out, "--overwrite")
    assert (code, len(moves) > 5) == (130, True)
    assert errors.endswith(f"visa: interrupted. Nothing was written to `{out}`.\n")
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before


def test_an_output_that_is_a_broken_link_is_refused(visa, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    code, _, errors = visa(write_folder(tmp_path / "frames", 2), "it", "-o", tmp_path / "link")
    assert code == 2 and "is a link to nothing. Give a folder." in errors


@pytest.mark.parametrize("video", ["", "https://example.com/clip.mp4"])
def test_what_is_no_path_is_refused(visa, tmp_path, video):
    code, _, errors = visa(video, "it", "-o", tmp_path / "out")
    assert (code, errors) == (
        2,
        f"visa: error: `{video}` is no file or folder. Give the path of a video; download it first.\n",
    )


@pytest.mark.parametrize("name", ["out", "."])
def test_an_empty_folder_is_filled_where_it_is(visa, tmp_path, monkeypatch, name):
    """A folder that is mounted, or is the current one, cannot be replaced by another."""
    video = write_folder(tmp_path / "frames", 2)
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out if name == "." else tmp_path)
    inode = out.stat().st_ino
    assert visa(video, "it", "-o", name, "--no-overlay")[0] == 0
    assert out.stat().st_ino == inode
    assert sorted(path.name for path in out.iterdir()) == ["Annotations", "predictions.jsonl"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of things that one could give to the command by mistake."""
    folder = tmp_path_factory.mktemp("inputs")
    write_constant_rate(folder / "clip.mp4", 6)
    (folder / "text.mp4").write_text("this is no video")
    (folder / "empty").mkdir()
    (folder / "no_model").mkdir()
    build_demo_checkpoint(folder / "no_weights")
    for file in (folder / "no_weights").glob("*.safetensors"):
        file.unlink()
    Image.fromarray(np.zeros((10, 12), dtype=np.uint8)).save(folder / "small.png")
    Image.fromarray(np.full((64, 96), 255, dtype=np.uint8)).save(folder / "full.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No VIDEO is given. Give one with a QUERY, or --requests with a file of both."),
        (["clip.mp4", "it", "--explain", "--first-mask", "full.png"], "`explain` and a `first_mask` are given"),
        (["none.mp4", "it"], "There is no video at `none.mp4`."),
        (["text.mp4", "it"], "text.mp4"),
        (["empty", "it"], "The folder `empty` holds no images"),
        (["clip.mp4"], "No QUERY and no --first-mask is given. Say what to segment."),
        (["clip.mp4", ""], "`query` is empty"),
        (["clip.mp4", "the [SEG]"], "holds `[SEG]`, which the model reads as a special token"),
        (["clip.mp4", "an <image>"], "holds `<image>`, which the model reads as a special token"),
        (["clip.mp4", "cat " * 5000], "fit into the model's context"),
        (["clip.mp4", "it", "--target-frame", "6"], "`target_frame` is 6 but the video"),
        (["clip.mp4", "it", "--target-frame", "6", "--first-mask", "full.png"], "`target_frame` is 6 but the video"),
        (["clip.mp4", "it", "--reference-frames", "0,9"], "`reference_frames` is 9 but the video"),
        (
            ["clip.mp4", "--first-mask", "small.png"],
            "`first_mask` has shape (1, 10, 12) but the frames are 64 x 96 pixels",
        ),
        (["clip.mp4", "--first-mask", "none.png"], "There is no mask at `none.png`."),
        (["clip.mp4", "--first-mask", "text.mp4"], "The mask `text.mp4` is not an image that can be read."),
        (
            ["clip.mp4", "it", "--start", "later"],
            "`start` is 'later' but must be seconds, like 2.5, or a frame number",
        ),
        (["clip.mp4", "it", "--start", "9f"], "No frame lies between `start` 9f and `end` None"),
        (["clip.mp4", "it", "--every", "0"], "`every` is 0 but must be at least 1"),
        (
            ["clip.mp4", "it", "--max-frames", "5"],
            "6 frames would be tracked but `max_frames` is 5. Track fewer with `every`",
        ),
        (["clip.mp4", "it", "--threshold", "1.5"], "`threshold` is 1.5 but must be a probability"),
        (["clip.mp4", "it", "--device", "abacus"], "`device` is 'abacus' but must be"),
        (["clip.mp4", "it", "--model", "none/of/these"], "There is no model folder `none/of/these`."),
        (["clip.mp4", "it", "--model", "no_model"], "`no_model` is no model: it has no config.json."),
        (["clip.mp4", "it", "--model", "no_weights"], "The model folder `no_weights` has no weights"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(visa, inputs, monkeypatch, arguments, message):
    monkeypatch.chdir(inputs)
    before = files_in(inputs)
    code, printed, errors = visa(*arguments, "-o", "new/out")
    assert (code, printed) == (2, "")
    assert errors.startswith("visa: error: ") and errors.count("\n") == 1 and message in errors
    assert files_in(inputs) == before and not (inputs / "new").exists()


def test_arguments_that_cannot_be_parsed_exit_with_2(capsys):
    for arguments in (
        [],
        ["segment"],
        ["segment", "clip.mp4", "it"],
        ["segment", "a", "b", "-o", "c", "--dtype", "int8"],
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
    with pytest.raises(SystemExit):
        cli.main(["segment", "clip.mp4", "it", "-o", "out", "--reference-frames", "0,x"])
    assert "'0,x' is not a list of frame numbers like 0,5,9" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(visa, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("in the way")
    code, _, errors = visa(inputs / "clip.mp4", "it", "-o", tmp_path / "file")
    assert (code, errors) == (2, f"visa: error: The output `{tmp_path / 'file'}` is a file. Give a folder.\n")
    code, _, errors = visa(inputs / "clip.mp4", "it", "-o", tmp_path / "file" / "out")
    assert code == 2 and f"The output folder `{tmp_path / 'file' / 'out'}` cannot be written: " in errors

    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    code, _, errors = visa(inputs / "clip.mp4", "it", "-o", tmp_path / "out")
    assert (code, errors) == (
        2,
        f"visa: error: The output folder `{tmp_path / 'out'}` cannot be written: Permission denied\n",
    )
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("written", ["save_palette_png", "write_json_lines"])
def test_a_full_disk_leaves_nothing_behind(visa, inputs, tmp_path, monkeypatch, written):
    real = getattr(result_files, written)
    calls = []

    def fill(path, content):
        calls.append(path)
        if len(calls) == 3 or written == "write_json_lines":
            raise OSError(errno.ENOSPC, f"Cannot write `{path}`: No space left on device")
        real(path, content)

    monkeypatch.setattr(result_files, written, fill)
    out = tmp_path / "out"
    code, printed, errors = visa(inputs / "clip.mp4", "it", "-o", out)
    assert (code, printed) == (2, "")
    assert errors == (f"visa: error: No space is left on the disk of `{out}`. Free some, or choose another folder.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_overwriting_keeps_the_earlier_result(visa, inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert visa(inputs / "clip.mp4", "one", "-o", out)[0] == 0
    before = files_in(out)

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(result_files, "write_json_lines", fill)
    assert visa(inputs / "clip.mp4", "two", "-o", out, "--overwrite")[0] == 2
    assert files_in(out) == before and read_rows(out)[0]["query"] == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_without_pyav_a_folder_still_works_without_an_overlay(visa, tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "is_av_available", lambda: False)
    monkeypatch.setattr("visa_hf.modeling.frame_source_visa.is_av_available", lambda: False)
    frames, out = write_folder(tmp_path / "frames", 2), tmp_path / "out"
    code, _, errors = visa(frames, "it", "-o", out)
    assert (
        code == 2
        and "Writing overlay.mp4 needs PyAV: `pip install av`, or leave it out with `overlay=False` (--no-overlay)."
        in errors
    )
    assert not out.exists()
    assert visa(frames, "it", "-o", out, "--no-overlay")[0] == 0
    code, _, errors = visa(tmp_path / "clip.mp4", "it", "-o", tmp_path / "out2", "--no-overlay")
    assert code == 2 and "There is no video" in errors
    video = write_video(tmp_path / "clip.mp4", 2)
    code, _, errors = visa(video, "it", "-o", tmp_path / "out2", "--no-overlay")
    assert code == 2 and "pip install av" in errors and not (tmp_path / "out2").exists()


def test_a_defect_keeps_its_traceback(visa, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "make_results", lambda *_: {}["defect"])
    with pytest.raises(KeyError, match="defect"):
        visa(inputs / "clip.mp4", "it", "-o", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interruption_ends_with_130_and_leaves_nothing_behind(tmp_path, sent):
    """A real process, a real signal, after the output was begun."""
    video = write_video(tmp_path / "clip.mp4", 1000)
    work = tmp_path / "work"
    work.mkdir()
    mask = np.zeros((64, 96), dtype=np.uint8)
    mask[16:48, 24:72] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    process = subprocess.Popen(
        [sys.executable, "-m", "visa_hf", "segment", video, "-o", work / "out", "--first-mask", tmp_path / "mask.png"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # What is started in the background of a shell ignores Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not any(path.suffix == ".png" for path in work.rglob("*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == "" and "Traceback" not in errors
    assert errors.endswith(f"visa: interrupted. Nothing was written to `{work / 'out'}`.\n")
    assert list(work.iterdir()) == []


def test_the_target_comes_from_a_sampler_or_a_file(visa, inputs, tmp_path):
    code, _, _ = visa(inputs / "clip.mp4", "it", "-o", tmp_path / "asked", "--sampler", "visa")
    assert code == 0
    percentages = tmp_path / "percentages.json"
    percentages.write_text(json.dumps({"clip": {"it": 100}}))
    code, _, errors = visa(inputs / "clip.mp4", "it", "-o", tmp_path / "stored", "--percentages", percentages)
    assert (code, errors) == (0, "")
    (row,) = read_rows(tmp_path / "stored")
    assert row["target_frame"] == max(map(int, row["masks"]))
    code, _, errors = visa(inputs / "clip.mp4", "that", "-o", tmp_path / "none", "--percentages", percentages)
    assert code == 2 and "'that'" in errors
