"""Random inputs of the model, made by hand as the contract says, without the processor."""

from collections.abc import Sequence
from typing import Any

import torch

from visa_hf import VisaConfig


def make_batch(
    config: VisaConfig,
    conversations: Sequence[tuple[int, int]] = ((0, 1), (0, 2), (1, 1), (1, 0)),
    frames: Sequence[int] = (2, 1),
    sizes: Sequence[tuple[int, int]] = ((40, 64), (50, 30)),
    padding: str = "right",
    seed: int = 0,
) -> dict[str, Any]:
    """Conversations as (video, number of [SEG]) about videos of so many frames; video -1 is text only.

    A size of (0, 0) means that the video has no target.
    """
    sizes = sizes[: len(frames)]
    generator = torch.Generator().manual_seed(seed)
    side, sam_side = config.vision_config.image_size, config.sam_config.vision_config.image_size

    def words(count: int) -> list[int]:
        return torch.randint(3, 1000, (count,), generator=generator).tolist()

    rows, labels, mask_labels = [], [], []
    for number, (video, num_segs) in enumerate(conversations):
        prompt = [1, *words(3 + 2 * number)]
        for _ in range(frames[video] if video >= 0 else 0):
            prompt += [config.image_token_id] * config.num_visual_tokens + words(2)
        answer = words(2) + [token for _ in range(num_segs) for token in (config.seg_token_id, *words(1))] + [2]
        rows.append(prompt + answer)
        labels.append([-100] * len(prompt) + answer)
        height, width = sizes[video] if video >= 0 else (0, 0)
        mask_labels.append((torch.rand(num_segs, height, width, generator=generator) > 0.6).float())

    reshaped = [[round(edge * sam_side / max(size)) if max(size) else 0 for edge in size] for size in sizes]
    return {
        "input_ids": pad(rows, 0, padding),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, padding),
        "labels": pad(labels, -100, padding),
        "pixel_values": torch.randn(sum(frames), 3, side, side, generator=generator),
        "num_frames": torch.tensor(frames, dtype=torch.long),
        "conversation_to_video": torch.tensor([video for video, _ in conversations]),
        "sam_pixel_values": torch.randn(len(frames), 3, sam_side, sam_side, generator=generator),
        "original_sizes": torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
        "reshaped_input_sizes": torch.tensor(reshaped, dtype=torch.long).reshape(-1, 2),
        "mask_labels": mask_labels,
    }


def pad(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """Rows of different lengths -> (N, S), int64."""
    length = max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    padded = [[*row, *extra] if side == "right" else [*extra, *row] for row, extra in zip(rows, fill, strict=True)]
    return torch.tensor(padded)


def conversation(batch: dict[str, Any], index: int) -> dict[str, Any]:
    """One conversation of a batch, alone: unpadded and with its own video only."""
    kept = batch["attention_mask"][index].bool()
    video = int(batch["conversation_to_video"][index])
    starts = [0, *batch["num_frames"].cumsum(0).tolist()]
    frames = slice(starts[video], starts[video + 1]) if video >= 0 else slice(0, 0)
    videos = slice(video, video + 1) if video >= 0 else slice(0, 0)
    return {
        **{name: batch[name][index : index + 1, kept] for name in ("input_ids", "attention_mask", "labels")},
        "pixel_values": batch["pixel_values"][frames],
        "num_frames": batch["num_frames"][videos],
        "conversation_to_video": torch.tensor([0 if video >= 0 else -1]),
        "sam_pixel_values": batch["sam_pixel_values"][videos],
        "original_sizes": batch["original_sizes"][videos],
        "reshaped_input_sizes": batch["reshaped_input_sizes"][videos],
        "mask_labels": [batch["mask_labels"][index]],
    }


def without(batch: dict[str, Any], *names: str) -> dict[str, Any]:
    """The batch without some of its entries."""
    return {name: value for name, value in batch.items() if name not in names}


def prompts(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as `generate_masks` takes it: answers cut off, padded on the left."""
    kept = (batch["labels"] == -100) & batch["attention_mask"].bool()
    rows = [row[mask].tolist() for row, mask in zip(batch["input_ids"], kept, strict=True)]
    return {
        **without(batch, "labels", "mask_labels"),
        "input_ids": pad(rows, 0, "left"),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, "left"),
    }
