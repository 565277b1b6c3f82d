"""The lines of your own data: each a JSON object with a video, an expression and masks, read with every check.

`LineReader` is what the builder `OwnData` and `visa data check` share, so that what passes the check can be prepared.
A line with something wrong gives messages, all of them, and no row. The format is described in `own_data`.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from visa_hf.datasets_scripts.annotations import check_relative
from visa_hf.datasets_scripts.brief import brief
from visa_hf.datasets_scripts.features import TYPE_NO_OBJECT, TYPE_REASONING, TYPE_REFERRING
from visa_hf.datasets_scripts.image_files import PILLOW_ERRORS, open_image, orientation
from visa_hf.datasets_scripts.mask_checks import all_fill
from visa_hf.datasets_scripts.own_data_masks import FORMS, is_rle, read_mask
from visa_hf.datasets_scripts.special_texts import SEG, special_texts_in
from visa_hf.modeling.frame_source_visa import IMAGE_SUFFIXES, image_files_of, open_frames
from visa_hf.rle import RLE

KEYS = ("video", "expression", "type_id", "masks", "expression_id", "answer", "explanation")
TYPES = (TYPE_REFERRING, TYPE_REASONING, TYPE_NO_OBJECT)
# What `datasets` allows as the name of a split; "all" is taken.
_SPLIT_NAME = re.compile(r"(?!all$)[A-Za-z0-9_]+")
# An id becomes the name of a folder when predictions are written.
_EXPRESSION_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]*")
_FRAME_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Clip:
    """A video of your own data: its frames, relative to the root, and their (height, width)."""

    frames: tuple[str, ...]
    size: tuple[int, int]


@dataclass(frozen=True)
class OwnLine:
    """A line that is in order.

    `masks` has the frames that are annotated and no others; `None` is an empty mask: the object is not to be seen.
    """

    video: str
    clip: Clip
    expression_id: str
    expression: str
    type_id: int
    masks: dict[int, RLE | None]
    answer: str | None
    explanation: str | None


def jsonl_files(root: Path) -> list[Path]:
    """The JSONL files of a folder, one for each split, sorted.

    Raises:
        FileNotFoundError: the folder does not exist or holds none.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder `{root}`. Give the folder that holds your JSONL files.")
    files = sorted(path for path in root.iterdir() if path.suffix == ".jsonl" and path.is_file())
    if not files:
        raise FileNotFoundError(
            f"`{root}` holds no JSONL file. Write one for each split, `train.jsonl`, `valid.jsonl`, with a JSON "
            'object a line: {"video": "clip.mp4", "expression": "the red car", "masks": {"0": "mask.png"}}.'
        )
    return files


def split_name(path: Path) -> str:
    """The split that a JSONL file is for.

    Raises:
        ValueError: the file's name is no name for a split.
    """
    if not _SPLIT_NAME.fullmatch(path.stem):
        raise ValueError(
            f'the file gives a split the name {path.stem!r}; letters, digits and _ are allowed, and not "all". '
            "Rename the file."
        )
    return path.stem


def needs_masks(split: str) -> bool:
    """Whether a line about an object is of no use without masks: in training data. Elsewhere there is prediction."""
    return split.startswith("train")


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, numbered from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if text.strip():
                yield number, text


def has_masks(path: Path) -> bool:
    """Whether a file seems to show any object, or has something wrong with it; mostly the first line tells."""
    is_empty = True
    for _, raw in raw_lines(path):
        is_empty = False
        try:
            masks = _parse(raw).get("masks")
        except ValueError:
            return True
        if any(masks.values()) if isinstance(masks, dict) else masks is not None:
            return True
    return is_empty


@dataclass
class LineReader:
    """Reads the lines of one file, one after the other.

    Args:
        root (`Path`): folder that paths are relative to.
        needs_masks (`bool`): whether a line about an object must have masks, as in training data.
        clips (`dict`, *optional*): videos opened before, to be shared by readers.

    Attributes:
        place (`dict[str, str]`): `video` and `expression` (its id) of the line read last, as far as they are known.
    """

    root: Path
    needs_masks: bool
    clips: dict[str, Clip | str] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    _num_of_video: dict[str, int] = field(default_factory=dict)
    _line_of_id: dict[tuple[str, str], int] = field(default_factory=dict)
    _line_of_expression: dict[tuple[str, str], int] = field(default_factory=dict)

    def read(self, number: int, raw: bytes) -> tuple[OwnLine | None, list[str]]:
        """Read a line.

        Args:
            number (`int`): of the line, for messages about later ones that repeat it.
            raw (`bytes`): the line.

        Returns:
            The line and no message, or `None` and all that is wrong with it.
        """
        self.place = {}
        try:
            values = _parse(raw)
        except ValueError as error:
            return None, [str(error)]
        problems = _unknown_keys(values)
        expression, type_id = _expression(values, problems), _type_id(values, problems)
        answer, explanation = _texts(values, type_id, problems)
        video = _video(values, problems)
        clip = None if video is None else self._clip(video, problems)
        masks: dict[int, RLE | None] = {}
        if clip is not None:
            num_before = len(problems)
            masks = _masks(values.get("masks"), clip, self.root, problems)
            if type_id is not None:
                self._check_type(type_id, masks, len(problems) == num_before, problems)
        expression_id = None
        if video is not None:
            expression_id = self._expression_id(number, video, values, problems)
            self.place = {"video": video} | ({} if expression_id is None else {"expression": expression_id})
            if expression is not None:
                self._check_expression(number, video, expression, problems)
        if problems or None in (video, clip, expression_id, expression, type_id):
            return None, problems
        assert video and clip and expression_id and expression and type_id is not None  # for the type checker
        if type_id == TYPE_NO_OBJECT:
            masks = dict.fromkeys(range(len(clip.frames)))
        return OwnLine(video, clip, expression_id, expression, type_id, masks, answer, explanation), []

    def _clip(self, video: str, problems: list[str]) -> Clip | None:
        if video not in self.clips:
            try:
                self.clips[video] = open_clip(self.root, video)
            except (ValueError, OSError) as error:
                self.clips[video] = str(error)
        clip = self.clips[video]
        if isinstance(clip, str):
            problems.append(clip)
            return None
        return clip

    def _check_type(self, type_id: int, masks: dict[int, RLE | None], is_complete: bool, problems: list[str]) -> None:
        """Compare the type with the masks; `is_complete`: all masks of the line could be read."""
        shown = [index for index, mask in masks.items() if mask is not None]
        if type_id == TYPE_NO_OBJECT:
            if shown:
                problems.append(
                    f"`type_id` is {type_id}, no such object, but the mask of frame {shown[0]} is not empty. "
                    f"Leave out `masks`, or give type {TYPE_REFERRING} or {TYPE_REASONING}."
                )
        elif masks and not shown and is_complete:
            problems.append(
                f"every mask is empty, but `type_id` is {type_id}: an object. Annotate a frame that shows it, or give "
                f"type {TYPE_NO_OBJECT} if there is none."
            )
        elif not masks and is_complete and self.needs_masks:
            problems.append('`masks` is missing or empty, so nothing can be learnt from this line: {"0": ...}.')

    def _expression_id(self, number: int, video: str, values: dict[str, Any], problems: list[str]) -> str | None:
        """The id that the line gives, or else how many lines before it are about the video."""
        count = self._num_of_video.get(video, 0)
        self._num_of_video[video] = count + 1
        given = values.get("expression_id")
        expression_id = str(count if given is None else given)
        if type(given) not in (str, int, type(None)) or not _EXPRESSION_ID.fullmatch(expression_id):
            problems.append(
                f"`expression_id` is {brief(given)}; letters, digits, and inside also . - _ and space are allowed."
            )
            return None
        first = self._line_of_id.setdefault((video, expression_id), number)
        if first != number:
            problems.append(
                f"the id {brief(expression_id)} was given in line {first} already to an expression of `{video}`."
            )
        return expression_id

    def _check_expression(self, number: int, video: str, expression: str, problems: list[str]) -> None:
        first = self._line_of_expression.setdefault((video, " ".join(expression.lower().split())), number)
        if first != number:
            problems.append(
                f"the expression {brief(expression)} was given in line {first} already for `{video}`. One line holds "
                "all frames and all objects that an expression means."
            )


def open_clip(root: Path, video: str) -> Clip:
    """Find the frames of a video: a file, a folder of images, or one image.

    Raises:
        ValueError, OSError: it is missing, cannot be read, or has frames of several sizes; the text names it.
    """
    path = root / video
    if not path.exists():
        raise FileNotFoundError(f"there is no video at `{video}`. Paths are relative to the folder of the data.")
    if path.is_dir():
        files = image_files_of(path)
        return Clip(tuple(f"{video}/{file.name}" for file in files), _common_size(files))
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return Clip((video,), _common_size([path]))
    with open_frames(path) as source:
        frames = tuple(f"{video}#{index}" for index in range(source.num_frames))
        return Clip(frames, (source.height, source.width))


def _common_size(files: list[Path]) -> tuple[int, int]:
    """(height, width) of images, from their headers."""
    first: tuple[int, int] | None = None
    for file in files:
        try:
            with open_image(file) as image:
                size = (image.height, image.width)
                is_deep = image.mode == "F" or image.mode.startswith("I")
                is_turned = orientation(image) != 1
        except PILLOW_ERRORS as error:
            raise ValueError(f"`{file}` is not an image that can be read ({error}).") from error
        if is_deep:
            raise ValueError(f"`{file}` has more than 8 bits per channel. Save it with 8.")
        if is_turned:
            raise ValueError(f"`{file}` asks by EXIF to be turned, which a mask cannot follow. Save it upright.")
        first = first or size
        if size != first:
            raise ValueError(
                f"`{file}` is {size[0]} x {size[1]} (height x width), but the first frame {first[0]} x {first[1]}. "
                "All frames of a video need one size."
            )
    assert first is not None
    return first


# The parts of a line: each returns what it read and adds to `problems` what is wrong.


def _parse(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key `{key}` stands there twice.")
            found[key] = value
        return found

    def no_number(name: str) -> Any:
        raise ValueError(f"{name} is no number that JSON knows.")

    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 (byte {error.start}). Save the file as UTF-8.") from error
    try:
        values = json.loads(text, object_pairs_hook=unique, parse_constant=no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON: {error.msg} at character {error.pos + 1}.") from error
    except RecursionError as error:
        raise ValueError("the line is nested too deeply.") from error
    if not isinstance(values, dict):
        raise ValueError('the line is no JSON object: {"video": ..., "expression": ..., "masks": {...}} is needed.')
    return values


def _unknown_keys(values: dict[str, Any]) -> list[str]:
    problems = []
    for key in values:
        if key not in KEYS:
            near = get_close_matches(key, KEYS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(KEYS)}."
            problems.append(f"unknown key `{key}`: {hint}")
    return problems


def _video(values: dict[str, Any], problems: list[str]) -> str | None:
    """The path of the video in its shortest form, which is also the video's id."""
    if "video" not in values:
        problems.append("`video` is missing: the path of a video file, image or folder of frames.")
        return None
    video = values["video"]
    if not isinstance(video, str):
        problems.append(f"`video` is {brief(video)}, not a string.")
        return None
    try:
        return posixpath.normpath(check_relative(video))
    except ValueError as error:
        problems.append(str(error))
        return None


def _expression(values: dict[str, Any], problems: list[str]) -> str | None:
    if "expression" not in values:
        problems.append("`expression` is missing: the sentence that says what is meant.")
        return None
    return _text("expression", values["expression"], problems)


def _text(name: str, value: Any, problems: list[str], *, allowed: str = "") -> str | None:
    if not isinstance(value, str):
        problems.append(f"`{name}` is {brief(value)}, not a string.")
        return None
    if not value.strip():
        problems.append(f"`{name}` is empty.")
        return None
    if any("\ud800" <= character <= "\udfff" for character in value):
        problems.append(f"`{name}` holds half a character (a lone surrogate).")
        return None
    found = [special for special in special_texts_in(value) if special != allowed]
    if found:
        problems.append(f"`{name}` holds {', '.join(found)}, which the model reads as a special token. Remove it.")
        return None
    return value


def _type_id(values: dict[str, Any], problems: list[str]) -> int | None:
    type_id = values.get("type_id", TYPE_REFERRING)
    if type(type_id) is int and type_id in TYPES:
        return type_id
    problems.append(f"`type_id` is {brief(type_id)}; 0 (referring), 1 (reasoning) or 2 (no such object) is needed.")
    return None


def _texts(values: dict[str, Any], type_id: int | None, problems: list[str]) -> tuple[str | None, str | None]:
    """The answer that the model shall give, or the explanation that it shall add to a ready-made one."""
    answer = explanation = None
    if values.get("explanation") is not None:
        explanation = _text("explanation", values["explanation"], problems)
    if values.get("answer") is not None:
        answer = _text("answer", values["answer"], problems, allowed=SEG)
    if answer is not None and answer.count(SEG) != 1 and not (type_id == TYPE_NO_OBJECT and SEG not in answer):
        problems.append(f"`answer` has {answer.count(SEG)} times {SEG}; the place of the mask is needed once.")
    if answer is not None and explanation is not None:
        problems.append("both `answer` and `explanation` are given. An answer holds its explanation already.")
    return answer, explanation


def _masks(values: Any, clip: Clip, root: Path, problems: list[str]) -> dict[int, RLE | None]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        problems.append(f'`masks` is of type {type(values).__name__}; {{"<frame number>": mask}} is needed: {FORMS}.')
        return {}
    masks: dict[int, RLE | None] = {}
    # All at once, since one by one is slow; where something is wrong, `read_mask` says what.
    are_good = all_fill([value for value in values.values() if is_rle(value)], *clip.size)
    for key, value in values.items():
        if not _FRAME_NUMBER.fullmatch(key):
            problems.append(
                f"`masks` has the key {brief(key)}; frames are numbered from 0 in the order of the video, without "
                "leading zeros."
            )
        elif int(key) >= len(clip.frames):
            problems.append(f"frame {key} is beyond the video, which has {len(clip.frames)} frames, numbered from 0.")
        else:
            try:
                masks[int(key)] = read_mask(value, clip.size, root, is_good_rle=are_good and is_rle(value))
            except (ValueError, OSError) as error:
                problems.append(f"frame {key}: {error}")
    return dict(sorted(masks.items()))
