"""LLaVA-Instruct-150k: conversations about COCO images (https://huggingface.co/papers/2304.08485).

Read from the folder layout of LISA (https://github.com/dvlab-research/LISA). Conversations have no masks.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from visa_hf.datasets_scripts.annotations import AnnotationError, iter_json_array
from visa_hf.datasets_scripts.base import VisaBuilderConfig, VisaDatasetBuilder
from visa_hf.datasets_scripts.conversations import read_path, read_turns
from visa_hf.datasets_scripts.features import CONVERSATION_FEATURES

_JSON = "llava_dataset/llava_instruct_150k.json"
_IMAGES = "coco/train2017"


class LLaVAInstruct(VisaDatasetBuilder):
    """Builder of LLaVA-Instruct-150k.

    Config "conversations" (`CONVERSATION_FEATURES`, all rounds); split "train". Several conversations may be about one
    image: `video_id` is the image's name without suffix, `conversation_id` the place in the file, counted from 0.

    Args:
        data_dir: LISA's root.
    """

    SHORT_NAME = "llava_instruct"
    LAYOUT = f"""\
{_JSON}
{_IMAGES}/000000000009.jpg ..."""
    BUILDER_CONFIGS = [VisaBuilderConfig(name="conversations")]
    DEFAULT_CONFIG_NAME = "conversations"

    def annotation_files(self) -> list[Path]:
        """Return the one file."""
        return [self.root / _JSON]

    def image_folders(self) -> list[Path]:
        """Return the folder of the images."""
        return [self.root / _IMAGES]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=CONVERSATION_FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        path, _ = self.require(_JSON, _IMAGES)
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"path": str(path)})]

    def _generate_examples(self, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, item in enumerate(iter_json_array(path)):
            try:
                row = self._row(item, number, path)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            yield number, row

    def _row(self, item: Any, number: int, path: str) -> dict[str, Any]:
        where: dict[str, Any] = {"file": path, "annotation": str(number)}
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            raise AnnotationError.at("the item has no `image`, the name of a file.", **where)
        frame = read_path(self.root, _IMAGES, item["image"], **where)
        return {
            "dataset": self.SHORT_NAME,
            "video_id": Path(frame).stem,
            "conversation_id": str(number),
            "frames": [frame],
            "turns": read_turns(item.get("conversations"), video=item["image"], **where),
        }
