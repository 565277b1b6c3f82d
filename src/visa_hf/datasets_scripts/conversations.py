"""Conversations in LLaVA's form, `[{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]`, to turns.

What LLaVA-Instruct and Chat-UniVi-Instruct have in common. Marks that stand for a picture go out of the text: where
pictures stand in a prompt is the processor's business.
"""

import os
import re
from pathlib import Path
from typing import Any

from visa_hf.datasets_scripts.annotations import AnnotationError, check_relative
from visa_hf.datasets_scripts.brief import brief
from visa_hf.datasets_scripts.special_texts import special_texts_in

_PICTURE_MARK = re.compile(r"\s*<(?:image|video)>\s*")


def read_turns(conversation: Any, *, may_open_with_answer: bool = False, **where: Any) -> list[dict[str, str]]:
    """Read the rounds of a conversation.

    Args:
        conversation: list of messages, whose speakers take turns: "human" first, "gpt" last.
        may_open_with_answer (`bool`): drop a first message of "gpt", as Chat-UniVi does.
        where: `file`, `annotation`, `video`: for errors.

    Returns:
        A list of dicts `question` and `answer`, without marks of pictures and without white space around.

    Raises:
        AnnotationError: another form or order, an empty text, or one with a special token in it.
    """
    if not isinstance(conversation, list) or not all(isinstance(message, dict) for message in conversation):
        raise AnnotationError.at("`conversations` is no list of messages.", **where)
    speakers = [message.get("from") for message in conversation]
    if may_open_with_answer and speakers[:1] == ["gpt"]:
        conversation, speakers = conversation[1:], speakers[1:]
    if not speakers or len(speakers) % 2 or speakers != ["human", "gpt"] * (len(speakers) // 2):
        shown = ", ".join(map(repr, speakers[:6])) + (", ..." if len(speakers) > 6 else "")
        raise AnnotationError.at(
            f'the {len(speakers)} messages are from [{shown}]; "human" and "gpt" must take turns, "gpt" comes last.',
            **where,
        )
    texts = [_text(message.get("value"), number, where) for number, message in enumerate(conversation)]
    return [{"question": q, "answer": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]


def _text(value: Any, number: int, where: dict[str, Any]) -> str:
    text = _PICTURE_MARK.sub(" ", value).strip() if isinstance(value, str) else ""
    if not text:
        raise AnnotationError.at(f"message {number} is {brief(value)}; text is needed.", **where)
    found = special_texts_in(text)
    if found:
        raise AnnotationError.at(
            f"message {number} holds {', '.join(found)}, which the model reads as a special token.", **where
        )
    return text


def read_path(root: Path, folder: str, name: Any, **where: Any) -> str:
    """Return the path of a file named by a conversation, relative to the root, if the file is there.

    Raises:
        AnnotationError: it is missing, or the name leads out of the folder.
    """
    path = f"{folder}/{check_relative(name, **where)}"
    if not os.path.isfile(root / path):
        raise AnnotationError.at(
            f'there is no file `{path}`. Complete the folder, or leave such rows out with `on_error="skip"`.', **where
        )
    return path
