"""ReVOS (Yan et al., VISA, ECCV 2024): referring and reasoning expressions, and expressions of no such object.

Layout: https://github.com/cilinyan/ReVOS-api. Masks are streamed from `mask_dict.json`, which is never in memory.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from visa_hf.rle import RLE

from .foregrounds import locate_foregrounds, read_foreground
from .mask_files import JSONMasks
from .referring_annotations import ReferringVideo, read_meta
from .referring_videos import VIDEOS, ReferringSplit, ReferringVideoBuilder

_META = {"train": "meta_expressions_train_.json", "valid": "meta_expressions_valid_.json"}
_MASKS = "mask_dict.json"
_FOREGROUND = "mask_dict_foreground.json"
_IMAGES = "JPEGImages"


class ReVOS(ReferringVideoBuilder):
    """ReVOS: `ReVOS("masks", data_dir=".../ReVOS")`.

    Splits: `train` and `valid`. Configurations: `expressions`, `masks`, `videos`; the last one has the foreground (all
    annotated objects together) of the videos for which it is published.

    Args:
        config_name (`str`, *optional*): `"expressions"` by default.
        data_dir (`str` or `Path`): the folder `ReVOS`.
        on_error (`str`): `"raise"` or `"skip"`.
    """

    SHORT_NAME = "revos"
    LAYOUT = """\
  JPEGImages/<video>/<frame>.jpg
  meta_expressions_train_.json and/or meta_expressions_valid_.json
  mask_dict.json
  mask_dict_foreground.json (for the configuration `videos`)"""

    def annotation_files(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / name for name in (*_META.values(), _MASKS, _FOREGROUND)]

    def image_folders(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / _IMAGES]

    def find_splits(self) -> list[ReferringSplit]:
        """See the base."""
        self.require(_IMAGES)
        (path,) = self.require(_MASKS)
        masks = JSONMasks(str(path))
        found = [(name, self.root / meta) for name, meta in _META.items() if os.path.exists(self.root / meta)]
        splits = [ReferringSplit(name, read_meta(str(meta)), _IMAGES, masks) for name, meta in found]
        if self.config.name == VIDEOS:
            (foreground,) = self.require(_FOREGROUND)
            locate_foregrounds(str(foreground), [video for split in splits for video in split.videos])
        return splits

    def foreground(self, video: ReferringVideo) -> tuple[list[RLE | None], list[float]]:
        """See the base."""
        return read_foreground(str(self.root / _FOREGROUND), video)
