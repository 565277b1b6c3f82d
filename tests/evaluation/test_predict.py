"""Predicting a split: what is written, and that interruptions do not show in it."""

import copy
import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.worlds import expression_row, revos_set, write_frames
from tests.media import write_video
from tests.random_model import build_demo_checkpoint
from visa_hf.evaluation import predict as module
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet
from visa_hf.evaluation.predict import PredictionOptions, predict
from visa_hf.inference import load_model, segment
from visa_hf.processes import checkpoint_fingerprint
from visa_hf.rle import decode_mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build_demo_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="module")
def demo(checkpoint):
    return load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def evaluation_set(tmp_path_factory):
    return revos_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def load(demo):
    """Stand in for `load_model`, which takes longer; counts how often it is asked."""
    calls = []

    def load(model, **options):
        calls.append(model)
        return demo

    load.calls = calls
    return load


@pytest.fixture(scope="module")
def whole(demo, evaluation_set, checkpoint, tmp_path_factory):
    """An uninterrupted run of one process."""
    out = tmp_path_factory.mktemp("whole") / "out"
    predict(evaluation_set, out, checkpoint, load=lambda model, **_: demo)
    return out


def contents(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_predictions_agree_with_segment_and_with_each_other(whole, evaluation_set, demo):
    rows = [json.loads(line) for line in (whole / "predictions.jsonl").read_text().splitlines()]
    assert [(row["video"], row["expression_id"]) for row in rows] == [
        (expression.video, expression.expression_id) for expression in evaluation_set.expressions
    ]
    model, processor = demo
    for row, expression in zip(rows, evaluation_set.expressions, strict=True):
        frames = [np.asarray(Image.open(evaluation_set.root / name)) for name in expression.frames]
        alone = segment(np.stack(frames), expression.text, model=model, processor=processor)
        assert row["query"] == expression.text
        assert (row["answer"], row["target_frame"]) == (alone.answer, alone.frame_selection.target_idx)
        for number, name in enumerate(expression.frame_names):
            with Image.open(whole / "Annotations" / row["video"] / row["expression_id"] / f"{name}.png") as png:
                assert png.mode == "P"
                mask = np.asarray(png)
            assert set(np.unique(mask)) <= {0, 1}
            assert np.array_equal(mask == 1, decode_mask(row["masks"][str(number)]))
            assert np.array_equal(mask == 1, alone.mask_of(number))
    assert any(decode_mask(rle).any() for row in rows for rle in row["masks"].values())
    assert sorted(path.name for path in whole.iterdir()) == ["Annotations", "predictions.jsonl", "run.json"]


def test_all_expressions_of_a_video_share_one_session(evaluation_set, checkpoint, load, tmp_path, monkeypatch):
    opened = []
    real = module.VisaVideoSession
    monkeypatch.setattr(module, "VisaVideoSession", lambda *args, **kwargs: opened.append(1) or real(*args, **kwargs))
    predict(evaluation_set, tmp_path / "out", checkpoint, load=load)
    assert len(opened) == len(evaluation_set.videos)


@pytest.mark.parametrize("moment", ["while predicting", "while writing the part", "while merging"])
def test_an_interrupted_run_goes_on_and_ends_the_same(
    whole, evaluation_set, checkpoint, load, demo, tmp_path, monkeypatch, moment
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        if moment == "while predicting":
            real = module.predict_video

            def crash(model, processor, chosen, video, options, *, on_frame, **more):
                if video == "b":
                    on_frame(0, [np.ones((24, 32), bool)] * 2)
                    raise KeyboardInterrupt
                return real(model, processor, chosen, video, options, on_frame=on_frame, **more)

            patch.setattr(module, "predict_video", crash)
        elif moment == "while writing the part":
            real_write = module.write_json_lines

            def crash_write(path, rows):
                if path.name.startswith("b"):
                    raise KeyboardInterrupt
                real_write(path, rows)

            patch.setattr(module, "write_json_lines", crash_write)
        else:
            patch.setattr(module, "_merge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            predict(evaluation_set, out, checkpoint, load=load)
    assert (out / "parts" / "a.jsonl").is_file()
    assert not (out / "predictions.jsonl").exists()
    computed = []
    real = module.predict_video

    def count(model, processor, chosen, video, options, **more):
        computed.append(video)
        return real(model, processor, chosen, video, options, **more)

    monkeypatch.setattr(module, "predict_video", count)
    predict(evaluation_set, out, checkpoint, load=load)
    assert computed == ([] if moment == "while merging" else ["b"])
    assert contents(out) == contents(whole)


def test_a_killed_process_leaves_only_what_the_next_run_clears(whole, evaluation_set, checkpoint, load, tmp_path):
    out = tmp_path / "out"
    predict(evaluation_set, out, checkpoint, load=load)
    (out / "predictions.jsonl").unlink()
    (out / "parts").mkdir()
    lines = (whole / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (out / "parts" / "a.jsonl").write_bytes(b"".join(lines[:3]))
    (out / "parts" / ".b.jsonl.1.partial").write_bytes(lines[3][:20])
    (out / ".b.partial" / "0").mkdir(parents=True)
    (out / ".predictions.jsonl.partial").write_bytes(lines[0][:10])
    (out / "Annotations" / "b" / "0" / "00000.png").write_bytes(b"cut")
    predict(evaluation_set, out, checkpoint, load=load)
    assert contents(out) == contents(whole)


def test_a_finished_run_is_not_computed_again(evaluation_set, checkpoint, load, tmp_path):
    out = tmp_path / "out"
    first = predict(evaluation_set, out, checkpoint, load=load)
    before = contents(out)
    assert predict(evaluation_set, out, checkpoint, load=load) == first
    assert (contents(out), len(load.calls)) == (before, 1)


def test_other_settings_are_refused(evaluation_set, checkpoint, load, tmp_path):
    out = tmp_path / "out"
    predict(evaluation_set, out, checkpoint, load=load)
    with pytest.raises(ValueError, match=r"run with other settings: `threshold` was 0.5 and is 0.7"):
        predict(evaluation_set, out, checkpoint, options=PredictionOptions(threshold=0.7), load=load)
    with pytest.raises(ValueError, match="`num_videos` was 2 and is 1"):
        predict(revos_set(tmp_path / "data", limit=1), out, checkpoint, load=load)
    copied = tmp_path / "trained"
    build_demo_checkpoint(copied)
    weights = next(copied.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert checkpoint_fingerprint(str(copied)) != checkpoint_fingerprint(checkpoint)


def test_settings_may_be_corrected_before_the_first_video_is_finished(evaluation_set, checkpoint, load, tmp_path):
    def refuse(model, **options):
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        predict(evaluation_set, tmp_path / "out", "wrong", load=refuse)
    predict(evaluation_set, tmp_path / "out", checkpoint, load=load)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"] == checkpoint


def test_a_folder_with_something_else_is_left_alone(evaluation_set, checkpoint, load, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="holds no run to continue"):
        predict(evaluation_set, tmp_path, checkpoint, load=load)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_frames_of_a_video_file_are_read_as_a_video(demo, tmp_path):
    write_video(tmp_path / "clip.mp4", num_frames=4)
    whole = expression_row("clip.mp4", "0", "it", 0, [], [f"clip.mp4#{number}" for number in range(4)])
    part = {**whole, "video_id": "part", "frames": ["clip.mp4#1", "clip.mp4#3"]}
    rows = [{**row, "height": 64, "width": 96} for row in (whole, part)]
    evaluation_set = EvaluationSet(BENCHMARKS["mevis"], "valid", tmp_path, rows)
    assert module.frames_of(tmp_path, evaluation_set.expressions[0]) == tmp_path / "clip.mp4"
    assert len(module.frames_of(tmp_path, evaluation_set.expressions[1])) == 2
    predict(evaluation_set, tmp_path / "out", "demo", load=lambda model, **_: demo)
    names = sorted(path.name for path in (tmp_path / "out" / "Annotations" / "part" / "0").iterdir())
    assert names == ["00000.png", "00001.png"]


def test_a_reason_seg_image_is_asked_in_the_form_that_its_flag_says(demo, tmp_path):
    frames = write_frames(tmp_path, "x", 1)
    rows = [expression_row("x", "0", "what is hot", 1, ["x"], frames, is_sentence=True)]
    evaluation_set = EvaluationSet(BENCHMARKS["reason_seg"], "val", tmp_path, rows)
    model, processor = demo
    watched, asked = copy.copy(processor), []

    def build_prompt(*args, **options):
        asked.append(options["style"])
        return processor.build_prompt(*args, **options)

    watched.build_prompt = build_prompt
    predict(evaluation_set, tmp_path / "out", "demo", load=lambda name, **_: (model, watched))
    assert asked == ["long"]


def test_a_video_that_does_not_fit_its_annotations_is_named(demo, tmp_path):
    frames = write_frames(tmp_path, "v", 2)
    rows = [{**expression_row("v", "0", "it", 0, [], frames), "height": 30}]
    evaluation_set = EvaluationSet(BENCHMARKS["mevis"], "valid", tmp_path, rows)
    with pytest.raises(ValueError, match="Video `v` cannot be predicted: its frames are 24 x 32 .* say 30 x 32"):
        predict(evaluation_set, tmp_path / "out", "demo", load=lambda model, **_: demo)
    (tmp_path / frames[1]).unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="Video `v` cannot be predicted"):
        predict(evaluation_set, tmp_path / "out", "demo", load=lambda model, **_: demo)
    assert not (tmp_path / "out" / "Annotations").exists()
