"""Readers of annotation files, and the checks that nothing wrong gets past them.

Files of several hundred megabytes are streamed. Pickles are read by an unpickler that knows containers, text, numbers
and numpy arrays, and can call nothing else.
Every error names the file and, where known, line, video, expression and frame. No data set's layout is known here.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from visa_hf.rle import RLE, mask_area

from .brief import brief
from .json_stream import JSONStreamError, Span, locate_items, locate_members, stream_array
from .mask_checks import all_fill
from .restricted_pickle import RestrictedPickleError, load_restricted

# Part of every fingerprint: raise it when the rows that a builder makes of the same files change.
_CODE_VERSION = "2"

# In a path: a drive of Windows at its start, a backslash, a NUL.
_REFUSED = re.compile(r"\A[A-Za-z]:|[\\\0]")


class AnnotationError(ValueError):
    """An annotation that cannot be used; its text says which and why."""

    @classmethod
    def at(
        cls,
        message: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        video: str | None = None,
        expression: str | None = None,
        annotation: str | None = None,
        frame: str | int | None = None,
    ) -> "AnnotationError":
        """Return an error whose text names the place: the file first, then what is known of the rest."""
        places = [] if file is None else [str(file)]
        places += [] if line is None else [f"line {line}"]
        named = {"video": video, "expression": expression, "annotation": annotation, "frame": frame}
        places += [f"{name} {brief(value)}" for name, value in named.items() if value is not None]
        return cls(f"{', '.join(places)}: {message}" if places else message)


def locate_json_items(path: str | Path) -> Iterator[tuple[str, Any, Span]]:
    """Yield the keys and values of a big JSON object, and where each value lies: its first byte, and its last + 1.

    One value at a time is in memory, and its bytes are a JSON text that can be read again without the others.

    Raises:
        AnnotationError: the JSON is broken (found when the place is reached) or no object, or a key occurs twice.
    """
    with _naming(path):
        yield from locate_items(path)


def locate_json_members(path: str | Path) -> Iterator[tuple[str, Any, Span]]:
    """Yield the members of all lists of a big JSON object, as `locate_json_items` does items.

    A list is announced by a member `None` that lies nowhere, so that an empty one is seen too.

    Raises:
        AnnotationError: as `locate_json_items`.
    """
    with _naming(path):
        yield from locate_members(path)


def iter_json_array(path: str | Path) -> Iterator[Any]:
    """Yield the items of a file that holds one big JSON array; one item at a time is in memory.

    Raises:
        AnnotationError: the JSON is broken (found when the place is reached) or no array.
    """
    with _naming(path):
        yield from stream_array(path)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    try:
        yield
    except JSONStreamError as error:
        raise AnnotationError.at(str(error), file=path) from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file into memory; a key that occurs twice in an object is an error.

    Raises:
        AnnotationError: the JSON is broken, or a key occurs twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AnnotationError.at(f"is not UTF-8 text ({error}).", file=path) from error
    return parse_json(text, path)


def load_restricted_pickle(path: str | Path) -> Any:
    """Read a pickle of containers, text, bytes, numbers and numpy arrays; Python 2's as well.

    Nothing in the file is executed: a pickle that names any other class or function is refused.

    Raises:
        AnnotationError: something else is in it, or it is damaged.
    """
    try:
        return load_restricted(path)
    except RestrictedPickleError as error:
        raise AnnotationError.at(str(error), file=path) from error


def check_relative(path: Any, **where: Any) -> str:
    """Return a path found inside an annotation, if it stays inside the data folder.

    Raises:
        AnnotationError: it is absolute, has `..`, a drive, a backslash or a NUL, or is empty or no text.
    """
    if not isinstance(path, str):
        raise AnnotationError.at(f"the path {brief(path)} is not text.", **where)
    parts = path.split("/")
    is_inside = (
        path.strip() != ""
        and not path.startswith("/")
        and ".." not in parts
        and any(part not in ("", ".") for part in parts)
        and not _REFUSED.search(path)
    )
    if not is_inside:
        raise AnnotationError.at(
            f"the path {brief(path)} is refused: a path inside the data folder is needed, relative, with `/` and "
            "without `..`.",
            **where,
        )
    return check_text(path, "path", **where)


def check_text(value: Any, name: str, **where: Any) -> str:
    """Return a text that is not blank and can be written as UTF-8.

    Raises:
        AnnotationError: it is something else.
    """
    if not isinstance(value, str) or not value.strip():
        raise AnnotationError.at(f"`{name}` is {brief(value)}; text is needed.", **where)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise AnnotationError.at(f"`{name}` is {brief(value)}, which is not valid Unicode.", **where) from error
    return value


def check_id(value: Any, name: str, **where: Any) -> str:
    """Return an id, published as text or as a whole number, as text.

    Raises:
        AnnotationError: it is something else.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return check_text(value, name, **where)


def check_rle(rle: Any, height: int, width: int, **where: Any) -> RLE:
    """Return a mask as `visa_hf.rle` has it, after checking that its runs fill a frame of that size.

    Args:
        rle: dict with `size` [H, W] and `counts`, COCO's compressed runs as text or bytes.

    Raises:
        AnnotationError: another size than (`height`, `width`), or damaged.
    """
    if not isinstance(rle, dict) or not {"size", "counts"} <= set(rle):
        raise AnnotationError.at(f"the mask is {brief(rle)}; a dict with `size` and `counts` is needed.", **where)
    checked: RLE = _plain_rle(rle)
    if checked["size"] != [height, width]:
        raise AnnotationError.at(
            f"the mask has size {brief(checked['size'])} (H, W), but the frame has [{height}, {width}].", **where
        )
    try:
        mask_area(checked)
    except (TypeError, ValueError) as error:
        raise AnnotationError.at(str(error), **where) from error
    if not all_fill([checked], height, width):  # a sum of huge runs can wrap around to the right number
        raise AnnotationError.at("the mask has a run that is longer than the frame: it is damaged.", **where)
    return checked


def check_masks(rles: Any, frames: Sequence[str], height: int, width: int, **where: Any) -> list[RLE | None]:
    """Return the masks of one object in every frame; `None` where it is not to be seen.

    Args:
        rles: one entry per frame, in the order of `frames`.

    Raises:
        AnnotationError: not one entry per frame, or an entry is neither null nor a mask of the frame's size.
    """
    if not isinstance(rles, list | tuple):
        raise AnnotationError.at(f"the masks are {brief(rles)}; a list, one entry per frame, is needed.", **where)
    if len(rles) != len(frames):
        raise AnnotationError.at(
            f"there are {len(rles)} masks for {len(frames)} frames; one entry per frame is needed, null where the "
            "object is not to be seen.",
            **where,
        )
    plain = [None if rle is None else _plain_rle(rle) for rle in rles]
    if all_fill([rle for rle in plain if rle is not None], height, width):
        return plain
    return [
        None if rle is None else check_rle(rle, height, width, frame=frame, **where)
        for rle, frame in zip(rles, frames, strict=True)
    ]


def _plain_rle(rle: Any) -> Any:
    """Return a mask with its counts as text and nothing but what a mask needs; anything else as it is."""
    if not isinstance(rle, dict) or not {"size", "counts"} <= rle.keys():
        return rle
    size, counts = rle["size"], rle["counts"]
    return {
        "size": list(size) if isinstance(size, tuple) else size,
        "counts": counts.decode("latin-1") if isinstance(counts, bytes) else counts,
    }


def fingerprint(
    paths: Sequence[str | Path], root: str | Path | None = None, image_folders: Sequence[str | Path] = ()
) -> str:
    """Return a short text that changes whenever one of the files does, or comes, or goes.

    It looks at names, sizes and times of change, not at the contents. Of a folder, every file in it counts.

    Args:
        root: names are taken relative to it, so that another place alone is no change.
        image_folders: folders of which only the lists of files count, which takes no look at each file.
    """
    digest = blake2b(_CODE_VERSION.encode(), digest_size=16)
    files = [file for path in paths for file in _files_in(path)]
    folders = [folder for path in image_folders for folder, _ in walk(path)]
    for path in [*files, *folders]:
        name = os.path.relpath(path, root) if root is not None else os.path.basename(path)
        digest.update(f"{name}\0{_state(path)}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def natural_key(name: str) -> list[Any]:
    """Return a key that sorts `frame2` before `frame10`."""
    parts = re.split(r"([0-9]+)", name)
    # A number as (digits, text): of any length, and without Python's limit on the digits of an integer.
    return [(len(part.lstrip("0")), part.lstrip("0")) if idx % 2 else part for idx, part in enumerate(parts)]


def walk(folder: str | Path, *, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below a path, itself first, with the names of its files, all sorted.

    Links to folders are followed, since data sets are often put together of them; each folder is visited once.

    Args:
        hidden: whether files and folders whose names begin with a dot count.
    """
    seen: set[tuple[int, int]] = set()
    for parent, below, names in os.walk(folder, followlinks=True):
        stat = os.stat(parent)
        if (stat.st_dev, stat.st_ino) in seen:
            below.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        below[:] = sorted(name for name in below if hidden or name[0] != ".")
        yield parent, sorted(name for name in names if hidden or name[0] != ".")


def _files_in(path: str | Path) -> list[str]:
    """Return the path itself, or all files below it if it is a folder."""
    if not os.path.isdir(path):
        return [str(path)]
    return [os.path.join(folder, name) for folder, names in walk(path) for name in names]


def _state(path: str) -> str:
    """Return size and times of change of a file. Its ctime tells of a change even where the mtime was put back."""
    try:
        stat = os.stat(path)
    except OSError as error:  # missing, most often; or a link that leads nowhere
        return f"no file ({error.errno})"
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def parse_json(text: str, file: str | Path) -> Any:
    """Parse the JSON of a file that was read; a key that occurs twice in an object is an error.

    Raises:
        AnnotationError: the JSON is broken, or a key occurs twice.
    """
    repeated: list[str] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        items = dict(pairs)
        if len(items) == len(pairs):
            return items
        counts = Counter(key for key, _ in pairs)
        repeated.append(next(key for key, count in counts.items() if count > 1))
        return _Repeated(items)

    try:
        value = json.loads(text, object_pairs_hook=build)
    except json.JSONDecodeError as error:
        raise AnnotationError.at(f"is not valid JSON: {error}.", file=file, line=error.lineno) from error
    except RecursionError as error:
        raise AnnotationError.at("is not valid JSON: it is nested too deeply.", file=file) from error
    except ValueError as error:  # a number of thousands of digits
        raise AnnotationError.at(f"is not valid JSON: {error}.", file=file) from error
    if repeated:
        place = ".".join(_path_to_repeated(value) or [])
        inside = f"the object at `{place}`" if place else "one object"
        raise AnnotationError.at(f"the key {brief(repeated[0])} occurs twice in {inside}.", file=file)
    return value


class _Repeated(dict):
    """An object of a JSON file that has a key twice."""


def _path_to_repeated(value: Any) -> list[str] | None:
    """Return the keys that lead to the first object with a key twice, the innermost ones first read."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        path = _path_to_repeated(item)
        if path is not None:
            return [str(key), *path]
    return [] if isinstance(value, _Repeated) else None
