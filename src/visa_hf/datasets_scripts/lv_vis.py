"""LV-VIS (Wang et al., ICCV 2023) as referring expressions: an object's category is the sentence about it.

Videos: https://github.com/haochenheheda/LVVIS; the lists of expressions and masks were published with VISA. In them
a category's words are joined by "_"; rows have spaces.
"""

from collections.abc import Sequence
from pathlib import Path

from .mask_files import JSONMasks
from .referring_annotations import read_meta
from .referring_videos import ReferringSplit, ReferringVideoBuilder


class LVVIS(ReferringVideoBuilder):
    """LV-VIS: `LVVIS("expressions", data_dir=".../lvvis")`.

    Split: `train`.

    Args:
        config_name (`str`, *optional*): `"expressions"` (default), `"masks"` or `"videos"`.
        data_dir (`str` or `Path`): the folder `lvvis`.
        on_error (`str`): `"raise"` or `"skip"`.
    """

    SHORT_NAME = "lv_vis"
    LAYOUT = """\
  train/JPEGImages/<video>/<frame>.jpg
  train/meta_expressions.json
  train/mask_dict.json"""

    def annotation_files(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / "train" / name for name in ("meta_expressions.json", "mask_dict.json")]

    def image_folders(self) -> Sequence[Path]:
        """See the base."""
        return [self.root / "train" / "JPEGImages"]

    def find_splits(self) -> list[ReferringSplit]:
        """See the base."""
        meta, masks, _ = self.require("train/meta_expressions.json", "train/mask_dict.json", "train/JPEGImages")
        videos = read_meta(str(meta))
        for video in videos:
            for item in video.expressions:
                item.text = item.text.replace("_", " ")
        return [ReferringSplit("train", videos, "train/JPEGImages", JSONMasks(str(masks)))]
