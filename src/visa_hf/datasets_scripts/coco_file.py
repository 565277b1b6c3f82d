"""Annotation files in COCO's format: `images`, `categories` and `annotations`, which may be hundreds of megabytes.

One pass over the file notes where each annotation lies in it; workers then read only the annotations of their images.
Used by PASCAL-Part, PACO-LVIS and RefCOCO. What the annotations mean is the builders' business.
"""

import json
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .annotations import AnnotationError, check_relative, check_text, locate_json_members
from .brief import brief

Report = Callable[[AnnotationError], None]


class CocoImage(NamedTuple):
    """An image as the file names it; `file_name` is relative and stays inside its folder."""

    image_id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoIndex:
    """What a file in COCO's format holds, without the annotations themselves.

    Attributes:
        images (`dict[int, CocoImage]`): by id, in the file's order.
        categories (`dict[int, str]`): names by id.
        annotation_ids (`np.ndarray` of shape `(A,)`, int64): in the file's order.
        image_ids (`np.ndarray` of shape `(A,)`, int64): the image of each annotation.
        spans (`np.ndarray` of shape `(A, 2)`, int64): first byte of each annotation, and the one behind its last.
    """

    images: dict[int, CocoImage]
    categories: dict[int, str]
    annotation_ids: np.ndarray
    image_ids: np.ndarray
    spans: np.ndarray


def index_coco(path: Path, report: Report) -> CocoIndex:
    """Read images and categories and find the annotations.

    Args:
        path (`Path`): of the file.
        report: gets each `AnnotationError` about one image, category or annotation; unless it raises, that one is
            left out.

    Raises:
        AnnotationError: the JSON is broken, or one of the three lists is missing.
    """
    images: dict[int, CocoImage] = {}
    categories: dict[int, str] = {}
    places = array("q")  # four numbers an annotation: its id, its image's, first byte, last byte + 1
    read = {
        "images": lambda item, start, end: _add_image(images, item, path),
        "categories": lambda item, start, end: _add_category(categories, item, path),
        "annotations": lambda item, start, end: places.extend((*_annotation_ids(item, path), start, end)),
    }
    found = set()
    for section, item, (start, end) in locate_json_members(path):
        found.add(section)
        if section in read and item is not None:
            try:
                read[section](item, start, end)
            except AnnotationError as error:
                report(error)
    if missing := set(read) - found:
        raise AnnotationError.at(f"has no list `{min(missing)}`; COCO's format needs it.", file=path)
    table = np.array(places, dtype=np.int64).reshape(-1, 4)
    first = np.unique(table[:, 0], return_index=True)[1]
    for row in np.setdiff1d(np.arange(len(table)), first):
        report(AnnotationError.at("the id is given to two annotations.", file=path, annotation=str(table[row, 0])))
    table = table[np.sort(first)]
    return CocoIndex(images, categories, table[:, 0], table[:, 1], table[:, 2:])


def read_annotations(path: Path, spans: np.ndarray) -> Iterator[dict[str, Any]]:
    """Read the annotations that lie at `spans` `(A, 2)`, each a dict with whole `id` and `image_id`."""
    with open(path, "rb") as file:
        for start, end in spans.tolist():
            file.seek(start)
            yield json.loads(file.read(end - start))


def check_whole(value: Any, name: str, lowest: int = -(2**62), **where: Any) -> int:
    """Return a whole number of at least `lowest`.

    Raises:
        AnnotationError: it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not lowest <= value < 2**62:
        least = f" from {lowest} on" if lowest >= 0 else ""
        raise AnnotationError.at(f"`{name}` is {brief(value)}; a whole number{least} is needed.", **where)
    return int(value)


def _add_image(images: dict[int, CocoImage], item: Any, path: Path) -> None:
    item = _as_dict(item, "image", path)
    image_id = check_whole(item.get("id"), "id", file=path, annotation="an image")
    where: dict[str, Any] = {"file": path, "annotation": f"image {image_id}"}
    if image_id in images:
        raise AnnotationError.at("the id is given to two images.", **where)
    images[image_id] = CocoImage(
        image_id,
        check_relative(item.get("file_name"), **where),
        check_whole(item.get("height"), "height", lowest=1, **where),
        check_whole(item.get("width"), "width", lowest=1, **where),
    )


def _add_category(categories: dict[int, str], item: Any, path: Path) -> None:
    item = _as_dict(item, "category", path)
    category_id = check_whole(item.get("id"), "id", file=path, annotation="a category")
    where: dict[str, Any] = {"file": path, "annotation": f"category {category_id}"}
    if category_id in categories:
        raise AnnotationError.at("the id is given to two categories.", **where)
    categories[category_id] = check_text(item.get("name"), "name", **where)


def _annotation_ids(item: Any, path: Path) -> tuple[int, int]:
    """Return the ids of an annotation and of its image."""
    item = _as_dict(item, "annotation", path)
    annotation_id = check_whole(item.get("id"), "id", file=path, annotation="an annotation")
    return annotation_id, check_whole(item.get("image_id"), "image_id", file=path, annotation=str(annotation_id))


def _as_dict(item: Any, what: str, path: Path) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise AnnotationError.at(f"one {what} is {brief(item)}; an object is needed.", file=path)
    return item
