"""How sure a mask is: means by hand, and what an empty mask is worth."""

import torch

from visa_hf.modeling.mask_scores_visa import mask_scores


def test_a_score_is_the_mean_probability_of_the_mask_s_pixels():
    probs = torch.tensor([[[0.75, 0.5, 0.0], [1.0, 0.25, 0.0]], [[0.25, 0.5, 1.0], [0.0, 0.75, 1.0]]])
    masks = torch.tensor([[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]]]).bool()
    scores = mask_scores(masks, probs)
    assert scores.tolist() == [0.75, 0.875]  # (0.75 + 0.5 + 1) / 3 and (1 + 0.75) / 2
    assert scores.dtype == torch.float32


def test_an_empty_mask_has_the_score_0_and_no_mask_has_none():
    probs = torch.full((2, 4, 5), 0.875)
    masks = torch.zeros(2, 4, 5, dtype=torch.bool)
    masks[1, 2, 3] = True
    assert mask_scores(masks, probs).tolist() == [0.0, 0.875]
    assert mask_scores(masks[:0], probs[:0]).tolist() == []


def test_rounding_does_not_lead_above_1():
    masks = torch.ones(3, 1021, 1019, dtype=torch.bool)
    probs = torch.stack([torch.full((1021, 1019), value) for value in (1.0, 1 - 2**-24, 0.9)])
    scores = mask_scores(masks, probs)
    assert scores.max() <= 1
    torch.testing.assert_close(scores, probs[:, 0, 0], atol=1e-6, rtol=0)


def test_a_score_depends_on_no_other_mask():
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(3, 97, 61, generator=generator)
    masks = torch.rand(3, 97, 61, generator=generator) > 0.5
    alone = torch.cat([mask_scores(masks[row : row + 1], probs[row : row + 1]) for row in range(3)])
    torch.testing.assert_close(mask_scores(masks, probs), alone, atol=1e-6, rtol=0)
