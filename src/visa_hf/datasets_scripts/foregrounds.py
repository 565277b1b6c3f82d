"""`mask_dict_foreground.json` of ReVOS: all annotated objects of a video together, and their share of each frame.

`{video: {"masks_rle": [...], "foreground_ratio": [...]}}`, one entry per frame. The file covers the videos that are
evaluated; those that it does not name have no foreground. Like the masks, it is read in pieces.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from visa_hf.rle import RLE, decode_masks, encode_mask

from .annotations import AnnotationError, check_masks, check_rle, locate_json_items
from .referring_annotations import ReferringVideo


def locate_foregrounds(path: str, videos: Sequence[ReferringVideo]) -> None:
    """Note in each video where in the file its foreground lies.

    Raises:
        AnnotationError: the JSON is broken.
    """
    by_id = {video.video_id: video for video in videos}
    for video_id, _, span in locate_json_items(path):
        if video_id in by_id:
            by_id[video_id].foreground_span = span


def read_foreground(path: str, video: ReferringVideo) -> tuple[list[RLE | None], list[float]]:
    """Return the foreground of each frame and its share of the frame, in [0, 1]; empty where there is none.

    Raises:
        AnnotationError: not one entry per frame, or an entry is no mask of the frame's size.
    """
    if video.foreground_span is None:
        return [], []
    where: dict[str, Any] = {"file": path, "video": video.video_id}
    start, end = video.foreground_span
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(end - start)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise AnnotationError.at(f"the file has changed while it was read ({error}).", **where) from error
    if not isinstance(data, dict) or "masks_rle" not in data or "foreground_ratio" not in data:
        raise AnnotationError.at("a dict with `masks_rle` and `foreground_ratio` is needed.", **where)
    rles = data["masks_rle"]
    if isinstance(rles, list):
        rles = [_united(rle, video.height, video.width, **where) if isinstance(rle, list) else rle for rle in rles]
    masks = check_masks(rles, video.names, video.height, video.width, **where)
    return masks, _ratios(data["foreground_ratio"], len(video.names), **where)


def _united(parts: list[Any], height: int, width: int, **where: Any) -> RLE | None:
    """Return the union of masks: some entries are published as a list of masks."""
    rles = [check_rle(rle, height, width, **where) for rle in parts]
    if len(rles) <= 1:
        return rles[0] if rles else None
    return encode_mask(np.logical_or.reduce(decode_masks(rles)))


def _ratios(ratios: Any, num_frames: int, **where: Any) -> list[float]:
    is_list = isinstance(ratios, list) and len(ratios) == num_frames
    if not is_list or not all(type(ratio) in (int, float) and 0 <= ratio <= 1 for ratio in ratios):
        raise AnnotationError.at(f"`foreground_ratio` must be {num_frames} numbers from 0 to 1, one a frame.", **where)
    return [float(ratio) for ratio in ratios]
