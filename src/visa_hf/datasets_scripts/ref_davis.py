"""Ref-DAVIS17 (Khoreva et al., ACCV 2018): each object of DAVIS 2017 described by four annotators.

Layout: the lists of expressions as ReferFormer (https://github.com/wjn922/ReferFormer) makes them from the published
text files: a video's expressions are numbered from 0, object by object, the four annotators of each in their order.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .annotations import AnnotationError
from .object_masks import object_mask_files, open_object_masks
from .referring_annotations import ReferringVideo, read_meta
from .referring_videos import ReferringSplit, ReferringVideoBuilder

NUM_ANNOTATORS = 4

_SPLITS = ("train", "valid")


def annotator_of(expression_id: str) -> int:
    """Return who wrote an expression, from 0 to 3; scores are means over the four annotators' sets of expressions."""
    return int(expression_id) % NUM_ANNOTATORS


class RefDAVIS17(ReferringVideoBuilder):
    """Ref-DAVIS17: `RefDAVIS17("expressions", data_dir=".../davis17")`.

    Splits, as far as they are there: `train` and `valid`. `annotator_of(expression_id)` tells the annotator. An object
    is `<video>/<object number>` in `anno_ids`, whether its masks come from PNGs or from a pickled dict.

    Args:
        config_name (`str`, *optional*): `"expressions"` (default), `"masks"` or `"videos"`.
        data_dir (`str` or `Path`): the folder `davis17`.
        on_error (`str`): `"raise"` or `"skip"`.
    """

    SHORT_NAME = "ref_davis"
    LAYOUT = """\
  meta_expressions/<split>/meta_expressions.json, where <split> is train or valid
  <split>/JPEGImages/<video>/<frame>.jpg
  <split>/mask_dict.pkl, or <split>/Annotations/<video>/<frame>.png
  <split>/meta.json (if it is there, objects are looked up in it)"""

    def annotation_files(self) -> Sequence[Path]:
        """See the base."""
        lists = [self.root / _meta(split) for split in _SPLITS]
        return lists + [file for split in _SPLITS for file in object_mask_files(self.root / split)]

    def image_folders(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / split / "JPEGImages" for split in _SPLITS]

    def find_splits(self) -> list[ReferringSplit]:
        """See the base."""
        splits = []
        for name in _SPLITS:
            if os.path.exists(self.root / _meta(name)):
                self.require(f"{name}/JPEGImages")
                videos = read_meta(str(self.root / _meta(name)))
                _check_annotators(videos)
                masks = open_object_masks(self.root, name, videos)
                splits.append(ReferringSplit(name, videos, f"{name}/JPEGImages", masks))
        return splits


def _meta(split: str) -> str:
    return f"meta_expressions/{split}/meta_expressions.json"


def _check_annotators(videos: Sequence[ReferringVideo]) -> None:
    """Give a problem to expressions of videos where the number does not tell the annotator."""
    for video in videos:
        by_id = {item.expression_id: item for item in video.expressions}
        ordered = [by_id.get(str(number)) for number in range(len(by_id))]
        objects = [None if item is None else item.object_ids for item in ordered]
        groups = [objects[start : start + NUM_ANNOTATORS] for start in range(0, len(objects), NUM_ANNOTATORS)]
        if all(len(group) == NUM_ANNOTATORS and None not in group and len(set(group)) == 1 for group in groups):
            continue
        for item in video.expressions:
            item.problem = item.problem or AnnotationError.at(
                f"the video's {len(by_id)} expressions are not numbered from 0 on, {NUM_ANNOTATORS} for each object: "
                "which annotator wrote which cannot be told.",
                file=video.file,
                video=video.video_id,
                expression=item.expression_id,
            )
