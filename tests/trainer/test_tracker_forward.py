"""XMem over whole clips: the same as `step`, differentiable, and its losses."""

import math

import pytest
import torch
import torch.nn.functional as F

from visa_hf import XMemConfig, XMemModel
from visa_hf.trainer.tracker_forward import hard_share_at, track_clips, tracking_losses


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    # Everything is read, and nothing consolidated.
    return XMemModel(XMemConfig.tiny(memory_every=2, top_k=None, use_long_term=False)).eval()


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(2, 6, 3, 48, 64, generator=generator)
    labels = torch.randint(0, 3, (2, 48, 64), generator=generator)
    return frames, F.one_hot(labels, 3)[..., 1:].permute(0, 3, 1, 2).float()


def stepped(model, frames, masks):
    """Probabilities of `step`, frame by frame: (T - 1, 1 + N, H, W)."""
    memory = model.init_memory()
    model.step(memory, frames[0], masks)
    last = len(frames) - 1
    return torch.stack([model.step(memory, frames[idx], is_last=idx == last) for idx in range(1, len(frames))])


def all_there(num_clips, num_objects):
    return torch.ones(num_clips, num_objects, dtype=torch.bool)


def test_a_clip_is_tracked_as_by_step_with_the_same_memory_frames(model, clips):
    frames, masks = clips
    with torch.no_grad():
        probs = track_clips(model, frames, masks, all_there(2, 2), {0, 2, 4}).softmax(dim=2)
    for clip in range(2):
        expected = stepped(model, frames[clip], masks[clip])
        torch.testing.assert_close(probs[clip], expected, rtol=0, atol=1e-5)
    # Not by chance: other memory frames give something else.
    with torch.no_grad():
        others = track_clips(model, frames, masks, all_there(2, 2), {0, 3}).softmax(dim=2)
    assert (others - probs).abs().max() > 1e-3


def test_an_object_that_a_clip_does_not_have_changes_nothing(model, clips):
    frames, masks = clips
    is_object = torch.tensor([[True, True], [True, False]])
    with torch.no_grad():
        probs = track_clips(model, frames, masks, is_object, {0, 2, 4}).softmax(dim=2)
    torch.testing.assert_close(probs[0], stepped(model, frames[0], masks[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(probs[1, :, :2], stepped(model, frames[1], masks[1, :1]), rtol=0, atol=1e-5)
    assert probs[1, :, 2].max() < 1e-6


def test_the_last_frame_is_not_memorised(model, clips):
    frames, masks = clips
    with torch.no_grad():
        expected = track_clips(model, frames, masks, all_there(2, 2), {0, 2})
        torch.testing.assert_close(track_clips(model, frames, masks, all_there(2, 2), [0, 2, 5]), expected)


def test_gradients_reach_every_parameter_through_the_memory(clips):
    frames, masks = clips
    torch.manual_seed(0)
    model = XMemModel(XMemConfig.tiny(train_batch_norm=True)).train()
    frames = frames[:, :4].clone().requires_grad_()
    logits = track_clips(model, frames, masks, all_there(2, 2), {0, 1})
    # Of the last frame alone: what it is told of the others, it has from memory.
    logits[:, -1].softmax(dim=1)[:, 1].mean().backward()
    without = [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum() > 0]
    assert without == []
    assert all(frames.grad[:, idx].abs().sum() > 0 for idx in range(4))


def test_gradients_are_those_of_finite_differences(clips):
    torch.manual_seed(0)
    model = XMemModel(XMemConfig.tiny()).double().eval()
    frames, masks = (each.double() for each in clips)
    weight = model.value_encoder.fuser.block2.conv2.weight

    def loss():
        # `aggregate` computes in float32, so the logits are summed with weights that round little.
        logits = track_clips(model, frames[:1, :3], masks[:1], all_there(1, 2), {0, 1})
        return logits[:, -1].double().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = gradient / gradient.norm()
    step = 0.05
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    assert float(above - below) / (2 * step) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_losses_by_hand():
    # One frame of two pixels, one object: log-odds of its probability 0.8 on its own pixel, 0.4 on the other.
    odds = torch.tensor([math.log(0.8 / 0.2), math.log(0.4 / 0.6)])
    logits = torch.stack([torch.zeros(2), odds]).reshape(1, 1, 2, 1, 2)
    labels = torch.tensor([1, 0]).reshape(1, 1, 1, 2)
    ce, dice = tracking_losses(logits, labels, all_there(1, 1), 1.0)
    assert float(ce) == pytest.approx(-(math.log(0.8) + math.log(0.6)) / 2, abs=1e-6)
    assert float(dice) == pytest.approx(1 - (2 * 0.8 + 1) / (1.2 + 1 + 1), abs=1e-6)
    # The harder pixel alone.
    ce, _ = tracking_losses(logits, labels, all_there(1, 1), 0.5)
    assert float(ce) == pytest.approx(-math.log(0.6), abs=1e-6)


def test_an_object_that_is_not_there_has_no_dice_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 8, 8, generator=generator)
    labels = torch.randint(0, 2, (2, 3, 8, 8), generator=generator)
    is_object = torch.tensor([[True, False], [True, False]])
    _, dice = tracking_losses(logits, labels, is_object, 1.0)
    probs = logits.softmax(dim=2)[:, :, 1].flatten(2)
    targets = (labels == 1).float().flatten(2)
    expected = 1 - (2 * (probs * targets).sum(-1) + 1) / (probs.sum(-1) + targets.sum(-1) + 1)
    assert float(dice) == pytest.approx(float(expected.mean()), abs=1e-6)
    _, none = tracking_losses(logits, labels, torch.zeros(2, 2, dtype=torch.bool), 1.0)
    assert float(none) == 0


def test_ever_fewer_pixels_count():
    shares = [hard_share_at(progress, 0.2, 0.6, 0.15) for progress in (0, 0.2, 0.4, 0.6, 1)]
    assert shares == pytest.approx([1, 1, 0.575, 0.15, 0.15])
    assert hard_share_at(0.5, 0.5, 0.5, 0.15) == 1 and hard_share_at(0.51, 0.5, 0.5, 0.15) == 0.15
