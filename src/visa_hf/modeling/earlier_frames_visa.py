"""What was tracked before its turn to be yielded, kept small: packed masks, and probabilities in a temporary file."""

import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .outputs_visa import PackedMask


class Found(NamedTuple):
    """One query in one frame.

    Args:
        masks (`torch.Tensor` of shape `(K, H, W)`, bool, CPU): one mask per object.
        scores (`torch.Tensor` of shape `(K,)`, float32, CPU): as of [`VideoFrameOutput`].
        probs (`torch.Tensor` of shape `(K, H, W)`, float32, CPU): probabilities; `None` if not wanted.
    """

    masks: Tensor
    scores: Tensor
    probs: Tensor | None


class EarlierFrames:
    """What one sweep found, until the next one comes by: packed masks, and probabilities in a file.

    Probabilities are kept as 16-bit numbers, rounded to 1/65535.
    """

    def __init__(self, want_probs: bool) -> None:
        self._masks: dict[tuple[int, int], list[tuple[PackedMask, float]]] = {}
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        self._file: Any = None
        if want_probs:
            with _temporary_file_errors():
                self._file = tempfile.TemporaryFile()

    def __enter__(self) -> "EarlierFrames":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            with _temporary_file_errors():
                self._file.close()

    def put(self, query_id: int, frame_idx: int, found: Found) -> None:
        """Keep what was found of a query in a frame."""
        packed = [PackedMask.pack(mask) for mask in found.masks.numpy()]
        self._masks[query_id, frame_idx] = list(zip(packed, found.scores.tolist(), strict=True))
        if self._file is not None and found.probs is not None:
            data = zlib.compress(np.rint(found.probs.numpy() * 65535).astype(np.uint16).tobytes(), 1)
            with _temporary_file_errors():
                self._places[query_id, frame_idx] = self._file.seek(0, 2), len(data)
                self._file.write(data)

    def pop(self, query: Any, frame_idx: int) -> Found:
        """Take what was found of a `SessionQuery` out again; empty masks if it was not tracked."""
        masks = torch.zeros_like(query.target_masks)
        scores = torch.zeros(len(masks))
        probs = None if self._file is None else torch.zeros(masks.shape)
        for row, (packed, score) in enumerate(self._masks.pop((query.query_id, frame_idx), [])):
            masks[row], scores[row] = torch.from_numpy(packed.unpack()), score
        place = self._places.pop((query.query_id, frame_idx), None)
        if self._file is not None and place is not None:
            with _temporary_file_errors():
                self._file.seek(place[0])
                data = self._file.read(place[1])
            values = np.frombuffer(zlib.decompress(data), dtype=np.uint16).astype(np.float32) / 65535
            probs = torch.from_numpy(values).reshape(masks.shape)
        return Found(masks, scores, probs)


@contextmanager
def _temporary_file_errors() -> Iterator[None]:
    """Say which folder is full or cannot be written, which the system's own message does not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"Probabilities cannot be kept in the folder for temporary files, `{tempfile.gettempdir()}`: "
            f"{error.strerror or error}. Free space there, or name another folder in the variable `TMPDIR`."
        ) from error
