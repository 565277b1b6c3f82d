"""`visa data`: what its commands print, write and return."""

import json
import re

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.media import write_folder
from visa_hf import cli
from visa_hf.datasets_scripts import publish_hub
from visa_hf.rle import encode_mask

BOX = np.zeros((64, 96), dtype=np.bool_)
BOX[10:20, 30:60] = True


@pytest.fixture
def visa(capsys):
    """Run `visa data ...`; returns code, stdout and stderr."""

    def run(*arguments):
        code = cli.main(["data", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_folder(folder / "walk", 3)
    write_lines(folder, {"video": "walk", "expression": "the box", "masks": {"1": encode_mask(BOX)}})
    return folder


def write_lines(folder, *lines):
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_good_data_gives_a_summary_and_code_0(visa, data):
    assert visa("check", data) == (
        0,
        "1 expressions in order (train 1; 1 referring, 0 reasoning, 0 no such object) of 1 videos, 1 masks and 0 "
        "frames without the object; 0 problems\n",
        "",
    )
    assert visa("check", data, "--quiet") == (0, "", "")


def test_each_problem_is_a_line_with_its_place_and_the_code_is_1(visa, data):
    write_lines(data, {"video": "walk", "expression": "", "mask": 1}, {"video": "run", "expression": "x"})
    code, printed, errors = visa("check", data, "--decode", "-q")
    assert (code, errors) == (1, "")
    assert printed.splitlines() == [
        "train.jsonl:1: unknown key `mask`: did you mean `masks`?",
        "train.jsonl:1: `expression` is empty.",
        """train.jsonl:1: `masks` is missing or empty, so nothing can be learnt from this line: {"0": ...}.""",
        "train.jsonl:2: there is no video at `run`. Paths are relative to the folder of the data.",
    ]


def test_the_preview_is_drawn(visa, data, tmp_path):
    sheet = tmp_path / "sheet.jpg"
    code, printed, _ = visa("check", data, "--preview", sheet)
    assert code == 0 and printed.endswith(f"drew 1 masks in {sheet}\n")
    assert Image.open(sheet).size == (320, 258)
    write_lines(data, {"video": "walk", "expression": "x", "type_id": 2})
    assert "drew no preview: no line that is in order has a mask" in visa("check", data, "--preview", sheet)[1]
    code, printed, errors = visa("check", data, "--preview", tmp_path / "sheet.pdf")
    assert (code, printed) == (2, "") and "must end in .jpg or .png" in errors
    assert "There is no folder" in visa("check", data, "--preview", tmp_path / "no" / "sheet.jpg")[2]


def test_a_folder_that_is_no_data_is_an_error(visa, tmp_path):
    code, printed, errors = visa("check", tmp_path)
    assert (code, printed) == (2, "") and re.match("visa: error: `.*` holds no JSONL file. Write one for each", errors)
    assert visa("check", tmp_path / "none")[0] == 2


def test_a_pushed_folder_loads(visa, data, tmp_path):
    out = tmp_path / "out"
    arguments = ("push", "own_data", "--data-dir", data, "--cache-dir", tmp_path / "cache")
    code, printed, _ = visa(*arguments, "--output", out, "--with-frames", "--license", "mit", "--source", "here")
    assert (code, printed) == (0, f"wrote {out}\n")
    rows = datasets.load_dataset(str(out), "masks", split="train", cache_dir=str(tmp_path / "loaded"))
    assert rows[0]["rle"] == [None, encode_mask(BOX), None]
    assert "license: mit" in (out / "README.md").read_text() and "Source: here" in (out / "README.md").read_text()
    code, _, errors = visa(*arguments, "--output", out)
    assert code == 2 and "is not empty. Give another one" in errors


def test_pushing_looks_at_the_hub_before_any_work(visa, data, tmp_path, monkeypatch):
    pushed = []

    def push_folder(folder, repo, *, private):
        pushed.append((sorted(path.name for path in folder.iterdir()), repo, private))
        return f"https://hub/{repo}"

    monkeypatch.setattr(publish_hub, "push_folder", push_folder)
    monkeypatch.setattr(publish_hub, "check_login", lambda repo: None)
    arguments = ("push", "own_data", "--data-dir", data, "--cache-dir", tmp_path / "cache", "--repo", "me/data")
    assert visa(*arguments, "--private")[:2] == (0, "pushed https://hub/me/data\n")
    assert pushed == [(["README.md", "expressions", "masks", "videos"], "me/data", True)]

    def refuse(repo):
        raise ConnectionError("The Hub cannot be reached.")

    monkeypatch.setattr(publish_hub, "check_login", refuse)
    code, _, errors = visa(*arguments, "--output", tmp_path / "out")
    assert (code, errors) == (2, "visa: error: The Hub cannot be reached.\n")
    assert not (tmp_path / "out").exists() and len(pushed) == 1


def test_a_push_that_makes_no_sense_is_an_error(visa, data, tmp_path):
    push = ("push", "own_data", "--data-dir", data)
    assert "Neither --repo nor --output is given" in visa(*push)[2]
    assert "--private is for a repository" in visa(*push, "--private", "--output", tmp_path / "out")[2]
    assert "There is no data set 'nope'" in visa("push", "nope", "--data-dir", data, "--output", tmp_path / "out")[2]
    bad = data / "train.jsonl"
    bad.write_text("{}")
    code, _, errors = visa(*push, "--output", tmp_path / "out", "--cache-dir", tmp_path / "cache")
    assert code == 2 and f"{bad}, line 1: " in errors


def test_a_synthetic_data_set_is_written_as_asked(visa, tmp_path):
    out = tmp_path / "world"
    numbers = ("--videos", 2, "--valid-videos", 1, "--unseen-videos", 1, "--seed", 5)
    assert visa("synthesize", out, *numbers, "--size", "64x96", "--frames", "6")[:2] == (0, f"wrote {out}\n")
    train = json.loads((out / "meta_expressions_train_.json").read_text())["videos"]
    assert sorted(train) == ["train_00000", "train_00001"]
    assert {(video["height"], video["width"], len(video["frames"])) for video in train.values()} == {(64, 96, 6)}
    valid = json.loads((out / "meta_expressions_valid_.json").read_text())["videos"]
    assert sorted(valid) == ["unseen_00000", "valid_00000"]


def test_ideas_can_be_weighed(visa, tmp_path):
    out = tmp_path / "world"
    weights = ("--idea-weights", "place=50,size=0, odd one out=0")
    numbers = ("--videos", 2, "--valid-videos", 0, "--levels", "1", "--size", "64x64")
    assert visa("synthesize", out, *numbers, *weights, "--look-weight", 0.5)[0] == 0
    options = json.loads((out / "synthetic.json").read_text())["options"]
    assert options["idea_weights"] == {"place": 50, "size": 0, "odd one out": 0} and options["look_weight"] == 0.5
    videos = json.loads((out / "meta_expressions_train_.json").read_text())["videos"].values()
    ideas = [expression["idea"] for video in videos for expression in video["expressions"].values()]
    assert ideas.count("place") > len(ideas) / 3 and not {"size", "odd one out"} & set(ideas)
    assert "has colour; ideas are border, " in visa("synthesize", out, "--idea-weights", "colour=1")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "64"), "'64' is no size; give height x width, like 128x128"),
        (("--frames", "6-"), "argument --frames: '6-' is no range"),
        (("--frames", "x"), "'x' is no range; give least and most, like 16-24, or one number"),
        (("--idea-weights", "place"), "'place' is no weight of an idea; give IDEA=W, like place=3"),
    ],
)
def test_wrong_sizes_and_ranges_are_refused(arguments, message, visa, tmp_path, capsys):
    with pytest.raises(SystemExit):
        visa("synthesize", tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(visa, data, monkeypatch):
    def missing(name, *others, **named):
        if name.startswith("visa_hf.datasets_scripts"):
            raise ImportError("No module named 'datasets'", name="datasets")
        return real(name, *others, **named)

    real = __import__
    monkeypatch.setattr("builtins.__import__", missing)
    code, _, errors = visa("check", data)
    assert code == 2 and "`visa data` needs the package `datasets`: `pip install visa-hf[" in errors
