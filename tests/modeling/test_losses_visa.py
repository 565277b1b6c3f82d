"""Losses against the published numbers and cases computed by hand."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import interpolate

from visa_hf.modeling.losses_visa import mask_bce_loss, mask_dice_loss, mean_loss, text_loss_sum_and_count

VISA_TINY = Path(__file__).parents[1] / "reference" / "visa_tiny"
PUBLISHED_WEIGHTS = {"bce": 2.0, "dice": 0.5}


@pytest.fixture(scope="module")
def inputs():
    return load_file(VISA_TINY / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected():
    return load_file(VISA_TINY / "expected.safetensors")


def full_size_logits(low_res, padded_size, resized_size, original_size):
    logits = interpolate(low_res, padded_size, mode="bilinear", align_corners=False)
    logits = logits[..., : resized_size[0], : resized_size[1]]
    return interpolate(logits, original_size, mode="bilinear", align_corners=False)[:, 0]


@pytest.mark.parametrize(("loss", "name"), [(mask_bce_loss, "bce"), (mask_dice_loss, "dice")])
def test_mask_losses_are_those_of_the_published_model(inputs, expected, loss, name):
    """Published: weighted, and averaged over the masks of all conversations."""
    logits = [
        full_size_logits(
            expected[f"train.low_res_masks.{i}"],
            inputs[f"images.{i}"].shape[-2:],
            inputs["resize"][i].tolist(),
            inputs["original"][i].tolist(),
        )
        for i in range(2)
    ]
    labels = [inputs[f"masks.{i}"][:, 0] for i in range(2)]
    values = loss(logits, labels)
    assert values.shape == (3,)
    weighted = PUBLISHED_WEIGHTS[name] * mean_loss(values.sum(), len(values))
    torch.testing.assert_close(weighted, expected[f"train.mask_{name}_loss"][0], rtol=0, atol=1e-4)


def test_text_loss_is_that_of_the_published_model(inputs, expected):
    """Published: the mean over the learnt tokens of the batch; each `<image>` (-200) is 112 positions long."""
    logits = expected["train.logits"]
    labels = torch.full(logits.shape[:2], -100)
    for row, (ids, row_labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        lengths = torch.where(ids == -200, 112, 1)
        expanded = row_labels.repeat_interleave(lengths)[: logits.shape[1]]
        labels[row, : len(expanded)] = expanded
    loss_sum, num_learnt = text_loss_sum_and_count(logits, labels)
    assert num_learnt == (inputs["labels"] != -100).sum()
    torch.testing.assert_close(mean_loss(loss_sum, num_learnt), expected["train.ce_loss"][0], rtol=0, atol=1e-4)


def test_text_loss_looks_one_position_back():
    # Position 0 predicts label 1, position 1 predicts nothing learnt; label 0 has nothing before it.
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, -5.0], [7.0, 1.0]]])
    labels = torch.tensor([[0, 1, -100]])
    loss_sum, num_learnt = text_loss_sum_and_count(logits, labels)
    assert num_learnt == 1
    assert loss_sum.item() == pytest.approx(-math.log(0.75))


def test_text_loss_sums_over_rows_of_unequal_length():
    logits = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, 4, 5, 6, 2, -100], [-100] * 6, [3, -100, 1, -100, -100, 9]])
    loss_sum, num_learnt = text_loss_sum_and_count(logits, labels)
    log_probs = logits.log_softmax(dim=-1)
    by_hand = [(0, 0, 4), (0, 1, 5), (0, 2, 6), (0, 3, 2), (2, 1, 1), (2, 4, 9)]
    assert num_learnt == len(by_hand)
    assert loss_sum.item() == pytest.approx(-sum(log_probs[index].item() for index in by_hand), rel=1e-5)


def test_text_loss_of_nothing_learnt_is_a_differentiable_zero():
    logits = torch.randn(2, 5, 7, requires_grad=True)
    loss_sum, num_learnt = text_loss_sum_and_count(logits, torch.full((2, 5), -100))
    loss = mean_loss(loss_sum, num_learnt)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_text_loss_is_computed_in_float32():
    logits = torch.randn(1, 9, 50, dtype=torch.bfloat16)
    labels = torch.arange(9)[None]
    loss_sum, _ = text_loss_sum_and_count(logits, labels)
    assert loss_sum.dtype == torch.float32
    assert torch.equal(loss_sum, text_loss_sum_and_count(logits.float(), labels)[0])


def test_bce_of_a_mask_is_the_mean_over_its_pixels():
    logits = torch.tensor([[[0.0, math.log(3.0)]], [[-math.log(4.0), 0.0]]])  # probabilities 1/2, 3/4; 1/5, 1/2
    masks = torch.tensor([[[1, 1]], [[0, 1]]], dtype=torch.uint8)
    expected = [-(math.log(1 / 2) + math.log(3 / 4)) / 2, -(math.log(4 / 5) + math.log(1 / 2)) / 2]
    assert mask_bce_loss([logits], [masks]).tolist() == pytest.approx(expected)


def test_dice_of_a_mask_is_the_formula_of_the_paper():
    logits = torch.tensor([[[0.0, math.log(3.0)], [-math.log(4.0), 0.0]]])  # probabilities 0.5, 0.75, 0.2, 0.5
    masks = torch.tensor([[[True, True], [False, False]]])
    expected = 1 - (2 * 1.25 / 1000 + 1e-6) / (1.95 / 1000 + 2 / 1000 + 1e-6)
    assert mask_dice_loss([logits], [masks]).item() == pytest.approx(expected, rel=1e-5)


def test_dice_of_an_empty_mask_is_small_only_when_nothing_is_predicted():
    masks = torch.zeros(2, 4, 4)
    logits = torch.stack([torch.full((4, 4), -50.0), torch.full((4, 4), 50.0)])
    nothing, everything = mask_dice_loss([logits], [masks]).tolist()
    assert nothing == pytest.approx(0, abs=1e-6)
    assert everything == pytest.approx(1 - 1e-6 / (16 / 1000 + 1e-6), rel=1e-6)


@pytest.mark.parametrize("loss", [mask_bce_loss, mask_dice_loss])
def test_each_mask_counts_the_same_whatever_its_size_and_company(loss):
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 6, 8), (0, 5, 5), (1, 30, 7)]
    logits = [torch.randn(size, generator=generator) for size in sizes]
    labels = [torch.rand(size, generator=generator) > 0.5 for size in sizes]
    alone = [loss([logits[n][k : k + 1]], [labels[n][k : k + 1]]) for n, k in ((0, 0), (0, 1), (2, 0))]
    torch.testing.assert_close(loss(logits, labels), torch.cat(alone), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", [mask_bce_loss, mask_dice_loss])
def test_no_mask_is_a_differentiable_zero(loss):
    logits = torch.zeros(0, 9, 9, requires_grad=True)
    values = loss([logits], [torch.zeros(0, 9, 9, dtype=torch.bool)])
    assert values.shape == (0,)
    total = mean_loss(values.sum(), 0)
    total.backward()
    assert total.item() == 0
    assert logits.grad.shape == (0, 9, 9)


@pytest.mark.parametrize("loss", [mask_bce_loss, mask_dice_loss])
def test_no_conversation_is_zero(loss):
    assert loss([], []).sum().item() == 0


@pytest.mark.parametrize("loss", [mask_bce_loss, mask_dice_loss])
def test_mask_losses_are_computed_in_float32(loss):
    logits = torch.randn(2, 16, 16, dtype=torch.bfloat16)
    masks = torch.rand(2, 16, 16) > 0.5
    values = loss([logits], [masks])
    assert values.dtype == torch.float32
    assert torch.equal(values, loss([logits.float()], [masks]))


@pytest.mark.parametrize("loss", [mask_bce_loss, mask_dice_loss])
def test_a_missing_list_of_masks_is_refused(loss):
    with pytest.raises(ValueError, match="shorter"):
        loss([torch.zeros(1, 2, 2)], [])


@pytest.mark.parametrize("count", [4, torch.tensor(4)])
def test_mean_loss_divides_by_the_number_that_is_given(count):
    assert mean_loss(torch.tensor(6.0), count).item() == 1.5
