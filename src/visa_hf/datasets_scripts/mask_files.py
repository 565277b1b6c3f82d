"""Where the masks of the referring and reasoning sets lie: a big JSON dict, a pickled dict, or palette PNGs.

Each kind has two verbs. `check` goes through all masks of some videos once, and notes with each video what cannot be
used; `read` yields the masks of one video. Of a JSON dict, `check` also notes where in the file each object's masks
lie, so that every process reads the bytes of its own videos only, and none holds the dict.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from visa_hf.rle import RLE, encode_mask

from .annotations import AnnotationError, check_masks, load_restricted_pickle, locate_json_items
from .image_files import PILLOW_ERRORS, open_image
from .referring_annotations import ReferringVideo

MaskRows = Iterator[tuple[str, list[RLE | None] | AnnotationError]]


class MaskFile(Protocol):
    """The masks of one or several splits."""

    can_be_shared_out: bool
    """Whether several processes can read some videos each, without each of them reading all."""

    def check(self, videos: Sequence[ReferringVideo], *, with_masks: bool) -> None:
        """Note in each video's `mask_problems` the annotation ids whose masks cannot be used.

        Args:
            with_masks: look at the masks themselves as well; else only at what `read` does not see.
        """

    def read(self, videos: Iterable[ReferringVideo]) -> Iterator[tuple[ReferringVideo, MaskRows]]:
        """Yield each video and, for each of its annotation ids, the masks or why there are none."""


class JSONMasks:
    """`mask_dict.json`: `{anno_id: [run lengths or null for each frame]}`, several hundred megabytes."""

    can_be_shared_out = True

    def __init__(self, path: str) -> None:
        self.path = path

    def check(self, videos: Sequence[ReferringVideo], *, with_masks: bool) -> None:
        """See `MaskFile`. One pass over the file, one object's masks in memory at a time."""
        owners = _owners(videos)
        for anno_id, rles, span in locate_json_items(self.path):
            for video in owners.get(anno_id, ()):
                video.mask_spans[anno_id] = span
                if with_masks and video.problem is None and anno_id not in video.mask_problems:
                    try:
                        self._checked(rles, video, anno_id)
                    except AnnotationError as error:
                        video.mask_problems[anno_id] = error
        for anno_id, named_by in owners.items():
            for video in named_by:
                if anno_id not in video.mask_spans:
                    message = "it is named by an expression, but has no masks here."
                    video.mask_problems[anno_id] = self._error(message, video, anno_id)

    def read(self, videos: Iterable[ReferringVideo]) -> Iterator[tuple[ReferringVideo, MaskRows]]:
        """See `MaskFile`."""
        with open(self.path, "rb") as file:
            for video in videos:
                yield video, self._read_video(file, video)

    def _read_video(self, file: Any, video: ReferringVideo) -> MaskRows:
        for anno_id in video.anno_ids:
            try:
                yield anno_id, self._read_one(file, video, anno_id)
            except AnnotationError as error:
                yield anno_id, error

    def _read_one(self, file: Any, video: ReferringVideo, anno_id: str) -> list[RLE | None]:
        if anno_id in video.mask_problems:
            raise video.mask_problems[anno_id]
        start, end = video.mask_spans[anno_id]
        file.seek(start)
        try:
            rles = json.loads(file.read(end - start))
        except ValueError as error:
            raise self._error(f"the file has changed while it was read ({error}).", video, anno_id) from error
        return self._checked(rles, video, anno_id)

    def _checked(self, rles: Any, video: ReferringVideo, anno_id: str) -> list[RLE | None]:
        where: dict[str, Any] = {"file": self.path, "video": video.video_id, "annotation": anno_id}
        return check_masks(rles, video.names, video.height, video.width, **where)

    def _error(self, message: str, video: ReferringVideo, anno_id: str) -> AnnotationError:
        return AnnotationError.at(message, file=self.path, video=video.video_id, annotation=anno_id)


class PickledMasks:
    """`mask_dict.pkl`: the same as a pickle. It can only be read as a whole, so only one process does it."""

    can_be_shared_out = False

    def __init__(self, path: str) -> None:
        self.path = path

    def check(self, videos: Sequence[ReferringVideo], *, with_masks: bool) -> None:
        """See `MaskFile`."""
        if not with_masks:
            return
        for video, rows in self.read(videos):
            for anno_id, rles in rows:
                if isinstance(rles, AnnotationError):
                    video.mask_problems[anno_id] = rles

    def read(self, videos: Iterable[ReferringVideo]) -> Iterator[tuple[ReferringVideo, MaskRows]]:
        """See `MaskFile`."""
        masks = load_restricted_pickle(self.path)
        if not isinstance(masks, dict):
            raise AnnotationError.at("holds no dict; {annotation id: masks} is needed.", file=self.path)
        masks = {str(key): rles for key, rles in masks.items()}
        for video in videos:
            yield video, self._read_video(masks, video)

    def _read_video(self, masks: dict[str, Any], video: ReferringVideo) -> MaskRows:
        if video.problem is not None:
            return
        for anno_id in video.anno_ids:
            try:
                yield anno_id, self._read_one(masks, video, anno_id)
            except AnnotationError as error:
                yield anno_id, error

    def _read_one(self, masks: dict[str, Any], video: ReferringVideo, anno_id: str) -> list[RLE | None]:
        where: dict[str, Any] = {"file": self.path, "video": video.video_id}
        first: list[RLE | None] | None = None
        for key in video.mask_keys[anno_id]:
            if key not in masks:
                raise AnnotationError.at("it is needed by an expression, but has no masks.", annotation=key, **where)
            rles = check_masks(masks[key], video.names, video.height, video.width, annotation=key, **where)
            if first is not None and rles != first:
                # The keys are counted, not published: if the count were off, masks would be of other expressions.
                raise AnnotationError.at(
                    f"two expressions about the object {anno_id!r} have different masks, so the masks are not those "
                    "of this list of expressions.",
                    annotation=key,
                    **where,
                )
            first = rles
        assert first is not None, "every annotation id comes from an expression"
        return first


class PaletteMasks:
    """`Annotations/<video>/<frame>.png`: each pixel says which object it belongs to, 0 none.

    Args:
        root: the data folder.
        folder: the folder of the annotations below it.
    """

    can_be_shared_out = True

    def __init__(self, root: str, folder: str) -> None:
        self.root = root
        self.folder = folder

    def check(self, videos: Sequence[ReferringVideo], *, with_masks: bool) -> None:
        """See `MaskFile`. Sizes and checksums of the files; the pixels are decoded by `read` only."""
        if not with_masks:
            return
        for video in videos:
            if video.problem is not None:
                continue
            try:
                for name in video.names:
                    self._verify(video, name)
            except AnnotationError as error:
                video.mask_problems |= dict.fromkeys(video.anno_ids, error)

    def read(self, videos: Iterable[ReferringVideo]) -> Iterator[tuple[ReferringVideo, MaskRows]]:
        """See `MaskFile`. The PNGs of a video are decoded once for all of its objects."""
        for video in videos:
            yield video, self._read_video(video)

    def _read_video(self, video: ReferringVideo) -> MaskRows:
        anno_ids = [anno_id for anno_id in video.anno_ids if anno_id not in video.mask_problems]
        rles: dict[str, list[RLE | None]] = {anno_id: [] for anno_id in anno_ids}
        problem = video.problem
        try:
            for name in video.names if problem is None else ():
                labels = self._labels(video, name)
                for anno_id in anno_ids:
                    mask = labels == int(anno_id.rpartition("/")[2])
                    rles[anno_id].append(encode_mask(mask) if mask.any() else None)
        except AnnotationError as error:
            problem = error
        for anno_id in video.anno_ids:
            yield anno_id, video.mask_problems.get(anno_id) or problem or rles[anno_id]

    def _path(self, video: ReferringVideo, name: str) -> str:
        return os.path.join(self.root, self.folder, video.video_id, f"{name}.png")

    def _verify(self, video: ReferringVideo, name: str) -> None:
        """Look at a file without decoding its pixels: header and checksums."""
        try:
            with open_image(self._path(video, name)) as image:
                self._check_form(image, video, name)
                image.verify()
        except AnnotationError:
            raise
        except PILLOW_ERRORS as error:
            raise self._unreadable(video, name, error) from error

    def _labels(self, video: ReferringVideo, name: str) -> np.ndarray:
        """Return the object of each pixel, `(H, W)`, uint8."""
        try:
            with open_image(self._path(video, name)) as image:
                self._check_form(image, video, name)
                return np.array(image, dtype=np.uint8)
        except AnnotationError:
            raise
        except PILLOW_ERRORS as error:
            raise self._unreadable(video, name, error) from error

    def _check_form(self, image: Image.Image, video: ReferringVideo, name: str) -> None:
        where: dict[str, Any] = {"file": self._path(video, name), "video": video.video_id, "frame": name}
        if image.mode not in ("P", "L", "1"):
            raise AnnotationError.at(
                f'the masks are an image of mode "{image.mode}"; a palette PNG, whose pixels are object numbers, is '
                "needed.",
                **where,
            )
        if image.size != (video.width, video.height):
            raise AnnotationError.at(
                f"the masks have size [{image.height}, {image.width}] (H, W), but the frame has "
                f"[{video.height}, {video.width}].",
                **where,
            )

    def _unreadable(self, video: ReferringVideo, name: str, error: BaseException) -> AnnotationError:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        path = self._path(video, name)
        return AnnotationError.at(f"the image of the masks {what}.", file=path, video=video.video_id, frame=name)


def _owners(videos: Sequence[ReferringVideo]) -> dict[str, list[ReferringVideo]]:
    """Return which videos name each annotation id. One is as it must be; two are a problem of both."""
    owners: dict[str, list[ReferringVideo]] = {}
    for video in videos:
        for anno_id in video.anno_ids:
            owners.setdefault(anno_id, []).append(video)
    for anno_id, named_by in owners.items():
        for video in named_by if len(named_by) > 1 else ():
            others = ", ".join(repr(other.video_id) for other in named_by if other is not video)
            video.mask_problems[anno_id] = AnnotationError.at(
                f"the video {others} names the same annotation; an annotation belongs to one video.",
                file=video.file,
                video=video.video_id,
                annotation=anno_id,
            )
    return owners
