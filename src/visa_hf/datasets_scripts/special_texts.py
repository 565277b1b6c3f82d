"""Texts that a tokenizer of VISA reads as one token with a meaning of its own: data may not hold them by accident.

Only the published ones: a checkpoint with further tokens refuses these in its processor.
"""

SEG = "[SEG]"
"""The place of a mask in an answer."""

SPECIAL_TEXTS = (SEG, "<image>", "<video>", "<s>", "</s>", "<unk>", "<pad>")


def special_texts_in(text: str) -> list[str]:
    """Return those that a text holds."""
    return [special for special in SPECIAL_TEXTS if special in text]
