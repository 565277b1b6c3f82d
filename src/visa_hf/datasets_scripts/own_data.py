"""Your own data: videos, and a JSON line for each expression with the masks of the frames that you annotated.

A folder holds a JSONL file for each split (`train.jsonl`, `valid.jsonl`, ...) and whatever the lines name, by paths
relative to the folder. A line:

    {"video": "clips/street.mp4", "expression": "the car that turns left", "type_id": 0,
     "masks": {"0": "masks/street_0.png", "12": [[10, 10, 90, 10, 90, 60]], "24": null}}

`video` is a video file, an image, or a folder of frames (in natural order of their names). `masks` has a key for
each annotated frame (numbered from 0), with a COCO RLE, a list of polygons, the path of a PNG, or `null` for a frame
on which the object is not to be seen. A frame that is not named is unknown, not empty: the column `annotated` says
which are known, and training takes its targets from those alone. What may stand in a line is read in `own_data_lines`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from visa_hf.datasets_scripts.annotations import AnnotationError, walk
from visa_hf.datasets_scripts.base import VisaBuilderConfig, VisaDatasetBuilder
from visa_hf.datasets_scripts.features import EXPRESSION_FEATURES, MASK_FEATURES, VIDEO_FEATURES
from visa_hf.datasets_scripts.own_data_lines import (
    Clip,
    LineReader,
    OwnLine,
    has_masks,
    jsonl_files,
    needs_masks,
    raw_lines,
    split_name,
)

OWN_EXPRESSION_FEATURES = datasets.Features(
    {
        **EXPRESSION_FEATURES,
        "annotated": datasets.List(datasets.Value("int32")),  # frames whose mask is known, ascending
        "answer": datasets.Value("string"),  # what the model shall say, with [SEG]; None for a ready-made answer
        "explanation": datasets.Value("string"),  # what follows a ready-made answer; None if none
    }
)
"""`EXPRESSION_FEATURES` and what only your own data knows."""


class OwnData(VisaDatasetBuilder):
    """Builder of your own data.

    Configs: "expressions" (`OWN_EXPRESSION_FEATURES`), "masks" (`MASK_FEATURES`, one row per line that shows its
    object; `None` on frames without it and on those that are unknown) and "videos" (`VIDEO_FEATURES`, without
    foreground). Splits are the JSONL files, by their names; one without any mask is missing from "masks". A video's id
    is its path.

    Args:
        data_dir: the folder with the JSONL files.
    """

    SHORT_NAME = "own_data"
    LAYOUT = """\
train.jsonl        {"video": "clip.mp4", "expression": "the red car", "masks": {"0": "mask.png"}}  (one a line)
valid.jsonl        further splits, if any
...                what the lines name: videos, images, folders of frames, mask PNGs"""
    BUILDER_CONFIGS = [VisaBuilderConfig(name=name) for name in ("expressions", "masks", "videos")]
    DEFAULT_CONFIG_NAME = "expressions"

    def annotation_files(self) -> list[Path]:
        """Return all files but hidden ones: the lines may name any of them."""
        return [Path(folder, name) for folder, names in walk(self.root, hidden=False) for name in names]

    def _info(self) -> datasets.DatasetInfo:
        features = {"expressions": OWN_EXPRESSION_FEATURES, "masks": MASK_FEATURES, "videos": VIDEO_FEATURES}
        return datasets.DatasetInfo(features=features[self.config.name])

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        generators = []
        for path in jsonl_files(self.root):
            try:
                name = split_name(path)
            except ValueError as error:
                raise AnnotationError.at(str(error), file=path) from error
            # `datasets` cannot open a split without rows.
            if self.config.name == "masks" and not has_masks(path):
                continue
            generators.append(datasets.SplitGenerator(name=name, gen_kwargs={"path": str(path), "split": name}))
        if not generators:
            raise AnnotationError.at("no line of any file has a mask. Annotate some frames first.", file=self.root)
        return generators

    def _generate_examples(self, path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        seen: set[str] = set()
        for line in self._lines(Path(path), split):
            key = f"{line.video}:{line.expression_id}"
            if self.config.name == "expressions":
                yield key, _expression_row(line, key)
            elif self.config.name == "masks" and _shows_object(line):
                masks = [line.masks.get(index) for index in range(len(line.clip.frames))]
                yield key, {"video_id": line.video, "anno_id": key, "rle": masks}
            elif self.config.name == "videos" and line.video not in seen:
                seen.add(line.video)
                yield line.video, _video_row(line.video, line.clip)

    def _lines(self, path: Path, split: str) -> Iterator[OwnLine]:
        # All of a line is read whatever the config, so that all configs agree on the lines that are left out.
        reader = LineReader(self.root, needs_masks(split))
        is_empty = True
        for number, raw in raw_lines(path):
            is_empty = False
            line, problems = reader.read(number, raw)
            if line is not None:
                yield line
                continue
            more = f" ({len(problems) - 1} more: `visa data check` lists all)" if len(problems) > 1 else ""
            self.skip_or_raise(AnnotationError.at(problems[0] + more, file=path, line=number, **reader.place))
        if is_empty:
            raise AnnotationError.at("the file is empty. Write a JSON object a line, or remove it.", file=path)


def _shows_object(line: OwnLine) -> bool:
    """Whether an expression has a row of masks: one that shows no object on any frame needs none."""
    return any(mask is not None for mask in line.masks.values())


def _expression_row(line: OwnLine, key: str) -> dict[str, Any]:
    return {
        "dataset": OwnData.SHORT_NAME,
        "video_id": line.video,
        "expression_id": line.expression_id,
        "expression": line.expression,
        "type_id": line.type_id,
        "anno_ids": [key] if _shows_object(line) else [],
        **_frames_of(line.clip),
        "annotated": sorted(line.masks),
        "answer": line.answer,
        "explanation": line.explanation,
    }


def _video_row(video: str, clip: Clip) -> dict[str, Any]:
    return {"video_id": video, **_frames_of(clip), "foreground_rle": [], "foreground_ratio": []}


def _frames_of(clip: Clip) -> dict[str, Any]:
    return {"frames": list(clip.frames), "height": clip.size[0], "width": clip.size[1]}
