"""Pickles without their danger: containers, text, bytes, numbers and numpy arrays are read, nothing else is called.

The standard unpickler looks up every class and function by `find_class`; here that is a fixed table. Arrays are built
by our own code from (shape, dtype, bytes), because numpy trusts the state that a pickle gives it.
"""

import math
import pickle
import re
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from .brief import brief

# Kinds of plain numbers and strings, with their bytes per element. Objects ("O") and records ("V") are no plain data.
_DTYPE = re.compile(r"[<>|=]?(?:[biufc]|[SU](?=[0-9]*[1-9]))[0-9]{1,9}")


class RestrictedPickleError(ValueError):
    """The pickle holds more than plain data, or is damaged."""


def load_restricted(path: str | Path) -> Any:
    """Read a pickle of plain data; text of Python 2 becomes `str`."""
    with open(path, "rb") as file:
        try:
            return _Unpickler(file, encoding="latin-1").load()
        except RestrictedPickleError:
            raise
        except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way
            raise RestrictedPickleError(
                f"is not a pickle that can be read ({type(error).__name__}: {error})."
            ) from error


class _Dtype:
    """What a pickled numpy dtype says, before anything is done with it."""

    def __init__(self, code: str) -> None:
        if not isinstance(code, str) or not _DTYPE.fullmatch(code):
            raise RestrictedPickleError(
                f"holds a numpy array of dtype {brief(code)}; plain numbers and strings are read."
            )
        self.code = code.lstrip("<>|=")
        self.byte_order = code[0] if code[0] in "<>|=" else "="

    def __setstate__(self, state: Any) -> None:
        self.byte_order = state[1]
        if self.byte_order not in ("<", ">", "|", "=") or any(state[2:5]):
            raise RestrictedPickleError("holds a numpy array of records; plain numbers and strings are read.")

    def resolve(self) -> np.dtype:
        return np.dtype(self.byte_order + self.code)


class _Array(np.ndarray):
    """An array whose pickled state is checked before numpy gets it."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        array = _build_array(data, dtype, shape, "F" if is_fortran else "C")
        state = (1, array.shape, array.dtype, int(bool(is_fortran)), array.tobytes(order="A"))
        super().__setstate__(state)


class _Unpickler(pickle.Unpickler):
    """Looks names up in a fixed table. Bound methods, because a pickle can set attributes of what it is given."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "__builtin__":
            module = "builtins"
        module = module.replace("numpy.core.", "numpy._core.")
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): defaultdict,
            ("_codecs", "encode"): self._encode,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self._dtype,
            ("numpy._core.multiarray", "_reconstruct"): self._reconstruct,
            ("numpy._core.multiarray", "scalar"): self._scalar,
            ("numpy._core.numeric", "_frombuffer"): self._frombuffer,
        }
        known |= {("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset, complex)}
        known |= {("builtins", kind.__name__): kind for kind in (int, float, bool)}
        known["builtins", "bytes"] = self._bytes
        known["builtins", "bytearray"] = self._bytearray
        known["builtins", "str"] = known["builtins", "unicode"] = self._str
        known["builtins", "long"] = int
        if (module, name) not in known:
            raise RestrictedPickleError(
                f"names {module}.{name}, so it is more than plain data; it is refused and nothing in it was executed."
            )
        return known[module, name]

    def _bytes(self, *parts: Any) -> bytes:
        return bytes(self._bytearray(*parts))

    def _bytearray(self, *parts: Any) -> bytearray:
        # `bytearray(10**12)` would take that much memory, of a pickle of a few bytes.
        if parts and not isinstance(parts[0], bytes | str | list):
            raise RestrictedPickleError("asks for bytes by their number instead of giving them.")
        return bytearray(*parts)

    def _str(self, *parts: Any) -> str:
        # So would the text of a list that holds itself many times over.
        if not all(isinstance(part, bytes | str) for part in parts):
            raise RestrictedPickleError("makes a text of something that is none.")
        return str(*parts)

    def _encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise RestrictedPickleError(f"asks for the encoding {brief(encoding)}; bytes are pickled as latin1.")
        return text.encode("latin-1")

    def _dtype(self, code: str, *flags: Any) -> _Dtype:
        return _Dtype(code)

    def _reconstruct(self, kind: Any, shape: Any, code: Any) -> np.ndarray:
        return _Array((0,), dtype=np.uint8)

    def _scalar(self, dtype: Any, data: bytes | str) -> Any:
        return _build_array(data, dtype, (), "C")[()]

    def _frombuffer(self, data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
        return _build_array(bytes(data), dtype, shape, order)


def _build_array(data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
    """Make an array from pickled parts, if they fit together."""
    if not isinstance(dtype, _Dtype):
        raise RestrictedPickleError("holds a numpy array without a plain dtype.")
    if not isinstance(shape, tuple) or not all(type(length) is int and length >= 0 for length in shape):
        raise RestrictedPickleError(f"holds a numpy array of shape {brief(shape)}.")
    data = data.encode("latin-1") if isinstance(data, str) else data
    kind = dtype.resolve()
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * kind.itemsize:
        raise RestrictedPickleError("holds a numpy array whose data do not fill its shape.")
    return np.frombuffer(data, dtype=kind).reshape(shape, order="F" if order == "F" else "C")
