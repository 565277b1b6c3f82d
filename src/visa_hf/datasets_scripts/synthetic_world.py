"""The builder of the synthetic world: what `visa data synthesize` wrote, read with the answers that it knows.

The files are in ReVOS's layout (synthetic.py), so `ReVOS` reads them too, without answers and with the compositions
that are never seen in training among the rest of "valid".
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets import Features, Value

from .annotations import AnnotationError, read_json
from .features import EXPRESSION_FEATURES
from .referring_videos import ReferringSplit
from .revos import ReVOS
from .synthetic import DESCRIPTION_FILE


class Synthetic(ReVOS):
    """A synthetic data set: `Synthetic("masks", data_dir=DIR)`.

    Splits: `train`, `valid` and `unseen`, whose shapes all have compositions of colour, form and texture that the
    others never have. Configurations: `expressions` (with `answer`, what a model shall say, and `idea`, what kind of
    thought it takes), `masks` and `videos`.

    Args:
        config_name (`str`, *optional*): `"expressions"` by default.
        data_dir (`str` or `Path`): the folder.
        on_error (`str`): `"raise"` or `"skip"`.
    """

    SHORT_NAME = "synthetic"
    LAYOUT = f"""\
{ReVOS.LAYOUT}
  {DESCRIPTION_FILE}
  (`visa data synthesize DIR` writes all of these)"""
    EXPRESSION_COLUMNS = Features({**EXPRESSION_FEATURES, "answer": Value("string"), "idea": Value("string")})

    def annotation_files(self) -> Sequence[Path]:
        """See the base."""
        return [*super().annotation_files(), self.root / DESCRIPTION_FILE]

    def find_splits(self) -> list[ReferringSplit]:
        """See the base."""
        (description,) = self.require(DESCRIPTION_FILE)
        content = read_json(description)
        names = content.get("unseen_videos") if isinstance(content, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AnnotationError.at("has no list `unseen_videos` of names.", file=str(description))
        unseen = set(names)
        splits = []
        for split in super().find_splits():
            parts = {split.name: [video for video in split.videos if video.video_id not in unseen]}
            parts["unseen"] = [video for video in split.videos if video.video_id in unseen]
            splits += [replace(split, name=name, videos=videos) for name, videos in parts.items() if videos]
        return splits
