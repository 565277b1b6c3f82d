"""Sets of objects and their parts in COCO's format: the base of PASCAL-Part and PACO-LVIS (`semantic_seg`).

A name in an image is one expression; each annotation is a mask of its own, and the expression means all of that name.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from visa_hf.rle import RLE

from .annotations import AnnotationError
from .base import VisaBuilderConfig, VisaDatasetBuilder
from .brief import brief
from .coco_file import CocoImage, CocoIndex, index_coco, read_annotations
from .features import EXPRESSION_FEATURES, MASK_FEATURES
from .regions import segmentation_rle
from .still_images import check_image_size, expression_row, in_chunks, join, mask_row, stem

_NUM_SHARDS = 64


class PartFiles(NamedTuple):
    """Where one split lies, relative to the data folder."""

    annotations: str
    images: str


class PartBuilder(VisaDatasetBuilder):
    """Base of the sets of parts.

    Configs:
        - `"expressions"`: a row per name in an image: "the head of the dog" for the category "dog:head";
        - `"masks"`: a row per annotation, `anno_id` its id in the file.

    An annotation without pixels gives no row. With `on_error="skip"` a damaged annotation takes the expressions of its
    name in that image with it, so that none is left with half of its objects.
    """

    BUILDER_CONFIGS = [VisaBuilderConfig(name="expressions"), VisaBuilderConfig(name="masks")]
    DEFAULT_CONFIG_NAME = "expressions"

    @abstractmethod
    def part_files(self) -> dict[str, PartFiles]:
        """Return the annotation file and folder of images of each split; those that are there are read."""

    def annotation_files(self) -> Sequence[Path]:
        """Return the annotation files of all splits."""
        return [self.root / files.annotations for files in self.part_files().values()]

    def image_folders(self) -> Sequence[Path]:
        """Return the folders of images."""
        return [self.root / files.images for files in self.part_files().values()]

    def _info(self) -> datasets.DatasetInfo:
        is_masks = self.config.name == "masks"
        return datasets.DatasetInfo(features=MASK_FEATURES if is_masks else EXPRESSION_FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        splits = self.part_files()
        found = {split: files for split, files in splits.items() if (self.root / files.annotations).is_file()}
        if not found:
            self.require(next(iter(splits.values())).annotations)
        generators = []
        for split, files in found.items():
            index = index_coco(self.root / files.annotations, self.skip_or_raise)
            shards = self._shards(index, self.root / files.annotations)
            kwargs = {"files": tuple(files), "queries": tuple(self._queries(index, files).items()), "images": shards}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=kwargs))
        return generators

    def _queries(self, index: CocoIndex, files: PartFiles) -> dict[int, str]:
        queries = {}
        for category_id, name in index.categories.items():
            try:
                queries[category_id] = part_query(name, file=self.root / files.annotations)
            except AnnotationError as error:
                self.skip_or_raise(error)
        return queries

    def _shards(self, index: CocoIndex, file: Path) -> list[tuple[tuple[CocoImage, np.ndarray], ...]]:
        """Return the images that have annotations, each with where those lie in the file, in shards."""
        spans_of: dict[int, list[int]] = {}
        for number, image_id in enumerate(index.image_ids.tolist()):
            spans_of.setdefault(image_id, []).append(number)
        for image_id in sorted(spans_of.keys() - index.images.keys()):
            annotation = str(index.annotation_ids[spans_of[image_id][0]])
            text = f"`image_id` is {image_id}, which none of the images has."
            self.skip_or_raise(AnnotationError.at(text, file=file, annotation=annotation))
        seen: dict[str, CocoImage] = {}
        images = []
        for image_id, image in index.images.items():
            other = seen.setdefault(stem(image.file_name), image)
            if other is not image:
                text = f"two images have one name: {other.file_name} and {image.file_name}."
                self.skip_or_raise(AnnotationError.at(text, file=file))
            elif image_id in spans_of:
                images.append((image, index.spans[spans_of[image_id]]))
        return in_chunks(images, _NUM_SHARDS)

    def _generate_examples(
        self,
        files: tuple[str, str],
        queries: tuple[tuple[int, str], ...],
        images: list[tuple[tuple[CocoImage, np.ndarray], ...]],
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        file, query_of = self.root / files[0], dict(queries)
        for image, spans in (image for chunk in images for image in chunk):
            frame = join(files[1], image.file_name)
            try:
                check_image_size(self.root, frame, (image.height, image.width), file=file)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            if self.config.name == "masks":
                yield from self._mask_rows(file, image, spans, query_of)
            else:
                yield from self._expression_rows(file, frame, image, spans, query_of)

    def _mask_rows(
        self, file: Path, image: CocoImage, spans: np.ndarray, query_of: dict[int, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        video_id = stem(image.file_name)
        for annotation in read_annotations(file, spans):
            try:
                rle = _read_mask(annotation, image, query_of, file)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            if rle is not None:
                anno_id = str(annotation["id"])
                yield anno_id, mask_row(video_id, anno_id, rle)

    def _expression_rows(
        self, file: Path, frame: str, image: CocoImage, spans: np.ndarray, query_of: dict[int, str]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        video_id = stem(image.file_name)
        annotations_of: dict[str, list[dict[str, Any]]] = {}
        damaged: dict[str | None, AnnotationError] = {}
        for annotation in read_annotations(file, spans):
            category_id = annotation.get("category_id")
            query = query_of.get(category_id) if isinstance(category_id, int) else None
            try:
                if _read_mask(annotation, image, query_of, file) is not None and query is not None:
                    annotations_of.setdefault(query, []).append(annotation)
            except AnnotationError as error:
                damaged.setdefault(query, error)
        for problem in damaged.values():
            self.skip_or_raise(problem)
        for query, annotations in annotations_of.items():
            if query in damaged:
                continue
            expression_id = str(min(annotation["category_id"] for annotation in annotations))
            row = expression_row(
                self.SHORT_NAME,
                frame,
                (image.height, image.width),
                video_id=video_id,
                expression_id=expression_id,
                expression=query,
                anno_ids=[str(annotation["id"]) for annotation in annotations],
            )
            yield f"{video_id}/{expression_id}", row


def part_query(category: str, **where: Any) -> str:
    """Return how one asks for a category: `"mug:handle"` -> `"the handle of the mug"`, `"trash_can"` -> `"trash can"`.

    Raises:
        AnnotationError: it has more than one colon, or nothing before or behind it.
    """
    # As in LISA, what tells meanings apart goes: "bat_(animal)" -> "bat". Differs from LISA: "_" becomes a space, and
    # of its two forms of a part, "mug handle" and "the handle of the mug", it is always the second.
    names = [" ".join(name.split("_(")[0].replace("_", " ").split()) for name in category.split(":")]
    if len(names) > 2 or not all(names):
        raise AnnotationError.at(f"the category {brief(category)} is neither `object` nor `object:part`.", **where)
    return names[0] if len(names) == 1 else f"the {names[1]} of the {names[0]}"


def _read_mask(annotation: dict[str, Any], image: CocoImage, query_of: dict[int, str], file: Path) -> RLE | None:
    """Return an annotation's mask, `None` if it has no pixels."""
    where: dict[str, Any] = {"file": file, "video": stem(image.file_name), "annotation": str(annotation["id"])}
    category_id = annotation.get("category_id")
    if not isinstance(category_id, int) or category_id not in query_of:
        raise AnnotationError.at(f"`category_id` is {brief(category_id)}, which none of the categories has.", **where)
    where["expression"] = query_of[category_id]
    return segmentation_rle(annotation.get("segmentation"), image.height, image.width, **where)
