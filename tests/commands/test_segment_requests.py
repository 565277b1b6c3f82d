"""`visa segment --requests`: the same files as for one video, what is printed, and exit codes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.media import write_constant_rate, write_folder
from tests.random_model import make_demo_model
from visa_hf import cli, result_files, segment_many
from visa_hf.commands import segment as command


@pytest.fixture(scope="module")
def demo():
    return make_demo_model()


@pytest.fixture
def visa(demo, monkeypatch, capsys):
    """Run `visa segment ...` in this process with the demo model ready; returns code, stdout and stderr."""
    for module in (command, segment_many):
        monkeypatch.setattr(module, "load_model", lambda model, *_, **__: demo)

    def run(*arguments):
        code = cli.main(["segment", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_constant_rate(folder / "clip.mp4", 5, audio="aac")
    write_folder(folder / "walk", 3)
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "requests.csv").write_text("video,query\nclip.mp4,the cat\nwalk,the dog\nclip.mp4,what moves?\n")
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_each_folder_holds_what_the_command_writes_for_one_video(visa, world, tmp_path):
    options = ("--soft", "--cutout", "--every", 2, "--end", "4f", "--max-new-tokens", 9, "--explain")
    code, printed, errors = visa("--requests", world / "requests.csv", "-o", tmp_path / "many", *options)
    assert (code, errors) == (0, "")
    assert re.fullmatch(
        rf"wrote 2 of 2 videos \(3 queries\) to {re.escape(str(tmp_path / 'many'))} in [\d.]+ s\n", printed
    )
    for name, queries in (("clip.mp4", ["the cat", "what moves?"]), ("walk", ["the dog"])):
        alone, many = tmp_path / name, tmp_path / "many" / name.removesuffix(".mp4")
        assert visa(world / name, *queries, "-o", alone, *options)[0] == 0
        assert (many / "request.json").is_file()
        (many / "request.json").unlink()
        assert contents(many) == contents(alone)


def test_a_second_run_says_what_was_there_already(visa, world, tmp_path):
    requests = world / "more.jsonl"
    write_rows(requests, [{"video": "walk", "query": "it"}])
    arguments = ("--requests", requests, "-o", tmp_path / "out", "--no-overlay")
    assert visa(*arguments)[0] == 0
    write_rows(requests, [{"video": "walk", "query": "it"}, {"video": "clip.mp4", "query": "it"}])
    code, printed, _ = visa(*arguments)
    assert code == 0 and re.search(r"^wrote 1 of 2 videos \(1 query\) to .*out, 1 were there already in ", printed)
    assert visa(*arguments, "-q") == (0, "", "")
    code, _, errors = visa(*arguments, "--threshold", 0.4)
    assert code == 2 and "holds results of other requests or settings: walk (`threshold` was 0.5 and is 0.4)" in errors
    code, printed, _ = visa(*arguments, "--threshold", 0.4, "--overwrite")
    assert code == 0 and printed.startswith("wrote 2 of 2 videos (2 queries)")


def test_videos_that_failed_are_listed_and_the_exit_code_is_1(visa, world, tmp_path, monkeypatch):
    rows = [{"video": name, "query": "it"} for name in ("bad.mp4", "walk")]
    rows.append({"video": "clip.mp4", "query": "it", "target_frame": 5})
    requests = write_rows(world / "failing.jsonl", rows)
    code, printed, errors = visa("--requests", requests, "-o", tmp_path / "out", "--no-overlay")
    assert code == 1 and printed.startswith("wrote 1 of 3 videos (1 query) to ") and ", 2 failed in " in printed
    lines = errors.splitlines()
    assert [line.split(": ")[2] for line in lines] == ["bad.mp4", "clip.mp4"]
    assert "`target_frame` is 5 but the video, or the part chosen of it, has frames 0 to 4." in lines[1]
    monkeypatch.setattr(command, "_MAX_LISTED", 1)
    code, printed, errors = visa("--requests", requests, "-o", tmp_path / "out", "--no-overlay", "-q")
    assert (code, printed) == (1, "") and errors.count("\n") == 2
    assert errors.endswith(f"visa: failed: 1 more, see {tmp_path / 'out' / 'failed.jsonl'}\n")
    code, _, errors = visa("--requests", requests, "-o", tmp_path / "stopped", "--no-overlay", "--on-error", "stop")
    assert code == 2 and errors.startswith("visa: error: The video `bad.mp4` cannot be segmented: ")


def test_all_rows_that_cannot_be_used_are_listed(visa, world, tmp_path, monkeypatch):
    rows = [{"video": "clip.mp4", "qurey": "it"}, {"video": "none.mp4", "query": "it"}]
    requests = write_rows(world / "wrong.jsonl", rows)
    arguments = ("--requests", requests, "-o", tmp_path / "out")
    assert visa(*arguments) == (
        2,
        "",
        f"visa: error: `{requests}` has 3 problems:\n"
        "  line 1: 'qurey' is no column. Did you mean `query`?\n"
        "  line 1: `query` is missing. Say what to segment.\n"
        f"  line 2: there is no video at `{world / 'none.mp4'}`.\n",
    )
    # Of several processes, which read the same file, the first one says so.
    monkeypatch.setenv("RANK", "1")
    assert visa(*arguments) == (2, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["clip.mp4", "--requests", "requests.csv"],
            "Both a VIDEO, 'clip.mp4', and --requests are given. Leave one out.",
        ),
        (["--requests", "requests.csv", "--first-mask", "mask.png"], "--first-mask is for one video. Give the column"),
        (["--requests", "none.csv"], "There are no requests at `none.csv`."),
        (["--requests", "clip.mp4"], "The requests `clip.mp4` are neither a .jsonl nor a .csv file."),
        (["--requests", "requests.csv", "--threshold", "2"], "`threshold` is 2.0 but must be a probability"),
        (["--requests", "requests.csv", "--percentages", "none.json"], "There is no percentages file `none.json`."),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(visa, world, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(world)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(world / "mask.png")
    code, printed, errors = visa(*arguments, "-o", tmp_path / "new" / "out")
    assert (code, printed) == (2, "")
    assert errors.startswith("visa: error: ") and errors.count("\n") == 1 and message in errors
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_pyav_is_refused_once(visa, world, tmp_path, monkeypatch):
    monkeypatch.setattr(result_files, "is_av_available", lambda: False)
    code, _, errors = visa("--requests", world / "requests.csv", "-o", tmp_path / "out")
    assert code == 2 and "Writing overlay.mp4 needs PyAV: `pip install av`, or leave it out with" in errors


def test_an_interruption_says_how_to_go_on(visa, world, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(result_files, "make_results", interrupt)
    code, printed, errors = visa("--requests", world / "requests.csv", "-o", tmp_path / "out")
    assert (code, printed) == (130, "")
    assert f"Finished videos are in `{tmp_path / 'out'}`; the same command goes on with the others." in errors
