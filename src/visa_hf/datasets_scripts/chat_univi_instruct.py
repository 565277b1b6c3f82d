"""Chat-UniVi-Instruct: conversations about images, pairs of images and videos (https://huggingface.co/papers/2311.08046).

The three parts that VISA trains on: MIMIC-IT's images, ScienceQA, and ActivityNet's videos, from the folders of
https://huggingface.co/datasets/Chat-UniVi/Chat-UniVi-Instruct. Conversations have no masks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np

from visa_hf.datasets_scripts.annotations import AnnotationError, check_id, iter_json_array
from visa_hf.datasets_scripts.base import VisaBuilderConfig, VisaDatasetBuilder
from visa_hf.datasets_scripts.brief import brief
from visa_hf.datasets_scripts.conversations import read_path, read_turns
from visa_hf.datasets_scripts.features import CONVERSATION_FEATURES
from visa_hf.modeling.frame_source_visa import open_frames

_MIMIC = "Fine-tuning/MIMIC_imageonly"
_JSON = {
    "mimic": f"{_MIMIC}/MIMIC-IT-imageonly.json",
    "scienceqa": "ScienceQA_tuning/llava_train_QCM-LEA.json",
    "video": "Fine-tuning/VIDEO/video_chat.json",
}
_VIDEOS = "Fine-tuning/VIDEO/Activity_Videos"
_SCIENCEQA_IMAGES = "ScienceQA_tuning/train"
# The name of an image tells its part; the archives unpack to `images`, and CGD's folder is spelt both ways.
_MIMIC_FOLDERS = {
    "CGD": ("CDG/images", "CGD/images", "CDG", "CGD"),
    "LA": ("LA/images", "LA"),
    "SD": ("SD/images", "SD"),
}
# Codecs of which every packet is one shown frame, so that an mp4's index tells their number.
_COUNTED_BY_INDEX = ("h264", "hevc", "av1", "libdav1d", "vp9", "mpeg4")


@dataclass
class ChatUniViConfig(VisaBuilderConfig):
    """Config of `ChatUniViInstruct`.

    Args:
        max_frames: a video's row names one frame per second, or, if these are more, so many of them, evenly spread,
            the first and the last among them. As Chat-UniVi reads videos.
    """

    max_frames: int = 64


class ChatUniViInstruct(VisaDatasetBuilder):
    """Builder of Chat-UniVi-Instruct.

    Configs "mimic", "scienceqa", "video", each alone, and "conversations", all three (`CONVERSATION_FEATURES`, all
    rounds); split "train". A row's frames: the images that it names, in their order; none, for ScienceQA's questions
    without picture; some of a video's (`ChatUniViConfig`). `conversation_id` is the part and the place in its file.

    Args:
        data_dir: the root, with `Fine-tuning` and `ScienceQA_tuning`.
    """

    BUILDER_CONFIG_CLASS = ChatUniViConfig
    SHORT_NAME = "chat_univi_instruct"
    LAYOUT = f"""\
{_JSON["mimic"]}
{_MIMIC}/CDG/images, {_MIMIC}/LA/images, {_MIMIC}/SD/images
{_JSON["scienceqa"]}
{_SCIENCEQA_IMAGES}/1/image.png ...
{_JSON["video"]}
{_VIDEOS}/v_....mp4 ..."""
    BUILDER_CONFIGS = [ChatUniViConfig(name=name) for name in ("conversations", *_JSON)]
    DEFAULT_CONFIG_NAME = "conversations"

    def annotation_files(self) -> list[Path]:
        """Return the files of all parts, and the videos, whose lengths are read."""
        return [*(self.root / path for path in _JSON.values()), self.root / _VIDEOS]

    def image_folders(self) -> list[Path]:
        """Return the folders of the images."""
        return [self.root / _MIMIC, self.root / _SCIENCEQA_IMAGES]

    def _info(self) -> datasets.DatasetInfo:
        # `datasets` sets the fields of a config by name, past its constructor.
        if type(self.config.max_frames) is not int or self.config.max_frames < 1:
            raise ValueError(f"`max_frames` is {self.config.max_frames!r}; a number of frames from 1 on is needed.")
        return datasets.DatasetInfo(features=CONVERSATION_FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        parts = list(_JSON) if self.config.name == "conversations" else [self.config.name]
        self.require(*(_JSON[part] for part in parts))
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"parts": parts})]

    def _generate_examples(self, parts: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        lengths: dict[str, tuple[int, Fraction | None]] = {}
        for part in parts:
            path = self.root / _JSON[part]
            for number, item in enumerate(iter_json_array(path)):
                try:
                    row = self._row(item, part, number, path, lengths)
                except AnnotationError as error:
                    self.skip_or_raise(error)
                    continue
                yield row["conversation_id"], row

    def _row(
        self, item: Any, part: str, number: int, path: Path, lengths: dict[str, tuple[int, Fraction | None]]
    ) -> dict[str, Any]:
        where: dict[str, Any] = {"file": path, "annotation": str(number)}
        if not isinstance(item, dict):
            raise AnnotationError.at("the item is no object with `conversations`.", **where)
        if part == "video":
            video = read_path(self.root, _VIDEOS, item.get("video"), **where)
            video_id = PurePosixPath(video).stem
            frames = self._video_frames(video, lengths, where)
        else:
            frames = self._images(item.get("image"), part, where)
            video_id = (
                str(PurePosixPath(frames[0]).with_suffix("")) if frames else check_id(item.get("id"), "id", **where)
            )
        return {
            "dataset": self.SHORT_NAME,
            "video_id": video_id,
            "conversation_id": f"{part}_{number}",
            "frames": frames,
            "turns": read_turns(item.get("conversations"), may_open_with_answer=True, **where),
        }

    def _images(self, names: Any, part: str, where: dict[str, Any]) -> list[str]:
        """The images of a row of MIMIC-IT or ScienceQA: one, several, or, for ScienceQA, none."""
        if names is None and part == "scienceqa":
            return []
        listed = names if isinstance(names, list) else [names]
        if not listed or not all(isinstance(name, str) for name in listed):
            raise AnnotationError.at(
                f"`image` is {brief(names)}; the name of a file, or a list of them, is needed.", **where
            )
        paths = [name.replace("\\", "/") for name in listed]  # ScienceQA's were written on Windows
        if part == "scienceqa":
            return [read_path(self.root, _SCIENCEQA_IMAGES, path, **where) for path in paths]
        folder = self._mimic_folder(paths[0], where)
        return [read_path(self.root, folder, path, **where) for path in paths]

    def _mimic_folder(self, path: str, where: dict[str, Any]) -> str:
        for mark, folders in _MIMIC_FOLDERS.items():
            if mark in path:
                found = [f"{_MIMIC}/{folder}" for folder in folders if (self.root / _MIMIC / folder).is_dir()]
                if found:
                    return found[0]
                raise AnnotationError.at(
                    f"there is no folder `{_MIMIC}/{folders[0]}` for the image `{path}`.", **where
                )
        raise AnnotationError.at(f"the image {brief(path)} names none of the parts CGD, LA and SD.", **where)

    def _video_frames(
        self, video: str, lengths: dict[str, tuple[int, Fraction | None]], where: dict[str, Any]
    ) -> list[str]:
        if video not in lengths:
            try:
                lengths[video] = video_length(self.root / video)
            except (ValueError, OSError) as error:
                raise AnnotationError.at(str(error), **where) from error
        return [f"{video}#{index}" for index in spread_frames(*lengths[video], self.config.max_frames)]


def video_length(path: Path) -> tuple[int, Fraction | None]:
    """Count the frames of a video file, from the index at its beginning or end where that suffices.

    Returns:
        The number of frames that `open_frames` has, and how many there are per second.

    Raises:
        ValueError, OSError: it is no video, or damaged.
    """
    import av  # only here: rows without videos do not need it

    try:
        with av.open(str(path), metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if stream is not None and "mp4" in container.format.name and stream.codec_context is not None:
                entries = list(stream.index_entries)
                is_counted = stream.codec_context.name in _COUNTED_BY_INDEX and len(entries) == stream.frames > 0
                is_whole = all(entry.pos + entry.size <= path.stat().st_size for entry in entries)
                if is_counted and is_whole:
                    return sum(not entry.is_discard for entry in entries), stream.average_rate
    except av.FFmpegError:
        pass  # opened again below, where the message says what is wrong with it
    with open_frames(path) as source:
        return source.num_frames, source.fps


def spread_frames(num_frames: int, fps: Fraction | None, max_frames: int) -> list[int]:
    """Choose one frame per second, or `max_frames` of these, evenly spread from the first to the last."""
    seconds = range(0, num_frames, max(1, round(fps or 1)))
    if len(seconds) <= max_frames:
        return list(seconds)
    return [seconds[int(place)] for place in np.linspace(0, len(seconds) - 1, max_frames)]
