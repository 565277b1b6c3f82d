"""Sets whose masks are label images: one PNG per image, whose pixels are numbers of classes.

The base of ADE20K, COCO-Stuff and Mapillary (`semantic_seg`). A class that occurs in an image is one expression, and
all its pixels together are one mask, cut out of the label image when the masks are prepared.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from .annotations import AnnotationError
from .base import VisaBuilderConfig, VisaDatasetBuilder
from .features import EXPRESSION_FEATURES, MASK_FEATURES
from .image_files import PILLOW_ERRORS, open_image
from .regions import label_rles
from .still_images import check_image_size, expression_row, in_chunks, join, mask_row, stem

_NUM_SHARDS = 64


class LabelFolders(NamedTuple):
    """Where one split lies, relative to the data folder."""

    labels: str
    images: str


class LabelImageBuilder(VisaDatasetBuilder):
    """Base of the sets of label images.

    Configs:
        - `"expressions"`: a row per class name in an image; `expression` is the name as published;
        - `"masks"`: a row per label in an image, `anno_id` `"<image>/<label>"`: all pixels of the label together.

    Expressions and masks of an image are made of the same checks, so with `on_error="skip"` an image is missing from
    both or from none.
    """

    BUILDER_CONFIGS = [VisaBuilderConfig(name="expressions"), VisaBuilderConfig(name="masks")]
    DEFAULT_CONFIG_NAME = "expressions"

    @abstractmethod
    def label_folders(self) -> dict[str, LabelFolders]:
        """Return the folders of each split; those that are there are read."""

    @abstractmethod
    def names_file(self) -> Path:
        """Return the file with the names of the classes."""

    @abstractmethod
    def classes(self) -> dict[int, str | None]:
        """Return the name of each label, `None` for those that give no row; any other label is an error."""

    def annotation_files(self) -> Sequence[Path]:
        """Return the folders of label images and the file with the names of the classes."""
        return [self.names_file(), *(self.root / folders.labels for folders in self.label_folders().values())]

    def image_folders(self) -> Sequence[Path]:
        """Return the folders of images."""
        return [self.root / folders.images for folders in self.label_folders().values()]

    def _info(self) -> datasets.DatasetInfo:
        is_masks = self.config.name == "masks"
        return datasets.DatasetInfo(features=MASK_FEATURES if is_masks else EXPRESSION_FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        classes = tuple(self.classes().items())
        splits = self.label_folders()
        found = {split: folders for split, folders in splits.items() if (self.root / folders.labels).is_dir()}
        if not found:
            self.require(next(iter(splits.values())).labels)
        generators = []
        for split, folders in found.items():
            self.require(folders.images)
            labels = sorted(file.name for file in (self.root / folders.labels).iterdir() if file.suffix == ".png")
            if not labels:
                raise FileNotFoundError(
                    f"{self.root / folders.labels} has no .png file. It is needed, with:\n{self.LAYOUT}"
                )
            kwargs = {"folders": tuple(folders), "classes": classes, "labels": in_chunks(labels, _NUM_SHARDS)}
            generators.append(datasets.SplitGenerator(name=split, gen_kwargs=kwargs))
        return generators

    def _generate_examples(
        self,
        folders: tuple[str, str],
        classes: tuple[tuple[int, str | None], ...],
        labels: list[tuple[str, ...]],
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        names = dict(classes)
        label_folder, image_folder = folders
        for name in (name for chunk in labels for name in chunk):
            video_id = stem(name)
            file, frame = self.root / label_folder / name, join(image_folder, video_id + ".jpg")
            try:
                pixels = read_label_image(file)
                size = (pixels.shape[0], pixels.shape[1])
                check_image_size(self.root, frame, size, file=file)
                present = _present(pixels)
                _refuse_unknown([label for label in present if label not in names], file, frame)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            if self.config.name == "masks":
                for label, rle in label_rles(pixels).items():
                    if names[label] is not None:
                        anno_id = f"{video_id}/{label}"
                        yield anno_id, mask_row(video_id, anno_id, rle)
                continue
            labels_of: dict[str, list[int]] = {}
            for label in present:
                if (class_name := names[label]) is not None:
                    labels_of.setdefault(class_name, []).append(label)
            for class_name, numbers in labels_of.items():
                row = expression_row(
                    self.SHORT_NAME,
                    frame,
                    size,
                    video_id=video_id,
                    expression_id=str(numbers[0]),
                    expression=class_name,
                    anno_ids=[f"{video_id}/{label}" for label in numbers],
                )
                yield f"{video_id}/{numbers[0]}", row


def read_label_image(file: Path) -> np.ndarray:
    """Read a label image: grey or palette, 8 or 16 bits.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8 or uint16.

    Raises:
        AnnotationError: it cannot be read, or is a colour picture.
    """
    try:
        with open_image(file) as image:
            mode, pixels = image.mode, np.asarray(image)
    except PILLOW_ERRORS as error:
        raise AnnotationError.at(f"the label image cannot be read ({error}).", file=file) from error
    if mode == "I":
        pixels = pixels.astype(np.uint16)
    elif mode not in ("L", "P", "I;16"):
        raise AnnotationError.at(
            f"the label image has the mode {mode!r}; one number per pixel is needed, as grey or palette.", file=file
        )
    return pixels


def _present(pixels: np.ndarray) -> list[int]:
    """Return the labels that occur, in ascending order."""
    occurs = np.zeros(np.iinfo(pixels.dtype).max + 1, dtype=np.bool_)
    occurs[pixels.ravel()] = True
    return np.flatnonzero(occurs).tolist()


def _refuse_unknown(labels: list[int], file: Path, frame: str) -> None:
    if labels:
        shown = ", ".join(map(str, labels[:5])) + (", ..." if len(labels) > 5 else "")
        raise AnnotationError.at(
            f"the label image has the unknown class {shown}. Another version of the label images, or of the names?",
            file=file,
            frame=frame,
        )
