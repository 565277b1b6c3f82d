"""Who chooses the target frame of an expression when a benchmark is predicted: samplers by name.

`NAMES` are those of `visa evaluate --sampler`. "oracle" knows the true masks, which only an evaluation does: the best
that any choice of frames could reach. How samplers are asked is in `visa_hf.modeling.frame_samplers_visa`.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..modeling.frame_samplers_visa import FrameSampler, PercentagesFrameSampler, ShareFrameSampler, VideoView
from ..modeling.outputs_visa import FrameSelection
from .benchmarks import EvaluationSet, Expression
from .metrics import unite_packed_objects
from .packed import count

NAMES = ("middle", "first", "last", "visa", "oracle")

_SHARES = {"first": 0.0, "last": 1.0}


@dataclass(frozen=True)
class OracleFrameSampler:
    """The frame in which most is to be seen of what is meant, the first one of equals; the middle one of nothing.

    Args:
        areas (`tuple[int, ...]`): pixels of the true mask in each frame of the video; 0 where it is not known.
    """

    areas: tuple[int, ...]

    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the frame; `query` is not looked at."""
        frames = view.frame_indices
        best = max(frames, key=lambda idx: self.areas[idx])
        if not self.areas[best]:
            return view.select(view.at_share(0.5), "oracle: nothing is to be seen, so the middle frame")
        return view.select(best, f"oracle: {self.areas[best]} pixels are to be seen")


@dataclass(frozen=True)
class StoredFrameSampler:
    """Shares of videos from a file, found by the video and the id of one expression, or else by its words.

    Args:
        stored ([`PercentagesFrameSampler`]): the file, read.
        expression ([`Expression`]): for which one.
    """

    stored: PercentagesFrameSampler
    expression: Expression

    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the stored frame.

        Raises:
            ValueError: if the file lacks the video or the expression, or has several numbers for its words.
        """
        by_words = copy.copy(self.stored)
        by_words.video, by_words.expression_id = self.expression.video, None
        by_id = copy.copy(by_words)
        by_id.expression_id = self.expression.expression_id
        try:
            return by_id(view, query)
        except ValueError:  # most files know the words alone
            return by_words(view, query)


class TargetChoice:
    """How the target frames of a set are chosen.

    Args:
        evaluation_set ([`EvaluationSet`]): what is asked.
        sampler (`str`): one of `NAMES`.
        percentages (path, *optional*): a file of shares, which chooses instead; see [`PercentagesFrameSampler`].

    Raises:
        ValueError: for an unknown name, a file beside a sampler, a file that lacks an expression of the set, or an
            oracle where no true masks are.
        FileNotFoundError: if there is no such file.
    """

    def __init__(
        self, evaluation_set: EvaluationSet, sampler: str = "middle", percentages: str | Path | None = None
    ) -> None:
        if sampler not in NAMES:
            raise ValueError(f"`sampler` is {sampler!r} but must be one of {', '.join(NAMES)}.")
        if percentages is not None and sampler != "middle":
            raise ValueError(
                f"`sampler` is {sampler!r} and `percentages` are given, but only one of the two can choose the target "
                "frames. Leave one out."
            )
        if sampler == "oracle" and not evaluation_set.has_masks:
            raise ValueError(
                f"`sampler` is 'oracle', which looks at the true masks, but the split `{evaluation_set.split}` of "
                f"`{evaluation_set.benchmark.name}` has none that are public. Take another sampler or split."
            )
        self._set, self._name = evaluation_set, sampler
        self._stored: PercentagesFrameSampler | None = None
        if percentages is not None:
            self._stored = PercentagesFrameSampler(percentages)
            for expression in evaluation_set.expressions:
                self._check(self._stored, expression)

    def sampler_of(self, expression: Expression) -> FrameSampler | str | None:
        """Return what `add_query` takes as the sampler of an expression; `None` takes the middle frame."""
        if self._stored is not None:
            return StoredFrameSampler(self._stored, expression)
        if self._name == "oracle":
            return OracleFrameSampler(self._areas(expression))
        if self._name == "visa":
            return "visa"
        return None if self._name == "middle" else ShareFrameSampler(_SHARES[self._name])

    def _areas(self, expression: Expression) -> tuple[int, ...]:
        """Pixels of the true mask in each frame."""
        objects = self._set.objects_of(expression)
        if not objects:
            return (0,) * len(expression.frames)
        size = (expression.height, expression.width)
        return tuple(count(mask.strips) for mask in unite_packed_objects(objects, size))

    @staticmethod
    def _check(stored: PercentagesFrameSampler, expression: Expression) -> None:
        """Ask for the frame of an expression now, and not after hours of predicting."""
        source: Any = _Unread(len(expression.frames))
        try:
            StoredFrameSampler(stored, expression)(VideoView(source), expression.text)
        except ValueError as error:
            raise ValueError(f"The target frame of {expression.place} is not known. {error}") from error


@dataclass(frozen=True)
class _Unread:
    """A video of which only the length is known, which is all that shares need."""

    num_frames: int
