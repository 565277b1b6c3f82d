"""What the builders of image sets have in common: where a set lies, sizes of images, rows, shards.

A still image is a video of one frame, so each row names one frame, and each row of masks holds one mask. The layout of
the folders is LISA's (https://github.com/dvlab-research/LISA, README, "Training Data Preparation").
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visa_hf.rle import RLE

from .annotations import AnnotationError
from .image_files import image_size


def set_folder(root: Path, below_root: str) -> str:
    """Say where a set lies below `root`.

    The rule of all image sets: `data_dir` is LISA's root if it has the folder `below_root`; otherwise it is the set's
    own folder.

    Returns:
        `below_root`, or `""` for the set's own folder.
    """
    return below_root if (root / below_root).is_dir() else ""


def join(*parts: str) -> str:
    """Join the parts of a relative path with `/`, leaving empty ones out: the same names on every system."""
    return "/".join(part for part in parts if part)


def stem(frame: str) -> str:
    """Return the name of an image without folders and suffix: its video id."""
    return os.path.splitext(frame.rsplit("/", 1)[-1])[0]


def in_chunks(items: Sequence[Any], num_chunks: int) -> list[tuple[Any, ...]]:
    """Cut a sequence into at most `num_chunks` pieces of nearly the same length: the shards of a builder."""
    num_chunks = max(1, min(num_chunks, len(items)))
    borders = [len(items) * number // num_chunks for number in range(num_chunks + 1)]
    return [tuple(items[start:end]) for start, end in zip(borders[:-1], borders[1:], strict=True)]


def check_image_size(root: str | Path, frame: str, size: tuple[int, int], **where: Any) -> None:
    """Make sure that an image is there and has the size (H, W) that its annotation says.

    Raises:
        AnnotationError: it is missing, unreadable or of another size.
    """
    height, width = image_size(root, frame, **where)
    if (height, width) != size:
        raise AnnotationError.at(
            f"the image has {height} x {width} pixels (H x W), but its annotation {size[0]} x {size[1]}.",
            frame=frame,
            **where,
        )


def expression_row(
    dataset: str,
    frame: str,
    size: tuple[int, int],
    *,
    video_id: str,
    expression_id: str,
    expression: str,
    anno_ids: Sequence[str],
    type_id: int = 0,
) -> dict[str, Any]:
    """Make a row of `EXPRESSION_FEATURES` about one image of `size` (H, W)."""
    return {
        "dataset": dataset,
        "video_id": video_id,
        "expression_id": expression_id,
        "expression": expression,
        "type_id": type_id,
        "anno_ids": list(anno_ids),
        "frames": [frame],
        "height": size[0],
        "width": size[1],
    }


def mask_row(video_id: str, anno_id: str, rle: RLE | None) -> dict[str, Any]:
    """Make a row of `MASK_FEATURES` about one image."""
    return {"video_id": video_id, "anno_id": anno_id, "rle": [rle]}
