"""What is asked of many videos: a JSONL or CSV file, or a list of dictionaries, read with every check.

A row is about one video. Rows with the same video and the same part of it belong together, wherever they stand: their
queries go into one session. All that is wrong is found before any of it is used, but for what only the opened video
can tell. Nothing is computed or written here.
"""

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from visa_hf.datasets_scripts.brief import brief
from visa_hf.datasets_scripts.special_texts import special_texts_in
from visa_hf.modeling.frame_source_visa import IMAGE_SUFFIXES, image_files_of
from visa_hf.modeling.video_session_visa import is_blank
from visa_hf.result_files import read_mask
from visa_hf.segment_rows import COLUMNS, Fault, rows_of, unknown_column

_MAX_MESSAGES = 20
# Names of folders on any system: no separators, wildcards or control characters, no dot or blank at either end.
_ID_CHARACTER, _ID_END = r'[^/\\:*?"<>|\x00-\x1f\x7f]', r'[^\s./\\:*?"<>|\x00-\x1f\x7f]'
_EXPRESSION_ID = re.compile(f"{_ID_END}({_ID_CHARACTER}*{_ID_END})?")
_LONGEST_ID = 100


class RequestsError(ValueError):
    """Rows that cannot be used; the text has a line for each thing that is wrong with them.

    Args:
        name (`str`): the file.
        messages (`list[str]`): what is wrong, each with its place.
    """

    def __init__(self, name: str, messages: list[str]) -> None:
        self.messages = messages
        shown = [f"  {message}" for message in messages[:_MAX_MESSAGES]]
        if len(messages) > _MAX_MESSAGES:
            shown.append(f"  ... and {len(messages) - _MAX_MESSAGES} more")
        problems = "1 problem" if len(messages) == 1 else f"{len(messages)} problems"
        super().__init__("\n".join([f"{name} has {problems}:", *shown]))


@dataclass(frozen=True)
class RequestedQuery:
    """One query of a video; all but the id are arguments of `add_query`, with the path of a mask in its place."""

    expression_id: str
    query: str | None = None
    target_frame: int | None = None
    reference_frames: tuple[int, ...] | None = None
    num_reference_frames: int | None = None
    first_mask: Path | None = None
    explain: bool = False


@dataclass
class VideoRequest:
    """A video, or a part of one, and what is asked about it.

    Args:
        video (`str`): its path as it is written in the rows, without detours.
        path (`Path`): where it lies.
        start, end, fps: as of `segment`.
        place (`str`): the first row about it, for messages.
        queries (`list[RequestedQuery]`): at least one.
    """

    video: str
    path: Path
    start: float | str | None
    end: float | str | None
    fps: float | None
    place: str
    queries: list[RequestedQuery] = field(default_factory=list)


def read_requests(
    requests: str | os.PathLike[str] | Iterable[Mapping[str, Any]], **defaults: Any
) -> list[VideoRequest]:
    """Read and check requests.

    Args:
        requests: path of a JSONL or CSV file in UTF-8, or the rows themselves, as dictionaries. Paths in a file are
            relative to its folder.
        defaults: values of columns for the rows that have none: frames for those that ask the model, and `fps` for
            those that are no video file, which has its own.

    Returns:
        `list[VideoRequest]`: the videos in the order in which they are first named.

    Raises:
        FileNotFoundError: there is no such file.
        RequestsError: naming all rows that cannot be used.
        TypeError: if `requests` is neither.
        ValueError: for a file of another kind, or one that is empty, or a default that cannot be used.
    """
    rows: Iterator[tuple[str, Any]]
    if isinstance(requests, str | os.PathLike):
        file = Path(requests)
        name, root = f"`{file}`", file.parent
        rows = rows_of(file)
    elif isinstance(requests, Iterable) and not isinstance(requests, Mapping | bytes):
        name, root = "The list of requests", Path()
        rows = ((f"row {number}", row) for number, row in enumerate(requests))
    else:
        raise TypeError(
            f"`requests` is a {type(requests).__name__} but must be the path of a JSONL or CSV file, or a list of "
            "dictionaries."
        )
    collector = _Collector(root, _checked_defaults(defaults))
    for place, row in rows:
        collector.add(place, row)
    if collector.messages:
        raise RequestsError(name, collector.messages)
    if not collector.videos:
        raise ValueError(f"{name} has no row. Give at least one video with a query.")
    return list(collector.videos.values())


class _Collector:
    """Gathers rows by video, and what is wrong with them."""

    def __init__(self, root: Path, defaults: dict[str, Any]) -> None:
        self.root, self.defaults = root, defaults
        self.messages: list[str] = []
        self.videos: dict[tuple[Any, ...], VideoRequest] = {}
        self._ids: dict[tuple[Any, ...], dict[str, str]] = {}
        self._checked: dict[Path, str | None] = {}

    def add(self, place: str, row: Any) -> None:
        """Take one row, with its place."""
        if isinstance(row, Fault):
            self.messages.append(f"{place}: {row.text}")
            return
        values, problems = _checked_values(row)
        problems += self._problems_of_files(values)
        if problems:
            self.messages += [f"{place}: {problem}" for problem in problems]
            return
        path = self.root / values["video"]
        values = {**_suitable(self.defaults, values, path), **values}
        part = values.get("start"), values.get("end")
        # Spelled in different ways, a path is still that of one video.
        key = (os.path.abspath(path), *part)
        request = self.videos.setdefault(
            key, VideoRequest(os.path.normpath(values["video"]), path, *part, values.get("fps"), place)
        )
        if values.get("fps") != request.fps:
            self.messages.append(
                f"{place}: `fps` is {values.get('fps')} but {request.place}, about the same video, has {request.fps}. "
                "Give both the same."
            )
            return
        ids = self._ids.setdefault(key, {})
        for query in values.get("queries", [values.get("query")]):
            expression_id = values.get("expression_id", str(len(request.queries)))
            # On some disks names that differ only in the case of letters, or in how accents are made, are one.
            folded = unicodedata.normalize("NFC", expression_id).casefold()
            if folded in ids:
                self.messages.append(
                    f"{place}: the `expression_id` {expression_id!r} is that of another query on this video, in "
                    f"{ids[folded]}. Give each its own; without one it is the query's number on the video, from 0."
                )
                return
            ids[folded] = place
            request.queries.append(_query(self.root, expression_id, query, values))

    def _problems_of_files(self, values: dict[str, Any]) -> list[str]:
        problems: list[str | None] = []
        if "video" in values:
            path = self.root / values["video"]
            problems.append(self._problem_of_video(path))
            if "fps" in values and problems == [None] and not _needs_rate(path):
                problems.append("`fps` is for folders and images; a video file has a rate of its own. Leave it out.")
        if "first_mask" in values:
            problems.append(_problem_of_mask(self.root / values["first_mask"]))
        return [problem for problem in problems if problem is not None]

    def _problem_of_video(self, path: Path) -> str | None:
        """Look once whether there is such a video; what is inside is found out when it is opened."""
        if path not in self._checked:
            problem = None
            try:
                if not path.exists():
                    problem = f"there is no video at `{path}`."
                elif path.is_dir():
                    image_files_of(path)
            except (ValueError, OSError) as error:  # no images, or nothing that may be looked at
                problem = str(error)
            self._checked[path] = problem
        return self._checked[path]


def _query(root: Path, expression_id: str, query: str | None, values: dict[str, Any]) -> RequestedQuery:
    references = values.get("reference_frames")
    return RequestedQuery(
        expression_id,
        query,
        values.get("target_frame"),
        None if references is None else tuple(references),
        values.get("num_reference_frames"),
        root / values["first_mask"] if "first_mask" in values else None,
        values.get("explain", False),
    )


def _checked_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that are given, as they are used."""
    checked = {}
    for name, value in defaults.items():
        if not _is_absent(value):
            checked[name], needed = _CHECKS[name](value)
            if needed:
                raise ValueError(f"`{name}` is {brief(value)} but must be {needed}.")
    if "reference_frames" in checked and "num_reference_frames" in checked:
        raise ValueError("`reference_frames` and `num_reference_frames` are both given. Leave one out.")
    return checked


def _suitable(defaults: dict[str, Any], values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the defaults that go with the values of a row."""
    left_out = set()
    if values.keys() & {"first_mask", "reference_frames", "num_reference_frames"}:
        left_out |= {"reference_frames", "num_reference_frames"}
    if "first_mask" in values:
        left_out |= {"target_frame", "explain"}
    if not _needs_rate(path):
        left_out.add("fps")
    return {name: value for name, value in defaults.items() if name not in left_out}


def _needs_rate(path: Path) -> bool:
    return path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES


def _problem_of_mask(path: Path) -> str | None:
    try:
        read_mask(path)
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _checked_values(row: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the values of a row that are in order, without those not given, and what is wrong with the others."""
    if not isinstance(row, Mapping):
        return {}, [f"is {brief(row)} but must be an object, like {_EXAMPLE}."]
    row = {name: value for name, value in row.items() if not _is_absent(value)}
    values: dict[str, Any] = {}
    problems = [unknown_column(name) for name in row if name not in COLUMNS]
    for name in COLUMNS:
        if name in row:
            value, needed = _CHECKS[name](row[name])
            if needed:
                problems.append(f"`{name}` is {brief(row[name])} but must be {needed}.")
            else:
                values[name] = value
    if "video" not in row:
        problems.append(f"`video` is missing. A row is like {_EXAMPLE}.")
    if not row.keys() & {"query", "queries", "first_mask"}:
        problems.append("`query` is missing. Say what to segment.")
    problems += [
        f"`{one}` and `{other}` are both given. {remedy}"
        for one, other, remedy in _EXCLUSIVE
        if one in row and other in row and row[one] is not False
    ]
    start, end = values.get("start"), values.get("end")
    if isinstance(start, float) and isinstance(end, float) and start >= end:
        problems.append(f"`start` is {start:g} but `end` is {end:g}. The end must be later.")
    # Beside a mask a query is only a name.
    if "first_mask" not in row:
        problems += filter(None, map(_problem_of_words, values.get("queries", [values.get("query")])))
    return values, problems


_EXAMPLE = '{"video": "clip.mp4", "query": "the red car"}'
_ONE_EACH = "It belongs to one query: write a row for each."
_NOT_ASKED = "With a mask the model is not asked, and looks at no reference: leave one out."
_EXCLUSIVE = (
    ("query", "queries", "Leave one out."),
    ("expression_id", "queries", _ONE_EACH),
    ("first_mask", "queries", _ONE_EACH),
    ("reference_frames", "first_mask", _NOT_ASKED),
    ("num_reference_frames", "first_mask", _NOT_ASKED),
    ("explain", "first_mask", "With a mask the model is not asked: leave one out."),
    ("reference_frames", "num_reference_frames", "The number is for references that are chosen: leave one out."),
)


def _is_absent(value: Any) -> bool:
    """Tell whether a value is not given: tables say so with a number that is none."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _problem_of_words(query: str | None) -> str | None:
    if query is None:
        return None
    if is_blank(query):
        return f"a query is empty ({query!r}). Say in words what is meant."
    special = special_texts_in(query)
    if special:
        return f"the query {brief(query)} holds `{special[0]}`, which the model reads as a special token. Remove it."
    return None


# What is allowed in a column: value -> (value as used, what is needed instead or "")


def _text(value: Any) -> tuple[Any, str]:
    # Half a character comes out of a JSON escape, and cannot be written anywhere.
    is_fine = isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
    return value, "" if is_fine else "a text"


def _texts(value: Any) -> tuple[Any, str]:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    return value, "" if is_list and not any(_text(each)[1] for each in value) else "a list of texts"


def _path(value: Any) -> tuple[Any, str]:
    if isinstance(value, Path):
        value = str(value)
    if _text(value)[1] or not value.strip() or "\0" in value or "://" in value:
        return value, "the path of a file or folder; download it first"
    return value, ""


def _id(value: Any) -> tuple[Any, str]:
    value = str(int(value)) if _is_whole(value) else value
    is_fine = isinstance(value, str) and _EXPRESSION_ID.fullmatch(value) and not _text(value)[1]
    if not is_fine or len(os.fsencode(value)) > _LONGEST_ID:
        return value, f"fit to name a folder: at most {_LONGEST_ID} bytes without /, \\, dots or blanks at its ends"
    return value, ""


def _frame(value: Any) -> tuple[Any, str]:
    is_fine = _is_whole(value) and value >= 0
    return (int(value), "") if is_fine else (value, "a whole number from 0")


def _frames(value: Any) -> tuple[Any, str]:
    is_list = isinstance(value, list | tuple) and not any(_frame(each)[1] for each in value)
    return ([int(each) for each in value], "") if is_list else (value, "a list of frame numbers, like 0,5,9")


def _flag(value: Any) -> tuple[Any, str]:
    return value, "" if isinstance(value, bool) else "true or false"


def _time(value: Any) -> tuple[Any, str]:
    if isinstance(value, str) and re.fullmatch(r"\d+f", value):
        return value, ""
    try:
        seconds = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    # "2" and 2.0 are one time.
    is_time = math.isfinite(seconds) and seconds >= 0
    return (seconds, "") if is_time else (value, 'seconds, like 2.5, or a frame number, like "120f"')


def _rate(value: Any) -> tuple[Any, str]:
    is_fine = _is_number(value) and math.isfinite(value) and value > 0
    return (float(value), "") if is_fine else (value, "a number above 0")


_CHECKS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "video": _path,
    "query": _text,
    "queries": _texts,
    "expression_id": _id,
    "target_frame": _frame,
    "reference_frames": _frames,
    "num_reference_frames": _frame,
    "first_mask": _path,
    "explain": _flag,
    "start": _time,
    "end": _time,
    "fps": _rate,
}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    """Tell whether a value is a whole number; tables that lack some hold 5 as 5.0."""
    return _is_number(value) and float(value).is_integer()
