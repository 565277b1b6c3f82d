"""Whole clips during a training: which ones, what `visa evaluate` says of them, one process and two, refusals."""

import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import visa_hf
from tests.trainer.evaluating import make_trainer, measured, speaking_model, write_world
from tests.trainer.training import tiny_processor
from visa_hf import VisaForVideoSegmentation
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet, open_benchmark
from visa_hf.evaluation.predict import predict, predict_video
from visa_hf.evaluation.predictions import open_predictions
from visa_hf.evaluation.score import score_predictions
from visa_hf.trainer import clip_evaluation as module
from visa_hf.trainer.clip_evaluation import ClipEvaluation, choose_expressions, id_of
from visa_hf.trainer.lockstep import LockstepForward

ROOT = Path(__file__).parents[2]
FIGURES = ("J", "F", "JF", "A", "R")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world") / "synthetic")


@pytest.fixture(scope="module")
def questions(world, cache):
    return open_benchmark("revos", world, "valid", cache_dir=cache)


@pytest.fixture(scope="module")
def model():
    return speaking_model().eval()


@pytest.fixture(scope="module")
def clips(questions):
    return ClipEvaluation(questions, 5)


@pytest.fixture(scope="module")
def scores(clips, model):
    return clips.score(model, tiny_processor())


# --- which ones ---


def test_types_share_the_choice_and_a_larger_one_keeps_a_smaller_one(questions):
    chosen = choose_expressions(questions, 6)
    types = [expression.type_id for expression in chosen]
    available = {expression.type_id for expression in questions.expressions}
    assert len(chosen) == 6 and {types.count(type_id) for type_id in available} <= {2, 3}
    assert set(map(id_of, chosen)) <= set(map(id_of, choose_expressions(questions, 9)))
    assert choose_expressions(questions, 6, seed=1) != chosen
    everything = choose_expressions(questions, 10_000)
    assert everything == questions.expressions  # in the order of the set


def test_the_choice_does_not_depend_on_the_order_of_the_rows(questions):
    videos = list(questions.videos.values())
    random.Random(0).shuffle(videos)
    other = questions.subset([expression for group in videos for expression in reversed(group)])
    assert other.expressions != questions.expressions
    assert set(map(id_of, choose_expressions(other, 5))) == set(map(id_of, choose_expressions(questions, 5)))


def test_the_synthetic_world_is_a_benchmark_of_its_own(world, cache, questions):
    synthetic = open_benchmark("synthetic", world, "valid", cache_dir=cache)
    assert synthetic.expressions == questions.expressions
    assert synthetic.benchmark.summary == questions.benchmark.summary == "types"
    assert synthetic.foreground_of(synthetic.expressions[0].video) is not None


# --- what is measured ---


def test_the_metrics_are_those_of_visa_evaluate(clips, scores, model, tmp_path):
    predict(clips.questions, tmp_path / "out", "tiny", load=lambda name, **_: (model, tiny_processor()))
    result = score_predictions(clips.questions, open_predictions(tmp_path / "out"))
    metrics = clips.metrics(scores)
    assert metrics["num_expressions"] == 5
    for row, figures in result.table.items():
        for figure in FIGURES:
            name = f"{row.replace('-', '_')}_{figure}"
            assert metrics[name] == figures["J&F" if figure == "JF" else figure] / 100
    assert metrics["no_object_R"] == result.robustness / 100
    assert 0 < metrics["overall_JF"] < 1  # masks are neither right nor nothing


def test_no_order_and_no_share_shows_in_any_digit(clips, scores, model):
    expected = clips.metrics(scores)
    assert clips.metrics(scores[::-1]) == expected
    shares = [clips.score(model, tiny_processor(), rank, 2) for rank in (0, 1)]
    assert all(shares)
    assert clips.metrics(shares[1] + shares[0]) == expected


def test_no_object_is_right_without_any_mask(clips, scores, model, monkeypatch):
    absent = [score for score in scores if score.expression.type_id == 2]
    assert absent

    def nothing(*args, **kwargs):
        results = predict_video(*args, **kwargs)
        for result in results:
            object.__setattr__(result, "object_masks", tuple(() for _ in result.object_masks))
        return results

    monkeypatch.setattr(module, "predict_video", nothing)
    metrics = clips.metrics(clips.score(model, tiny_processor()))
    assert (metrics["no_object_empty"], metrics["no_object_J"], metrics["no_object_R"]) == (1.0, 1.0, 1.0)
    assert metrics["overall_J"] < 0.5


def test_without_a_tracker_the_target_frame_is_measured(questions, model):
    """The same masks as those that a session has on the target frame, and no other frame is scored."""
    clips, processor = ClipEvaluation(questions, 4), tiny_processor()
    untracked = speaking_model(with_tracker=False)
    assert untracked.tracker is None
    num_pixels = 0
    for video, expressions in clips.questions.videos.items():
        results = predict_video(model, processor, clips.questions, video, clips.options)
        asked, held = clips._predict(untracked, processor, video)
        for expression, result in zip(asked.videos[video], results, strict=True):
            target = len(expressions[0].frames) // 2
            assert expression.scored_frames == (target,) == (result.frame_selection.target_idx,)
            (mask,) = held.read(expression).values()
            assert (mask == result.mask_of(target)).all()
            num_pixels += mask.sum()
    assert num_pixels > 0
    metrics = clips.metrics(clips.score(untracked, processor))
    assert metrics["num_expressions"] == 4 and 0 < metrics["overall_JF"] < 1


def test_a_target_is_taken_among_the_annotated_frames(questions):
    (one, *_) = questions.expressions
    known = questions.subset([replace(one, annotated=(0, 3))])
    (score,) = ClipEvaluation(known, 1).score(speaking_model(with_tracker=False), tiny_processor())
    assert score.expression.annotated == (3,)  # the nearer one to the middle of 4 or 5 frames


def test_what_a_training_put_over_forward_is_there_again_afterwards(clips, scores, model):
    put_over = LockstepForward(model.forward, tiny_processor(), (1.0, 1.0, 1.0))
    model.forward = put_over
    try:
        assert clips.metrics(clips.score(model, tiny_processor())) == clips.metrics(scores)
        assert model.forward is put_over
    finally:
        del model.forward


# --- through the trainer ---


def test_an_evaluation_measures_target_frames_and_clips(world, cache, tmp_path):
    trainer = make_trainer(speaking_model(), world, cache, tmp_path)
    metrics = trainer.evaluate()
    rows = ("overall_", "referring_", "reasoning_", "no_object_")
    assert {f"eval_clip_{row}{figure}" for row in rows for figure in FIGURES} <= set(metrics)
    assert {f"eval_{figure}" for figure in FIGURES} <= set(metrics)
    assert {"eval_referring_J", "eval_clip_num_expressions", "eval_clip_no_object_empty"} <= set(metrics)
    again = trainer.evaluate()
    assert measured(again) == measured(metrics)
    assert not any("clip" in name for name in trainer.predict(list(trainer.eval_dataset)).metrics)


def test_the_best_checkpoint_may_be_told_by_clips(world, cache, tmp_path):
    timed = {"eval_strategy": "steps", "eval_steps": 1, "num_samples": 1}
    make_trainer(speaking_model(), world, cache, tmp_path, metric_for_best_model="eval_clip_overall_JF", **timed)
    with pytest.raises(
        ValueError, match="'target_JF', but evaluations .* `overall_JF`, or one that begins with `clip_`."
    ):
        make_trainer(speaking_model(), world, cache, tmp_path, metric_for_best_model="target_JF", **timed)


def test_clips_do_not_change_the_training(world, cache, tmp_path):
    losses = []
    for number in (0, 2):
        settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_train_batch_size": 2, "seed": 3}
        trainer = make_trainer(speaking_model(), world, cache, tmp_path, num_clips=number, **settings)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        logged = [row for row in trainer.state.log_history if "eval_clip_overall_JF" in row]
        assert len(logged) == (3 if number else 0)
        assert "forward" not in vars(trainer.model.base_model.model)
    assert losses[0] == losses[1]


def test_clips_are_measured_in_the_precision_of_the_training(world, cache, tmp_path):
    trainer = make_trainer(speaking_model().to(torch.bfloat16), world, cache, tmp_path, num_clips=2, bf16=True)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_clip_overall_JF"] <= 1


def test_a_model_without_a_tracker_names_its_metrics_so(world, cache, tmp_path):
    metrics = make_trainer(
        speaking_model(with_tracker=False), world, cache, tmp_path, num_samples=1, num_clips=2
    ).evaluate()
    assert "eval_target_overall_JF" in metrics and not any("clip" in name for name in metrics)


def run_two(world, cache, base, out, arguments):
    out.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # What `torchrun` sets, without its own process, which takes seconds to start.
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    paths = [str(path) for path in (world, cache, base, out)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.evaluating", *paths, json.dumps(arguments)],
            cwd=ROOT,
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=400)[1] for process in processes]
    return [process.returncode for process in processes], errors


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    speaking_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("mode", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_processes_measure_the_same_to_the_last_digit(world, cache, base, tmp_path, mode):
    expected = make_trainer(VisaForVideoSegmentation.from_pretrained(base), world, cache, tmp_path).evaluate()
    arguments = {}
    if mode == "zero2":
        # ZeRO-2 measures what it trains; with a rate of 0 that stays as it is.
        arguments = {"max_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 0.0}
        arguments["deepspeed"] = str(Path(visa_hf.__file__).parent / "trainer" / "deepspeed" / "zero2.json")
    codes, errors = run_two(world, cache, base, tmp_path / "two", arguments)
    assert codes == [0, 0], "".join(errors)[-4000:]
    for rank in (0, 1):
        metrics = json.loads((tmp_path / "two" / f"metrics-{rank}.json").read_text())
        assert measured(metrics) == measured(expected)
        assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


# --- refusals ---


def test_what_cannot_be_measured_is_refused(questions, world, cache, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`num_clips` is 0 but must be at least 1."):
        ClipEvaluation(questions, 0)
    rows = [
        {
            "video_id": "v",
            "expression_id": "0",
            "expression": "it",
            "type_id": 0,
            "anno_ids": [],
            "frames": ["v/0.jpg"],
            "height": 8,
            "width": 8,
        }
    ]
    with pytest.raises(ValueError, match="The split `valid` of `mevis` has no public masks, so nothing can be"):
        ClipEvaluation(EvaluationSet(BENCHMARKS["mevis"], "valid", world, rows), 1)
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="with DeepSpeed's ZeRO-3, whose processes .* Use ZeRO-2 .* `visa evaluate`"):
        make_trainer(speaking_model(), world, cache, tmp_path)


def test_what_cannot_be_read_is_found_before_the_training(questions):
    (one, *_) = questions.expressions
    lost = questions.subset([replace(one, frames=("JPEGImages/gone/0.jpg", *one.frames[1:]))])
    message = f"The frames of video `{one.video}`, expression `{one.expression_id}`, .* `.*gone/0.jpg` is missing"
    with pytest.raises(FileNotFoundError, match=message):
        ClipEvaluation(lost, 1)
    unknown = questions.subset([replace(one, annotated=())])
    with pytest.raises(ValueError, match=f"No frame of video `{one.video}`, expression .* is annotated"):
        ClipEvaluation(unknown, 1)


def test_a_video_that_cannot_be_predicted_is_named(questions, model):
    (one, *_) = questions.expressions
    wrong = questions.subset([replace(one, height=one.height + 1)])
    with pytest.raises(ValueError, match=f"Video `{one.video}` cannot be predicted: its frames are 48 x 64 pixels"):
        ClipEvaluation(wrong, 1).score(model, tiny_processor())
