"""Small data sets for tests of sampling: real pictures on disk, and rows as the builders make them.

The red of a picture is its video's number, the green its frame's; each object is a rectangle that its number places.
"""

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features
from PIL import Image

from visa_hf.datasets_scripts.features import (
    CONVERSATION_FEATURES,
    EXPRESSION_FEATURES,
    MASK_FEATURES,
    REASON_SEG_FEATURES,
)
from visa_hf.rle import encode_mask

SIZE = (24, 32)


def write_video(root: Path, video: int, num_frames: int, size: tuple[int, int] = SIZE) -> list[str]:
    """Write PNG frames; returns their names relative to `root`."""
    folder = root / "JPEGImages" / f"video{video}"
    folder.mkdir(parents=True)
    names = []
    for frame in range(num_frames):
        picture = np.zeros((*size, 3), dtype=np.uint8)
        picture[..., 0], picture[..., 1] = video, frame
        Image.fromarray(picture).save(folder / f"{frame:05d}.png")
        names.append(f"JPEGImages/video{video}/{frame:05d}.png")
    return names


def object_mask(number: int, frame: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A rectangle of 3 x 3 pixels, whose row tells the object and whose column the frame; no two objects overlap."""
    mask = np.zeros(size, dtype=bool)
    top, left = 3 * (number % (size[0] // 3)), frame % (size[1] - 2)
    mask[top : top + 3, left : left + 3] = True
    return mask


def mask_row(video: int, number: int, num_frames: int, hidden: tuple[int, ...] = (), size: Any = SIZE) -> dict:
    """All masks of one object; `None` in the frames `hidden`."""
    rles = [None if t in hidden else encode_mask(object_mask(number, t, size)) for t in range(num_frames)]
    return {"video_id": f"video{video}", "anno_id": f"{video}_{number}", "rle": rles}


def expression_row(
    video: int, number: int, frames: list[str], objects: list[int], text: str, size: Any = SIZE, **more: Any
) -> dict:
    return {
        "dataset": "test",
        "video_id": f"video{video}",
        "expression_id": str(number),
        "expression": text,
        "type_id": 0 if objects else 2,
        "anno_ids": [f"{video}_{thing}" for thing in objects],
        "frames": frames,
        "height": size[0],
        "width": size[1],
        **more,
    }


def rows_of(rows: list[dict], features: Features) -> Dataset:
    columns = {name: [row[name] for row in rows] for name in features}  # `from_list` refuses an empty list
    return Dataset.from_dict(columns, features=features)


def expressions_of(rows: list[dict], features: Features = EXPRESSION_FEATURES) -> Dataset:
    return rows_of(rows, features)


def reason_rows(rows: list[dict]) -> Dataset:
    return rows_of(rows, REASON_SEG_FEATURES)


def masks_of(rows: list[dict]) -> Dataset:
    return rows_of(rows, MASK_FEATURES)


def conversations_of(rows: list[dict]) -> Dataset:
    return rows_of(rows, CONVERSATION_FEATURES)


def conversation_row(video: int, frames: list[str], turns: list[tuple[str, str]]) -> dict:
    return {
        "dataset": "test",
        "video_id": f"video{video}",
        "conversation_id": f"c{video}",
        "frames": frames,
        "turns": [{"question": question, "answer": answer} for question, answer in turns],
    }


def small_world(root: Path, lengths: tuple[int, ...] = (40, 20, 5, 30)) -> tuple[Dataset, Dataset]:
    """Videos of the given lengths with three objects and four expressions each, written under `root`.

    Expression 0 means object 0, expression 1 object 1, expression 2 both 0 and 2, expression 3 none. Object 1 is
    hidden in every frame of odd number.
    """
    expressions, masks = [], []
    for video, length in enumerate(lengths):
        frames = write_video(root, video, length)
        for number, objects in enumerate(([0], [1], [0, 2], [])):
            text = f"The Thing {number}" + ("?" if number == 1 else "")
            expressions.append(expression_row(video, number, frames, objects, text))
        odd = tuple(range(1, length, 2))
        masks += [mask_row(video, number, length, odd if number == 1 else ()) for number in range(3)]
    return expressions_of(expressions), masks_of(masks)
