"""RefCOCO, RefCOCO+, RefCOCOg and RefCLEF: sentences that tell one object of an image from the others.

From the folders of https://github.com/lichengunc/refer inside LISA's root (https://github.com/dvlab-research/LISA,
`utils/refer_seg_dataset.py`). The references are a pickle of Python 2, read as plain data: nothing in it runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np

from visa_hf.rle import RLE

from .annotations import AnnotationError, check_text, load_restricted_pickle
from .base import VisaBuilderConfig, VisaDatasetBuilder
from .brief import brief
from .coco_file import CocoImage, Report, check_whole, index_coco, read_annotations
from .features import EXPRESSION_FEATURES, MASK_FEATURES
from .regions import segmentation_rle
from .still_images import (
    check_image_size,
    expression_row,
    in_chunks,
    join,
    mask_row,
    set_folder,
    stem,
)

_SUBSETS = ("refcoco", "refcoco+", "refcocog", "refclef")
_SPLIT_BY = ("unc", "umd", "google", "berkeley")
_SPLITS = ("train", "val", "test", "testA", "testB", "testC")
_NUM_SHARDS = 64


@dataclass
class ReferSegConfig(VisaBuilderConfig):
    """Which of the four sets, and who cut it into splits.

    Args:
        subset: `"refcoco"`, `"refcoco+"`, `"refcocog"` or `"refclef"`.
        split_by: the part in brackets of `refs(unc).p`; by default the first of "unc", "umd", "google" and "berkeley"
            that is there, which makes the published choice: "umd" for RefCOCOg, "unc" for the others.
    """

    subset: str = "refcoco"
    split_by: str | None = None


class _Object(NamedTuple):
    """An object that is referred to: where its annotation lies, and its sentences with their ids."""

    image: CocoImage
    annotation_id: int
    span: tuple[int, int]
    sentences: tuple[tuple[str, str], ...]


class ReferSeg(VisaDatasetBuilder):
    """The four sets of referring expressions about images; splits as their authors name them.

    Configs: `"refcoco_expressions"`, `"refcoco_masks"`, and the same for `refcoco+`, `refcocog` and `refclef`.
        - expressions: a row per sentence; `expression_id` is its `sent_id`, `video_id` the image's name, no suffix;
        - masks: a row per object that is referred to, `anno_id` its `ann_id`; `None` if it has no pixels.

    Splits: those of "train", "val", "test", "testA", "testB" and "testC" that the references name. A reference that
    belongs to several tests ("testAB") is in each of them.

    Args:
        data_dir (`str` or `Path`): LISA's root (`refer_seg` below it), or that folder itself.
        config_name (`str`, *optional*): `"refcoco_expressions"` by default.
        **kwargs: as for any builder; `split_by="google"` chooses another cut, `on_error="skip"` leaves out what cannot
            be used.
    """

    SHORT_NAME = "refer_seg"
    LAYOUT = """\
    [refer_seg/]
      {refcoco,refcoco+,refcocog,refclef}/instances.json
      {refcoco,refcoco+,refclef}/refs(unc).p   refcocog/refs(umd).p   or another cut: google, berkeley
      images/mscoco/images/train2014/NAME.jpg      for refcoco, refcoco+, refcocog
      images/saiapr_tc-12/NAME.jpg                 for refclef"""
    BUILDER_CONFIG_CLASS = ReferSegConfig
    BUILDER_CONFIGS = [
        ReferSegConfig(name=f"{subset}_{rows}", subset=subset)
        for subset in _SUBSETS
        for rows in ("expressions", "masks")
    ]
    DEFAULT_CONFIG_NAME = "refcoco_expressions"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Here, because `datasets` sets the fields of a configuration that is named after it was made.
        cut = self.config.split_by
        if cut not in (None, *_SPLIT_BY):
            raise ValueError(f"`split_by` is {cut!r}; one of {', '.join(_SPLIT_BY)} is needed, or None.")

    def annotation_files(self) -> Sequence[Path]:
        """Return references and instances of all four sets."""
        folder = self.root / set_folder(self.root, "refer_seg")
        names = ["instances.json", *(f"refs({cut}).p" for cut in _SPLIT_BY)]
        return [folder / subset / name for subset in _SUBSETS for name in names]

    def image_folders(self) -> Sequence[Path]:
        """Return the folders of images of all four sets."""
        folder = self.root / set_folder(self.root, "refer_seg")
        return sorted({folder / _image_folder(subset) for subset in _SUBSETS})

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Referring expressions about images, with masks.",
            features=MASK_FEATURES if self._has_masks else EXPRESSION_FEATURES,
            homepage="https://github.com/lichengunc/refer",
        )

    @property
    def _has_masks(self) -> bool:
        return self.config.name.endswith("_masks")

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        base, subset = set_folder(self.root, "refer_seg"), self.config.subset
        folder = join(base, subset)
        cuts = _SPLIT_BY if self.config.split_by is None else (self.config.split_by,)
        refs_files = [join(folder, f"refs({cut}).p") for cut in cuts]
        found = [file for file in refs_files if (self.root / file).is_file()]
        default = join(folder, "refs(umd).p" if subset == "refcocog" else "refs(unc).p")
        refs_path, instances = self.require(
            found[0] if found else refs_files[0] if len(cuts) == 1 else default, join(folder, "instances.json")
        )
        objects = self._objects(refs_path, instances)
        if not objects:
            raise AnnotationError.at(f"has no reference in any of the splits {', '.join(_SPLITS)}.", file=refs_path)
        frames = join(base, _image_folder(subset))
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={
                    "instances": join(folder, "instances.json"),
                    "frames": frames,
                    "objects": in_chunks(objects[split], _NUM_SHARDS),
                },
            )
            for split in _SPLITS
            if split in objects
        ]

    def _objects(self, refs_path: Path, instances: Path) -> dict[str, list[_Object]]:
        """Return the objects that are referred to in each split, in the order of the references."""
        refs = load_restricted_pickle(refs_path)
        if not isinstance(refs, list):
            raise AnnotationError.at(f"holds a {type(refs).__name__}; a list of references is needed.", file=refs_path)
        index = index_coco(instances, self.skip_or_raise)
        row_of = {annotation_id: row for row, annotation_id in enumerate(index.annotation_ids.tolist())}
        # By split and annotation, because an object may be in several references.
        objects: dict[str, dict[int, tuple[CocoImage, list[tuple[str, str]]]]] = {}
        seen: set[str] = set()
        for number, ref in enumerate(refs):
            try:
                splits, annotation_id, image_id, sentences = _read_ref(ref, number, refs_path, self.skip_or_raise)
                if not sentences:
                    continue
                where: dict[str, Any] = {"file": refs_path, "annotation": str(annotation_id)}
                where["expression"] = sentences[0][0]
                if annotation_id not in row_of:
                    raise AnnotationError.at(f"`ann_id` {annotation_id} is not in {instances.name}.", **where)
                if image_id not in index.images or index.image_ids[row_of[annotation_id]] != image_id:
                    raise AnnotationError.at(
                        f"the reference is about image {image_id}, its annotation in {instances.name} about image "
                        f"{index.image_ids[row_of[annotation_id]]}.",
                        **where,
                    )
                twice = [sentence_id for sentence_id, _ in sentences if sentence_id in seen]
                if twice:
                    raise AnnotationError.at(f"`sent_id` {twice[0]} is given to two sentences.", **where)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            seen.update(sentence_id for sentence_id, _ in sentences)
            for split in splits:
                of_split = objects.setdefault(split, {})
                of_split.setdefault(annotation_id, (index.images[image_id], []))[1].extend(sentences)
        return {
            split: [
                _Object(image, annotation_id, tuple(index.spans[row_of[annotation_id]].tolist()), tuple(sentences))
                for annotation_id, (image, sentences) in of_split.items()
            ]
            for split, of_split in objects.items()
        }

    def _generate_examples(
        self, instances: str, frames: str, objects: list[tuple[_Object, ...]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        file = self.root / instances
        chosen = [item for chunk in objects for item in chunk]
        spans = np.array([item.span for item in chosen], dtype=np.int64).reshape(-1, 2)
        for item, annotation in zip(chosen, read_annotations(file, spans), strict=True):
            image, anno_id, video_id = item.image, str(item.annotation_id), stem(item.image.file_name)
            frame = join(frames, image.file_name)
            where: dict[str, Any] = {"file": file, "video": video_id, "annotation": anno_id}
            where["expression"] = item.sentences[0][0]
            try:
                check_image_size(self.root, frame, (image.height, image.width), **where)
                # Made for the expressions too, though not kept: those of a mask that cannot be made are left out.
                rle: RLE | None = segmentation_rle(annotation.get("segmentation"), image.height, image.width, **where)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            if self._has_masks:
                yield anno_id, mask_row(video_id, anno_id, rle)
                continue
            for sentence_id, sentence in item.sentences:
                row = expression_row(
                    self.config.subset,
                    frame,
                    (image.height, image.width),
                    video_id=video_id,
                    expression_id=sentence_id,
                    expression=sentence,
                    anno_ids=[anno_id],
                )
                yield f"{video_id}/{sentence_id}", row


def _image_folder(subset: str) -> str:
    return "images/saiapr_tc-12" if subset == "refclef" else "images/mscoco/images/train2014"


def _read_ref(ref: Any, number: int, file: Path, report: Report) -> tuple[list[str], int, int, list[tuple[str, str]]]:
    """Return the splits of a reference, the ids of its annotation and image, and its sentences with their ids.

    A sentence that cannot be used is reported by itself; the others stay.
    """
    where: dict[str, Any] = {"file": file, "annotation": f"reference {number}"}
    if not isinstance(ref, dict):
        raise AnnotationError.at(f"the reference is {brief(ref)}; a dict is needed.", **where)
    annotation_id = check_whole(ref.get("ann_id"), "ann_id", **where)
    image_id = check_whole(ref.get("image_id"), "image_id", **where)
    published = check_text(ref.get("split"), "split", **where)
    splits = [published] if published in ("train", "val", "test") else []
    if published.startswith("test"):
        splits += [f"test{letter}" for letter in published[4:]]
    if not splits or not set(splits) <= set(_SPLITS):
        raise AnnotationError.at(f"`split` is {brief(published)}; one of {', '.join(_SPLITS)} is needed.", **where)
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(item, dict) for item in sentences):
        raise AnnotationError.at(f"`sentences` is {brief(sentences)}; a list of dicts is needed.", **where)
    found = []
    for item in sentences:
        try:
            sentence_id = str(check_whole(item.get("sent_id"), "sent_id", **where))
            found.append((sentence_id, check_text(item.get("sent"), "sent", expression=sentence_id, **where)))
        except AnnotationError as error:
            report(error)
    return splits, annotation_id, image_id, found
