"""The measures: published numbers, numbers computed by hand, the classical way, odd masks, refused input."""

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import visa_hf.evaluation as evaluation
from tests.evaluation.davis_reference import (
    boundary_map,
    classical_boundary_f,
    classical_region_similarity,
    dilate_with_numpy,
    dilate_with_opencv,
)
from visa_hf.evaluation import (
    ClipScore,
    ImageSetScore,
    average_scores,
    boundary_f,
    intersection_and_union,
    pixel_accuracy,
    region_similarity,
    robustness,
    score_clip,
    score_image_set,
    sum_objects,
    summarize_revos,
    unite_objects,
)
from visa_hf.rle import decode_masks, encode_mask

REFERENCE = Path(__file__).parents[1] / "reference" / "metrics"
CLIPS = json.loads((REFERENCE / "revos_metrics.json").read_text())
COMPAT_CLIPS = json.loads((REFERENCE / "revos_compat.json").read_text())
EXACT = {"rtol": 0, "atol": 1e-9}


def rectangle(size: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[rows, columns] = True
    return mask


# Published numbers


@pytest.mark.parametrize("clip", CLIPS, ids=range(len(CLIPS)))
def test_all_four_measures_equal_the_published_implementation(clip: dict) -> None:
    pred, true, foreground = clip["pred"], clip["gt"], clip["foreground"]
    np.testing.assert_allclose(region_similarity(pred, true), clip["J"], **EXACT)
    np.testing.assert_allclose(boundary_f(pred, true), clip["F"], **EXACT)
    np.testing.assert_allclose(pixel_accuracy(pred, true), clip["A"], **EXACT)
    np.testing.assert_allclose(robustness(pred, true, foreground), clip["R"], **EXACT)
    score = score_clip(pred, true, foreground)
    for letter in "JFAR":
        np.testing.assert_allclose(score.per_frame[letter], clip[letter], **EXACT)
    np.testing.assert_allclose([score.J, score.F, score.A, score.R], [np.mean(clip[x]) for x in "JFAR"], **EXACT)
    assert score.JF == (score.J + score.F) / 2


@pytest.mark.parametrize("clip", COMPAT_CLIPS, ids=range(len(COMPAT_CLIPS)))
def test_published_compat_equals_the_released_tool(clip: dict) -> None:
    true = sum_objects(clip["objects"], tuple(clip["pred"][0]["size"]))
    pred = decode_masks(clip["pred"]).astype(np.uint8) * np.uint8(clip["pred_value"])
    foreground = clip["foreground"]
    for given in [pred, clip["pred"]] if clip["pred_value"] == 255 else [pred]:
        score = score_clip(given, true, foreground, published_compat=True)
        for letter in "JFAR":
            np.testing.assert_allclose(score.per_frame[letter], clip[letter], **EXACT)
        np.testing.assert_allclose(pixel_accuracy(given, true, published_compat=True), clip["A"], **EXACT)
        np.testing.assert_allclose(robustness(given, true, foreground, published_compat=True), clip["R"], **EXACT)


# By hand


def test_region_accuracy_and_robustness_of_a_shifted_square_by_hand() -> None:
    true = rectangle((4, 5), slice(1, 3), slice(1, 3))  # 4 pixels
    pred = rectangle((4, 5), slice(1, 3), slice(2, 4))  # 4 pixels, 2 of them true
    foreground = rectangle((4, 5), slice(0, 4), slice(0, 2))  # 8 pixels
    assert region_similarity(pred, true) == 2 / 6
    assert pixel_accuracy(pred, true) == 16 / 20
    assert robustness(pred, true, foreground) == 1 - 2 / (8 + 1e-6)
    assert intersection_and_union(pred, true).tolist() == [2, 6]


def test_boundary_f_of_a_shifted_square_by_hand() -> None:
    # A 2 x 2 square has 8 boundary pixels, one row and one column of them outside; 4 of them coincide after the shift.
    true = rectangle((8, 8), slice(2, 4), slice(2, 4))
    pred = rectangle((8, 8), slice(2, 4), slice(3, 5))
    assert boundary_f(pred, true, bound_th=0) == 0.5
    assert boundary_f(pred, true, bound_th=1) == 1
    assert boundary_f(pred, true) == 1  # 0.008 of the diagonal of 11.3 pixels, rounded up: 1


def test_boundary_f_is_the_harmonic_mean_by_hand() -> None:
    true = rectangle((20, 20), slice(4, 6), slice(4, 6))  # 8 boundary pixels
    pred = true | rectangle((20, 20), slice(14, 16), slice(14, 16))  # these 8 and 8 far away
    assert boundary_f(pred, true, bound_th=0) == 2 * 0.5 * 1 / 1.5


def test_published_compat_by_hand() -> None:
    true = np.array([[0, 0, 1, 2]], dtype=np.uint8)
    pred = np.array([[0, 255, 255, 255]], dtype=np.uint8)
    foreground = np.ones((1, 4), dtype=np.uint8)
    assert pixel_accuracy(pred, true, published_compat=True) == 0.25  # 255 never equals 1 or 2
    assert robustness(pred, true, foreground, published_compat=True) == 0  # 1 false pixel counts 255
    # 1 - 2 wraps to 255, and 255 * 255 to 1: an overlap counts one pixel.
    assert robustness(pred[:, 2:], true[:, 2:], foreground[:, 2:], published_compat=True) == 1 - 1 / (2 + 1e-6)


# Odd masks


def test_two_empty_masks_agree_completely() -> None:
    empty = np.zeros((30, 40), dtype=bool)
    score = score_clip(empty[None], empty[None], empty[None])
    assert (score.J, score.F, score.A, score.R) == (1, 1, 1, 1)
    absent = score_clip([None, None], [None, None], [None, None])
    assert (absent.J, absent.F, absent.A, absent.R) == (1, 1, 1, 1)


def test_one_empty_mask_agrees_in_the_background_only() -> None:
    true = rectangle((10, 10), slice(2, 7), slice(2, 6))
    empty = np.zeros((10, 10), dtype=bool)
    for pred, other in ((empty, true), (true, empty)):
        assert region_similarity(pred, other) == 0
        assert boundary_f(pred, other) == 0
        assert pixel_accuracy(pred, other) == 0.8
    assert robustness(empty, true, true) == 1
    assert robustness(true, empty, true) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("size", [(1, 1), (5, 64), (64, 65), (33, 130)])
def test_a_full_mask_has_no_boundary(size: tuple[int, int]) -> None:
    full, empty = np.ones(size, dtype=bool), np.zeros(size, dtype=bool)
    score = score_clip(full[None], full[None])
    assert (score.J, score.F, score.A) == (1, 1, 1)
    assert boundary_f(full, empty) == 1  # neither has a boundary, as in DAVIS
    assert region_similarity(full, empty) == 0


@pytest.mark.parametrize("place", [(0, 0), (0, 63), (0, 64), (0, 99), (49, 0), (49, 99), (20, 63), (20, 64), (48, 98)])
def test_one_pixel_equals_the_classical_way_wherever_it_is(place: tuple[int, int]) -> None:
    true = np.zeros((50, 100), dtype=bool)
    true[place] = True
    for other in [(0, 0), (20, 62), (21, 65), (49, 98), place]:
        pred = np.zeros_like(true)
        pred[other] = True
        for bound_th in (0.008, 0, 1, 3):
            assert boundary_f(pred, true, bound_th) == classical_boundary_f(pred, true, bound_th)


@pytest.mark.parametrize(
    "rows, columns",
    [
        (slice(0, 9), slice(20, 40)),
        (slice(30, 50), slice(20, 40)),
        (slice(10, 20), slice(0, 9)),
        (slice(10, 20), slice(60, 100)),
        (slice(0, 50), slice(0, 64)),
        (slice(0, 25), slice(0, 100)),
        (slice(40, 50), slice(90, 100)),
    ],
)
def test_masks_that_touch_the_border_equal_the_classical_way(rows: slice, columns: slice) -> None:
    true = rectangle((50, 100), rows, columns)
    for shift in [(0, 0), (2, -3), (-5, 4)]:
        pred = np.roll(true, shift, axis=(0, 1))
        assert boundary_f(pred, true) == classical_boundary_f(pred, true)
        assert boundary_f(true, pred) == classical_boundary_f(true, pred)


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 70), (70, 1), (2, 2), (17, 63), (17, 64), (17, 65), (60, 128), (48, 129)]
)
@pytest.mark.parametrize("density", [0.001, 0.02, 0.5, 0.98])
def test_measures_equal_the_classical_way_bit_by_bit(size: tuple[int, int], density: float) -> None:
    rng = np.random.default_rng(int(density * 1000) + size[1])
    pred, true = rng.random((2, 4, *size)) < density
    for bound_th in (0.008, 0.05, 0, 1, 2, 5, 9):
        expected = [classical_boundary_f(p, t, bound_th) for p, t in zip(pred, true, strict=True)]
        assert boundary_f(pred, true, bound_th).tolist() == expected
    expected = [classical_region_similarity(p, t) for p, t in zip(pred, true, strict=True)]
    assert region_similarity(pred, true).tolist() == expected
    assert pixel_accuracy(pred, true).tolist() == (pred == true).mean(axis=(1, 2)).tolist()


@pytest.mark.parametrize("radius", [12, 18, 37, 63, 64, 65, 130])
def test_wide_tolerances_equal_the_classical_way(radius: int) -> None:
    rng = np.random.default_rng(radius)
    pred, true = rng.random((2, 60, 300)) < 0.0005
    assert pred.any() and true.any()
    value = boundary_f(pred, true, bound_th=radius)
    assert value == classical_boundary_f(pred, true, radius)
    assert 0 < value


def test_a_frame_of_480_x_854_equals_the_classical_way() -> None:
    rows, columns = np.mgrid[:480, :854]
    true = np.hypot(rows - 200, columns - 500) < 130 + 20 * np.sin(np.arctan2(rows - 200, columns - 500) * 9)
    pred = np.roll(true, (5, 7), axis=(0, 1)) & (columns < 600)
    value = boundary_f(pred, true)
    assert value == classical_boundary_f(pred, true)
    assert 0.5 < value < 0.95


def test_the_plain_dilation_equals_that_of_opencv() -> None:
    boundary = boundary_map(np.random.default_rng(0).random((60, 90)) < 0.01)
    for radius in (1, 4, 8):
        assert np.array_equal(dilate_with_numpy(boundary, radius), dilate_with_opencv(boundary, radius))


# Forms of input


def test_arrays_run_lengths_tensors_and_lists_give_the_same() -> None:
    rng = np.random.default_rng(3)
    pred, true = rng.random((2, 3, 20, 30)) < 0.4
    true[1] = False
    expected = score_clip(pred, true, true).per_frame
    forms: list[Callable] = [
        lambda masks: masks.astype(np.uint8),
        lambda masks: masks.astype(np.float32),
        lambda masks: np.asfortranarray(masks),
        lambda masks: torch.from_numpy(masks),
        lambda masks: [torch.from_numpy(mask) for mask in masks],
        lambda masks: masks.astype(int).tolist(),
        lambda masks: [encode_mask(mask) for mask in masks],
        lambda masks: [encode_mask(mask) if mask.any() else None for mask in masks],
        lambda masks: [None if not mask.any() else mask for mask in masks],
    ]
    for form in forms:
        values = score_clip(form(pred), form(true), form(true)).per_frame
        mixed = score_clip(pred, form(true), form(true)).per_frame
        for letter in "JFAR":
            assert values[letter].tolist() == mixed[letter].tolist() == expected[letter].tolist()


def test_a_single_mask_gives_a_scalar_and_a_clip_an_array() -> None:
    mask = rectangle((6, 6), slice(1, 3), slice(1, 3))
    for single in (mask, encode_mask(mask), mask.astype(int).tolist()):
        assert np.shape(region_similarity(single, mask)) == ()
        assert float(boundary_f(single, mask)) == 1
        assert score_clip(single, mask, mask).per_frame["R"].shape == (1,)
    for clip in (mask[None], [encode_mask(mask)], [mask]):
        assert pixel_accuracy(clip, mask[None]).shape == (1,)
    assert intersection_and_union([mask, mask], [mask, None]).tolist() == [[4, 4], [0, 4]]


def test_the_inputs_are_left_alone() -> None:
    pred, true = (np.random.default_rng(1).random((2, 2, 30, 70)) < 0.3).astype(np.uint8)
    copies = pred.copy(), true.copy()
    score_clip(pred, true, true)
    score_clip(pred, true, true, published_compat=True)
    assert np.array_equal(pred, copies[0]) and np.array_equal(true, copies[1])


# Refused input


@pytest.mark.parametrize(
    "measure", [region_similarity, boundary_f, pixel_accuracy, score_clip, intersection_and_union]
)
@pytest.mark.parametrize("value", [255, 2, 0.5, np.nan, -1])
def test_values_other_than_0_and_1_are_refused(measure: Callable, value: float) -> None:
    mask = np.zeros((2, 4, 4))
    other = mask.copy()
    other[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"`pred` holds .* but masks are 0/1.*`pred > 0`.*published_compat=True"):
        measure(other, mask)
    with pytest.raises(ValueError, match="`true` holds"):
        measure(mask, other)


def test_a_foreground_of_other_values_is_refused() -> None:
    mask = np.zeros((1, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="`foreground` holds 3 but masks are 0/1"):
        robustness(mask, mask, mask + 3)


def test_published_compat_refuses_what_is_no_byte() -> None:
    mask = np.zeros((1, 4, 4), dtype=np.uint8)
    for bad in (mask.astype(float), mask.astype(int) + 256, mask.astype(int) - 1):
        with pytest.raises(ValueError, match="`published_compat` works on bytes"):
            score_clip(bad, mask, mask, published_compat=True)


def test_sizes_that_differ_are_an_error_with_both_sizes() -> None:
    small, large = np.zeros((2, 4, 5), dtype=bool), np.zeros((2, 8, 5), dtype=bool)
    with pytest.raises(ValueError, match=r"differ in frame 0: `pred` is \(4, 5\), `true` is \(8, 5\)"):
        region_similarity(small, large)
    with pytest.raises(ValueError, match=r"differ in frame 1: .*`foreground` is \(8, 5\)"):
        robustness(small, small, [None, encode_mask(large[0])])


def test_numbers_of_frames_that_differ_are_an_error() -> None:
    clip = np.zeros((3, 4, 5), dtype=bool)
    with pytest.raises(ValueError, match="Numbers of frames differ: `pred` has 3, `true` has 2"):
        boundary_f(clip, clip[:2])
    with pytest.raises(ValueError, match="`foreground` has 1"):
        score_clip(clip, clip, clip[0])


def test_clips_without_frames_or_pixels_and_wrong_shapes_are_errors() -> None:
    for nothing in (np.zeros((0, 4, 5)), []):
        with pytest.raises(ValueError, match="no frames"):
            score_clip(nothing, nothing)
    with pytest.raises(ValueError, match="at least one pixel"):
        region_similarity(np.zeros((4, 0)), np.zeros((4, 0)))
    for shape in [(4,), (1, 2, 3, 4)]:
        with pytest.raises(ValueError, match=r"must be \(H, W\) or \(T, H, W\)"):
            region_similarity(np.zeros(shape), np.zeros(shape))


def test_what_is_no_mask_is_a_type_error() -> None:
    mask = np.zeros((2, 2), dtype=bool)
    for wrong in ("mask.png", None, 3):
        with pytest.raises(TypeError, match="`pred` is .* Give an array, a run-length mask"):
            region_similarity(wrong, mask)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Give numbers"):
        region_similarity(np.array([["a", "b"], ["c", "d"]]), mask)


@pytest.mark.parametrize("bound_th", [-1, -0.1, 1.5, float("nan"), float("inf")])
def test_tolerances_that_mean_nothing_are_refused(bound_th: float) -> None:
    mask = np.zeros((2, 2), dtype=bool)
    for measure in (boundary_f, score_clip):
        with pytest.raises(ValueError, match="`bound_th` is .* share of the diagonal"):
            measure(mask, mask, bound_th=bound_th)


# Objects


def test_objects_are_united_or_added_up() -> None:
    first = np.array([[[1, 1, 0]], [[0, 0, 0]]], dtype=bool)
    second = [encode_mask(np.array([[False, True, True]])), None]
    assert unite_objects([first, second], (1, 3)).tolist() == [[[True, True, True]], [[False, False, False]]]
    added = sum_objects([first, second], (1, 3))
    assert added.dtype == np.uint8 and added.tolist() == [[[1, 2, 1]], [[0, 0, 0]]]
    assert unite_objects([[None]], (2, 3)).tolist() == [[[False] * 3] * 2]


def test_objects_of_other_sizes_and_no_objects_are_errors() -> None:
    with pytest.raises(ValueError, match=r"`objects\[0\]` is \(1, 3\), `size` is \(2, 3\)"):
        unite_objects([np.zeros((1, 1, 3))], (2, 3))
    with pytest.raises(ValueError, match="`objects` is empty"):
        sum_objects([], (2, 3))


# Averages


def test_figures_of_an_expression_are_rounded_before_they_are_averaged() -> None:
    scores = [ClipScore(J=0.123449, F=0.5, A=1, R=0.25), ClipScore(J=0.2, F=0.5, A=0.5, R=0.75)]
    average = average_scores(scores)
    assert average.num_expressions == 2
    assert average.J == (12.34 + 20) / 2
    assert average.JF == (31.17 + 35) / 2  # 31.17245 and 35
    assert (average.F, average.A, average.R) == (50, 75, 50)
    assert average_scores(scores, decimals=None).J == pytest.approx((12.3449 + 20) / 2, abs=1e-12)


def test_overall_is_the_mean_of_referring_and_reasoning_whatever_their_numbers() -> None:
    scores = [ClipScore(J=j, F=j, A=1, R=r) for j, r in [(0.1, 0.2), (0.3, 0.2), (0.8, 0.4), (1, 0.9), (0, 0.5)]]
    summary = summarize_revos(scores, [0, 0, 1, 2, 2])
    assert summary.referring and summary.reasoning and summary.no_object and summary.overall
    assert (summary.referring.J, summary.reasoning.J, summary.overall.J) == (20, 80, 50)
    assert (summary.overall.JF, summary.overall.A, summary.overall.num_expressions) == (50, 100, 3)
    assert (summary.no_object.J, summary.no_object.num_expressions) == (50, 2)
    assert summary.robustness == 70
    assert summarize_revos(scores, [0, 0, 1, 2, 2], published_compat=True).robustness == 30


def test_groups_without_expressions_are_absent_and_not_zero() -> None:
    summary = summarize_revos([ClipScore(J=0.5, F=0.5, A=1)], [0])
    assert summary.referring and summary.referring.R is None
    assert (summary.reasoning, summary.no_object, summary.overall, summary.robustness) == (None,) * 4


def test_averages_do_not_depend_on_the_order() -> None:
    rng = np.random.default_rng(0)
    scores = [ClipScore(*values) for values in rng.random((1000, 4))]
    expected = average_scores(scores)
    for _ in range(5):
        rng.shuffle(scores)
        assert average_scores(scores) == expected


def test_averages_refuse_what_has_no_mean() -> None:
    score = ClipScore(J=1, F=1, A=1)
    with pytest.raises(ValueError, match="no scores"):
        average_scores([])
    with pytest.raises(ValueError, match="no scores"):
        summarize_revos([], [])
    with pytest.raises(ValueError, match="1 of 2 scores have no R"):
        average_scores([score, ClipScore(J=1, F=1, A=1, R=1)])
    with pytest.raises(ValueError, match="1 scores but 2 `type_ids`"):
        summarize_revos([score], [0, 1])
    with pytest.raises(ValueError, match=r"holds \[3\]"):
        summarize_revos([score], [3])


# Image sets


def test_image_set_scores_by_hand() -> None:
    true = [rectangle((2, 5), slice(0, 2), slice(0, 4)), rectangle((1, 2), slice(0, 1), slice(0, 2)), None]
    pred = [rectangle((2, 5), slice(0, 2), slice(0, 2)), rectangle((1, 2), slice(0, 1), slice(0, 2)), None]
    score = score_image_set(pred, true)  # 4 of 8, 2 of 2, 0 of 0
    assert score == ImageSetScore(num_images=3, ciou=6 / 10, giou=(0.5 + 1 + 1) / 3)
    assert ImageSetScore.from_counts(np.array([[4, 8], [2, 2], [0, 0]])) == score
    assert score_image_set(true[0], true[0]) == ImageSetScore(1, 1, 1)


def test_image_set_counts_of_another_shape_are_refused() -> None:
    for counts in (np.zeros((0, 2)), np.zeros(2), np.zeros((2, 3))):
        with pytest.raises(ValueError, match=r"must be \(N, 2\)"):
            ImageSetScore.from_counts(counts)


# The house


def test_the_measures_know_neither_model_nor_trainer_nor_data_sets() -> None:
    tree = ast.parse(Path(evaluation.metrics.__file__).read_text(encoding="utf-8"))
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level}
    outside = {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert imported | outside <= {"numpy", "packed", "rle"} | set(sys.stdlib_module_names)


def test_exported_names_exist_and_are_documented() -> None:
    for name in set(evaluation.__all__) - {"REVOS_METRIC"}:
        assert getattr(evaluation, name).__doc__, name
    assert (Path(evaluation.REVOS_METRIC) / "revos_metric.py").is_file()
