"""What the builders of the referring and reasoning video sets share: from files to rows.

A subclass says which splits there are, in which files, and of which kind their masks are. Expressions and masks are
checked together, so that an expression never names masks that the other configuration leaves out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from .annotations import AnnotationError
from .base import VisaBuilderConfig, VisaDatasetBuilder
from .features import EXPRESSION_FEATURES, MASK_FEATURES, TYPE_NO_OBJECT, VIDEO_FEATURES
from .image_files import image_size
from .mask_files import MaskFile
from .referring_annotations import ReferringVideo, locate_frames

EXPRESSIONS = "expressions"
MASKS = "masks"
VIDEOS = "videos"


@dataclass
class ReferringSplit:
    """One split.

    Args:
        name: as in `as_dataset(split=name)`.
        videos: from its list of expressions.
        image_folder: the folder of the frames, relative to the data folder.
        masks: where the masks lie; `None` where they are not published.
    """

    name: str
    videos: list[ReferringVideo]
    image_folder: str
    masks: MaskFile | None


class ReferringVideoBuilder(VisaDatasetBuilder):
    """Base of the builders for sets in the layout of `referring_annotations`.

    Configurations: `expressions` (a row per expression), `masks` (a row per annotated object) and `videos` (a row per
    video, after the header of each frame has been read); columns in `features`.
    """

    BUILDER_CONFIGS = [
        VisaBuilderConfig(name=EXPRESSIONS, description="a row per expression, with the ids of its masks"),
        VisaBuilderConfig(name=MASKS, description="a row per annotated object, with its mask in every frame"),
        VisaBuilderConfig(name=VIDEOS, description="a row per video: frames and size"),
    ]
    DEFAULT_CONFIG_NAME = EXPRESSIONS
    EXPRESSION_COLUMNS = EXPRESSION_FEATURES
    # A row of masks takes tens of kilobytes: what is written at once stays at some megabytes.
    DEFAULT_WRITER_BATCH_SIZE = 100

    def find_splits(self) -> list[ReferringSplit]:
        """Return the splits that the data folder has; those whose files are not there are left out.

        Raises:
            FileNotFoundError: a file that a split needs is missing, or there is no split at all.
            AnnotationError: a file is broken.
        """
        raise TypeError(f"{type(self).__name__} must define `find_splits`.")

    def foreground(self, video: ReferringVideo) -> tuple[list[Any], list[float]]:
        """Return run lengths and share of all objects together, per frame; empty where they are not published."""
        return [], []

    def _info(self) -> datasets.DatasetInfo:
        columns = {EXPRESSIONS: self.EXPRESSION_COLUMNS, MASKS: MASK_FEATURES, VIDEOS: VIDEO_FEATURES}
        return datasets.DatasetInfo(features=columns[self.config.name])

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        splits = self.find_splits()
        if self.config.name == MASKS:
            splits = [split for split in splits if split.masks is not None]
        if not splits:
            raise FileNotFoundError(
                f"{type(self).__name__}: {self.root} has nothing for the configuration `{self.config.name}`. "
                f"This is needed:\n{self.LAYOUT}"
            )
        for split in splits:
            for video in split.videos:
                locate_frames(video, str(self.root), split.image_folder)
        if self.config.name != VIDEOS:
            _check_masks(splits, with_masks=self.config.name == EXPRESSIONS)
        return [datasets.SplitGenerator(name=split.name, gen_kwargs=self._shared_out(split)) for split in splits]

    def _shared_out(self, split: ReferringSplit) -> dict[str, Any]:
        """Return what rows are made from. A list is shared out among processes, a tuple is not."""
        is_whole = self.config.name == MASKS and split.masks is not None and not split.masks.can_be_shared_out
        return {"videos": tuple(split.videos) if is_whole else split.videos, "masks": split.masks}

    def _generate_examples(
        self, videos: Sequence[ReferringVideo], masks: MaskFile | None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.config.name == MASKS:
            assert masks is not None, "a split without masks has no rows here"
            yield from self._mask_rows(videos, masks)
        elif self.config.name == VIDEOS:
            yield from self._video_rows(videos)
        else:
            for video in videos:
                yield from self._expression_rows(video, has_masks=masks is not None)

    def _expression_rows(self, video: ReferringVideo, *, has_masks: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        if video.problem is not None and not video.expressions:
            self.skip_or_raise(video.problem)
        for item in video.expressions:
            where: dict[str, Any] = {"file": video.file, "video": video.video_id, "expression": item.expression_id}
            problem = video.problem or item.problem
            bad_masks = [video.mask_problems[anno_id] for anno_id in item.anno_ids if anno_id in video.mask_problems]
            if problem is None and bad_masks:
                problem = AnnotationError.at(f"its masks cannot be used: {bad_masks[0]}", **where)
            if problem is None and has_masks and not item.anno_ids and item.type_id != TYPE_NO_OBJECT:
                problem = AnnotationError.at("no object is named, though the expression means one.", **where)
            if problem is not None:
                self.skip_or_raise(problem)
                continue
            yield (
                f"{video.video_id}/{item.expression_id}",
                {
                    "dataset": self.SHORT_NAME,
                    "video_id": video.video_id,
                    "expression_id": item.expression_id,
                    "expression": item.text,
                    "type_id": item.type_id,
                    "anno_ids": list(item.anno_ids) if has_masks else [],
                    "frames": video.frames,
                    "height": video.height,
                    "width": video.width,
                    **{
                        name: getattr(item, name)
                        for name in self.EXPRESSION_COLUMNS
                        if name not in EXPRESSION_FEATURES
                    },
                },
            )

    def _mask_rows(self, videos: Sequence[ReferringVideo], masks: MaskFile) -> Iterator[tuple[str, dict[str, Any]]]:
        usable = []
        for video in videos:
            if video.problem is None:
                usable.append(video)
                continue
            for _ in video.anno_ids:
                self.skip_or_raise(video.problem)
        for video, rows in masks.read(usable):
            for anno_id, rles in rows:
                if isinstance(rles, AnnotationError):
                    self.skip_or_raise(rles)
                    continue
                yield anno_id, {"video_id": video.video_id, "anno_id": anno_id, "rle": rles}

    def _video_rows(self, videos: Sequence[ReferringVideo]) -> Iterator[tuple[str, dict[str, Any]]]:
        for video in videos:
            try:
                if video.problem is not None:
                    raise video.problem
                _check_sizes(video, str(self.root))
                foreground_rle, foreground_ratio = self.foreground(video)
            except AnnotationError as error:
                self.skip_or_raise(error)
                continue
            yield (
                video.video_id,
                {
                    "video_id": video.video_id,
                    "frames": video.frames,
                    "height": video.height,
                    "width": video.width,
                    "foreground_rle": foreground_rle,
                    "foreground_ratio": foreground_ratio,
                },
            )


def _check_masks(splits: Sequence[ReferringSplit], *, with_masks: bool) -> None:
    """Check the masks of all splits, those in one file together."""
    by_file: dict[int, tuple[MaskFile, list[ReferringVideo]]] = {}
    for split in splits:
        if split.masks is not None:
            by_file.setdefault(id(split.masks), (split.masks, []))[1].extend(split.videos)
    for masks, videos in by_file.values():
        masks.check(videos, with_masks=with_masks)


def _check_sizes(video: ReferringVideo, root: str) -> None:
    """Make sure that all frames can be opened and are of one size."""
    for frame in video.frames:
        height, width = image_size(root, frame, file=video.file, video=video.video_id)
        if (height, width) != (video.height, video.width):
            raise AnnotationError.at(
                f"the frame has size [{height}, {width}] (H, W), but the first one has "
                f"[{video.height}, {video.width}].",
                file=video.file,
                video=video.video_id,
                frame=frame,
            )
