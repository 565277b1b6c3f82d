"""SAM's mask logits at the size of the frame: published numbers, one case by hand, edges."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from visa_hf.modeling.mask_sizes_visa import upscale_mask_logits

VISA_TINY = Path(__file__).parents[1] / "reference" / "visa_tiny"


def test_published_masks_come_from_the_published_low_resolution_ones():
    inputs, expected = load_file(VISA_TINY / "inputs.safetensors"), load_file(VISA_TINY / "expected.safetensors")
    masks = expected["infer.pred_masks.0"]
    reshaped, original = (tuple(inputs[name][0].tolist()) for name in ("resize", "original"))
    ours = upscale_mask_logits(expected["train.low_res_masks.0"][:, 0], 256, reshaped, original)
    torch.testing.assert_close(ours, masks, rtol=0, atol=5e-4 * masks.abs().max().item())


def test_padding_is_cut_off_and_the_rest_resized_as_computed_by_hand():
    # 2 x 2 -> 4 x 4 between pixel centres: weights 1, 3/4, 1/4, 0 of the first column; the lower half is padding.
    low_res = torch.tensor([[[0.0, 8.0], [50.0, 50.0]]])
    square = upscale_mask_logits(low_res, 4, (1, 4), (1, 4))
    assert square.tolist() == [[[0.0, 2.0, 6.0, 8.0]]]
    # And to a frame of 2 pixels: each the mean of two.
    assert upscale_mask_logits(low_res, 4, (1, 4), (1, 2)).tolist() == [[[1.0, 7.0]]]


def test_many_masks_are_those_of_each_alone():
    low_res = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    together = upscale_mask_logits(low_res, 64, (33, 64), (70, 135))
    alone = torch.cat([upscale_mask_logits(one[None], 64, (33, 64), (70, 135)) for one in low_res])
    assert together.shape == (3, 70, 135)
    assert torch.equal(together, alone)


def test_half_precision_is_resized_in_full_precision():
    low_res = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours = upscale_mask_logits(low_res, 32, (32, 20), (9, 7))
    assert ours.dtype == torch.float32
    assert torch.equal(ours, upscale_mask_logits(low_res.float(), 32, (32, 20), (9, 7)))


def test_gradients_reach_the_low_resolution_logits():
    low_res = torch.zeros(2, 4, 4, requires_grad=True)
    upscale_mask_logits(low_res, 16, (16, 16), (5, 5)).sum().backward()
    torch.testing.assert_close(low_res.grad.sum(dim=(1, 2)), torch.tensor([25.0, 25.0]))


def test_no_mask_gives_no_mask_even_without_a_frame():
    assert upscale_mask_logits(torch.zeros(0, 16, 16), 64, (33, 64), (70, 135)).shape == (0, 70, 135)
    assert upscale_mask_logits(torch.zeros(0, 16, 16), 64, (0, 0), (0, 0)).shape == (0, 0, 0)


@pytest.mark.parametrize(("reshaped", "original"), [((65, 64), (9, 9)), ((0, 64), (9, 9)), ((64, 64), (0, 9))])
def test_sizes_that_cannot_be_are_refused(reshaped, original):
    with pytest.raises(ValueError, match=r"do not fit `padded_size` 64: .*Give the sizes that the processor returned"):
        upscale_mask_logits(torch.zeros(1, 16, 16), 64, reshaped, original)
