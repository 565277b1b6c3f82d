"""Sets whose expressions name an object of their video by number: Ref-YouTube-VOS and Ref-DAVIS17.

Their masks are palette PNGs as published, or `mask_dict.pkl`, which was published with VISA and holds the masks of
each *expression* under a running number that no annotation names: expressions are counted over the videos in the order
of their names and, within a video, in the order of their ids as text. Either way an object gets the annotation id
`<video>/<object number>`, and its masks are stored once.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .annotations import AnnotationError
from .brief import brief
from .mask_files import MaskFile, PaletteMasks, PickledMasks
from .referring_annotations import ReferringExpression, ReferringVideo, read_object_ids

_PICKLE = "mask_dict.pkl"
_PNGS = "Annotations"
_META = "meta.json"
# A palette PNG has 8 bits; 0 is the background.
_LAST_OBJECT = 255
_OBJECTS = frozenset(map(str, range(1, _LAST_OBJECT + 1)))


def object_mask_files(folder: Path) -> list[Path]:
    """Return the annotation files of a split's folder: those that are used, and those that would be if they came."""
    files = [folder / _META, folder / _PICKLE]
    return files if os.path.exists(folder / _PICKLE) else [*files, folder / _PNGS]


def open_object_masks(root: Path, split: str, videos: Sequence[ReferringVideo]) -> MaskFile:
    """Give the expressions their annotation ids, and return where the masks are.

    Raises:
        FileNotFoundError: there is neither a pickled dict nor a folder of PNGs.
        AnnotationError: the pickled dict cannot be assigned, because the list of expressions is damaged.
    """
    folder = root / split
    if os.path.exists(folder / _PICKLE):
        _assign_keys(videos)
        masks: MaskFile = PickledMasks(str(folder / _PICKLE))
    elif os.path.isdir(folder / _PNGS):
        _assign_numbers(videos)
        masks = PaletteMasks(str(root), f"{split}/{_PNGS}")
    else:
        raise FileNotFoundError(f"There is neither {folder / _PICKLE} nor {folder / _PNGS}. One of them is needed.")
    if os.path.exists(folder / _META):
        _check_known(videos, str(folder / _META))
    return masks


def _assign_keys(videos: Sequence[ReferringVideo]) -> None:
    """Name objects for a pickled dict: the masks' key is the expression's number, unless it names keys itself."""
    number = 0
    for video in sorted(videos, key=lambda video: video.video_id):
        if video.problem is not None:
            raise AnnotationError.at(
                f"{_PICKLE} numbers the expressions in their order, so none can be left out. {video.problem}"
            )
        for item in sorted(video.expressions, key=lambda item: item.expression_id):
            if item.anno_ids:
                video.mask_keys |= {anno_id: [anno_id] for anno_id in item.anno_ids}
            elif _check_objects(video, item):
                # All of an expression's objects have one mask together.
                anno_id = f"{video.video_id}/{'+'.join(item.object_ids)}"
                video.mask_keys.setdefault(anno_id, []).append(str(number))
                item.anno_ids = (anno_id,)
            number += 1


def _assign_numbers(videos: Sequence[ReferringVideo]) -> None:
    """Name objects for palette PNGs, whose pixels are the objects' numbers."""
    for video in videos:
        for item in video.expressions:
            item.anno_ids = ()
            if _check_objects(video, item):
                item.anno_ids = tuple(f"{video.video_id}/{number}" for number in item.object_ids)


def _check_objects(video: ReferringVideo, item: ReferringExpression) -> bool:
    """Return whether the expression names objects by numbers that a palette can have; else it gets a problem."""
    if item.problem is None and not item.object_ids:
        item.problem = _error("`obj_id` is missing; the number of an object is needed.", video, item)
    for number in item.object_ids if item.problem is None else ():
        if number not in _OBJECTS:
            message = f"`obj_id` is {brief(number)}; a number from 1 to {_LAST_OBJECT} is needed."
            item.problem = _error(message, video, item)
    return item.problem is None


def _check_known(videos: Sequence[ReferringVideo], meta: str) -> None:
    """Give a problem to expressions about objects that `meta.json` does not know."""
    known = read_object_ids(meta)
    for video in videos:
        for item in video.expressions if video.problem is None else ():
            unknown = [number for number in item.object_ids if number not in known.get(video.video_id, ())]
            if unknown and item.problem is None:
                item.problem = _error(f"the object {unknown[0]!r} of the video is not in {meta}.", video, item)


def _error(message: str, video: ReferringVideo, item: ReferringExpression) -> AnnotationError:
    where: dict[str, Any] = {"file": video.file, "video": video.video_id, "expression": item.expression_id}
    return AnnotationError.at(message, **where)
