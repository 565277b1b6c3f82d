"""XMem over whole clips, with gradients through what it remembers, and the losses that it is trained with.

How: https://huggingface.co/papers/2207.07115, section 3 and appendix. Every step is that of `XMemModel.step`; here all
memory frames stay in working memory, and a position reads all of their elements, as in XMem's own training (top-k is
for longer videos). Which clips, and how long, is the business of others.

Letters: B clips, T frames, N objects, H W pixels (multiples of 16).
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from visa_hf.modeling.memory_xmem import similarity
from visa_hf.modeling.modeling_xmem import XMemFrameFeatures, XMemModel, aggregate


def track_clips(
    model: XMemModel, frames: Tensor, first_masks: Tensor, is_object: Tensor, memory_frames: Collection[int]
) -> Tensor:
    """Carry the masks of each clip's first frame through the clip.

    As in `XMemModel.step` with `deep_update_every=-1`: on memory frames the deep update of the sensory memory takes
    the place of the usual one. What is memorised are the tracker's own soft masks, and gradients flow through them.

    Args:
        model (`XMemModel`): the tracker.
        frames (`torch.Tensor` of shape `(B, T, 3, H, W)`): normalised with ImageNet's mean and standard deviation.
        first_masks (`torch.Tensor` of shape `(B, N, H, W)`, in [0, 1]): of the first frames.
        is_object (`torch.Tensor` of shape `(B, N)`, bool): false where a clip has fewer than N objects; nothing is
            segmented there.
        memory_frames (collection of `int`): frames that are memorised, of all clips the same. The first one always is.

    Returns:
        `torch.Tensor` of shape `(B, T - 1, 1 + N, H, W)`, float32: logits of all frames but the first, the background
        first; their softmax over dimension 2 are the probabilities.
    """
    num_clips, num_frames = frames.shape[:2]
    in_time = frames.transpose(0, 1)  # (T, B, 3, H, W)
    features = _of_each_frame(model.encode_key(in_time.flatten(0, 1)), num_clips)
    is_object = is_object[..., None, None]
    masks = first_masks * is_object
    sensory = masks.new_zeros(*masks.shape[:2], model.config.sensory_dim, *features[0].key.shape[-2:])
    value, sensory = model.encode_value(in_time[0], features[0].f16, masks, sensory)
    memory, values = [features[0]], [value]
    logits = []
    for frame_idx in range(1, num_frames):
        frame, is_last = features[frame_idx], frame_idx == num_frames - 1
        is_memorised = frame_idx in memory_frames and not is_last
        readout = read_memory(memory, values, frame)
        each, updated = model.decoder(
            frame, readout.flatten(0, 1), sensory.flatten(0, 1), not (is_memorised or is_last)
        )
        sensory = updated.unflatten(0, masks.shape[:2])
        probs = torch.sigmoid(each.squeeze(1).unflatten(0, masks.shape[:2]).float()) * is_object
        logits.append(aggregate(probs, dim=1))
        if is_memorised:
            masks = logits[-1].softmax(dim=1)[:, 1:] * is_object
            value, sensory = model.encode_value(in_time[frame_idx], frame.f16, masks.to(frames.dtype), sensory)
            memory.append(frame)
            values.append(value)
    return torch.stack(logits, dim=1)


def read_memory(memory: list[XMemFrameFeatures], values: list[Tensor], frame: XMemFrameFeatures) -> Tensor:
    """Look up every position of B frames in the memory frames of their clips.

    Args:
        memory (list of M `XMemFrameFeatures`): of the memory frames.
        values (list of M `torch.Tensor` of shape `(B, N, CV, h, w)`): what they store.
        frame (`XMemFrameFeatures`): of the B frames that read.

    Returns:
        `torch.Tensor` of shape `(B, N, CV, h, w)`.
    """
    # Squares of keys are subtracted from each other: half precision does not do.
    with torch.autocast(frame.key.device.type, enabled=False):
        key = torch.cat([_rows(each.key) for each in memory], dim=1)  # (B, L, CK)
        shrinkage = torch.cat([_rows(each.shrinkage) for each in memory], dim=1)
        affinity = similarity(key, shrinkage, _rows(frame.key), _rows(frame.selection)).softmax(dim=-1)  # (B, P, L)
    stored = torch.cat([_rows(each.flatten(1, 2)) for each in values], dim=1)  # (B, L, N * CV)
    read = (affinity @ stored).mT.to(values[0].dtype)
    return read.unflatten(1, values[0].shape[1:3]).unflatten(3, values[0].shape[-2:])


def tracking_losses(logits: Tensor, labels: Tensor, is_object: Tensor, hard_share: float) -> tuple[Tensor, Tensor]:
    """Compute XMem's two losses: cross-entropy of the hardest pixels, and dice of each object.

    Both are means over clips, frames and (dice) objects; XMem sums over frames, which only scales them.

    Args:
        logits (`torch.Tensor` of shape `(B, T, 1 + N, H, W)`): the background first.
        labels (`torch.Tensor` of shape `(B, T, H, W)`, int64): 0 for the background, else 1 + number of the object.
        is_object (`torch.Tensor` of shape `(B, N)`, bool): which of a clip's objects there are.
        hard_share (`float`, in (0, 1]): of each frame, the share of pixels that counts: those of the highest loss.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: cross-entropy and dice loss, scalars.
    """
    logits = logits.flatten(0, 1).float()
    labels = labels.flatten(0, 1)
    per_pixel = F.cross_entropy(logits, labels, reduction="none").flatten(1)
    num_hard = max(int(hard_share * per_pixel.shape[1]), 1)
    hardest = per_pixel if num_hard == per_pixel.shape[1] else per_pixel.topk(num_hard, dim=1, sorted=False).values
    probs = logits.softmax(dim=1)[:, 1:].flatten(2)  # (B * T, N, H * W)
    numbers = torch.arange(1, 1 + probs.shape[1], device=labels.device)
    targets = (labels.flatten(1)[:, None] == numbers[:, None]).float()
    overlap = (2 * (probs * targets).sum(dim=-1) + 1) / (probs.sum(dim=-1) + targets.sum(dim=-1) + 1)
    counted = is_object.repeat_interleave(len(probs) // len(is_object), dim=0).float()
    dice = ((1 - overlap) * counted).sum() / counted.sum().clamp(min=1)
    return hardest.mean(), dice


def hard_share_at(progress: float, start: float, end: float, least: float) -> float:
    """Return the share of pixels that count: 1 until `start`, then falling to `least` at `end`; all in [0, 1]."""
    if progress <= start:
        return 1.0
    if progress >= end:
        return least
    return least + (1 - least) * (end - progress) / (end - start)


def _of_each_frame(features: XMemFrameFeatures, num_clips: int) -> list[XMemFrameFeatures]:
    """Cut the features of T * B frames into those of each of the T frames."""
    parts = {name: value.split(num_clips) for name, value in vars(features).items()}
    return [XMemFrameFeatures(**dict(zip(parts, each, strict=True))) for each in zip(*parts.values(), strict=True)]


def _rows(planes: Tensor) -> Tensor:
    """(B, C, h, w) or (B, C, CV, h, w), flattened to C: -> (B, h * w, C), float32."""
    return planes.flatten(-2).mT.float()
