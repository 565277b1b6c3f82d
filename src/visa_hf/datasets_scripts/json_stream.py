"""JSON files that are larger than they should be in memory, one item at a time.

`ijson` (https://github.com/ICRAR/ijson) reads them where it is installed; else the standard library's decoder runs
over a sliding window of text, half as fast. Which of the two was used cannot be told from the items.
"""

import json
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

# Characters read at once. A value larger than this is read in ever larger pieces.
_CHUNK = 1 << 20


class JSONStreamError(ValueError):
    """The JSON is broken, a key occurs twice, or the file holds something else than was asked for."""


def stream_items(path: str | Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield keys and values of the object at `prefix` (keys joined by dots)."""
    if find_spec("ijson") is None:
        yield from plain_items(path, prefix)
        return
    keys: set[str] = set()
    for key, value in _with_ijson(path, "kvitems", prefix):
        _refuse_twice(key, keys)
        yield key, value
    if not keys:  # ijson is silent when there is no such object
        yield from plain_items(path, prefix)


def stream_array(path: str | Path) -> Iterator[Any]:
    """Yield the items of the array that the file holds."""
    if find_spec("ijson") is None:
        yield from plain_array(path)
        return
    is_empty = True
    for value in _with_ijson(path, "items", "item"):
        is_empty = False
        yield value
    if is_empty:
        yield from plain_array(path)


def plain_items(path: str | Path, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """As `stream_items`, with the standard library alone."""
    with _open(path) as file:
        window = _Window(file)
        yield from _object_at(window, [part for part in prefix.split(".") if part], prefix)
        window.expect_end()


def plain_array(path: str | Path) -> Iterator[Any]:
    """As `stream_array`, with the standard library alone."""
    with _open(path) as file:
        window = _Window(file)
        if window.peek() != "[":
            raise JSONStreamError("holds no JSON array; `[...]` is needed.")
        for _ in window.members("[", "]"):
            yield window.value()
        window.expect_end()


def locate_items(path: str | Path) -> Iterator[tuple[str, Any, tuple[int, int]]]:
    """Yield keys and values of the object that the file holds, and where each value lies in it, in bytes.

    The bytes from start to end are a JSON text of their own, so that one value can be read again without the others.
    """
    # As Latin-1 each byte is one character, and what gives JSON its structure is ASCII in UTF-8 too.
    with open(path, encoding="latin-1", newline="") as file:
        window = _Window(file)
        if window.peek() != "{":
            raise JSONStreamError("holds no JSON object; `{...}` is needed.")
        keys: set[str] = set()
        for key in _keys(window, keys):
            window.peek()
            start = window.position
            value = window.value()
            yield _as_utf8(key), value, (start, window.position)
        window.expect_end()


def _object_at(window: "_Window", parts: list[str], prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the items of the object to which `parts` lead from here."""
    if window.peek() != "{":
        raise JSONStreamError(f"holds no JSON object{f' at `{prefix}`' if prefix else ''}; `{{...}}` is needed.")
    keys: set[str] = set()
    for key in _keys(window, keys):
        if not parts:
            yield key, window.value()
        elif key == parts[0]:
            yield from _object_at(window, parts[1:], prefix)
        else:
            window.value()
    if parts and parts[0] not in keys:
        raise JSONStreamError(f"has no `{parts[0]}`; it is needed{f' at `{prefix}`' if prefix != parts[0] else ''}.")


def _keys(window: "_Window", keys: set[str]) -> Iterator[str]:
    """Stop behind each key of an object, collecting them in `keys`; the caller reads the value."""
    for _ in window.members("{", "}"):
        key = window.value()
        if not isinstance(key, str):
            raise JSONStreamError(f"is not valid JSON: {key!r} is no key, near character {window.position}.")
        _refuse_twice(key, keys)
        window.expect(":")
        yield key


def _as_utf8(text: str) -> str:
    """Return what a text read as Latin-1 says as UTF-8. Characters that were escaped are beyond Latin-1 or equal."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _refuse_twice(key: str, keys: set[str]) -> None:
    if key in keys:
        raise JSONStreamError(f"the key {key!r} occurs twice in one object.")
    keys.add(key)


def _open(path: str | Path) -> TextIO:
    return open(path, encoding="utf-8-sig")


def _with_ijson(path: str | Path, function: str, prefix: str) -> Iterator[Any]:
    ijson = import_module("ijson")
    with open(path, "rb") as file:
        read = {"kvitems": ijson.kvitems, "items": ijson.items}[function]
        try:
            yield from read(file, prefix, use_float=True)
        except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error).strip().split("\n")[0]
            raise JSONStreamError(f"is not valid JSON: {reason} (near byte {file.tell()} or before).") from error


class _Window:
    """The part of a text file around the place that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = ""
        self._start = 0  # of the window, in characters from the start of the file
        self._idx = 0  # of the next character, in the window
        self._is_complete = False
        self._decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        """Characters before the place that is being read."""
        return self._start + self._idx

    def peek(self) -> str:
        """Return the next character that is no white space; "" at the end of the file."""
        while True:
            while self._idx < len(self._text) and self._text[self._idx] in " \t\n\r":
                self._idx += 1
            if self._idx < len(self._text):
                return self._text[self._idx]
            if not self._more(_CHUNK):
                return ""

    def expect(self, character: str) -> None:
        """Step over one character, which must come next."""
        got = self.peek()
        if got != character:
            found = f"{got!r}" if got else "the end of the file"
            raise JSONStreamError(
                f"is not valid JSON: {character!r} is needed at character {self.position}, not {found}."
            )
        self._idx += 1

    def expect_end(self) -> None:
        """Make sure that only white space is left."""
        if self.peek():
            raise JSONStreamError(f"is not valid JSON: more follows its end, at character {self.position}.")

    def members(self, opening: str, closing: str) -> Iterator[None]:
        """Stop before each member of an array or object; the caller reads it."""
        self.expect(opening)
        if self.peek() == closing:
            self._idx += 1
            return
        while True:
            yield
            if self.peek() == closing:
                self._idx += 1
                return
            self.expect(",")
            if self.peek() == closing:
                raise JSONStreamError(f"is not valid JSON: a comma before {closing!r}, at character {self.position}.")

    def value(self) -> Any:
        """Read the value that comes next."""
        self.peek()
        size = _CHUNK
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._idx)
            except json.JSONDecodeError as error:
                # A value that is cut off by the window fails at its end, or with its last string not closed.
                may_be_cut = len(self._text) - error.pos < 16 or error.msg.startswith("Unterminated string")
                size *= 2
                if may_be_cut and self._more(size):
                    continue
                raise JSONStreamError(
                    f"is not valid JSON: {error.msg} at character {self._start + error.pos}."
                ) from error
            except RecursionError as error:
                raise JSONStreamError("is not valid JSON: it is nested too deeply.") from error
            # A number at the very end of the window may go on behind it.
            if end == len(self._text) and self._more(size):
                continue
            self._idx = end
            return value

    def _more(self, size: int) -> bool:
        """Move the window on, keeping what is unread; `False` at the end of the file."""
        try:
            text = "" if self._is_complete else self._file.read(size)
        except UnicodeDecodeError as error:
            raise JSONStreamError(f"is not UTF-8 text ({error}).") from error
        self._is_complete = not text
        self._text = self._text[self._idx :] + text
        self._start += self._idx
        self._idx = 0
        return bool(text)
