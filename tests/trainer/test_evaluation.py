"""Masks of target frames: J, F, A, R by hand, by type, and sums that no order shows in."""

import math

import numpy as np
import pytest
import torch

from tests.trainer.training import TinySamples
from visa_hf.evaluation.metrics import ClipScore, score_clip
from visa_hf.trainer.evaluation import Facts, MaskScore, facts_of, mask_metrics, score_masks


def square(top, left, side=4, size=(12, 16)):
    mask = np.zeros(size, dtype=np.float32)
    mask[top : top + side, left : left + side] = 1
    return mask


def logits_of(*masks):
    return torch.tensor(np.stack(masks)) * 2 - 1


def test_masks_are_scored_by_hand():
    """A square of 16 pixels, one column off: 12 of 20 in common; 8 of 192 wrong, 4 of which are falsely found."""
    true, found, foreground = square(2, 2), square(2, 3), square(2, 2, side=5)
    (one,) = score_masks([logits_of(found)], [torch.tensor(true)[None]], [Facts(0, foreground.astype(np.uint8))])
    assert one.type_id == 0
    assert one.score.J == 12 / 20
    assert one.score.A == pytest.approx(1 - 8 / 192, abs=1e-15)
    assert one.score.R == pytest.approx(1 - 4 / (25 + 1e-6), abs=1e-15)
    assert one.score.F == 1.0  # the tolerance is a pixel
    assert one.score == score_clip(found[None] > 0, true[None] > 0, foreground[None] > 0)


def test_each_mask_of_a_conversation_is_scored_by_itself():
    true = np.stack([square(0, 0), square(6, 6), np.zeros((12, 16), np.float32)])
    found = np.stack([square(0, 0), square(6, 7), square(0, 0)])
    scores = score_masks(
        [torch.zeros(0, 12, 16), logits_of(*found)],
        [torch.zeros(0, 12, 16), torch.tensor(true)],
        [Facts(1, None), Facts(2, None)],
    )
    assert [each.score.J for each in scores] == [1.0, 0.6, 0.0]
    assert all(each.score.R is None and each.type_id == 2 for each in scores)


def test_types_have_means_of_their_own_and_overall_is_the_mean_of_two():
    figures = {0: (0.2, 0.4, 0.9), 1: (0.5,), 2: (1.0, 0.0), None: (0.25,)}
    scores = [
        MaskScore(type_id, ClipScore(J=value, F=value / 2, A=1.0, R=0.5))
        for type_id, values in figures.items()
        for value in values
    ]
    metrics = mask_metrics(scores)
    assert metrics["J"] == pytest.approx(3.25 / 7) and metrics["F"] == pytest.approx(3.25 / 14)
    assert metrics["JF"] == pytest.approx(0.75 * 3.25 / 7)
    assert (metrics["referring_J"], metrics["reasoning_J"], metrics["no_object_J"]) == pytest.approx((0.5, 0.5, 0.5))
    assert metrics["overall_JF"] == pytest.approx(0.75 * 0.5)
    assert (metrics["A"], metrics["R"], metrics["no_object_R"]) == (1.0, 0.5, 0.5)
    names = {
        f"{row}{figure}"
        for row in ("", "referring_", "reasoning_", "no_object_", "overall_")
        for figure in ("J", "F", "JF", "A", "R")
    }
    assert set(metrics) == names


def test_rows_that_nothing_is_known_of_are_left_out():
    assert mask_metrics([]) == {}
    some = [MaskScore(None, ClipScore(1.0, 1.0, 1.0, 1.0)), MaskScore(None, ClipScore(0.0, 0.0, 0.0, None))]
    assert mask_metrics(some) == {"J": 0.5, "F": 0.5, "JF": 0.5, "A": 0.5}
    one = mask_metrics([MaskScore(1, ClipScore(1.0, 0.0, 1.0))])
    assert "overall_J" not in one and one["reasoning_JF"] == 0.5


def test_no_order_shows_in_any_digit():
    rng = np.random.default_rng(0)
    values = rng.random((500, 4)) ** 9  # of many magnitudes, whose plain sums depend on the order
    scores = [MaskScore(number % 3, ClipScore(*row)) for number, row in enumerate(values.tolist())]
    expected = mask_metrics(scores)
    for _ in range(3):
        rng.shuffle(scores)
        assert mask_metrics(scores) == expected
    shards = [scores[rank::3] for rank in range(3)]
    assert mask_metrics([score for shard in shards for score in shard]) == expected
    assert expected["A"] == pytest.approx(math.fsum(values[:, 2]) / 500, abs=1e-15)


def test_facts_follow_the_conversations_of_a_batch():
    samples = [TinySamples(4, ("masks", "text", "one"))[draw] for draw in range(3)]
    assert [each.type_id for each in facts_of(samples)] == [None] * 4
