"""Scores of a whole split: by hand, in several processes, with predictions missing, and by every protocol."""

import csv
import json
import math

import numpy as np
import pytest

from tests.evaluation.worlds import (
    SIZE,
    expression_row,
    masks_row,
    revos_set,
    shifted,
    square,
    truths,
    write_frames,
    write_predictions,
)
from visa_hf.evaluation import score_clip, summarize_revos
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet
from visa_hf.evaluation.predictions import open_predictions
from visa_hf.evaluation.score import score_predictions, write_scores


@pytest.fixture
def world(tmp_path):
    """A ReVOS-like set, and predictions that are off by a pixel; the dog that is not there is seen."""
    evaluation_set = revos_set(tmp_path / "data")
    masks = shifted(truths(evaluation_set))
    masks["a", "2"] = [square(0, 0), square(2, 4), np.zeros(SIZE, bool)]
    write_predictions(tmp_path / "out", evaluation_set, masks)
    return evaluation_set, masks, tmp_path / "out"


def test_scores_by_hand(world):
    """Squares of 8 x 8, a column apart: 7 * 8 pixels of 9 * 8 in common, 16 of 24 * 32 wrong."""
    evaluation_set, _, out = world
    clip = score_predictions(evaluation_set, open_predictions(out)).scores[0].clip
    assert clip.J == pytest.approx(56 / 72, abs=1e-15)
    assert clip.A == pytest.approx(1 - 16 / 768, abs=1e-15)
    assert clip.F == 1.0  # the tolerance is a pixel: 0.008 of the diagonal, rounded up


def test_a_revos_table_is_what_summarize_revos_makes_of_every_clip(world):
    evaluation_set, masks, out = world
    result = score_predictions(evaluation_set, open_predictions(out))
    clips = []
    for expression in evaluation_set.expressions:
        key = (expression.video, expression.expression_id)
        clips.append(
            score_clip(masks[key], truths(evaluation_set)[key], evaluation_set.foreground_of(expression.video))
        )
    summary = summarize_revos(clips, [0, 1, 2, 0, 1])
    assert [score.clip for score in result.scores] == clips
    assert result.table["referring"]["J&F"] == summary.referring.JF
    assert result.table["no-object"]["R"] == summary.no_object.R == result.robustness
    assert result.table["overall"] == {
        "num_expressions": 4,
        "J": summary.overall.J,
        "F": summary.overall.F,
        "J&F": summary.overall.JF,
        "A": summary.overall.A,
        "R": summary.overall.R,
    }
    # 64 of 112 foreground pixels are falsely predicted in frame 0, 64 of 128 in frame 1, none in frame 2.
    foreground = [np.count_nonzero(masks["a", "1"][0]), np.count_nonzero(masks["a", "1"][1])]
    robust = [1 - 64 / (number + 1e-6) for number in foreground] + [1]
    assert result.robustness == round(100 * math.fsum(robust) / 3, 2)


def test_object_share_counts_frames_that_show_the_object(world):
    evaluation_set, _, out = world
    shares = [score.object_share for score in score_predictions(evaluation_set, open_predictions(out)).scores]
    pixels = SIZE[0] * SIZE[1]
    assert shares == [64 / pixels, pytest.approx((128 + 128 + 64) / 3 / pixels), 0.0, 64 / pixels, 64 / pixels]


def test_two_processes_give_the_same_digits(world, tmp_path):
    evaluation_set, _, out = world
    for number, name in ((0, "one"), (2, "two")):
        (tmp_path / name).mkdir()
        write_scores(score_predictions(evaluation_set, open_predictions(out), num_workers=number), tmp_path / name)
    for file in ("scores.json", "scores.csv"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_palette_and_grey_pngs_score_the_same_also_in_compat(world, tmp_path):
    evaluation_set, masks, out = world
    write_predictions(tmp_path / "grey", evaluation_set, masks, "grey")
    for compat in (False, True):
        first, second = (
            score_predictions(evaluation_set, open_predictions(place), published_compat=compat)
            for place in (out, tmp_path / "grey")
        )
        assert first.as_json() == second.as_json()


def test_published_compat_sums_overlapping_objects_and_takes_robustness_from_the_objects(world):
    evaluation_set, _, out = world
    plain = score_predictions(evaluation_set, open_predictions(out))
    compat = score_predictions(evaluation_set, open_predictions(out), published_compat=True)
    assert compat.table["overall"]["J&F"] == plain.table["overall"]["J&F"]
    assert compat.table["overall"]["A"] < plain.table["overall"]["A"]
    assert compat.robustness == compat.table["overall"]["R"]


def test_missing_predictions_are_refused_by_name(world):
    evaluation_set, _, out = world
    (out / "b" / "0" / "00001.png").unlink()
    with pytest.raises(ValueError, match="video `b`, expression `0`, frame `00001` is missing.*--missing zero"):
        score_predictions(evaluation_set, open_predictions(out))


def test_damaged_predictions_are_refused_by_name(world):
    evaluation_set, _, out = world
    (out / "b" / "0" / "00001.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1 problem \(1 unreadable\): .*00001.png` is unreadable"):
        score_predictions(evaluation_set, open_predictions(out))


def test_missing_counts_as_zero_when_asked(world):
    evaluation_set, masks, out = world
    whole = score_predictions(evaluation_set, open_predictions(out))
    (out / "b" / "0" / "00001.png").unlink()
    for path in (out / "a" / "2").iterdir():
        path.unlink()
    (out / "stranger").mkdir()
    result = score_predictions(evaluation_set, open_predictions(out), missing="zero")
    frame = score_clip(masks["b", "0"][0], truths(evaluation_set)["b", "0"][0])
    assert result.scores[3].clip.J == frame.J / 2
    assert result.scores[3].clip.A == frame.A / 2
    assert result.scores[3].num_zeroed == 1
    # Nothing is true there and nothing predicted: full marks, if it were not missing.
    assert (result.scores[2].clip.J, result.scores[2].clip.R) == (0, 0)
    assert result.scores[0] == whole.scores[0]
    assert sorted((problem.kind, problem.where) for problem in result.problems) == [
        ("extra", f"`{out / 'stranger'}`"),
        ("missing", "video `a`, expression `2`"),
        ("missing", "video `b`, expression `0`, frame `00001`"),
    ]


def test_intervals_come_from_drawing_videos(world):
    evaluation_set, _, out = world
    result = score_predictions(evaluation_set, open_predictions(out))
    again = score_predictions(evaluation_set, open_predictions(out))
    assert result.intervals == again.intervals
    for row, figures in result.intervals.items():
        for figure, (low, high) in figures.items():
            assert low - 1e-9 <= result.table[row][figure] <= high + 1e-9
    # Two videos with one referring expression each: both, or one of them twice.
    values = [round(100 * result.scores[place].clip.J, 2) for place in (0, 3)]
    assert result.intervals["referring"]["J"] == pytest.approx(sorted(values))


def test_one_video_has_no_interval(tmp_path):
    evaluation_set = revos_set(tmp_path / "data", limit=1)
    assert list(evaluation_set.videos) == ["a"]
    write_predictions(tmp_path / "out", evaluation_set, truths(evaluation_set))
    assert score_predictions(evaluation_set, open_predictions(tmp_path / "out")).intervals == {}


def test_csv_and_json_hold_every_figure(world, tmp_path):
    evaluation_set, _, out = world
    result = score_predictions(evaluation_set, open_predictions(out))
    write_scores(result, tmp_path, {"model": "m"})
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["expression"] for row in rows] == [e.text for e in evaluation_set.expressions]
    assert [float(row["J"]) for row in rows] == [score.clip.J for score in result.scores]
    summary = json.loads((tmp_path / "scores.json").read_text())
    assert summary["model"] == "m"
    assert summary["scores"] == result.table
    assert summary["confidence_intervals"]["seed"] == 0


def test_other_video_sets_average_all_expressions_without_rounding(tmp_path):
    evaluation_set = revos_set(tmp_path / "data", BENCHMARKS["mevis"])
    write_predictions(tmp_path / "out", evaluation_set, shifted(truths(evaluation_set)))
    result = score_predictions(evaluation_set, open_predictions(tmp_path / "out"))
    assert result.table["overall"]["J"] == math.fsum(100 * score.clip.J for score in result.scores) / 5
    assert result.robustness is None


def test_ref_davis_is_the_mean_of_four_annotators(tmp_path):
    frames = write_frames(tmp_path / "data", "v", 2)
    masks = [masks_row("v", "1", [square(2, 2)] * 2), masks_row("v", "2", [square(12, 12)] * 2)]
    expressions = [
        expression_row("v", str(4 * number + annotator), "a square", 0, [anno_id], frames)
        for number, anno_id in enumerate(("1", "2"))
        for annotator in range(4)
    ]
    evaluation_set = EvaluationSet(BENCHMARKS["ref_davis17"], "valid", tmp_path / "data", expressions, masks)
    assert [expression.annotator for expression in evaluation_set.expressions] == [0, 1, 2, 3] * 2
    predicted = truths(evaluation_set)
    predicted["v", "1"] = [np.zeros(SIZE, bool)] * 2  # annotator 2 finds one of two objects
    write_predictions(tmp_path / "out", evaluation_set, predicted)
    table = score_predictions(evaluation_set, open_predictions(tmp_path / "out")).table
    assert [table[f"annotator {number}"]["J&F"] for number in (1, 2, 3, 4)] == [100, 50, 100, 100]
    assert table["overall"]["J&F"] == 87.5
    strange = expression_row("v", "first", "a square", 0, ["1"], frames)
    with pytest.raises(ValueError, match="expression `first` of video `v` has no number"):
        EvaluationSet(BENCHMARKS["ref_davis17"], "valid", tmp_path, [strange], masks)


@pytest.fixture
def images(tmp_path):
    """Two images like ReasonSeg's; in the second a part is to be ignored."""
    rows, masks = [], []
    for name, is_sentence in (("x", True), ("y", False)):
        frames = write_frames(tmp_path / "data", name, 1)
        rows += [
            expression_row(name, str(number), "it", 1, [name], frames, is_sentence=is_sentence) for number in (0, 1)
        ]
        masks.append(masks_row(name, name, [square(4, 4)]))
        masks.append(masks_row(name, f"{name}/ignore", [square(4, 12) if name == "y" else None]))
    return EvaluationSet(BENCHMARKS["reason_seg"], "val", tmp_path / "data", rows, masks)


def test_reason_seg_counts_the_first_expression_and_leaves_the_ignored_region_out(images, tmp_path):
    assert [expression.expression_id for expression in images.expressions] == ["0", "0"]
    both = square(4, 4) | square(4, 12)
    write_predictions(tmp_path / "out", images, {("x", "0"): [both], ("y", "0"): [both]})
    result = score_predictions(images, open_predictions(tmp_path / "out"))
    assert [score.counts for score in result.scores] == [(64, 128), (64, 64)]
    assert result.table == {
        "long": {"num_expressions": 1, "cIoU": 50.0, "gIoU": 50.0},
        "short": {"num_expressions": 1, "cIoU": 100.0, "gIoU": 100.0},
        "overall": {"num_expressions": 2, "cIoU": 100 * (128 / 192), "gIoU": 75.0},
    }


def test_a_missing_image_has_no_intersection_and_no_full_marks(images, tmp_path):
    write_predictions(tmp_path / "out", images, {("x", "0"): [square(4, 4)], ("y", "0"): [square(4, 4)]})
    (tmp_path / "out" / "y" / "0" / "00000.png").unlink()
    result = score_predictions(images, open_predictions(tmp_path / "out"), missing="zero")
    assert [score.counts for score in result.scores] == [(64, 64), (0, 64)]


def test_only_annotated_frames_of_own_data_are_scored(tmp_path):
    frames = write_frames(tmp_path / "data", "v", 3)
    rows = [expression_row("v", "0", "it", 0, ["k"], frames, annotated=[0, 2])]
    masks = [masks_row("v", "k", [square(2, 2), None, square(2, 2)])]
    evaluation_set = EvaluationSet(BENCHMARKS["own_data"], "valid", tmp_path / "data", rows, masks)
    write_predictions(
        tmp_path / "out", evaluation_set, {("v", "0"): [square(2, 2), square(2, 2), np.zeros(SIZE, bool)]}
    )
    result = score_predictions(evaluation_set, open_predictions(tmp_path / "out"))
    assert result.scores[0].clip.J == 0.5


def test_sets_that_cannot_be_evaluated_are_refused(tmp_path):
    frames = write_frames(tmp_path, "v", 2)
    row = expression_row("v", "0", "it", 0, [], frames)

    def make(*rows, masks=()):
        return EvaluationSet(BENCHMARKS["mevis"], "valid_u", tmp_path, list(rows), list(masks))

    for rows, message in (
        ((), "has no expression"),
        ((row, row), "two rows for video `v`, expression `0`"),
        ((row, {**row, "expression_id": "1", "frames": frames[:1]}), "differ from those"),
        (({**row, "anno_ids": ["7"]},), "The mask `7` of video `v`"),
        (({**row, "video_id": "../v"},), "cannot be the name of a video"),
        (({**row, "expression_id": "a/b"},), "cannot be the name of an expression"),
        ((row, {**row, "video_id": "v/w"}), "cannot both be evaluated"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*rows)


def test_a_split_without_masks_is_not_scored_here(tmp_path):
    rows = [expression_row("v", "0", "it", 0, [], write_frames(tmp_path / "data", "v", 2))]
    evaluation_set = EvaluationSet(BENCHMARKS["mevis"], "valid", tmp_path / "data", rows)
    write_predictions(tmp_path / "out", evaluation_set, {("v", "0"): [square(2, 2)] * 2})
    with pytest.raises(ValueError, match="has no public masks"):
        score_predictions(evaluation_set, open_predictions(tmp_path / "out"))
