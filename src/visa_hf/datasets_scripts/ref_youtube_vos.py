"""Ref-YouTube-VOS (Seo et al., URVOS, ECCV 2020): expressions about one object each.

Layout: https://youtube-vos.org/dataset/rvos/. The masks of the validation videos are not published: a server scores
them. The published list for validation also holds the test videos; what is in the list for test is left out.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .object_masks import object_mask_files, open_object_masks
from .referring_annotations import read_meta, read_video_ids
from .referring_videos import ReferringSplit, ReferringVideoBuilder

_META = {name: f"meta_expressions/{name}/meta_expressions.json" for name in ("train", "valid", "test")}


class RefYoutubeVOS(ReferringVideoBuilder):
    """Ref-YouTube-VOS: `RefYoutubeVOS("expressions", data_dir=".../Ref-Youtube-VOS")`.

    Splits, as far as they are there: `train`, and `valid` (202 videos as published), whose expressions name no masks.
    An object is `<video>/<object number>` in `anno_ids`, whether its masks come from PNGs or from a pickled dict.

    Args:
        config_name (`str`, *optional*): `"expressions"` (default), `"masks"` or `"videos"`.
        data_dir (`str` or `Path`): the folder `Ref-Youtube-VOS`.
        on_error (`str`): `"raise"` or `"skip"`.
    """

    SHORT_NAME = "ref_youtube_vos"
    LAYOUT = """\
  meta_expressions/train/meta_expressions.json
  train/JPEGImages/<video>/<frame>.jpg
  train/mask_dict.pkl, or train/Annotations/<video>/<frame>.png
  train/meta.json (if it is there, objects are looked up in it)
or, for `valid`,
  meta_expressions/{valid,test}/meta_expressions.json
  valid/JPEGImages/<video>/<frame>.jpg"""

    def annotation_files(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / meta for meta in _META.values()] + object_mask_files(self.root / "train")

    def image_folders(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / split / "JPEGImages" for split in ("train", "valid")]

    def find_splits(self) -> list[ReferringSplit]:
        """See the base."""
        splits = []
        if os.path.exists(self.root / _META["train"]):
            self.require("train/JPEGImages")
            videos = read_meta(str(self.root / _META["train"]))
            masks = open_object_masks(self.root, "train", videos)
            splits.append(ReferringSplit("train", videos, "train/JPEGImages", masks))
        if os.path.exists(self.root / _META["valid"]):
            _, test = self.require("valid/JPEGImages", _META["test"])
            videos = read_meta(str(self.root / _META["valid"]), without=read_video_ids(str(test)))
            splits.append(ReferringSplit("valid", videos, "valid/JPEGImages", None))
        return splits
