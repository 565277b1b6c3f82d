"""A tiny data set for the tests of evaluation: rows as the builders make them, and frames on disk."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visa_hf.evaluation.benchmarks import BENCHMARKS, Benchmark, EvaluationSet
from visa_hf.rendering import save_palette_png
from visa_hf.rle import encode_mask

SIZE = (24, 32)


def square(top: int, left: int, side: int = 8, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[top : top + side, left : left + side] = True
    return mask


def write_frames(root: Path, video: str, num_frames: int, size: tuple[int, int] = SIZE) -> list[str]:
    folder = root / "JPEGImages" / video
    folder.mkdir(parents=True)
    rows, columns = np.mgrid[: size[0], : size[1]]
    for number in range(num_frames):
        frame = np.stack([rows * 5 + number, columns * 6, (rows + columns + 9 * number) % 90 + 60], axis=2)
        Image.fromarray(frame.astype(np.uint8)).save(folder / f"{number:05d}.jpg")
    return [f"JPEGImages/{video}/{number:05d}.jpg" for number in range(num_frames)]


def masks_row(video: str, anno_id: str, masks: list[np.ndarray | None]) -> dict[str, Any]:
    return {"video_id": video, "anno_id": anno_id, "rle": [None if m is None else encode_mask(m) for m in masks]}


def expression_row(
    video: str, expression_id: str, text: str, type_id: int, anno_ids: list[str], frames: list[str], **more: Any
) -> dict[str, Any]:
    return {
        "dataset": "toy",
        "video_id": video,
        "expression_id": expression_id,
        "expression": text,
        "type_id": type_id,
        "anno_ids": anno_ids,
        "frames": frames,
        "height": SIZE[0],
        "width": SIZE[1],
        **more,
    }


def revos_rows(root: Path) -> tuple[list, list, list]:
    """Two videos like ReVOS': of three frames (two objects, one of which is gone at the end), and of two."""
    frames = {"a": write_frames(root, "a", 3), "b": write_frames(root, "b", 2)}
    one = [square(2, 2), square(2, 4), square(2, 6)]
    two = [square(12, 20), square(12, 18), None]
    three = [square(8, 8), square(9, 9)]
    masks = [masks_row("a", "1", one), masks_row("a", "2", two), masks_row("b", "3", three)]
    expressions = [
        expression_row("a", "0", "the square on top", 0, ["1"], frames["a"]),
        expression_row("a", "1", "which squares move?", 1, ["1", "2"], frames["a"]),
        expression_row("a", "2", "the dog", 2, [], frames["a"]),
        expression_row("b", "0", "the only square", 0, ["3"], frames["b"]),
        expression_row("b", "1", "what would you see first?", 1, ["3"], frames["b"]),
    ]
    union = [one[0] | two[0], one[1] | two[1], one[2]]
    videos = [
        {"video_id": "a", "foreground_rle": [encode_mask(mask) for mask in union]},
        {"video_id": "b", "foreground_rle": [encode_mask(mask) for mask in three]},
    ]
    return expressions, masks, videos


def revos_set(root: Path, benchmark: Benchmark = BENCHMARKS["revos"], **options: Any) -> EvaluationSet:
    expressions, masks, videos = revos_rows(root)
    return EvaluationSet(benchmark, "valid", root, expressions, masks, videos, **options)


def truths(evaluation_set: EvaluationSet) -> dict[tuple[str, str], list[np.ndarray]]:
    """The true masks of every expression, united by hand."""
    found = {}
    for expression in evaluation_set.expressions:
        masks = [np.zeros((expression.height, expression.width), dtype=bool) for _ in expression.frames]
        for clip in evaluation_set.objects_of(expression):
            for mask, rle in zip(masks, clip, strict=True):
                if rle is not None:
                    from visa_hf.rle import decode_mask

                    mask |= decode_mask(rle)
        found[expression.video, expression.expression_id] = masks
    return found


def write_predictions(folder: Path, evaluation_set: EvaluationSet, masks: dict, kind: str = "palette") -> None:
    """Write PNGs: "palette" with 0/1, or "grey" with 0/255."""
    for expression in evaluation_set.expressions:
        place = folder / expression.video / expression.expression_id
        place.mkdir(parents=True)
        for name, mask in zip(expression.frame_names, masks[expression.video, expression.expression_id], strict=True):
            if kind == "palette":
                save_palette_png(place / f"{name}.png", mask.astype(np.uint8))
            else:
                Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(place / f"{name}.png")


def shifted(masks: dict, step: int = 1) -> dict:
    """The masks, moved to the right: predictions that are nearly right."""
    return {key: [np.roll(mask, step, axis=1) for mask in clip] for key, clip in masks.items()}
