"""The published sampling recipe of VISA's training (https://huggingface.co/papers/2407.11325): numbers and draws.

Which frames of a clip a training sample shows, and the options of that choice. Every random number comes from a
generator made of (seed, draw), so that a sample is the same on any worker, on any rank and in any order. Pure
functions over numbers: nothing here reads a file.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# CLIP's mean colour, with which LLaVA and Chat-UniVi pad images: 255 * (0.48145466, 0.4578275, 0.40821073), cut off.
PADDING_COLOUR = (122, 116, 104)

_MAX_KEY = 2**64


@dataclass(frozen=True)
class SamplingRecipe:
    """How samples of one source are drawn. The defaults are VISA's for videos.

    Attributes:
        min_reference_frames, max_reference_frames (`int`): reference frames of a sample, drawn anew for each, perhaps
            none; shorter clips give all of theirs.
        expressions_per_video (`int`): at most so many expressions of one video share a sample.
        foreign_probability (`float`): share of samples whose target frame comes from another video of the source, with
            empty masks.
        min_video_frames (`int`): videos with fewer frames are left out.
        lower_case (`bool`): lower-case expressions.
        text_only_probability (`float`): of the samples with an explanation, the share that has no target: the answer
            is the explanation alone.
        explanation_probability (`float`): of the others, the share whose answer is `[SEG]`, then the explanation.
        pad_to_square (`bool`): pad the frames of conversation data to squares.
        last_turn_only (`bool`): of conversations with several rounds keep the last.
    """

    # frames
    min_reference_frames: int = 8
    max_reference_frames: int = 12
    min_video_frames: int = 1
    # expressions
    expressions_per_video: int = 3
    foreign_probability: float = 0.05
    lower_case: bool = False
    # explanations (ReasonSeg; as in LISA)
    text_only_probability: float = 0.1
    explanation_probability: float = 0.5
    # conversations
    pad_to_square: bool = False
    last_turn_only: bool = False

    def __post_init__(self) -> None:
        for name in ("min_reference_frames", "max_reference_frames", "expressions_per_video", "min_video_frames"):
            value = getattr(self, name)
            if type(value) is not int:
                raise TypeError(f"`{name}` is {value!r} but must be an integer.")
            least = 0 if name.endswith("_reference_frames") else 1
            if value < least:
                raise ValueError(f"`{name}` is {value} but must be at least {least}.")
        if self.max_reference_frames < self.min_reference_frames:
            raise ValueError(
                f"`max_reference_frames` is {self.max_reference_frames}, less than `min_reference_frames`, "
                f"{self.min_reference_frames}. Give a range."
            )
        for name in ("foreign_probability", "text_only_probability", "explanation_probability"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"`{name}` is {value!r} but must be a number.")
            if not 0 <= value <= 1:
                raise ValueError(f"`{name}` is {value} but must lie in [0, 1].")
        for name in ("lower_case", "pad_to_square", "last_turn_only"):
            if type(getattr(self, name)) is not bool:
                raise TypeError(f"`{name}` is {getattr(self, name)!r} but must be true or false.")


def random_generator(seed: int, draw: int, attempt: int = 0) -> np.random.Generator:
    """Return the random numbers of one draw: a pure function of its arguments, independent for different ones.

    Args:
        seed (`int`): of the run, in [0, 2**64).
        draw (`int`): number of the sample, in [0, 2**64).
        attempt (`int`): how many times this draw has failed before; its numbers are those of no other attempt.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, value in (("seed", seed), ("draw", draw), ("attempt", attempt)):
        if not 0 <= value < _MAX_KEY:
            raise ValueError(f"`{name}` is {value} but must be at least 0 and below 2**64.")
    # Philox encrypts a counter with a key: other keys, and far-off parts of the counter, never share numbers.
    key = np.array([seed, draw], dtype=np.uint64)
    counter = np.array([0, 0, 0, attempt], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(counter=counter, key=key))


def draw_frames(
    rng: np.random.Generator, num_frames: int, recipe: SamplingRecipe, allowed: Sequence[int] | None = None
) -> tuple[int, tuple[int, ...]]:
    """Draw the target frame and the reference frames of one clip.

    The clip is cut into n equal parts, n drawn from the recipe's range, and each part gives one frame. The target is
    one of these n, so it is among the references, as published. Drawn here in the other order, which gives the same
    samples: the target from all frames alike, then a frame from every part that does not hold the target. A clip of
    at most n frames gives all of them. With n = 0 there are no references.

    Args:
        rng (`np.random.Generator`): source of every choice.
        num_frames (`int`): frames of the clip, at least 1.
        recipe ([`SamplingRecipe`]): how many references.
        allowed (`Sequence[int]`, *optional*): frames that may be the target, at least one; all of them by default.

    Returns:
        `tuple[int, tuple[int, ...]]`: target and references, frames counted from 0, the references ascending.
    """
    wanted = int(rng.integers(recipe.min_reference_frames, recipe.max_reference_frames + 1))
    count = min(wanted, num_frames)
    pick = int(rng.integers(num_frames if allowed is None else len(allowed)))
    target_idx = pick if allowed is None else allowed[pick]
    bounds = [part * num_frames // count for part in range(count + 1)] if count else []
    references = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        drawn = int(rng.integers(start, stop))
        references.append(target_idx if start <= target_idx < stop else drawn)
    return target_idx, tuple(references)


def pad_to_square(frame: np.ndarray) -> np.ndarray:
    """Put a frame into the middle of a square of CLIP's mean colour, as LLaVA and Chat-UniVi do with images.

    Args:
        frame (`np.ndarray` of shape `(H, W, 3)`, uint8).

    Returns:
        `np.ndarray` of shape `(S, S, 3)`, uint8, S being the longer side; `frame` itself if it is square.
    """
    height, width = frame.shape[:2]
    if height == width:
        return frame
    side = max(height, width)
    square = np.empty((side, side, 3), dtype=np.uint8)
    square[:] = PADDING_COLOUR
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = frame
    return square
