"""`visa evaluate`: from a data set on disk to numbers, zips and messages."""

import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests.datasets_scripts.trees import (
    FRAMES,
    REVOS_VALID,
    SIZE,
    expression,
    object_masks,
    rles,
    video,
    write_mevis,
    write_ref_davis,
    write_ref_youtube_vos,
    write_revos,
)
from tests.evaluation.worlds import truths, write_predictions
from tests.random_model import build_demo_checkpoint
from visa_hf import cli
from visa_hf.evaluation import predict as predicting
from visa_hf.evaluation.benchmarks import open_benchmark
from visa_hf.inference import load_model

ROOT = Path(__file__).parents[2]
VALID = {
    **REVOS_VALID,
    "cars": video(
        FRAMES[:2],
        [
            expression("the red car", obj_id=[0], anno_id=[21], type_id=0),
            expression("which cars turn?", obj_id=[0, 1], anno_id=[21, 22], type_id=1),
            expression("the boat", obj_id=[], anno_id=[], type_id=2),
        ],
        vid_id=3,
        height=SIZE[0],
        width=SIZE[1],
    ),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    datasets.disable_progress_bars()  # as the command does: tests that prepare rows first would show them
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def revos(tmp_path_factory):
    masks = {"20": rles(object_masks(1, 3)), "21": rles(object_masks(0, 2)), "22": rles(object_masks(2, 2))}
    masks |= {"10": masks["20"], "11": masks["20"], "12": rles(object_masks(2, 1))}
    return write_revos(tmp_path_factory.mktemp("revos"), valid=VALID, masks=masks)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build_demo_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def demo(checkpoint):
    # Loaded, not made: the place of weights in memory may show in the last digit of a score.
    return load_model(checkpoint, device="cpu")


@pytest.fixture
def visa(cache, demo, monkeypatch, capsys):
    """Run `visa evaluate ...` in this process; the model is the demo model, ready made."""
    monkeypatch.setitem(cli.COMMANDS, "evaluate", "")
    monkeypatch.setattr(
        predicting.predict, "__kwdefaults__", {**predicting.predict.__kwdefaults__, "load": lambda *_, **__: demo}
    )

    def run(*arguments):
        code = cli.main(["evaluate", "--cache-dir", str(cache), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def oracle(name, root, split, cache, folder):
    """Write the true masks as predictions."""
    evaluation_set = open_benchmark(name, root, split, cache_dir=cache)
    write_predictions(folder, evaluation_set, truths(evaluation_set), "grey")
    return evaluation_set


def test_a_model_is_measured_on_revos(visa, revos, checkpoint, tmp_path):
    out = tmp_path / "out"
    options = ("--dataset", "revos", "--data-dir", revos, "--split", "valid", "-o", out, "--device", "cpu")
    code, printed, err = visa("--model", checkpoint, *options)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in out.iterdir()) == [
        "Annotations",
        "predictions.jsonl",
        "report",
        "run.json",
        "scores.csv",
        "scores.json",
    ]
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores["scores"]) == {"referring", "reasoning", "no-object", "overall"}
    assert scores["num_expressions"] == 4
    for row, values in scores["scores"].items():
        assert f"{row:12}{values['num_expressions']:12d}{values['J']:8.2f}" in printed
    # Scoring what was written, as PNGs, is the same.
    again = tmp_path / "again"
    code, second, _ = visa("--predictions", out, *options[:-4], "-o", again)
    *table, frames, _ = printed.splitlines()
    assert (code, second.splitlines()[:-1]) == (0, table)
    assert frames == "target frames: middle; reference frames: as the checkpoint says"
    assert json.loads((again / "scores.json").read_text())["scores"] == scores["scores"]


def test_the_truth_scores_full_marks(visa, revos, cache, tmp_path):
    oracle("revos", revos, "valid", cache, tmp_path / "p")
    code, printed, _ = visa(
        *("--predictions", tmp_path / "p", "--dataset", "revos", "--data-dir", revos, "--split", "valid"),
        *("-o", tmp_path / "out", "--no-report"),
    )
    assert code == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert scores["overall"]["J&F"] == scores["overall"]["A"] == 100
    assert "overall                3  100.00  100.00  100.00  100.00" in printed
    assert not (tmp_path / "out" / "report").exists()


def test_missing_predictions_end_with_code_2_unless_they_count_as_zero(visa, revos, cache, tmp_path):
    oracle("revos", revos, "valid", cache, tmp_path / "p")
    (tmp_path / "p" / "cars" / "0" / "00001.png").unlink()
    options = ("--predictions", tmp_path / "p", "--dataset", "revos", "--data-dir", revos, "--split", "valid")
    code, printed, err = visa(*options, "-o", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert "video `cars`, expression `0`, frame `00001` is missing" in err
    assert not (tmp_path / "out" / "scores.json").exists()
    code, _, err = visa(*options, "-o", tmp_path / "out", "--missing", "zero", "--no-report")
    assert code == 0
    assert "visa: warning: counted as zero" in err
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["referring"]["J"] == 50


@pytest.mark.parametrize(
    ("name", "write", "num_entries", "folder"),
    [("mevis", write_mevis, 3, ""), ("ref_youtube_vos", write_ref_youtube_vos, 4, "Annotations/")],
)
def test_what_a_server_scores_becomes_a_zip(visa, checkpoint, tmp_path, name, write, num_entries, folder):
    root, out = write(tmp_path / name), tmp_path / "out"
    code, printed, err = visa(
        *("--model", checkpoint, "--dataset", name, "--data-dir", root, "--split", "valid", "-o", out),
        *("--device", "cpu"),
    )
    assert (code, err) == (0, "")
    assert "Upload" in printed
    with zipfile.ZipFile(out / "submission.zip") as archive:
        assert len(archive.namelist()) == num_entries
        assert {entry.count("/") for entry in archive.namelist()} == {2 + bool(folder)}
        assert all(entry.startswith(folder) for entry in archive.namelist())
    assert not (out / "scores.json").exists()


@pytest.mark.parametrize(
    ("name", "write", "split", "rows"),
    [
        ("mevis", write_mevis, "valid_u", ["overall"]),
        ("ref_davis17", write_ref_davis, "valid", [f"annotator {n}" for n in (1, 2, 3, 4)] + ["overall"]),
    ],
)
def test_other_sets_are_scored_by_their_protocol(visa, cache, tmp_path, name, write, split, rows):
    root = write(tmp_path / name)
    oracle(name, root, split, cache, tmp_path / "p")
    code, _, err = visa(
        *("--predictions", tmp_path / "p", "--dataset", name, "--data-dir", root, "--split", split),
        *("-o", tmp_path / "out"),
    )
    assert (code, err) == (0, "")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert list(scores) == rows
    assert scores["overall"]["J&F"] == 100


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20), (90, 120, 150)).save(path)


def write_refcoco(root):
    """Two sentences about one object of one image."""
    name = "COCO_train2014_000000000007.jpg"
    write_image(root / "refer_seg" / "images" / "mscoco" / "images" / "train2014" / name)
    sentences = [{"sent_id": n, "sent": f"the box {n}", "raw": "", "tokens": []} for n in (0, 1)]
    reference = {"ref_id": 0, "ann_id": 1, "image_id": 7, "category_id": 1, "file_name": name, "split": "testA"}
    folder = root / "refer_seg" / "refcoco+"
    folder.mkdir()
    (folder / "refs(unc).p").write_bytes(pickle.dumps([{**reference, "sent_ids": [0, 1], "sentences": sentences}]))
    polygon = [[5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]]
    instances = {
        "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "segmentation": polygon}],
        "images": [{"id": 7, "file_name": name, "height": 20, "width": 30}],
        "categories": [{"id": 1, "name": "box"}],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return root


def write_reason_seg(root):
    """One image of ReasonSeg, with a region to be ignored."""
    folder = root / "reason_seg" / "ReasonSeg" / "val"
    write_image(folder / "x.jpg")
    shapes = [
        {"label": "target", "points": [[2, 2], [9, 2], [9, 9], [2, 9]]},
        {"label": "ignore", "points": [[12, 2], [19, 2], [19, 9], [12, 9]]},
    ]
    annotation = {"text": ["what keeps the tea warm?", "not asked"], "is_sentence": True, "shapes": shapes}
    (folder / "x.json").write_text(json.dumps(annotation))
    return root


@pytest.mark.parametrize(
    ("name", "write", "split", "num_expressions"),
    [("refcoco+", write_refcoco, "testA", 2), ("reason_seg", write_reason_seg, "val", 1)],
)
def test_image_sets_have_ciou_and_giou(visa, cache, checkpoint, tmp_path, name, write, split, num_expressions):
    root = write(tmp_path / "data")
    options = ("--dataset", name, "--data-dir", root, "--split", split)
    evaluation_set = oracle(name, root, split, cache, tmp_path / "p")
    if name == "reason_seg":
        [expression] = evaluation_set.expressions
        assert evaluation_set.ignored_of(expression) != [None]
    code, printed, err = visa("--predictions", tmp_path / "p", *options, "-o", tmp_path / "scored")
    assert (code, err) == (0, "")
    assert "cIoU" in printed
    table = json.loads((tmp_path / "scored" / "scores.json").read_text())["scores"]
    assert table["overall"] == {"num_expressions": num_expressions, "cIoU": 100, "gIoU": 100}
    code, _, err = visa("--model", checkpoint, *options, "-o", tmp_path / "predicted", "--device", "cpu")
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dataset", "revos", "--split", "valid"), "Give either --model"),
        (
            ("--dataset", "revos", "--split", "test", "--predictions", "."),
            "`split` is 'test' but `revos` has valid, train",
        ),
        (("--dataset", "revos", "--split", "valid", "--predictions", "gone"), "There are no predictions at `gone`"),
        (("--dataset", "mevis", "--split", "valid", "--predictions", "."), "MeViS"),
        (("--dataset", "revos", "--split", "valid", "--predictions", ".", "--limit", "0"), "`limit` is 0"),
        (("--dataset", "revos", "--split", "valid", "--model", "x", "--threshold", "2"), "--threshold is 2.0"),
        (
            ("--dataset", "revos", "--split", "valid", "--model", "/gone", "--device", "cpu"),
            "There is no model folder",
        ),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(visa, revos, tmp_path, monkeypatch, options, message):
    monkeypatch.undo() if "/gone" in options else None
    monkeypatch.setitem(cli.COMMANDS, "evaluate", "")
    code, printed, err = visa(*options, "--data-dir", revos, "-o", tmp_path / "out")
    assert (code, printed) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_the_choice_of_frames_is_printed_and_written(visa, revos, checkpoint, tmp_path):
    options = ("--dataset", "revos", "--data-dir", revos, "--split", "valid", "--device", "cpu", "--model", checkpoint)
    out = tmp_path / "oracle"
    code, printed, err = visa(*options, "-o", out, "--sampler", "oracle", "--num-reference-frames", "0")
    assert (code, err) == (0, "")
    assert printed.splitlines()[-2] == "target frames: oracle; reference frames: 0"
    scores = json.loads((out / "scores.json").read_text())
    assert (scores["sampler"], scores["num_reference_frames"], scores["percentages"]) == ("oracle", 0, None)
    page = (out / "report" / "index.html").read_text()
    assert "sampler: oracle" in page and "num_reference_frames: 0" in page and "percentages" not in page
    code, _, err = visa(*options, "-o", out, "--sampler", "first", "--num-reference-frames", "0")
    assert code == 2 and "holds a run with other settings: `sampler` was 'oracle' and is 'first'" in err
    path = tmp_path / "tp.json"
    path.write_text(json.dumps({"birds": {"0": 100}, "cars": {"0": 0, "1": 100}}))
    code, _, err = visa(*options, "-o", tmp_path / "file", "--percentages", path)
    assert code == 2 and "The target frame of video `cars`, expression `2` is not known." in err
    path.write_text(json.dumps({"birds": {"0": 100}, "cars": {"0": 0, "1": 100, "2": 50}}))
    code, printed, err = visa(*options, "-o", tmp_path / "file", "--percentages", path)
    assert (code, err) == (0, "")
    assert f"target frames: {path}; reference frames: as the checkpoint says" in printed
    rows = [json.loads(line) for line in (tmp_path / "file" / "predictions.jsonl").open()]
    assert [row["target_frame"] for row in rows] == [len(rows[0]["masks"]) - 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "best"), "argument --sampler: invalid choice: 'best'"),
        (("--sampler", "visa", "--percentages", "x"), "argument --percentages: not allowed with argument --sampler"),
        (("--percentages", "gone.json"), "There is no percentages file `gone.json`"),
    ],
)
def test_a_wrong_choice_of_frames_is_refused(visa, revos, checkpoint, tmp_path, capsys, options, message):
    try:
        code, _, err = visa(
            *("--dataset", "revos", "--data-dir", revos, "--split", "valid", "--model", checkpoint),
            *("-o", tmp_path / "out", "--device", "cpu", *options),
        )
    except SystemExit as error:
        code, err = error.code, capsys.readouterr().err
    assert code == 2 and message in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(visa, revos, tmp_path):
    (tmp_path / "out").write_text("mine")
    options = ("--dataset", "revos", "--data-dir", revos, "--split", "valid", "-o", tmp_path / "out")
    code, _, err = visa("--predictions", tmp_path, *options)
    assert (code, err) == (2, f"visa: error: The output `{tmp_path / 'out'}` is a file. Give a folder.\n")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_interruption_says_how_to_go_on(visa, revos, checkpoint, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(predicting, "predict_video", interrupt)
    options = ("--dataset", "revos", "--data-dir", revos, "--split", "valid", "-o", tmp_path / "out")
    code, _, err = visa("--model", checkpoint, *options, "--device", "cpu")
    assert code == 130
    assert f"The same command continues the run in `{tmp_path / 'out'}`." in err


def test_two_processes_print_once_and_write_the_same(visa, revos, checkpoint, tmp_path, cache):
    options = ["--dataset", "revos", "--data-dir", str(revos), "--split", "valid", "--device", "cpu", "-q"]
    options += ["--cache-dir", str(cache), "--model", str(checkpoint)]
    _, printed, _ = visa(*options, "-o", tmp_path / "one")
    code = ("import sys", "from visa_hf import cli", "cli.COMMANDS['evaluate'] = ''", "sys.exit(cli.main())")
    (tmp_path / "run.py").write_text("\n".join(code))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # What `torchrun` sets, without its own process, which takes seconds to start.
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), "evaluate", *options, "-o", str(tmp_path / "two")],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    (first, err), (second, other_err) = (process.communicate(timeout=240) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (err + other_err)[-3000:]
    assert first.replace(str(tmp_path / "two"), "OUT") == printed.replace(str(tmp_path / "one"), "OUT")
    assert second == ""
    for name in ("predictions.jsonl", "scores.json", "scores.csv", "report/index.html"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    pngs = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png")]
    assert len(pngs) == 9
    assert all((tmp_path / "one" / png).read_bytes() == (tmp_path / "two" / png).read_bytes() for png in pngs)
    assert np.all([json.loads(line)["answer"] for line in (tmp_path / "two" / "predictions.jsonl").open()])
