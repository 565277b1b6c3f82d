"""ReasonSeg: images with questions that need thinking, from the folder published with LISA.

Source: LISA (https://huggingface.co/papers/2308.00692, https://github.com/dvlab-research/LISA: `data_processing.py`
for the masks, `reason_seg_dataset.py` for the explanations). Masks are drawn as the published script draws them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from visa_hf.rle import encode_mask

from .annotations import AnnotationError, check_text, parse_json, read_json
from .base import VisaBuilderConfig, VisaDatasetBuilder
from .brief import brief
from .features import MASK_FEATURES, REASON_SEG_FEATURES, TYPE_REASONING
from .image_files import image_size
from .regions import check_polygon, fill_polygon
from .still_images import (
    expression_row,
    in_chunks,
    join,
    mask_row,
    set_folder,
    stem,
)

_SPLITS = ("train", "val", "test")
_NUM_SHARDS = 16

IGNORE_SUFFIX = "/ignore"
"""What `anno_id` of an image's ignore region ends in."""


class ReasonSeg(VisaDatasetBuilder):
    """ReasonSeg's images, their sentences and masks; splits "train", "val" and "test", those that are there.

    Configs:
        - `"expressions"`: a row per sentence of an image, with `is_sentence` and `explanation` (train only);
        - `"masks"`: two rows per image: `anno_id` is the image's name without suffix for the target, and that name
          plus `"/ignore"` for the region to be left out of evaluation, which no expression names (255 in the published
          masks; it is not part of the target). A region without pixels is `None`.

    Args:
        data_dir (`str` or `Path`): LISA's root (`reason_seg/ReasonSeg` below it), or the folder `ReasonSeg` itself.
        config_name (`str`, *optional*): `"expressions"` (default) or `"masks"`.
        **kwargs: as for any builder; `on_error="skip"` leaves out images that cannot be used.
    """

    SHORT_NAME = "reason_seg"
    LAYOUT = """\
    [reason_seg/ReasonSeg/]
      train/ val/ test/        at least one of them: NAME.jpg and NAME.json for each image
      explanatory/train.json   optional: explanations"""
    BUILDER_CONFIGS = [VisaBuilderConfig(name="expressions"), VisaBuilderConfig(name="masks")]
    DEFAULT_CONFIG_NAME = "expressions"

    def annotation_files(self) -> Sequence[Path]:
        """Return the folders of all splits and the explanations."""
        folder = self.root / set_folder(self.root, "reason_seg/ReasonSeg")
        return [folder / name for name in (*_SPLITS, "explanatory/train.json")]

    def _info(self) -> datasets.DatasetInfo:
        features = REASON_SEG_FEATURES if self.config.name == "expressions" else MASK_FEATURES
        return datasets.DatasetInfo(
            description="ReasonSeg: implicit sentences about images, with masks.",
            features=features,
            homepage="https://github.com/dvlab-research/LISA",
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        folder = set_folder(self.root, "reason_seg/ReasonSeg")
        names = [name for name in _SPLITS if (self.root / folder / name).is_dir()]
        if not names:
            self.require(join(folder, "train"))
        generators = []
        for name in names:
            files = [file for file in (self.root / folder / name).iterdir() if file.suffix in (".jpg", ".json")]
            images = [join(folder, name, stem) for stem in sorted({file.stem for file in files})]
            explanations = join(folder, f"explanatory/{name}.json")
            has_explanations = (self.root / explanations).is_file()
            generators.append(
                datasets.SplitGenerator(
                    name=name,
                    gen_kwargs={
                        "images": in_chunks(images, _NUM_SHARDS),
                        "explanations": explanations if has_explanations else None,
                    },
                )
            )
        return generators

    def _generate_examples(
        self, images: list[tuple[str, ...]], explanations: str | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        known = {} if explanations is None else self._read_explanations(self.root / explanations)
        for image in (image for chunk in images for image in chunk):
            try:
                rows = list(self._rows(image, known))
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            yield from rows

    def _rows(self, image: str, explanations: dict[str, dict[str, str]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Make the rows of one image, given by its path without suffix."""
        video_id, frame, file = stem(image + ".jpg"), image + ".jpg", self.root / (image + ".json")
        size = image_size(self.root, frame, video=video_id)
        if not file.is_file():
            raise AnnotationError.at(f"the image {frame} has no annotation; this file is missing.", file=file)
        texts, is_sentence, shapes = read_annotation(file)
        target, ignore = draw_regions(shapes, *size, file=file, video=video_id)
        if self.config.name == "masks":
            for anno_id, region in ((video_id, target), (video_id + IGNORE_SUFFIX, ignore)):
                yield anno_id, mask_row(video_id, anno_id, encode_mask(region) if region.any() else None)
            return
        outputs = explanations.get(f"{video_id}.jpg", {})
        for number, text in enumerate(texts):
            row = expression_row(
                self.SHORT_NAME,
                frame,
                size,
                video_id=video_id,
                expression_id=str(number),
                expression=text,
                anno_ids=[video_id],
                type_id=TYPE_REASONING,
            )
            # As in LISA: the explanation holds for every wording of the image's question, not just for the one listed.
            explanation = outputs.get(text, next(reversed(outputs.values()), None))
            yield f"{video_id}/{number}", {**row, "is_sentence": is_sentence, "explanation": explanation}

    def _read_explanations(self, file: Path) -> dict[str, dict[str, str]]:
        """Return, by image name, the explanation of each query."""
        items = read_json(file)
        if not isinstance(items, list):
            raise AnnotationError.at(
                "holds no JSON array; a list of `image`, `query` and `outputs` is needed.", file=file
            )
        explanations: dict[str, dict[str, str]] = {}
        for number, item in enumerate(items):
            try:
                if not isinstance(item, dict):
                    raise AnnotationError.at(f"item {number} is {brief(item)}; an object is needed.", file=file)
                image, query, outputs = (
                    check_text(item.get(key), f"{key}` of item `{number}", file=file)
                    for key in ("image", "query", "outputs")
                )
                explanations.setdefault(image, {})[query] = outputs
            except AnnotationError as error:
                self.skip_or_raise(error)
        return explanations


def read_annotation(file: Path) -> tuple[list[str], bool, list[dict[str, Any]]]:
    """Read one image's JSON: its sentences, whether they are whole sentences, and its polygons.

    Most files are UTF-8, some cp1252.

    Raises:
        AnnotationError: broken JSON, or `text`, `is_sentence` or `shapes` is missing or of another kind.
    """
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError as error:
            raise AnnotationError.at(f"is neither UTF-8 nor cp1252 text ({error}).", file=file) from error
    annotation = parse_json(text, file)
    if not isinstance(annotation, dict):
        raise AnnotationError.at("holds no JSON object; `{...}` is needed.", file=file)
    texts = annotation.get("text")
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts:
        raise AnnotationError.at(f"`text` is {brief(texts)}; a list of sentences is needed.", file=file)
    is_sentence = annotation.get("is_sentence")
    if not isinstance(is_sentence, bool):
        raise AnnotationError.at(f"`is_sentence` is {brief(is_sentence)}; true or false is needed.", file=file)
    shapes = annotation.get("shapes")
    if not isinstance(shapes, list) or not all(isinstance(shape, dict) for shape in shapes):
        raise AnnotationError.at(
            "`shapes` is no list of objects; polygons with `label` and `points` are needed.", file=file
        )
    return [check_text(text, "text", file=file) for text in texts], is_sentence, shapes


def draw_regions(
    shapes: Sequence[dict[str, Any]], height: int, width: int, **where: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the polygons of an image, from large to small, each over those before it.

    As in LISA (`get_mask_from_json`): corners are cut to whole pixels and OpenCV's rule fills them; the label "flag"
    is left out, one with "ignore" in it makes an ignore region, any other the target.

    Args:
        shapes: each with `label` and `points` `[[x, y], ...]` in pixels.
        height (`int`): of the image.
        width (`int`): of the image.
        where: `file`, `video`: what an error names.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: target and ignore region, each of shape `(H, W)`, bool; they do not overlap.

    Raises:
        AnnotationError: a polygon is damaged or lies far outside the image.
    """
    polygons = []
    for number, shape in enumerate(shapes):
        label = check_text(shape.get("label"), "label", annotation=str(number), **where).lower()
        if label != "flag":
            points = _corners(shape, height, width, annotation=str(number), **where)
            polygons.append(("ignore" in label, fill_polygon(points, height, width)))
    areas = [int(polygon.sum()) for _, polygon in polygons]
    target, ignore = np.zeros((2, height, width), dtype=np.bool_)
    # Of two of the same size the later one is drawn first: the published script reverses an ascending order.
    for number in np.argsort(areas, kind="stable")[::-1]:
        is_ignored, polygon = polygons[number]
        target[polygon] = not is_ignored
        ignore[polygon] = is_ignored
    return target, ignore


def _corners(shape: dict[str, Any], height: int, width: int, **where: Any) -> np.ndarray:
    """Return the corners of a shape as whole pixels, `(P, 2)`, int64, after checking them."""
    if shape.get("shape_type", "polygon") in ("rectangle", "circle"):
        raise AnnotationError.at(f"the shape is a {shape['shape_type']}; a polygon is needed.", **where)
    points = shape.get("points")
    if not isinstance(points, list) or not all(isinstance(point, list) for point in points):
        raise AnnotationError.at("`points` is no list of [x, y]; the corners of a polygon are needed.", **where)
    for point in points:
        if len(point) != 2:
            raise AnnotationError.at(
                f"the point {brief(point)} has {len(point)} coordinates; x and y are needed.", **where
            )
    check_polygon([value for point in points for value in point], height, width, **where)
    return np.array(points, dtype=np.float64).astype(np.int64)
