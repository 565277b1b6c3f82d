"""Many videos: what is written, that interruptions and the number of processes do not show in it, what is refused."""

import errno
import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.media import cut_off, write_constant_rate, write_folder
from tests.random_model import build_demo_checkpoint, make_demo_model
from visa_hf import result_files, segment, segment_many
from visa_hf.modeling.frame_samplers_visa import PercentagesFrameSampler
from visa_hf.rle import decode_mask
from visa_hf.segment_many import segment_videos

ROOT = Path(__file__).parents[1]
ROWS = [
    {"video": "clip.mp4", "query": "the block"},
    {"video": "walk", "queries": ["what moves?", "the sky"], "fps": 10},
    {"video": "clip.mp4", "query": "the cat", "expression_id": "cat", "target_frame": 1},
    {"video": "Löwe 1.mp4", "query": "the lion", "start": "1f"},
]


@pytest.fixture(scope="module")
def demo():
    return make_demo_model()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three short videos, and a file that asks about them."""
    folder = tmp_path_factory.mktemp("world")
    write_constant_rate(folder / "clip.mp4", 5)
    write_constant_rate(folder / "Löwe 1.mp4", 4)
    write_folder(folder / "walk", 3)
    write_rows(folder / "requests.jsonl", ROWS)
    return folder


@pytest.fixture(scope="module")
def run(demo):
    """Call `segment_videos` with the demo model."""
    model, processor = demo
    return lambda requests, out, **options: segment_videos(
        requests, out, **{"model": model, "processor": processor, **options}
    )


@pytest.fixture(scope="module")
def whole(run, world, tmp_path_factory):
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(world / "requests.jsonl", out)
    return out


@pytest.fixture
def computed(monkeypatch):
    """The names of the videos that are computed."""
    names = []
    real = segment_many.segment_to_folder

    def watch(folder, model, session, *args, **options):
        names.append(session.source.name)
        return real(folder, model, session, *args, **options)

    monkeypatch.setattr(segment_many, "segment_to_folder", watch)
    return names


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def names_in(out):
    return sorted(path.name for path in out.iterdir())


def test_each_video_has_a_folder_of_its_own_that_agrees_with_segment(run, demo, world, tmp_path):
    out = tmp_path / "new" / "out"
    results = run(world / "requests.jsonl", out)
    assert [(result.video, result.folder, result.num_queries) for result in results] == [
        ("clip.mp4", out / "clip", 2),
        ("walk", out / "walk", 2),
        ("Löwe 1.mp4", out / "Löwe 1", 1),
    ]
    assert all(result.error is None and result.is_new for result in results)
    assert names_in(out) == ["Löwe 1", "clip", "videos.jsonl", "walk"]
    assert read_rows(out / "videos.jsonl")[2] == {
        "folder": "Löwe 1",
        "video": "Löwe 1.mp4",
        "start": "1f",
        "end": None,
    }
    model, processor = demo
    for name, rows in (("clip", ("0", "cat")), ("walk", ("0", "1")), ("Löwe 1", ("0",))):
        assert names_in(out / name) == ["Annotations", "overlay.mp4", "predictions.jsonl", "request.json"]
        assert names_in(out / name / "Annotations" / name) == sorted(rows)
        assert [row["expression_id"] for row in read_rows(out / name / "predictions.jsonl")] == list(rows)
    cat = read_rows(out / "clip" / "predictions.jsonl")[1]
    alone = segment(world / "clip.mp4", "the cat", target_frame=1, model=model, processor=processor)
    assert (cat["query"], cat["answer"], cat["target_frame"]) == ("the cat", alone.answer, 1)
    assert all(np.array_equal(decode_mask(cat["masks"][str(n)]), alone.mask_of(n)) for n in range(5))
    with Image.open(out / "clip" / "Annotations" / "clip" / "cat" / "00004.png") as png:
        assert np.array_equal(np.asarray(png), alone.mask_of(4))
    assert list(read_rows(out / "Löwe 1" / "predictions.jsonl")[0]["masks"]) == ["1", "2", "3"]


def test_a_request_says_what_was_asked_and_how(whole):
    record = json.loads((whole / "clip" / "request.json").read_text())
    assert (record["video"], record["threshold"], record["every"]) == ("clip.mp4", 0.5, 1)
    assert record["contents"] == {"overlay": True, "soft": False, "cutout": False}
    assert [query["query"] for query in record["queries"]] == ["the block", "the cat"]
    assert record["queries"][1]["expression_id"] == "cat"


def test_masks_and_reasons_may_be_asked_for(run, demo, world, tmp_path, monkeypatch):
    mask = np.zeros((64, 96), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    asked = []
    model, processor = demo
    real = model.add_queries
    monkeypatch.setattr(
        model, "add_queries", lambda session, queries, **more: asked.extend(queries) or real(session, queries, **more)
    )
    rows = [
        {"video": str(world / "walk"), "first_mask": str(tmp_path / "mask.png"), "expression_id": "given"},
        {"video": str(world / "walk"), "query": "why?", "explain": True},
    ]
    run(rows, tmp_path / "out", soft=True, cutout=True, overlay=False)
    given, why = read_rows(tmp_path / "out" / "walk" / "predictions.jsonl")
    assert np.array_equal(decode_mask(given["masks"]["0"]), mask > 0) and given["target_frame"] == 0
    assert (why["query"], asked[1]["explain"]) == ("why?", True)
    assert names_in(tmp_path / "out" / "walk") == [
        "Annotations",
        "Cutouts",
        "Probabilities",
        "predictions.jsonl",
        "request.json",
    ]


def test_videos_of_the_same_name_get_numbers_and_keep_them(run, tmp_path, computed):
    videos = ["a/clip.mp4", "b/clip.mp4", "b/clip-2.mp4", "c/CLIP.mp4", "c/videos.jsonl", "c/.mp4"]
    for number, video in enumerate(videos):
        (tmp_path / video).parent.mkdir(exist_ok=True)
        write_folder(tmp_path / video, 1 + number % 2, size=(64, 64))
    rows = [{"video": video, "query": "it"} for video in videos]
    out = tmp_path / "out"
    expected = ["clip.mp4", "clip.mp4-2", "clip-2.mp4", "CLIP.mp4-3", "videos.jsonl-2", "mp4"]
    first = run(write_rows(tmp_path / "rows.jsonl", rows), out, overlay=False)
    assert [result.folder.name for result in first] == expected
    # Others come before them, and one is asked about no more.
    write_folder(tmp_path / "CLIP.MP4", 1, size=(64, 64))
    rows = [{"video": "CLIP.MP4", "query": "it"}, *reversed(rows[:4])]
    computed.clear()
    second = run(write_rows(tmp_path / "rows.jsonl", rows), out, overlay=False)
    assert [result.folder.name for result in second] == ["CLIP.MP4-4", *reversed(expected[:4])]
    assert computed == ["CLIP.MP4"]
    assert [result.is_new for result in second] == [True, False, False, False, False]
    assert [row["folder"] for row in read_rows(out / "videos.jsonl")] == [*expected, "CLIP.MP4-4"]


@pytest.mark.parametrize("moment", ["before the first frame", "in the middle", "while it is put in its place"])
def test_an_interrupted_run_goes_on_and_ends_the_same(run, world, whole, tmp_path, monkeypatch, moment, computed):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if moment == "while it is put in its place":
            real_replace = os.replace

            def interrupt(source, target):
                if Path(target).name == "walk":
                    raise KeyboardInterrupt
                real_replace(source, target)

            patch.setattr(os, "replace", interrupt)
        else:
            real_save, saved = result_files.save_palette_png, []

            def interrupt(path, labels):
                saved.append(path)
                if "walk" in path.parts and (moment == "before the first frame" or path.stem == "frame2"):
                    raise KeyboardInterrupt
                real_save(path, labels)

            patch.setattr(result_files, "save_palette_png", interrupt)
        with pytest.raises(KeyboardInterrupt, match="Finished videos are in `.*`; the same command goes on"):
            run(world / "requests.jsonl", out)
    assert names_in(out) == ["clip", "videos.jsonl"]
    computed.clear()
    results = run(world / "requests.jsonl", out)
    assert computed == ["walk", "Löwe 1"]
    assert [result.is_new for result in results] == [False, True, True]
    assert contents(out) == contents(whole)


def test_a_killed_process_leaves_what_the_next_run_clears(run, world, whole, tmp_path):
    """A real process, killed in the middle of the second video."""
    out = tmp_path / "out"
    script = f"""
import sys, time
from visa_hf import result_files
from tests.random_model import make_demo_model
from visa_hf.segment_many import segment_videos
real = result_files.save_palette_png
def wait(path, labels):
    real(path, labels)
    if path.stem == "frame2":
        print("now", flush=True)
        time.sleep(600)
result_files.save_palette_png = wait
model, processor = make_demo_model()
segment_videos({str(world / "requests.jsonl")!r}, {str(out)!r}, model=model, processor=processor)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.stdout.close()
    assert sorted(path.name for path in out.iterdir()) == [".new-0.partial", "clip", "videos.jsonl"]
    assert [result.is_new for result in run(world / "requests.jsonl", out)] == [False, True, True]
    assert contents(out) == contents(whole)


def test_what_is_finished_is_not_computed_again(run, world, whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    monkeypatch.setattr(segment_many, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    results = run(world / "requests.jsonl", tmp_path / "out")
    assert not any(result.is_new or result.error for result in results)
    assert contents(tmp_path / "out") == contents(whole)


def test_results_of_another_request_are_computed_again_only_when_asked(run, world, whole, tmp_path, computed):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    rows = [{**row, "video": str(row["video"])} for row in ROWS]
    rows[1]["queries"] = ["what moves?", "the sea"]
    changed = write_rows(world / "changed.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"holds results of other requests or settings: walk \(other queries\)\. Give"
    ):
        run(changed, out)
    with pytest.raises(ValueError, match=r"clip \(`threshold` was 0.5 and is 0.6\), walk \(.*--overwrite"):
        run(world / "requests.jsonl", out, threshold=0.6)
    with pytest.raises(ValueError, match=r"clip \(other contents\)"):
        run(world / "requests.jsonl", out, soft=True)
    assert contents(out) == contents(whole) and computed == []
    results = run(changed, out, overwrite=True)
    assert computed == ["walk"] and [result.is_new for result in results] == [False, True, False]
    assert [row["query"] for row in read_rows(out / "walk" / "predictions.jsonl")] == ["what moves?", "the sea"]
    assert names_in(out) == names_in(whole)


def test_another_model_video_or_file_of_percentages_is_noticed(run, tmp_path):
    write_folder(tmp_path / "walk", 2)
    Image.fromarray(np.full((64, 96), 255, np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "shares.json").write_text('{"walk": {"it": 0.5, "mask": 1}}')
    rows = [
        {"video": tmp_path / "walk", "query": "it"},
        {"video": tmp_path / "walk", "query": "mask", "first_mask": tmp_path / "mask.png"},
    ]
    build_demo_checkpoint(tmp_path / "model")

    def again(out=tmp_path / "out"):
        sampler = PercentagesFrameSampler(tmp_path / "shares.json")
        return run(rows, out, sampler=sampler, model=tmp_path / "model", processor=None, overlay=False)

    assert again()[0].is_new and not again()[0].is_new
    weights = next((tmp_path / "model").glob("*.safetensors"))
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"walk \(another model\)"):
        again()
    weights.write_bytes(original)
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(tmp_path / "mask.png")
    (tmp_path / "shares.json").write_text('{"walk": {"it": 0.4}}')
    (tmp_path / "walk" / "frame2.png").unlink()
    with pytest.raises(ValueError, match=r"walk \(another video, other queries, `sampler` was 'percentages .*and is"):
        again()


def test_a_damaged_video_is_skipped_and_done_when_it_is_repaired(run, world, tmp_path, computed):
    data = tmp_path / "data"
    shutil.copytree(world, data)
    cut_off(world / "Löwe 1.mp4", data / "clip.mp4", 0.7)
    out = tmp_path / "out"
    results = run(data / "requests.jsonl", out)
    assert [result.error is None for result in results] == [False, True, True]
    assert "clip.mp4" in results[0].error and "\n" not in results[0].error
    assert names_in(out) == ["Löwe 1", "failed.jsonl", "videos.jsonl", "walk"]
    assert read_rows(out / "failed.jsonl") == [
        {"video": "clip.mp4", "folder": "clip", "row": "line 1", "error": results[0].error}
    ]
    shutil.copy(world / "clip.mp4", data / "clip.mp4")
    computed.clear()
    assert all(result.error is None for result in run(data / "requests.jsonl", out))
    assert computed == ["clip"] and names_in(out) == ["Löwe 1", "clip", "videos.jsonl", "walk"]


def test_what_only_the_opened_video_tells_is_a_failure_of_this_video(run, world, tmp_path):
    rows = [
        {"video": str(world / "clip.mp4"), "query": "it", "target_frame": 9},
        {"video": str(world / "walk"), "query": "it"},
    ]
    results = run(rows, tmp_path / "out", overlay=False)
    assert "`target_frame` is 9 but the video, or the part chosen of it, has frames 0 to 4" in results[0].error
    assert results[1].error is None


def test_a_failure_while_replacing_keeps_the_earlier_result(run, world, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)

    def fail(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(result_files, "make_results", fail)
    results = run(world / "requests.jsonl", out, threshold=0.6, overwrite=True)
    assert [result.error for result in results] == ["CUDA out of memory"] * 3
    (out / "failed.jsonl").unlink()
    assert contents(out) == contents(whole)


def test_an_error_stops_the_run_if_so_wished(run, world, tmp_path):
    rows = [
        {"video": str(world / "clip.mp4"), "query": "it", "target_frame": 9},
        {"video": str(world / "walk"), "query": "it"},
    ]
    with pytest.raises(ValueError, match="The video `.*clip.mp4` cannot be segmented: `target_frame` is 9"):
        run(rows, tmp_path / "out", overlay=False, on_error="stop")
    assert list(tmp_path.iterdir()) == []
    run(rows[1:], tmp_path / "out", overlay=False)
    with pytest.raises(ValueError, match="cannot be segmented"):
        run(rows, tmp_path / "out", overlay=False, on_error="stop")
    assert names_in(tmp_path / "out") == ["videos.jsonl", "walk"]


def test_a_full_disk_stops_the_run(run, world, tmp_path, monkeypatch):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(result_files, "save_palette_png", fill)
    with pytest.raises(OSError, match="No space left"):
        run(world / "requests.jsonl", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_defect_of_ours_is_no_failure_of_a_video(run, world, tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "make_results", lambda *_: {}["defect"])
    with pytest.raises(KeyError, match="defect"):
        run(world / "requests.jsonl", tmp_path / "out")


def test_nothing_is_kept_of_a_finished_video(run, world, tmp_path, monkeypatch):
    alive = []
    real = segment_many.segment_to_folder

    def watch(folder, model, session, *args, **options):
        gc.collect()
        assert [reference() for reference in alive] == [None] * len(alive)
        results = real(folder, model, session, *args, **options)
        alive.extend(weakref.ref(each) for each in (session, *results))
        return results

    monkeypatch.setattr(segment_many, "segment_to_folder", watch)
    run(world / "requests.jsonl", tmp_path / "out", overlay=False)
    assert len(alive) == 3 + 5


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"threshold": 1.5}, ValueError, "`threshold` is 1.5 but must be a probability"),
        ({"every": 0}, ValueError, "`every` is 0 but must be at least 1"),
        ({"max_frames": "many"}, TypeError, "`max_frames` is 'many' but must be a whole number"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` is 0 but must be at least 1."),
        ({"sampler": "best"}, TypeError, "`sampler` is 'best' but must be"),
        ({"on_error": "ignore"}, ValueError, '`on_error` is \'ignore\' but must be "skip" or "stop".'),
        ({"device": "abacus"}, ValueError, "`device` is 'abacus' but must be"),
        ({"dtype": "int8"}, ValueError, "`dtype` is 'int8' but must be one of"),
        ({"start": "soon"}, ValueError, "`start` is 'soon' but must be seconds"),
        ({"model": "none/of/these"}, FileNotFoundError, "There is no model folder `none/of/these`."),
    ],
)
def test_options_that_no_video_can_use_are_refused_and_leave_nothing(run, world, tmp_path, options, kind, message):
    with pytest.raises(kind, match=message):
        run(world / "requests.jsonl", tmp_path / "new" / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_refused_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(segment_many, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="row 0: there is no video at `none.mp4`"):
        run([{"video": "none.mp4", "query": "it"}], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_left_alone(run, world, tmp_path, whole):
    requests = world / "requests.jsonl"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="The output `.*file` is a file. Give a folder."):
        run(requests, tmp_path / "file")
    with pytest.raises(FileExistsError, match="is not empty and holds no run to continue .no videos.jsonl."):
        run(requests, tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="is a link to nothing. Give a folder."):
        run(requests, tmp_path / "link")
    with pytest.raises(OSError, match="The output folder `.*out` cannot be written: Not a directory"):
        run(requests, tmp_path / "file" / "out")
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out" / "walk" / "request.json").unlink()
    with pytest.raises(FileExistsError, match="`.*walk` is in the way of the results of `walk`, and holds none"):
        run(requests, tmp_path / "out", overwrite=True)
    rows = [{"video": tmp_path / "out" / "clip" / "overlay.mp4", "query": "it"}]
    with pytest.raises(ValueError, match="The video `.*overlay.mp4` lies in the output folder `.*out`. Give another"):
        run(rows, tmp_path / "out")
    for damage in ('{"folder": "../x", "video": "a", "start": null, "end": null}', "[]", '{"folder": []}', "{"):
        (tmp_path / "out" / "videos.jsonl").write_text(damage + "\n")
        with pytest.raises(ValueError, match="videos.jsonl` is not what an earlier run wrote: .*Give another output"):
            run(requests, tmp_path / "out")
    assert names_in(tmp_path) == ["file", "link", "out"]


def start_two(arguments):
    """Start the command twice, with what `torchrun` sets, without its own process, which takes seconds to start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "visa_hf", "segment", *map(str, arguments)],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


@pytest.fixture
def larger(world, tmp_path):
    """Five videos, one of them damaged."""
    data = tmp_path / "data"
    shutil.copytree(world, data)
    rows = [*ROWS, {"video": "bad.mp4", "query": "it"}, {"video": "other.mp4", "queries": ["a", "b"]}]
    write_rows(data / "requests.jsonl", rows)
    (data / "bad.mp4").write_bytes(b"no video")
    write_constant_rate(data / "other.mp4", 6)
    return data / "requests.jsonl"


def test_two_processes_write_what_one_writes_and_the_first_one_tells(larger, tmp_path):
    segment_videos(larger, tmp_path / "one", device="cpu")
    processes = start_two(["--requests", larger, "-o", tmp_path / "two"])
    (printed, errors), (other_printed, other_errors) = (process.communicate(timeout=240) for process in processes)
    assert [process.returncode for process in processes] == [1, 0], errors + other_errors
    assert printed.startswith(f"wrote 4 of 5 videos (7 queries) to {tmp_path / 'two'}, 1 failed in ")
    assert errors.count("visa: failed: bad.mp4: ") == 1 and "visa: failed" not in other_errors
    assert other_printed == "" and printed.count("\n") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert names_in(tmp_path / "two") == sorted(["clip", "failed.jsonl", "Löwe 1", "other", "videos.jsonl", "walk"])
    # Each loaded the model, so each had a share.
    assert all(text.count("No `model` was given") == 1 for text in (errors, other_errors))
