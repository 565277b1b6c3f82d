"""MeViS (Ding et al., ICCV 2023): expressions about motion; an expression may mean several objects.

Layout: https://github.com/henghuiding/MeViS. The masks of `valid` are not published: its authors' server scores it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from .mask_files import JSONMasks
from .referring_annotations import read_meta
from .referring_videos import ReferringSplit, ReferringVideoBuilder

_SPLITS = ("train", "valid_u", "valid")
_WITHOUT_MASKS = ("valid",)


class MeViS(ReferringVideoBuilder):
    """MeViS: `MeViS("expressions", data_dir=".../mevis")`.

    Splits, as far as they are there: `train`, `valid_u`, and `valid`, whose expressions name no masks.

    Args:
        config_name (`str`, *optional*): `"expressions"` (default), `"masks"` or `"videos"`.
        data_dir (`str` or `Path`): the folder `mevis`.
        on_error (`str`): `"raise"` or `"skip"`.
    """

    SHORT_NAME = "mevis"
    LAYOUT = """\
  <split>/JPEGImages/<video>/<frame>.jpg, where <split> is train, valid_u or valid
  <split>/meta_expressions.json
  <split>/mask_dict.json (not in valid)"""

    def annotation_files(self) -> Sequence[Path]:
        """See the base."""
        names = ("meta_expressions.json", "mask_dict.json")
        return [self.root / split / name for split in _SPLITS for name in names]

    def image_folders(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / split / "JPEGImages" for split in _SPLITS]

    def find_splits(self) -> list[ReferringSplit]:
        """See the base."""
        return [self._split(name) for name in _SPLITS if os.path.exists(self.root / name / "meta_expressions.json")]

    def _split(self, name: str) -> ReferringSplit:
        meta, _ = self.require(f"{name}/meta_expressions.json", f"{name}/JPEGImages")
        path = self.root / name / "mask_dict.json"
        if name not in _WITHOUT_MASKS:
            self.require(f"{name}/mask_dict.json")
        masks = JSONMasks(str(path)) if path.exists() else None
        return ReferringSplit(name, read_meta(str(meta)), f"{name}/JPEGImages", masks)
