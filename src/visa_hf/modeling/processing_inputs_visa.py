"""What people give the processor -> lists of one known form, or an error that says what is wrong with it.

Frames, masks, answers, and which conversation is about which video. These checks are ours; the published code has
none. Nothing here knows a tokenizer or changes a pixel.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .prompts_visa import answer_from_template

Frame = np.ndarray | Image.Image


# Frames


def as_videos(
    target_frame: Any, reference_frames: Any, mixed_sizes: bool = False
) -> tuple[list[list[np.ndarray]], list[bool]]:
    """Return per video its references and, last, its target, uint8 arrays `(H, W, 3)`; and whether it has a target."""
    if target_frame is None and reference_frames is None:
        return [], []
    if not isinstance(target_frame, list | tuple):
        return [_as_video(target_frame, reference_frames, "", mixed_sizes)], [target_frame is not None]
    references = [None] * len(target_frame) if reference_frames is None else list(reference_frames)
    if len(references) != len(target_frame):
        raise ValueError(
            f"`target_frame` is a list of {len(target_frame)} but `reference_frames` of {len(references)}. Give one "
            "list of references per target frame, or one target frame that is not in a list."
        )
    videos = [
        _as_video(target, around, f" of video {idx}", mixed_sizes)
        for idx, (target, around) in enumerate(zip(target_frame, references, strict=True))
    ]
    return videos, [target is not None for target in target_frame]


def _as_video(target_frame: Any, reference_frames: Any, whose: str, mixed_sizes: bool) -> list[np.ndarray]:
    target = None if target_frame is None else _as_frame(target_frame, f"The target frame{whose}")
    if reference_frames is None and target is not None:
        return [target, target]
    is_list = isinstance(reference_frames, list | tuple)
    if not is_list and not (isinstance(reference_frames, np.ndarray) and reference_frames.ndim == 4):
        raise TypeError(
            f"`reference_frames`{whose} is a {type(reference_frames).__name__} but must be a list of frames or an "
            "array of shape (R, H, W, 3). Put a single frame into a list."
        )
    frames = [_as_frame(frame, f"Reference frame {idx}{whose}") for idx, frame in enumerate(reference_frames)]
    if target is None and not frames:
        raise ValueError(
            f"`reference_frames`{whose} is empty and there is no `target_frame`. Give at least one frame."
        )
    has_own_size = target is None or mixed_sizes
    name, expected = ("Reference frame 0", frames[0]) if has_own_size and frames else ("the target frame", target)
    for idx, frame in enumerate(frames):
        assert expected is not None
        if frame.shape != expected.shape:
            raise ValueError(
                f"Reference frame {idx}{whose} has shape {frame.shape} but {name} {expected.shape}. Frames of "
                "one video have one size."
            )
    return frames if target is None else [*frames, target]


def _as_frame(frame: Any, name: str) -> np.ndarray:
    """Return an RGB array of shape `(H, W, 3)`, uint8, or say what is wrong with `frame`."""
    if isinstance(frame, Image.Image):
        if frame.mode not in ("RGB", "L"):
            raise ValueError(
                f'{name} is a PIL image of mode "{frame.mode}" but "RGB" or "L" is needed. Make it 8-bit RGB first.'
            )
        frame = np.asarray(frame.convert("RGB"))
    if not isinstance(frame, np.ndarray):
        raise TypeError(f"{name} is a {type(frame).__name__} but must be a PIL image or an array (H, W, 3), uint8.")
    if frame.dtype != np.uint8:
        raise ValueError(
            f"{name} has dtype {frame.dtype} but must be uint8, 0 to 255. Convert it: "
            "`(frame * 255).round().astype(np.uint8)` if it lies in [0, 1]."
        )
    if frame.ndim != 3 or frame.shape[2] != 3 or min(frame.shape) < 1:
        raise ValueError(f"{name} has shape {frame.shape} but must be (H, W, 3), RGB, of at least one pixel.")
    return frame


# Conversations


def per_conversation(value: Any, num_conversations: int, name: str) -> list[Any]:
    """Return one value per conversation: the same for all, or those of the list given."""
    if not isinstance(value, list | tuple):
        return [value] * num_conversations
    if len(value) != num_conversations:
        raise ValueError(f"`{name}` has {len(value)} values for {num_conversations} conversations. Give one for each.")
    return list(value)


def one_answer(answer: str | None, answer_template: int | None) -> str | None:
    """Return the answer that is given, or the published one of that number."""
    if answer is not None and answer_template is not None:
        raise ValueError("`answer` and `answer_template` are both given. Leave one out.")
    return answer if answer_template is None else answer_from_template(answer_template)


def answers_of(answer: Any, answer_template: Any, num_conversations: int) -> list[str] | None:
    """Return an answer for each conversation, or `None` if there is none at all."""
    if answer is None and answer_template is None:
        return None
    given = per_conversation(answer, num_conversations, "answer")
    numbers = per_conversation(answer_template, num_conversations, "answer_template")
    answers = [one_answer(text, number) for text, number in zip(given, numbers, strict=True)]
    if None in answers:
        raise ValueError(
            f"Conversation {answers.index(None)} has no `answer` but others have. Give one for each, or none."
        )
    return [text for text in answers if text is not None]


def history_of(history: Any, num_conversations: int, *, is_single: bool) -> list[list[tuple[str, str]]]:
    """Return per conversation its earlier rounds, each a question and its answer; none where nothing came before."""
    if history is None:
        return [[]] * num_conversations
    given = [history] if is_single else list(history)
    if len(given) != num_conversations:
        raise ValueError(
            f"`history` has {len(given)} entries for {num_conversations} conversations. Give a list of rounds for "
            "each."
        )
    for idx, rounds in enumerate(given):
        for pair in rounds or ():
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise TypeError(
                    f"`history` of conversation {idx} holds {pair!r} but each round must be a pair: a question and "
                    "its answer."
                )
    return [[(question, answer) for question, answer in rounds or ()] for rounds in given]


def match_conversations(given: Any, num_conversations: int, num_videos: int) -> list[int]:
    """Return the video of each conversation, -1 for none."""
    if given is None:
        if num_videos == 0:
            return [-1] * num_conversations
        if num_videos not in (1, num_conversations):
            raise ValueError(
                f"There are {num_conversations} conversations and {num_videos} videos. Say in "
                "`conversation_to_video` which video each conversation is about."
            )
        return [0] * num_conversations if num_videos == 1 else list(range(num_conversations))
    to_video = [int(idx) for idx in given]
    if len(to_video) != num_conversations:
        raise ValueError(
            f"`conversation_to_video` has {len(to_video)} values for {num_conversations} conversations. Give one for "
            "each."
        )
    wrong = [idx for idx in to_video if not -1 <= idx < num_videos]
    if wrong:
        raise ValueError(
            f"`conversation_to_video` names video {wrong[0]} but there are {num_videos}, counted from 0. "
            "Give one of them, or -1 for a conversation about no video."
        )
    return to_video


def mask_labels_of(
    masks: Any, counts: list[int] | None, sizes: list[tuple[int, int]], *, is_single: bool
) -> list[Tensor]:
    """Return per conversation its masks, float32, `(K, H, W)`, one for each of its `counts` `[SEG]`s."""
    if counts is None:
        raise ValueError("`masks` are given without `answer`. Give the answer whose `[SEG]`s they belong to.")
    given = [masks] if is_single else list(masks)
    if len(given) != len(counts):
        raise ValueError(f"`masks` has {len(given)} entries for {len(counts)} conversations. Give one for each.")
    return [_mask_label(*values) for values in zip(range(len(given)), given, counts, sizes, strict=True)]


def _mask_label(idx: int, masks: Any, count: int, size: tuple[int, int]) -> Tensor:
    """Return the masks of conversation `idx`, float32, `(count, H, W)`, or say what is wrong with them."""
    given = [] if masks is None else [np.asarray(mask) for mask in masks]
    if len(given) != count:
        raise ValueError(
            f"Conversation {idx} has {len(given)} `masks` but {count} `[SEG]` in its answer. Give one mask per "
            f"`[SEG]`: shape ({count}, H, W)."
        )
    for mask in given:
        if mask.shape != tuple(size):
            raise ValueError(
                f"A mask of conversation {idx} has shape {mask.shape} but the target frame {tuple(size)}. Give masks "
                "of the frame's own size."
            )
        if not np.isin(mask, (0, 1)).all():
            raise ValueError(
                f"A mask of conversation {idx} holds values from {mask.min()} to {mask.max()} but only 0 and 1 are "
                "allowed. Give `masks > 0` if any other value means the object."
            )
    return torch.from_numpy(np.stack(given).astype(np.float32)) if given else torch.zeros(0, *size)
