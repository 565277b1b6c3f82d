"""`visa data check`: everything that is wrong with a folder of your own data, and a picture of what is right.

It reads the lines as the builder does (`own_data_lines`), but goes on after a mistake.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm  # type: ignore[import-untyped]

from visa_hf.datasets_scripts.frame_store import FrameStore
from visa_hf.datasets_scripts.own_data_lines import (
    TYPES,
    Clip,
    LineReader,
    OwnLine,
    jsonl_files,
    needs_masks,
    raw_lines,
    split_name,
)
from visa_hf.rendering import contact_sheet
from visa_hf.rle import decode_mask

_CELL = (240, 320)  # (height, width) of a picture in the preview, in pixels
_CAPTION = 18  # height of the line under it
_MAX_EXAMPLES = 64


@dataclass(frozen=True)
class Problem:
    """Something wrong, in a line of a file (numbered from 1), or in the file as a whole (`line` is `None`)."""

    file: str
    line: int | None
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.message}"


@dataclass
class OwnDataReport:
    """What a folder of your own data holds, and what is wrong with it.

    Attributes:
        problems: in the order of files and lines.
        num_lines: lines that are in order, of each split.
        num_expressions: of each type.
        num_masks, num_empty: masks that show the object, and known to be empty ones.
        examples: some of the lines that are in order and show an object, evenly spread, with split and number each.
    """

    problems: list[Problem] = field(default_factory=list)
    num_lines: dict[str, int] = field(default_factory=dict)
    num_expressions: dict[int, int] = field(default_factory=lambda: dict.fromkeys(TYPES, 0))
    num_videos: int = 0
    num_masks: int = 0
    num_empty: int = 0
    examples: list[tuple[str, int, OwnLine]] = field(default_factory=list)
    _num_shown: int = 0
    _stride: int = 1

    def add(self, split: str, number: int, line: OwnLine) -> None:
        """Count a line that is in order."""
        shown = sum(mask is not None for mask in line.masks.values())
        self.num_lines[split] += 1
        self.num_expressions[line.type_id] += 1
        self.num_masks += shown
        self.num_empty += len(line.masks) - shown
        if not shown:
            return
        if self._num_shown % self._stride == 0:
            self.examples.append((split, number, line))
        self._num_shown += 1
        if len(self.examples) > _MAX_EXAMPLES:  # so that memory does not grow with the data
            self.examples, self._stride = self.examples[::2], 2 * self._stride

    def summary(self) -> str:
        """Say it in a few words."""
        splits = ", ".join(f"{name} {count}" for name, count in self.num_lines.items())
        types = self.num_expressions
        return (
            f"{sum(self.num_lines.values())} expressions in order ({splits}; {types[0]} referring, {types[1]} "
            f"reasoning, {types[2]} no such object) of {self.num_videos} videos, {self.num_masks} masks and "
            f"{self.num_empty} frames without the object; {len(self.problems)} problems"
        )


def check_own_data(folder: str | os.PathLike[str], *, decode: bool = False) -> list[Problem]:
    """Find everything that is wrong with a folder of your own data.

    Args:
        folder: as `OwnData` takes it.
        decode (`bool`): decode every frame of every video as well. Otherwise videos are opened, which finds those
            that are no videos or cut off, but no damage further inside.

    Returns:
        `list[Problem]`: all problems, in the order of files and lines.

    Raises:
        FileNotFoundError: there is no such folder, or no JSONL file in it.
    """
    return inspect_own_data(folder, decode=decode).problems


def inspect_own_data(folder: str | os.PathLike[str], *, decode: bool = False, progress: bool = False) -> OwnDataReport:
    """Do what `check_own_data` does, and count what is in order.

    Args:
        folder, decode: as there.
        progress (`bool`): show it on stderr.
    """
    root = Path(folder).absolute()
    report = OwnDataReport()
    clips: dict[str, Clip | str] = {}
    files = jsonl_files(root)
    num_bytes = sum(path.stat().st_size for path in files)
    with tqdm(total=num_bytes, desc="checking", unit="B", unit_scale=True, disable=not progress) as bar:
        for path in files:
            try:
                split = split_name(path)
            except ValueError as error:
                report.problems.append(Problem(path.name, None, str(error)))
                bar.update(path.stat().st_size)
                continue
            _check_file(path, split, LineReader(root, needs_masks(split), clips), report, bar, decode)
    report.num_videos = sum(isinstance(clip, Clip) for clip in clips.values())
    return report


def _check_file(path: Path, split: str, reader: LineReader, report: OwnDataReport, bar: Any, decode: bool) -> None:
    report.num_lines[split] = 0
    is_empty = True
    for number, raw in raw_lines(path):
        is_empty = False
        before = set(reader.clips)
        line, messages = reader.read(number, raw)
        if decode:
            for video in set(reader.clips) - before:
                messages += _damage(reader, video)
        report.problems += [Problem(path.name, number, message) for message in messages]
        if line is not None and not messages:
            report.add(split, number, line)
        bar.update(len(raw))
    if is_empty:
        report.problems.append(
            Problem(path.name, None, "the file is empty. Write a JSON object a line, or remove it.")
        )


def _damage(reader: LineReader, video: str) -> list[str]:
    """Decode a whole video, in slices; what is wrong with it, which later lines about it will be told too."""
    clip = reader.clips[video]
    if isinstance(clip, str):
        return []
    try:
        for _ in _decoded(clip, reader.root):
            pass
    except (ValueError, OSError) as error:
        reader.clips[video] = str(error)
        return [str(error)]
    return []


def _decoded(clip: Clip, root: Path) -> Iterator[np.ndarray]:
    store = FrameStore(root)
    for start in range(0, len(clip.frames), 32):
        yield from store.read(clip.frames[start : start + 32])


def draw_preview(
    report: OwnDataReport, folder: str | os.PathLike[str], output: str | os.PathLike[str], *, num_pictures: int = 12
) -> int:
    """Draw some of the masks over their frames, spread over the lines that are in order.

    Args:
        report: of `inspect_own_data`.
        folder: the folder that it is of.
        output: JPEG or PNG file to write; it appears whole, or not at all.
        num_pictures (`int`): how many, at most.

    Returns:
        `int`: the number of pictures; with 0, no file is written.
    """
    target = Path(output)
    check_preview_name(target)
    if not report.examples:
        return 0
    num_pictures = min(num_pictures, len(report.examples))
    places = np.linspace(0, len(report.examples) - 1, num_pictures).round().astype(int)
    store = FrameStore(folder)
    cells = [_cell(report.examples[place], store) for place in places]
    sheet = contact_sheet([frame for frame, _ in cells], [mask[None] for _, mask in cells])
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        Image.fromarray(sheet).save(temporary)
        os.replace(temporary, target)
    finally:
        with suppress(OSError):  # gone already on success; on failure the first error counts
            temporary.unlink()
    return num_pictures


def check_preview_name(path: Path) -> None:
    """Refuse, before all work, what no preview can be written to.

    Raises:
        ValueError: the file is neither a JPEG nor a PNG.
        FileNotFoundError: there is no folder to write it to.
    """
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"The preview `{path}` must end in .jpg or .png.")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder `{path.parent}` for the preview. Make it first.")


def _cell(example: tuple[str, int, OwnLine], store: FrameStore) -> tuple[np.ndarray, np.ndarray]:
    """The middle one of the frames that show the object, fitted into a cell, with a caption below, and its mask."""
    split, number, line = example
    shown = [(index, mask) for index, mask in line.masks.items() if mask is not None]
    index, rle = shown[len(shown) // 2]
    frame = store.read([line.clip.frames[index]])[0]
    scale = min(_CELL[0] / frame.shape[0], _CELL[1] / frame.shape[1])
    height, width = (max(1, round(length * scale)) for length in frame.shape[:2])
    picture = Image.new("RGB", (_CELL[1], _CELL[0] + _CAPTION), "black")
    picture.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR))
    caption = f"{split}:{number} frame {index}: {line.expression}"
    ImageDraw.Draw(picture).text((3, _CELL[0] + 2), caption, font=ImageFont.load_default(12), fill="white")
    mask = np.zeros((_CELL[0] + _CAPTION, _CELL[1]), dtype=np.bool_)
    small = Image.fromarray(decode_mask(rle)).resize((width, height), Image.Resampling.NEAREST)
    mask[:height, :width] = np.asarray(small)
    return np.asarray(picture), mask
