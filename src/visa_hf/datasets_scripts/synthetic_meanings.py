"""The plainest words for what a sentence means: "the shape moving down" for "what seems to be falling?".

Answers begin with them. What a sentence says in pictures or by knowledge of the world is first put into the words for
what is to be seen; which thing it is comes after ("Chain-of-Thought Prompting Elicits Reasoning in Large Language
Models", https://huggingface.co/papers/2201.11903).
"""

from .synthetic_facts import Program
from .synthetic_scene import ATTRIBUTES
from .synthetic_words import (
    CONCEPTS,
    EXTREMES,
    LIKENESS_CLAUSES,
    REASONING_CLAUSES,
    REFERRING_CLAUSES,
    RELATION_CLAUSES,
    inflected,
)

_ORDERS = {
    ("exit", -1): "first to leave the picture",
    ("exit", 1): "last to leave the picture",
    ("entry", -1): "first to enter the picture",
    ("entry", 1): "last to enter the picture",
}
_UNLIKE = {"color": "colour", "form": "form", "texture": "pattern"}


def plain_words(meaning: Program) -> str:
    """Say what a meaning is true of, in words for what is to be seen.

    Args:
        meaning (`tuple`): program of a sentence, see `Facts.truth`.

    Returns:
        `str` such as "the striped shape standing still"; one shape is spoken of, however many are meant, but for
        "all shapes".
    """
    if meaning == ("and", ("shape",)):
        return "all shapes"
    name, *arguments = meaning
    if name == "or":
        # In an order that can be known from the words alone.
        return " and ".join(sorted(plain_words(part) for part in arguments))
    before: list[str] = []
    look: dict[str, str] = {}
    after: list[str] = []
    _tell(meaning, before, look, after)
    words = [*before, look.get("texture", ""), look.get("color", ""), look.get("form", "shape"), *after]
    return " ".join(word for word in ("the", *words) if word)


def _tell(program: Program, before: list[str], look: dict[str, str], after: list[str]) -> None:
    """Add the words of a part of a meaning: adjectives before the noun, what it looks like, and what follows it."""
    name, *arguments = program
    if name == "and":
        for part in arguments:
            _tell(part, before, look, after)
    elif name in ATTRIBUTES:
        look[name] = arguments[0]
    elif name == "concept":
        concept = CONCEPTS[arguments[0]]
        look[concept.attribute] = " or ".join(concept.values)
    elif name == "most":
        key, sign, domain = arguments
        adjective, modifier = _EXTREMES[key, sign]
        before += [adjective] if adjective else []
        # Only what moves can be fast, what leaves can be the first to leave: that goes without saying.
        parts = domain[1:] if domain[0] == "and" else (domain,)
        look.update(part for part in parts if part[0] in ATTRIBUTES)
        after += [modifier] if modifier else []
    elif name == "related":
        relation, other = arguments
        after.append(_RELATIONS[relation].format(plain_words(other)))
    elif name == "not":
        after.append(f"other than {plain_words(arguments[0])}")
    elif name == "unlike":
        after.append(f"with another {_UNLIKE[arguments[0]]} than the others")
    elif name != "shape":
        after.append(_CLAUSES[program])


def _clauses() -> dict[Program, str]:
    """What is said after the noun, of programs that stand for a clause: where there is a choice, as it is seen."""
    words: dict[Program, str] = {}
    for clause in (*REFERRING_CLAUSES, *REASONING_CLAUSES):
        said = clause.modifiers[0] if clause.modifiers else f"that {inflected(clause.verbs[0], is_plural=False)}"
        words.setdefault(clause.program, said)
    return words


def _extremes() -> dict[tuple[str, int], tuple[str, str]]:
    """Words before and after the noun for each end of an order."""
    words = {order: ("", said) for order, said in _ORDERS.items()}
    for extreme in EXTREMES:
        if extreme.adjective or extreme.modifiers:
            said = (extreme.adjective, "" if extreme.adjective else extreme.modifiers[0])
            words.setdefault((extreme.key, extreme.sign), said)
    return words


_CLAUSES = _clauses()
_EXTREMES = _extremes()
_RELATIONS = {name: clause.modifiers[0] for name, clause in (*RELATION_CLAUSES.items(), *LIKENESS_CLAUSES.items())}
