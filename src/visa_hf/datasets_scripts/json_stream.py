"""JSON files that are larger than they should be in memory, one item at a time.

The standard library's decoder runs over a sliding window of the file. The window holds bytes, one character each, so
that it is known where in the file a value lies; a value that is not plain ASCII is decoded as UTF-8 when it is found.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# Bytes read at once. A value larger than this is read in ever larger pieces.
_CHUNK = 1 << 20

_BYTE_ORDER_MARK = "\u00ef\u00bb\u00bf"  # as it looks one character a byte

Span = tuple[int, int]
"""Where a value lies in its file: its first byte, and the one behind its last. They are a JSON text of their own."""


class JSONStreamError(ValueError):
    """The JSON is broken, a key occurs twice, or the file holds something else than was asked for."""


def stream_array(path: str | Path) -> Iterator[Any]:
    """Yield the items of the array that the file holds."""
    with _open(path) as file:
        window = _Window(file)
        if window.peek() != "[":
            raise JSONStreamError("holds no JSON array; `[...]` is needed.")
        for _ in window.members("[", "]"):
            yield window.value()
        window.expect_end()


def locate_items(path: str | Path) -> Iterator[tuple[str, Any, Span]]:
    """Yield keys and values of the object that the file holds, and where each value lies in it."""
    with _open(path) as file:
        window = _Window(file)
        for key in window.keys():
            yield (key, *window.located())
        window.expect_end()


def locate_members(path: str | Path) -> Iterator[tuple[str, Any, Span]]:
    """Yield the members of all lists of the object that the file holds: key of the list, member, where it lies.

    Before its members a list is announced by one that is `None` and lies nowhere, so that an empty one is seen too.
    """
    with _open(path) as file:
        window = _Window(file)
        for key in window.keys():
            if window.peek() != "[":
                window.value()
                continue
            yield key, None, (0, 0)
            for _ in window.members("[", "]"):
                yield (key, *window.located())
        window.expect_end()


def _open(path: str | Path) -> TextIO:
    # As Latin-1 each byte is one character, and what gives JSON its structure is ASCII in UTF-8 too.
    return open(path, encoding="latin-1", newline="")


class _Window:
    """The part of a file around the place that is being read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text = file.read(len(_BYTE_ORDER_MARK))
        self._start = 0  # of the window, in bytes from the start of the file
        self._idx = len(_BYTE_ORDER_MARK) if self._text == _BYTE_ORDER_MARK else 0  # of the next byte, in the window
        self._is_complete = False
        self._decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        """Bytes before the place that is being read."""
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
            raise JSONStreamError(f"is not valid JSON: {character!r} is needed at byte {self.position}, not {found}.")
        self._idx += 1

    def expect_end(self) -> None:
        """Make sure that only white space is left."""
        if self.peek():
            raise JSONStreamError(f"is not valid JSON: more follows its end, at byte {self.position}.")

    def keys(self) -> Iterator[str]:
        """Stop behind each key of an object; the caller reads the value."""
        if self.peek() != "{":
            raise JSONStreamError("holds no JSON object; `{...}` is needed.")
        seen: set[str] = set()
        for _ in self.members("{", "}"):
            key = self.value()
            if not isinstance(key, str):
                raise JSONStreamError(f"is not valid JSON: a key is no text, near byte {self.position}.")
            if key in seen:
                raise JSONStreamError(f"the key {key!r} occurs twice in one object.")
            seen.add(key)
            self.expect(":")
            yield key

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
                raise JSONStreamError(f"is not valid JSON: a comma before {closing!r}, at byte {self.position}.")

    def located(self) -> tuple[Any, Span]:
        """Read the value that comes next; return it and where it lies."""
        self.peek()
        start = self.position
        value = self.value()
        return value, (start, self.position)

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
                raise JSONStreamError(f"is not valid JSON: {error.msg} at byte {self._start + error.pos}.") from error
            except RecursionError as error:
                raise JSONStreamError("is not valid JSON: it is nested too deeply.") from error
            except ValueError as error:  # a number of thousands of digits
                raise JSONStreamError(f"is not valid JSON: {error}.") from error
            # A number at the very end of the window may go on behind it.
            if end == len(self._text) and self._more(size):
                continue
            text = self._text[self._idx : end]
            self._idx = end
            return value if text.isascii() else self._decoded(text)

    def _decoded(self, text: str) -> Any:
        """Return a value whose text, one character a byte, is not plain ASCII."""
        try:
            return self._decoder.decode(text.encode("latin-1").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise JSONStreamError(f"is not UTF-8 text ({error}, before byte {self.position}).") from error

    def _more(self, size: int) -> bool:
        """Move the window on, keeping what is unread; `False` at the end of the file."""
        text = "" if self._is_complete else self._file.read(size)
        self._is_complete = not text
        self._text = self._text[self._idx :] + text
        self._start += self._idx
        self._idx = 0
        return bool(text)
