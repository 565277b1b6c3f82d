"""Predicted masks on disk: our own layout and the published ones, read and checked.

A prediction is `Annotations/<video>/<expression_id>/<frame>.png` (a palette image, or black and white with 0/1 or
0/255), the same without the folder `Annotations`, or a line of `predictions.jsonl` with run-length masks. What is
missing, damaged, of another size, there twice or there for no reason becomes a `Problem` with a name; nothing is
guessed. Writing them is done in `predict`, scoring in `score`.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import numpy as np
from PIL import Image

from ..datasets_scripts.image_files import PILLOW_ERRORS
from ..rle import RLE, decode_mask
from .benchmarks import EvaluationSet, Expression

Mask = np.ndarray | RLE
ProblemKind = Literal["missing", "size", "unreadable", "duplicate", "extra"]

ANNOTATIONS = "Annotations"
PREDICTIONS_FILE = "predictions.jsonl"

_NOUNS: dict[str, str] = {
    "missing": "missing",
    "size": "of another size than the video",
    "unreadable": "unreadable",
    "duplicate": "there more than once",
    "extra": "not asked for",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with predictions.

    Args:
        kind (`str`): "missing", "size", "unreadable", "duplicate" or "extra".
        where (`str`): the file, or the video, expression and frame.
        detail (`str`): what exactly, if there is more to say.
    """

    kind: ProblemKind
    where: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where} is {_NOUNS[self.kind]}{f': {self.detail}' if self.detail else ''}"


def describe_problems(problems: Sequence[Problem], limit: int = 10) -> str:
    """Say what is wrong: how many of each kind, and the first ones by name."""
    counts = [
        f"{sum(problem.kind == kind for problem in problems)} {noun}"
        for kind, noun in _NOUNS.items()
        if any(problem.kind == kind for problem in problems)
    ]
    named = "; ".join(map(str, problems[:limit]))
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''} ({', '.join(counts)}): {named}{more}."


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file under a temporary name and rename it: it is there whole, or as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Predictions(Protocol):
    """Predicted masks of the expressions of a set."""

    def check(self, evaluation_set: EvaluationSet) -> list[Problem]:
        """Compare what is there with what is asked, by names alone."""

    def read(self, expression: Expression) -> list[Mask | Problem]:
        """Return the mask of each frame, bool `(H, W)` or run lengths, or what is wrong with it."""


def open_predictions(path: str | os.PathLike[str]) -> Predictions:
    """Open predictions for reading.

    Args:
        path: a folder with `Annotations/` (ours, and that of the servers' zips), a folder of videos, a folder with
            nothing but `predictions.jsonl`, or such a file. In a folder with both, the PNGs are read.

    Raises:
        FileNotFoundError: if there is nothing at `path`, or no predictions.
        ValueError: if a line of `predictions.jsonl` is not JSON or not of a prediction.
    """
    path = Path(path)
    if path.is_file():
        return JsonPredictions(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There are no predictions at `{path}`. Give a folder, or a predictions.jsonl.")
    if (path / ANNOTATIONS).is_dir():
        return PngPredictions(path / ANNOTATIONS)
    if (path / PREDICTIONS_FILE).is_file():
        return JsonPredictions(path / PREDICTIONS_FILE)
    if not any(entry.is_dir() for entry in path.iterdir()):
        raise FileNotFoundError(
            f"The folder `{path}` has no predictions: neither {ANNOTATIONS}/ nor {PREDICTIONS_FILE} nor a folder for "
            "each video. Give the folder above `<video>/<expression>/<frame>.png`."
        )
    return PngPredictions(path)


class PngPredictions:
    """Predictions as `<video>/<expression_id>/<frame>.png` under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, expression: Expression, name: str) -> Path:
        return self.folder / expression.video / expression.expression_id / f"{name}.png"

    def check(self, evaluation_set: EvaluationSet) -> list[Problem]:
        """Compare names: one look into each folder."""
        problems: list[Problem] = []
        expected_folders: set[str] = set()
        for expression in evaluation_set.expressions:
            folder = self.folder / expression.video / expression.expression_id
            names = {f"{name}.png" for name in expression.frame_names}
            found = _names_in(folder)
            if not names & found:
                problems.append(Problem("missing", expression.place))
            else:
                problems += [
                    Problem("missing", f"{expression.place}, frame `{name}`")
                    for name in expression.frame_names
                    if f"{name}.png" not in found
                ]
            problems += [Problem("extra", f"`{folder / name}`") for name in sorted(found - names)]
            expected_folders.add(f"{expression.video}/{expression.expression_id}")
        return problems + [Problem("extra", f"`{path}`") for path in _unexpected(self.folder, expected_folders)]

    def read(self, expression: Expression) -> list[Mask | Problem]:
        """Read the PNGs of one expression."""
        frames = [self._read_frame(expression, name) for name in expression.frame_names]
        if all(isinstance(frame, Problem) and frame.kind == "missing" for frame in frames):
            return [Problem("missing", expression.place)] * len(frames)
        return frames

    def _read_frame(self, expression: Expression, name: str) -> Mask | Problem:
        path = self._file(expression, name)
        try:
            mask = read_mask_png(path)
        except FileNotFoundError:
            return Problem("missing", f"{expression.place}, frame `{name}`")
        except ValueError as error:
            return Problem("unreadable", f"`{path}`", str(error))
        if mask.shape != (expression.height, expression.width):
            return Problem("size", f"`{path}`", _sizes(mask.shape, expression))
        return mask


class JsonPredictions:
    """Predictions as lines of a `predictions.jsonl`, found by their place in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[tuple[str, str], int] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._duplicates: dict[tuple[str, str], int] = {}
        self._num_masks: dict[tuple[str, str], int] = {}
        with path.open("rb") as file:
            place = 0
            for number, line in enumerate(file, start=1):
                row = _parsed(line, path, number)
                key = _key(row, path, number)
                if key in self._places:
                    self._duplicates[key] = number
                else:
                    self._places[key], self._numbers[key] = place, number
                    self._num_masks[key] = len(row["masks"])
                place += len(line)

    def check(self, evaluation_set: EvaluationSet) -> list[Problem]:
        """Compare the lines with the expressions."""
        asked = {(expression.video, expression.expression_id): expression for expression in evaluation_set.expressions}
        problems = [Problem("missing", asked[key].place) for key in asked if key not in self._places]
        problems += [self._duplicate(key) for key in self._duplicates]
        problems += [Problem("extra", _place(*key)) for key in self._places if key not in asked]
        problems += [
            Problem("extra", f"{expression.place}, a frame", f"{number} masks for {len(expression.frames)} frames")
            for key, expression in asked.items()
            if (number := self._num_masks.get(key, 0)) > len(expression.frames)
        ]
        return problems

    def read(self, expression: Expression) -> list[Mask | Problem]:
        """Read the line of one expression."""
        key = (expression.video, expression.expression_id)
        frames = range(len(expression.frames))
        if key not in self._places:
            return [Problem("missing", expression.place)] * len(frames)
        if key in self._duplicates:
            # Which of the two is meant cannot be known.
            return [self._duplicate(key)] * len(frames)
        with self.path.open("rb") as file:
            file.seek(self._places[key])
            masks = _parsed(file.readline(), self.path, self._numbers[key])["masks"]
        return [self._checked(masks.get(str(frame)), expression, frame) for frame in frames]

    def _duplicate(self, key: tuple[str, str]) -> Problem:
        lines = f"lines {self._numbers[key]} and {self._duplicates[key]} of `{self.path}`"
        return Problem("duplicate", _place(*key), lines)

    def _checked(self, rle: Any, expression: Expression, frame: int) -> Mask | Problem:
        where = f"{expression.place}, frame {frame}"
        if rle is None:
            return Problem("missing", where)
        try:
            mask = decode_mask(rle)
        except (TypeError, ValueError) as error:
            return Problem("unreadable", where, str(error))
        if mask.shape != (expression.height, expression.width):
            return Problem("size", where, _sizes(mask.shape, expression))
        return mask


def read_mask_png(file: str | os.PathLike[str] | BinaryIO) -> np.ndarray:
    """Read a predicted mask: a palette image, in which all but colour 0 is the object, or one of black and one grey.

    Args:
        file: path, or an open file.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no PNG, is damaged, or is of another kind.
    """
    try:
        with Image.open(file, formats=("PNG",)) as image:
            mode, values = image.mode, np.asarray(image)
    except FileNotFoundError:
        raise
    except PILLOW_ERRORS as error:
        raise ValueError(f"it is no PNG that can be read ({error})") from error
    if mode not in ("P", "L", "1"):
        raise ValueError(f'it is of mode "{mode}", and a mask is a palette image or one of 8-bit grey')
    mask = values != 0
    if mode == "L" and (values[mask] != values.max()).any():
        raise ValueError(f"it has {len(np.unique(values)) - 1} grey levels beside black, and a mask has one")
    return mask


def _parsed(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(
            f"Line {number} of `{path}` is not JSON ({error}). Predict again, or remove the line."
        ) from error


def _key(row: Any, path: Path, number: int) -> tuple[str, str]:
    """Return video and expression of a line after checking its form."""
    if not (
        isinstance(row, dict)
        and isinstance(row.get("video"), str)
        and isinstance(row.get("expression_id"), str | int)
        and isinstance(row.get("masks"), dict)
    ):
        raise ValueError(
            f"Line {number} of `{path}` is no prediction: `video` and `expression_id` as strings and `masks` as an "
            "object with a run-length mask for each frame number are needed."
        )
    return row["video"], str(row["expression_id"])


def _place(video: str, expression_id: str) -> str:
    return f"video `{video}`, expression `{expression_id}`"


def _sizes(shape: Iterable[int], expression: Expression) -> str:
    height, width = shape
    return f"{height} x {width} (height x width) instead of {expression.height} x {expression.width}"


def _names_in(folder: Path) -> set[str]:
    """Return the names in a folder, without hidden ones; none if there is no such folder."""
    try:
        return {entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _unexpected(folder: Path, expected: set[str]) -> Iterator[Path]:
    """Yield what lies beside the expected folders, the topmost of each kind only."""
    above = {str(parent) for path in expected for parent in Path(path).parents}

    def walk(relative: Path) -> Iterator[Path]:
        for name in sorted(_names_in(folder / relative)):
            inner = relative / name
            if str(inner) in above and (folder / inner).is_dir():
                yield from walk(inner)
            elif str(inner) not in expected:
                yield folder / inner

    return walk(Path())
