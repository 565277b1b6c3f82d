"""Values from annotation files as an error shows them: short, however large they are.

A plain `repr` of what a stranger's file holds may take gigabytes (a pickled list that holds itself twice, many times
over), recurse too deeply, or fail (a number of thousands of digits).
"""

import reprlib
from typing import Any

_LONGEST = 200

_writer = reprlib.Repr()
_writer.maxlevel = 3
_writer.maxlist = _writer.maxtuple = _writer.maxset = _writer.maxfrozenset = _writer.maxdict = 8
_writer.maxstring = _LONGEST
_writer.maxother = 80


def brief(value: Any) -> str:
    """Return a value as Python writes it, with `...` for what is left out."""
    try:
        text = _writer.repr(value)
    except ValueError:  # Python refuses to write a number of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _LONGEST + 2 else f"{text[:_LONGEST]}..."
