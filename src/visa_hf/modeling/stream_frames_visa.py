"""Live frames as they come, of which a bounded number is held: the latest, and some spread over all that came before.

A language model that is asked about the current frame may look at the held ones as references. This is our own work:
VISA knows no streams. Nothing is decoded here; `model.step` is given decoded frames.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from .frame_source_visa import FrameSource, open_frames


class StreamFrames(FrameSource):
    """The past of a stream. Its size is known from its first frame on, and its length grows.

    Half of the held frames are the latest ones; the others are every s-th frame before these, where s doubles when
    there would be too many. While all frames fit, all are held.

    Args:
        max_held_frames (`int`): frames held at any time, at least 4: the current one and the one before are
            always among them.
        fps (`Fraction` or `float`, *optional*): frames per second.
    """

    def __init__(self, max_held_frames: int, fps: Fraction | float | None = None) -> None:
        super().__init__(num_frames=0, height=0, width=0, fps=None if fps is None else Fraction(fps))
        self.name = "stream"
        self.is_finished = False
        self._max_held_frames = max_held_frames
        self._stride = 1
        self._held: dict[int, np.ndarray] = {}

    @property
    def held_frames(self) -> tuple[int, ...]:
        """Frames that can still be read, ascending; the last one is the current frame."""
        return tuple(self._held)

    def append(self, frame: Any) -> np.ndarray:
        """Take in the next frame, and let go of one that is too many.

        Args:
            frame: RGB array or tensor of shape `(H, W, 3)`, uint8, or a PIL image.

        Returns:
            `np.ndarray` of shape `(H, W, 3)`, uint8: the frame.

        Raises:
            RuntimeError: if the stream was finished.
            ValueError: if the frame has another size than those before, or cannot be used.
            TypeError: if it is no frame.
        """
        self._require_open()
        if self.is_finished:
            raise RuntimeError(
                f"The stream was finished after {self.num_frames} frames. Open another session for another stream."
            )
        with open_frames([frame]) as single:
            pixels = single[0]
        height, width = pixels.shape[:2]
        if self.num_frames and (height, width) != (self.height, self.width):
            raise ValueError(
                f"Frame {self.num_frames} of the stream is {height} x {width} pixels (height x width) but the stream "
                f"began as {self.height} x {self.width}. Resize it, or open another session."
            )
        self.height, self.width = height, width
        self._held[self.num_frames] = pixels
        self.num_frames += 1
        self._thin_out()
        return pixels

    def _thin_out(self) -> None:
        while len(self._held) > self._max_held_frames:
            first_recent = self.num_frames - self._max_held_frames // 2
            past = [idx for idx in self._held if idx < first_recent]
            gone = [idx for idx in past if idx % self._stride]
            if not gone:
                self._stride *= 2
                continue
            for idx in gone:
                del self._held[idx]

    def close(self) -> None:
        """Let go of all frames."""
        super().close()
        self._held.clear()

    def _read(self, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        for index in indices:
            if index not in self._held:
                raise ValueError(
                    f"Frame {index} of the stream is not held any more; {len(self._held)} are (`max_cached_frames`)."
                )
            yield index, self._held[index]
