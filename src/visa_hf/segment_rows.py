"""Files of requests, JSONL and CSV, as rows: dictionaries with their places.

What stands in a row is checked in `segment_requests`.
"""

import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from visa_hf.datasets_scripts.brief import brief

COLUMNS = (
    "video",
    "query",
    "queries",
    "expression_id",
    "target_frame",
    "reference_frames",
    "num_reference_frames",
    "first_mask",
    "explain",
    "start",
    "end",
    "fps",
)


@dataclass(frozen=True)
class Fault:
    """What stands in the place of a row that cannot be read."""

    text: str


def rows_of(file: Path) -> Iterator[tuple[str, dict[str, Any] | Fault]]:
    """Yield the rows of a file, each with its place, as "line 3".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is neither JSONL nor CSV by its name, or no UTF-8 text.
    """
    suffix = file.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise ValueError(f"The requests `{file}` are neither a .jsonl nor a .csv file. Name it after what it holds.")
    if not file.is_file():
        raise FileNotFoundError(f"There are no requests at `{file}`. Give the path of a JSONL or CSV file.")
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"`{file}`, line {line}: is not UTF-8 text ({error.reason}). Save it as UTF-8.") from error
    return _json_rows(text) if suffix == ".jsonl" else _csv_rows(text)


def _json_rows(text: str) -> Iterator[tuple[str, Any]]:
    # Not `splitlines`: a query may hold other characters that end lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line, object_pairs_hook=_unrepeated)
            except json.JSONDecodeError as error:
                row = Fault(f"is not valid JSON ({error.msg}, at character {error.pos + 1}).")
            except (ValueError, RecursionError) as error:
                row = Fault(f"is not valid JSON ({error}).")
            yield f"line {number}", row


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise ValueError(f"{name!r} occurs twice")
        row[name] = value
    return row


def _csv_rows(text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    while True:
        place = f"line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:  # where the next row begins is unknown
            yield place, Fault(f"is not valid CSV ({error}).")
            return
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            fault = _problem_of_header(header)
            if fault:
                yield place, Fault(fault)
                return
        elif len(cells) > len(header):
            too_many = f"has {len(cells)} cells but there are {len(header)} columns. Quote a text that holds commas."
            yield place, Fault(too_many)
        else:
            yield place, _typed({name: cell for name, cell in zip(header, cells, strict=False) if cell.strip()})


def _problem_of_header(header: list[str]) -> str | None:
    separator = re.search(r"[;\t]", header[0])
    if len(header) == 1 and separator:
        return f"the columns are separated by {separator[0]!r}. Separate them by commas."
    for name in header:
        if name not in COLUMNS:
            return unknown_column(name)
        if name == "queries":
            return "`queries` is for JSONL. Give the column `query`, with a row for each."
        if header.count(name) > 1:
            return f"the column `{name}` occurs twice."
    if "video" not in header:
        return "there is no column `video`. The first line names the columns, like: video,query"
    return None


def _typed(cells: dict[str, str]) -> dict[str, Any]:
    """Turn cells into what JSON would hold; what is no number stays a text, and is refused as one."""
    row: dict[str, Any] = dict(cells)
    for name in ("target_frame", "num_reference_frames"):
        if name in row:
            row[name] = _number(row[name])
    if "fps" in row:
        row["fps"] = _number(row["fps"])
    if "explain" in row:
        row["explain"] = {"true": True, "false": False}.get(row["explain"].strip().lower(), row["explain"])
    for name in ("start", "end"):
        if name in row:
            row[name] = row[name].strip()
    if "reference_frames" in row:
        row["reference_frames"] = [
            _number(each) for each in re.split(r"[,;\s]+", row["reference_frames"].strip(" []"))
        ]
    return row


def _number(text: str) -> Any:
    """Read a number; programs that know no missing whole numbers write 5 as 5.0."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() else number


def unknown_column(name: Any) -> str:
    """Return what is wrong with a name that is no column, with the nearest one that is."""
    near = get_close_matches(str(name), COLUMNS, n=1)
    hint = f"Did you mean `{near[0]}`?" if near else f"Known are {', '.join(COLUMNS)}."
    return f"{brief(name)} is no column. {hint}"
