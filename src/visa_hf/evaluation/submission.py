"""Zips for the servers that score MeViS valid and Ref-YouTube-VOS valid, written and checked.

Inside is `<video>/<expression_id>/<frame>.png` for every frame of every expression, one channel of 8 bits, 0 and 255:
at the top of the zip (MeViS), or in its folder `Annotations` (Ref-YouTube-VOS); `benchmarks` names the sources. The
same predictions give the same bytes. Predicting is done in `predict`, scoring on the servers.
"""

import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from ..rle import RLE, decode_mask
from .benchmarks import EvaluationSet, Expression
from .predictions import Mask, Predictions, Problem, describe_problems, read_mask_png

SUBMISSION_FILE = "submission.zip"

_EARLIEST = (1980, 1, 1, 0, 0, 0)  # the first date that a zip can hold: the same in every zip
_FILE_MODE = 0o100644 << 16


def write_submission(
    evaluation_set: EvaluationSet,
    predictions: Predictions,
    path: Path,
    *,
    on_video: Callable[[str], None] | None = None,
) -> None:
    """Write the zip that a server takes; it is there complete and checked, or not at all.

    Args:
        evaluation_set ([`EvaluationSet`]): what the server asks.
        predictions ([`Predictions`]): the masks; all of them must be there.
        path (`Path`): zip to write; an existing one is replaced.
        on_video (`Callable[[str], None]`, *optional*): called with its name after each video.

    Raises:
        ValueError: if predictions are missing or damaged.
        OSError: if the zip cannot be written.
    """
    problems = predictions.check(evaluation_set)
    if problems:
        raise ValueError(f"The predictions are not what the server asks. {describe_problems(problems)}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for video, expressions in evaluation_set.videos.items():
                for expression in expressions:
                    _add(archive, evaluation_set.benchmark.zip_folder, expression, predictions.read(expression))
                if on_video is not None:
                    on_video(video)
        problems = check_submission(temporary, evaluation_set)
        if problems:
            raise RuntimeError(f"The zip came out wrong. {describe_problems(problems)}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_submission(path: str | os.PathLike[str], evaluation_set: EvaluationSet) -> list[Problem]:
    """Compare a zip with what the server asks: every frame there, of its size, one channel of 0 and 255, no more.

    Args:
        path: the zip.
        evaluation_set ([`EvaluationSet`]): what the server asks.

    Returns:
        What is wrong; empty if nothing is.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no zip.
    """
    try:
        archive = zipfile.ZipFile(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no zip at `{path}`.") from error
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"`{path}` is no zip that can be read ({error}). Write it again.") from error
    folder = evaluation_set.benchmark.zip_folder
    with archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        problems = [Problem("duplicate", f"`{name}`") for name in twice]
        found = set(names)
        for expression in evaluation_set.expressions:
            for name in _names(folder, expression):
                if name in found:
                    problems += _check_entry(archive, name, expression)
                else:
                    problems.append(Problem("missing", f"`{name}`"))
        asked = {name for expression in evaluation_set.expressions for name in _names(folder, expression)}
        problems += [Problem("extra", f"`{name}`") for name in sorted(found - asked)]
    return problems


def _names(folder: str, expression: Expression) -> Iterator[str]:
    """Yield the names in the zip of one expression's frames."""
    above = [folder] if folder else []
    for frame in expression.frame_names:
        yield "/".join([*above, expression.video, expression.expression_id, f"{frame}.png"])


def _add(archive: zipfile.ZipFile, folder: str, expression: Expression, frames: list[Mask | Problem]) -> None:
    wrong = [frame for frame in frames if isinstance(frame, Problem)]
    if wrong:
        raise ValueError(f"The predictions are not what the server asks. {describe_problems(wrong)}")
    for name, frame in zip(_names(folder, expression), frames, strict=True):
        mask = frame if isinstance(frame, np.ndarray) else decode_mask(cast(RLE, frame))
        png = io.BytesIO()
        Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(png, format="PNG")
        entry = zipfile.ZipInfo(name, date_time=_EARLIEST)
        entry.external_attr, entry.create_system = _FILE_MODE, 3
        archive.writestr(entry, png.getvalue())


def _check_entry(archive: zipfile.ZipFile, name: str, expression: Expression) -> list[Problem]:
    """Check one PNG of the zip."""
    try:
        data = archive.read(name)
        mask = read_mask_png(io.BytesIO(data))
    except (ValueError, zipfile.BadZipFile, OSError) as error:
        return [Problem("unreadable", f"`{name}`", str(error))]
    if mask.shape != (expression.height, expression.width):
        size = f"{mask.shape[0]} x {mask.shape[1]} instead of {expression.height} x {expression.width}"
        return [Problem("size", f"`{name}`", size)]
    with Image.open(io.BytesIO(data)) as image:
        mode, highest = image.mode, int(np.asarray(image).max())
    if mode != "L" or highest not in (0, 255):
        detail = f'it is of mode "{mode}" with values up to {highest}; one channel of 0 and 255 is needed'
        return [Problem("unreadable", f"`{name}`", detail)]
    return []
