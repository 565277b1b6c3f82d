"""What the `meta_expressions.json` files of the referring and reasoning sets say, checked.

All of these sets share one layout, which Ref-YouTube-VOS began (Seo et al., ECCV 2020) and MeViS and ReVOS extended:
`{"videos": {video: {"frames": [...], "expressions": {id: {"exp": ..., "obj_id": ..., "anno_id": [...]}}}}}`, with the
frames at `JPEGImages/<video>/<frame>.jpg`. What is wrong with a video or an expression is kept with it, as its
`problem`, for the builder to raise or to count. No mask is read here.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .annotations import AnnotationError, check_id, check_relative, check_text, natural_key, read_json
from .brief import brief
from .features import TYPE_NO_OBJECT, TYPE_REASONING, TYPE_REFERRING
from .image_files import image_size


@dataclass
class ReferringExpression:
    """One expression. `object_ids` and `anno_ids` are as published, as text; the builder decides which it goes by.

    `answer` and `idea` are what the synthetic world knows beyond ReVOS; `None` elsewhere.
    """

    expression_id: str
    text: str = ""
    type_id: int = TYPE_REFERRING
    object_ids: tuple[str, ...] = ()
    anno_ids: tuple[str, ...] = ()
    answer: str | None = None
    idea: str | None = None
    problem: AnnotationError | None = None


@dataclass
class ReferringVideo:
    """One video and its expressions; small enough to be sent to the process that makes its rows.

    Args:
        file: the file that it was read from, for messages.
        names: the frames' names as published, in time order.
        frames: paths relative to the data folder.
        height, width: of the frames, in pixels.
        problem: why nothing of this video can be used.
        mask_spans: annotation id -> where its masks lie in their file, first byte and the one behind the last.
        mask_keys: annotation id -> the keys that its masks have in a pickled dict.
        mask_problems: annotation id -> why its masks cannot be used.
        foreground_span: where its foreground lies in its file, if it has one.
    """

    video_id: str
    file: str
    names: list[str] = field(default_factory=list)
    frames: list[str] = field(default_factory=list)
    height: int = 0
    width: int = 0
    expressions: list[ReferringExpression] = field(default_factory=list)
    problem: AnnotationError | None = None
    mask_spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    mask_keys: dict[str, list[str]] = field(default_factory=dict)
    mask_problems: dict[str, AnnotationError] = field(default_factory=dict)
    foreground_span: tuple[int, int] | None = None

    @property
    def anno_ids(self) -> list[str]:
        """The annotation ids that its expressions name, each once, in the order of their first naming."""
        return list(dict.fromkeys(anno_id for item in self.expressions for anno_id in item.anno_ids))


def read_meta(path: str | os.PathLike[str], without: Collection[str] = ()) -> list[ReferringVideo]:
    """Read a `meta_expressions.json`.

    Args:
        without: videos to leave out.

    Raises:
        AnnotationError: it is no such file, or an id occurs twice in it.
    """
    videos = _videos_of(path)
    return [_parse_video(video, data, os.fspath(path)) for video, data in videos.items() if video not in without]


def read_video_ids(path: str | os.PathLike[str]) -> set[str]:
    """Return which videos a `meta_expressions.json` or `meta.json` is about.

    Raises:
        AnnotationError: it is no such file.
    """
    return set(_videos_of(path))


def read_object_ids(path: str | os.PathLike[str]) -> dict[str, set[str]]:
    """Return which objects each video has, from a `meta.json` as YouTube-VOS has it.

    Raises:
        AnnotationError: it is no such file.
    """
    objects = {}
    for video, data in _videos_of(path).items():
        if not isinstance(data, dict) or not isinstance(data.get("objects"), dict):
            message = "`objects` is missing; a dict of the video's objects is needed."
            raise AnnotationError.at(message, file=os.fspath(path), video=video)
        objects[video] = set(data["objects"])
    return objects


def locate_frames(video: ReferringVideo, root: str, folder: str) -> None:
    """Find the frames of a video in a folder below `root`, and their size from the first one's header.

    Sets `frames`, `height` and `width`, or `problem`: a frame is missing, the first one cannot be read, or its size is
    not the one that the annotation gives.
    """
    if video.problem is not None:
        return
    try:
        video.frames = _frames_in(video, root, folder)
        height, width = image_size(root, video.frames[0], file=video.file, video=video.video_id)
        if (video.height, video.width) not in ((0, 0), (height, width)):
            raise AnnotationError.at(
                f"the annotation says [{video.height}, {video.width}] (H, W), but the frame {video.frames[0]} has "
                f"[{height}, {width}].",
                file=video.file,
                video=video.video_id,
            )
        video.height, video.width = height, width
    except AnnotationError as error:
        video.problem = error


def _videos_of(path: str | os.PathLike[str]) -> dict[str, Any]:
    meta = read_json(os.fspath(path))
    if not isinstance(meta, dict) or not isinstance(meta.get("videos"), dict):
        raise AnnotationError.at('has no `videos`; `{"videos": {video: {...}}}` is needed.', file=os.fspath(path))
    return meta["videos"]


def _parse_video(video_id: str, data: Any, file: str) -> ReferringVideo:
    """Check what is said of one video."""
    video = ReferringVideo(video_id, file)
    where: dict[str, Any] = {"file": file, "video": video_id}
    if isinstance(data, dict) and isinstance(data.get("expressions"), dict):
        video.expressions = [_parse_expression(key, item, **where) for key, item in data["expressions"].items()]
    try:
        check_relative(video_id, **where)
        if not isinstance(data, dict) or not isinstance(data.get("expressions"), dict):
            raise AnnotationError.at("`expressions` is missing; a dict {id: {...}} is needed.", **where)
        video.names = _parse_frames(data.get("frames"), **where)
        video.height, video.width = _parse_size(data.get("height"), data.get("width"), **where)
    except AnnotationError as error:
        video.problem = error
    return video


def _parse_frames(frames: Any, **where: Any) -> list[str]:
    """Check the frames' names: there are some, none twice, in time order."""
    if not isinstance(frames, list) or not frames:
        raise AnnotationError.at("`frames` is missing or empty; a list of the frames' names is needed.", **where)
    names = [check_relative(frame, frame=frame, **where) for frame in frames]
    if len(set(names)) < len(names):
        raise AnnotationError.at("a frame is listed twice in `frames`.", **where)
    if names != sorted(names) and names != sorted(names, key=natural_key):
        raise AnnotationError.at("`frames` are not in time order, so it is unclear which mask is whose.", **where)
    return names


def _parse_size(height: Any, width: Any, **where: Any) -> tuple[int, int]:
    """Return (H, W), or (0, 0) where nothing is said."""
    if height is None and width is None:
        return 0, 0
    if type(height) is not int or type(width) is not int or height < 1 or width < 1:
        raise AnnotationError.at(
            f"`height` is {brief(height)} and `width` {brief(width)}; integers are needed.", **where
        )
    return height, width


def _parse_expression(expression_id: str, data: Any, **where: Any) -> ReferringExpression:
    """Check one expression."""
    where = {**where, "expression": expression_id}
    expression = ReferringExpression(expression_id)
    try:
        check_text(expression_id, "id", **where)
        if not isinstance(data, dict):
            raise AnnotationError.at(f"the expression is {brief(data)}; a dict with `exp` is needed.", **where)
        expression.text = check_text(data.get("exp"), "exp", **where)
        expression.object_ids = _parse_ids(data.get("obj_id"), "obj_id", **where)
        expression.anno_ids = _parse_ids(data.get("anno_id"), "anno_id", **where)
        for name in ("answer", "idea"):
            if data.get(name) is not None:
                setattr(expression, name, check_text(data[name], name, **where))
        expression.type_id = data.get("type_id", TYPE_REFERRING)
        if type(expression.type_id) is not int or not TYPE_REFERRING <= expression.type_id <= TYPE_NO_OBJECT:
            raise AnnotationError.at(
                f"`type_id` is {brief(expression.type_id)}; {TYPE_REFERRING} (referring), {TYPE_REASONING} "
                f"(reasoning) or {TYPE_NO_OBJECT} (no such object) is needed.",
                **where,
            )
    except AnnotationError as error:
        expression.problem = error
    return expression


def _parse_ids(value: Any, name: str, **where: Any) -> tuple[str, ...]:
    """Return ids that are published as one or as a list, each as text or as a number; none where nothing is said."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    ids = tuple(check_id(item, name, **where) for item in values)
    if len(set(ids)) < len(ids):
        raise AnnotationError.at(f"`{name}` names {ids} one of them twice.", **where)
    return ids


def _frames_in(video: ReferringVideo, root: str, folder: str) -> list[str]:
    """Return the frames' paths relative to `root`, after seeing that each file is there."""
    below = f"{folder}/{video.video_id}"
    where: dict[str, Any] = {"file": os.path.join(root, below), "video": video.video_id}
    present: dict[str, set[str]] = {}
    frames = []
    for name in video.names:
        path = f"{below}/{name}.jpg"
        parent, _, file = path.rpartition("/")
        if parent not in present:
            try:
                present[parent] = set(os.listdir(os.path.join(root, parent)))
            except OSError as error:
                message = f"the folder of the frames cannot be read ({error.strerror})."
                raise AnnotationError.at(message, **where) from error
        if file not in present[parent]:
            raise AnnotationError.at(f"the image {path} is missing.", frame=name, **where)
        frames.append(path)
    return frames
