"""How well a tracker follows objects from their true first masks: J and F, through the path of inference.

Semi-supervised video object segmentation, as in https://huggingface.co/papers/2207.07115: each object's mask is given
on the first frame that shows it; all later ones are scored. Unlike DAVIS, the last frame counts too.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from visa_hf.evaluation.metrics import boundary_f, region_similarity
from visa_hf.modeling.modeling_xmem import XMemModel
from visa_hf.modeling.video_tracking_visa import highest_plane, prepare_tracker_frame, tracking_size
from visa_hf.trainer.tracker_samples import TrackedVideo


@dataclass(frozen=True)
class TrackerScore:
    """J and F of one object, means over its frames, in [0, 1]."""

    video_id: str
    object_number: int
    J: float
    F: float


@torch.no_grad()
def track_video(model: XMemModel, video: TrackedVideo) -> np.ndarray:
    """Track all objects of a video from the masks of the first frames that show them.

    Args:
        model (`XMemModel`): in evaluation mode.
        video ([`TrackedVideo`]): with N objects and T frames.

    Returns:
        `np.ndarray` of shape `(T, H, W)`, int64: 0 for the background, else 1 + number of the object.
    """
    height, width = size = video.masks.shape[-2:]
    small = tracking_size(height, width, model.config.input_size)
    entries = _entries(video)
    memory = model.init_memory()
    labels = np.zeros((len(video.frames), *size), dtype=np.int64)
    for idx, frame in enumerate(video.frames):
        new = [number for number, entry in enumerate(entries) if entry == idx]
        given = torch.from_numpy(video.masks[new, idx]).float()
        if new and given.shape[-2:] != small:
            given = F.interpolate(given[None], small, mode="nearest")[0]
        probs = model.step(
            memory,
            prepare_tracker_frame(frame, small, model.device, model.dtype),
            given.to(model.device) if new else None,
            new or None,
            is_last=idx == len(video.frames) - 1,
        )
        if probs.shape[-2:] != size:
            probs = F.interpolate(probs[None], size, mode="bilinear", align_corners=False)[0]
        numbers = np.array([0, *(1 + object_id for object_id in memory.object_ids)])
        labels[idx] = numbers[highest_plane(probs).cpu().numpy()]
    return labels


def score_tracker(model: XMemModel, videos: Iterable[TrackedVideo]) -> list[TrackerScore]:
    """Track videos and score each object on the known frames after its first one; objects without such are left out.

    Args:
        model (`XMemModel`): is put into evaluation mode for the time.
        videos: with all masks.
    """
    was_training = model.training
    model.eval()
    scores = []
    for video in videos:
        labels = track_video(model, video)
        for number, entry in enumerate(_entries(video)):
            scored = [idx for idx in video.known if entry is not None and idx > entry]
            if scored:
                pred, true = labels[scored] == 1 + number, video.masks[number, scored]
                j, f = float(region_similarity(pred, true).mean()), float(boundary_f(pred, true).mean())
                scores.append(TrackerScore(video.video_id, number, j, f))
    model.train(was_training)
    return scores


def _entries(video: TrackedVideo) -> list[int | None]:
    """Return the first frame that shows each object, `None` where none does."""
    return [int(each.argmax()) if each.any() else None for each in (mask.any(axis=(1, 2)) for mask in video.masks)]
