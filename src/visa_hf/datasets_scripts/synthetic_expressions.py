"""Sentences about a synthetic clip, each with a meaning that is proven on the clip's facts.

A candidate is a meaning whose things are known exactly: clearly true of these, clearly false of all others. Each part
of it is needed: without it, it would be true of more. If it is true of nothing, it is a sentence of type 2; most of
these are near misses: without any one of their parts, they would be true of something.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

from .synthetic_dice import Dice
from .synthetic_facts import Facts, Program, both, members
from .synthetic_meanings import plain_words
from .synthetic_scene import ATTRIBUTES, PILLAR, Look
from .synthetic_words import (
    CONCEPTS,
    EXTREMES,
    LIKENESS_CLAUSES,
    REASONING_CLAUSES,
    REFERRING_CLAUSES,
    RELATION_CLAUSES,
    Clause,
    Extreme,
    inflected,
    noun_phrase,
)

REFERRING, REASONING, NO_OBJECT = 0, 1, 2
# How many of the expressions of a clip are of each type, if there are enough candidates.
_TYPE_WEIGHTS = {REFERRING: 0.45, REASONING: 0.35, NO_OBJECT: 0.2}
# How often an idea is taken against the others, unless asked otherwise; where it is not here, once.
_IDEA_WEIGHTS = {
    **{"look": 2.0, "motion": 2.0, "knowledge": 1.5, "knowledge and event": 1.5, "order": 4.0, "overtaking": 1.5},
    **{"pair": 0.6, "except": 0.3, "likeness": 0.6, "odd one out": 0.6},
}
# How often a sentence about nothing is a near miss, where there are such.
_NEAR_MISSES = 0.8
# Kinds of thoughts that a sentence can take; "all" is the first sentence of each clip and not drawn.
IDEAS = tuple(
    sorted(
        {"look", "group", "except", "pair", "knowledge and event"}
        | {clause.idea for clause in (*REFERRING_CLAUSES, *REASONING_CLAUSES)}
        | {clause.idea for clause in (*RELATION_CLAUSES.values(), *LIKENESS_CLAUSES.values())}
        | {extreme.idea for extreme in EXTREMES}
    )
)
# These are said of one thing only.
_SINGULAR_IDEAS = ("order", "odd one out")
# In the order in which a description of a thing looks for something to say about its movement.
_DESCRIBING = ("moves", "still", "circles", "bounces", "grows", "shrinks", "spins")


# Some properties of a look: (("color", "red"), ("form", "circle")). They are programs, too.
PartialLook = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class SyntheticExpression:
    """A sentence about a clip.

    Attributes:
        text (`str`): the sentence.
        type_id (`int`): 0 referring, 1 reasoning, 2 no such object, as in ReVOS.
        objects (`tuple[int, ...]`): the things it means, as places in the clip's objects; empty for type 2.
        idea (`str`): what kind of thought it takes, such as "motion" or "knowledge".
        meaning (`tuple`): program that is true of exactly these things, see `Facts.truth`.
        answer (`str`): an answer that says what is asked for in plain words, then describes the things and holds
            `[SEG]`; without one for type 2.
    """

    text: str
    type_id: int
    objects: tuple[int, ...]
    idea: str
    meaning: Program
    answer: str

    @property
    def told(self) -> str:
        """The answer without the sentence that it begins with, which says what is asked for."""
        return self.answer.split(". ", 1)[1]


@dataclass(frozen=True)
class _Candidate:
    """A meaning with the things that it is true of, and what is needed to put it into words."""

    meaning: Program
    things: int
    type_id: int
    idea: str
    look: PartialLook = ()
    clauses: tuple[Clause, ...] = ()
    extreme: Extreme | None = None
    num_compared: int = 0
    others: tuple[PartialLook, ...] = ()
    is_near_miss: bool = True


def conjunction(parts: tuple[Program, ...]) -> Program:
    """Return the meaning that all parts hold, among the shapes."""
    return ("and", ("shape",), *parts)


def make_expressions(
    facts: Facts,
    dice: Dice,
    num_expressions: int,
    idea_weights: Mapping[str, float] | None = None,
    look_weight: float = 1.0,
) -> tuple[SyntheticExpression, ...]:
    """Make up to `num_expressions` different sentences about a clip, of mixed types and ideas.

    `idea_weights` say how often some of the `IDEAS` are drawn against the others, `look_weight` how often a sentence
    of the same idea that names one property of looks more: with 0.2, "the leftmost shape" five times for once "the
    leftmost red shape".
    """
    idea_weights = {**dict.fromkeys(IDEAS, 1.0), **_IDEA_WEIGHTS, **(idea_weights or {})}
    pools: dict[int, list[_Candidate]] = {REFERRING: [], REASONING: [], NO_OBJECT: []}
    for candidate in _candidates(facts):
        if idea_weights[candidate.idea] > 0:
            pools[candidate.type_id if candidate.things else NO_OBJECT].append(candidate)
    near_misses = [candidate for candidate in pools[NO_OBJECT] if candidate.is_near_miss]
    expressions: dict[str, SyntheticExpression] = {}
    if num_expressions > 1:
        every = _about_all(facts, dice)
        expressions[every.text] = every
    for _ in range(num_expressions * 3 if any(pools.values()) else 0):
        if len(expressions) == num_expressions:
            break
        weights = [weight if pools[type_id] else 0.0 for type_id, weight in _TYPE_WEIGHTS.items()]
        type_id = dice.choice(tuple(_TYPE_WEIGHTS), weights)
        is_near = type_id == NO_OBJECT and dice.chance(_NEAR_MISSES) and len(near_misses) > 0
        candidate = _drawn(near_misses if is_near else pools[type_id], dice, idea_weights, look_weight)
        text, things = _worded(candidate, facts, dice), tuple(members(candidate.things))
        if text not in expressions:
            expressions[text] = SyntheticExpression(
                text, type_id, things, candidate.idea, candidate.meaning, _answer(facts, candidate.meaning, things)
            )
    return tuple(expressions.values())


def _about_all(facts: Facts, dice: Dice) -> SyntheticExpression:
    """Return the sentence about all shapes: its answer tells of everything that there is to be seen."""
    things = tuple(members(facts.truth(("shape",))[0]))
    text = dice.choice(("all shapes", "all the shapes", "every shape"))
    meaning = conjunction(())
    return SyntheticExpression(text, REFERRING, things, "all", meaning, _answer(facts, meaning, things))


def _drawn(
    candidates: list[_Candidate], dice: Dice, idea_weights: Mapping[str, float], look_weight: float
) -> _Candidate:
    """Draw an idea, then a candidate that has it: rare ideas are not drowned by those with many meanings."""
    ideas = sorted({candidate.idea for candidate in candidates})
    idea = dice.choice(ideas, [idea_weights[idea] for idea in ideas])
    chosen = [candidate for candidate in candidates if candidate.idea == idea]
    return dice.choice(
        chosen, None if look_weight == 1 else [look_weight ** len(candidate.look) for candidate in chosen]
    )


# Candidates


def _candidates(facts: Facts) -> Iterator[_Candidate]:
    shapes = [look for look in facts.looks if look.form != PILLAR]
    looks = _partial_looks(shapes)
    names = _names(facts, looks)
    yield from _by_looks(facts, shapes)
    for type_id, clauses in (
        (REFERRING, (*REFERRING_CLAUSES, *_relations(names, RELATION_CLAUSES))),
        (REASONING, (*REASONING_CLAUSES, *_relations(names, LIKENESS_CLAUSES))),
    ):
        yield from _by_clause(facts, looks, clauses, type_id)
    yield from _by_two_clauses(facts)
    yield from _by_order(facts, looks)
    yield from _by_enumeration(facts, names)


def _partial_looks(shapes: list[Look]) -> list[PartialLook]:
    """List what can be said of at least one shape: nothing, one, two or three of its properties."""
    found: dict[PartialLook, None] = {}
    for look in shapes:
        for count in range(4):
            for attributes in combinations(ATTRIBUTES, count):
                found[tuple((name, getattr(look, name)) for name in attributes)] = None
    return list(found)


def _names(facts: Facts, looks: list[PartialLook]) -> dict[int, PartialLook]:
    """Return the shortest description by looks of each thing that has one of its own."""
    names: dict[int, PartialLook] = {}
    for look in sorted(looks, key=len):
        yes, _ = facts.truth(conjunction(look))
        if look and yes.bit_count() == 1:
            names.setdefault(yes.bit_length() - 1, look)
    for place, thing in enumerate(facts.looks):
        if thing.form == PILLAR:
            names[place] = (("form", PILLAR),)
    return names


def _checked(
    facts: Facts, parts: tuple[Program, ...], type_id: int, idea: str, **wording: object
) -> Iterator[_Candidate]:
    """Yield the candidate, if its things are known exactly and each part is needed."""
    truths = [facts.truth(part) for part in parts]
    shape = facts.truth(("shape",))
    yes, maybe = both(shape, *truths)
    if yes != maybe:
        return
    without = [both(shape, *truths[:k], *truths[k + 1 :])[0] for k in range(len(truths))]
    if yes and all(rest & ~yes for rest in without):
        yield _Candidate(conjunction(parts), yes, type_id, idea, **wording)  # type: ignore[arg-type]
    elif not yes:
        # Something fits all parts but one, whichever it is; a single part can be missed by anything.
        is_near_miss = len(parts) > 1 and all(without)
        if is_near_miss or len(parts) == 1:
            yield _Candidate(conjunction(parts), 0, type_id, idea, is_near_miss=is_near_miss, **wording)  # type: ignore[arg-type]


def _by_looks(facts: Facts, shapes: list[Look]) -> Iterator[_Candidate]:
    values = {name: list(dict.fromkeys(getattr(look, name) for look in shapes)) for name in ATTRIBUTES}
    options: list[PartialLook] = [()]
    for name in ATTRIBUTES:
        options += [(*option, (name, value)) for option in options for value in values[name]]
    for look in options[1:]:
        for candidate in _checked(facts, look, REFERRING, "look", look=look):
            is_group = candidate.things.bit_count() > 1
            yield (
                candidate
                if not is_group
                else _Candidate(candidate.meaning, candidate.things, REFERRING, "group", look=look)
            )
        yield from _except(facts, look)


def _except(facts: Facts, look: PartialLook) -> Iterator[_Candidate]:
    """Yield "all shapes but the red circle"."""
    yes, _ = facts.truth(conjunction(look))
    shapes, _ = facts.truth(("shape",))
    rest = shapes & ~yes
    if yes.bit_count() == 1 and rest.bit_count() > 1:
        meaning = ("and", ("shape",), ("not", conjunction(look)))
        yield _Candidate(meaning, rest, REFERRING, "except", others=(look,))


def _relations(names: Mapping[int, PartialLook], wordings: Mapping[str, Clause]) -> Iterator[Clause]:
    """Yield clauses about things that stand in a relation to one that has a name."""
    for name in names.values():
        other, after = noun_phrase(dict(name), "shape", _NEVER)
        assert not after
        for relation, clause in wordings.items():
            yield Clause(
                ("related", relation, conjunction(name) if ("form", PILLAR) not in name else name[0]),
                clause.idea,
                tuple(words.format(f"the {other}") for words in clause.verbs),
                tuple(words.format(f"the {other}") for words in clause.modifiers),
            )


def _by_clause(
    facts: Facts, looks: list[PartialLook], clauses: tuple[Clause, ...], type_id: int
) -> Iterator[_Candidate]:
    for clause in clauses:
        yes, maybe = facts.truth(clause.program)
        if not facts.measures.has_motion and yes == 0 and clause.idea not in ("knowledge", "odd one out"):
            continue
        for look in looks:
            if _fits(facts, look, clause):
                parts = (*look, clause.program)
                yield from _checked(facts, parts, type_id, clause.idea, look=look, clauses=(clause,))


def _fits(facts: Facts, look: PartialLook, clause: Clause) -> bool:
    """Say whether somebody would say both: not "the red shape with the colour of grass"."""
    name, *arguments = clause.program
    attributes = [attribute for attribute, _ in look]
    if name == "unlike":
        return not look
    if name == "most":  # see `EXTREMES` for those that exist: "the first red one" is the first of the red ones
        return not look and facts.truth(clause.program)[1] == 0
    if name == "concept":
        return CONCEPTS[arguments[0]].attribute not in attributes
    if name != "related":
        return True
    relation, other = arguments
    meant, _ = facts.truth(conjunction(look))
    # It must not ask about the very thing that it names.
    return relation.removeprefix("same ") not in attributes and meant & ~facts.truth(other)[0] != 0


def _by_two_clauses(facts: Facts) -> Iterator[_Candidate]:
    """Yield knowledge and what happens in one: "the one with the colour of grass that is overtaken"."""
    known = [clause for clause in REASONING_CLAUSES if clause.idea == "knowledge"]
    known = [clause for clause in known if facts.truth(clause.program)[0]]
    events = [
        c for c in (*REFERRING_CLAUSES, *REASONING_CLAUSES) if c.idea not in ("knowledge", "order", "odd one out")
    ]
    for event in events:
        if facts.truth(event.program)[0]:
            for fact in known:
                parts = (fact.program, event.program)
                yield from _checked(facts, parts, REASONING, "knowledge and event", clauses=(fact, event))


def _by_order(facts: Facts, looks: list[PartialLook]) -> Iterator[_Candidate]:
    for extreme in EXTREMES:
        for look in looks:
            domain = conjunction((*look, *extreme.domain))
            inside, _ = facts.truth(domain)
            if inside.bit_count() < 2:
                continue
            meaning = ("most", extreme.key, extreme.sign, domain)
            yes, maybe = facts.truth(meaning)
            if yes != maybe or not yes or not _needs_each(facts, look, extreme, yes):
                continue
            yield _Candidate(
                meaning,
                yes,
                extreme.type_id,
                extreme.idea,
                look=look,
                extreme=extreme,
                num_compared=facts.truth(conjunction(look))[1].bit_count(),
            )


def _needs_each(facts: Facts, look: PartialLook, extreme: Extreme, yes: int) -> bool:
    """Say whether the answer would be another one without any of the properties."""
    for k in range(len(look)):
        domain = conjunction((*look[:k], *look[k + 1 :], *extreme.domain))
        if facts.truth(("most", extreme.key, extreme.sign, domain))[1] & yes:
            return False
    return True


def _by_enumeration(facts: Facts, names: Mapping[int, PartialLook]) -> Iterator[_Candidate]:
    """Yield "the red circle and the blue square"."""
    shapes = facts.truth(("shape",))[0]
    for first, second in combinations(sorted(set(names) & set(members(shapes))), 2):
        others = (names[first], names[second])
        meaning = ("or", *(conjunction(name) for name in others))
        yield _Candidate(meaning, 1 << first | 1 << second, REFERRING, "pair", others=others)


# Words


class _Never(Dice):
    """Dice that decide against every chance: the plainest words."""

    def __init__(self) -> None:
        super().__init__(0)

    def chance(self, probability: float) -> bool:
        return False


_NEVER = _Never()


def _worded(candidate: _Candidate, facts: Facts, dice: Dice) -> str:
    """Put a meaning into words, in one of several ways."""
    if candidate.idea == "pair":
        names = dice.shuffled([_named(name, dice) for name in candidate.others])
        return f"{names[0]} and {names[1]}"
    if candidate.idea == "except":
        name = _named(candidate.others[0], dice)
        return dice.choice(("all shapes except {}", "every shape but {}", "all the shapes other than {}")).format(name)
    if candidate.extreme is not None:
        return _worded_order(candidate, candidate.extreme, dice)
    can_be_plural = candidate.things == 0 and candidate.idea not in _SINGULAR_IDEAS
    is_plural = candidate.things.bit_count() > 1 or (can_be_plural and dice.chance(0.15))
    look = dict(candidate.look)
    is_open = candidate.type_id == REASONING and not look and _is_all_but_pillar(candidate, facts)
    noun = dice.choice(("shape", "thing", "object", "one")) if is_open and not is_plural else "shape"
    head, after = noun_phrase(look, noun, dice, is_plural=is_plural)
    number = candidate.things.bit_count()
    if not candidate.clauses:
        article = "the"
        if is_plural:
            article = dice.choice(("all", "all the", "the", *(("both",) if number == 2 else ())))
        return " ".join(word for word in (article, head, after) if word)
    return _worded_clauses(candidate, head, after, dice, facts, is_plural=is_plural)


def _worded_clauses(candidate: _Candidate, head: str, after: str, dice: Dice, facts: Facts, *, is_plural: bool) -> str:
    first, *more = candidate.clauses
    noun = f"{head} {after}".strip()
    is_one = noun == "one"
    article = dice.choice(("the", "all")) if is_plural else "the"
    verb = _verb(first, facts, dice, is_plural=is_plural)
    if more:
        second = _verb(more[0], facts, dice, is_plural=is_plural)
        if first.modifiers and dice.chance(0.6):
            modifier = _modifier(first, facts, dice)
            if dice.chance(0.4):
                return f"which {noun} {modifier} {second}?"
            return f"{article} {noun} {modifier} that {second}"
        return dice.choice((f"which {noun} {verb} and {second}?", f"{article} {noun} that {verb} and {second}"))
    wants_question = dice.chance(0.5 if candidate.type_id == REASONING else 0.15)
    if wants_question:
        return f"what {verb}?" if noun in ("thing", "object") and not is_plural else f"which {noun} {verb}?"
    if first.modifiers and dice.chance(0.35 if is_one else 0.6):
        joint = " " if not after else " that is " if not is_plural else " that are "
        modifier = _modifier(first, facts, dice)
        # "with stripes with the colour of grass" would be two in a row.
        if not (after and modifier.startswith(("with", "in", "that"))):
            return f"{article} {noun}{joint if after else ' '}{modifier}"
    return f"{article} {noun} that {verb}"


def _worded_order(candidate: _Candidate, extreme: Extreme, dice: Dice) -> str:
    head, after = noun_phrase(dict(candidate.look), "shape", dice)
    noun = f"{head} {after}".strip()
    if extreme.verbs:
        verb = dice.choice(extreme.verbs)
        options = [f"which {noun} {verb}?", f"the {noun} that {verb}"]
        if not candidate.look and extreme.idea == "order":  # pillars neither come nor go
            options.append(f"what {verb}?")
        return dice.choice(options)
    options = [f"the {noun} {modifier}" for modifier in extreme.modifiers]
    if after:
        options = [option for option in options if " that is " in option]
    if extreme.adjective:
        options += 2 * [f"the {extreme.adjective} {noun}"]
    if extreme.comparative and candidate.num_compared == 2:
        many, after = noun_phrase(dict(candidate.look), "shape", dice, is_plural=True)
        options.append(f"the {extreme.comparative} of the two {many} {after}".strip())
    return dice.choice(options)


def _named(look: PartialLook, dice: Dice) -> str:
    head, after = noun_phrase(dict(look), "shape", dice)
    return f"the {head} {after}".strip()


def _verb(clause: Clause, facts: Facts, dice: Dice, *, is_plural: bool) -> str:
    words = dice.choice(clause.verbs) if facts.measures.has_motion else clause.verbs[0]
    return inflected(words, is_plural=is_plural)


def _modifier(clause: Clause, facts: Facts, dice: Dice) -> str:
    return dice.choice(clause.modifiers) if facts.measures.has_motion else clause.modifiers[0]


def _is_all_but_pillar(candidate: _Candidate, facts: Facts) -> bool:
    """Say whether the meaning stays the same when all things count, not only those that are called shapes."""
    _, _, *parts = candidate.meaning
    return both(*(facts.truth(part) for part in parts)) == (candidate.things, candidate.things)


def describe(facts: Facts, thing: int, *, with_motion: bool = True) -> str:
    """Say all that a thing looks like, and how it moves, if that is clear: "the plain red circle moving left"."""
    look = facts.looks[thing]
    if look.form == PILLAR:
        return f"the {look.color} {look.form}"
    words = f"the {look.texture} {look.color} {look.form}"
    for clause in REFERRING_CLAUSES if with_motion else ():
        if clause.program[0] in _DESCRIBING and facts.truth(clause.program)[0] >> thing & 1:
            return f"{words} {clause.modifiers[0]}"
    return words


def _answer(facts: Facts, meaning: Program, things: tuple[int, ...]) -> str:
    """Say what is asked for, which things these are, and then where: each step is found more easily after the last.

    Several things are named from left to right. What is not there gets no [SEG].
    """
    asked = plain_words(meaning).capitalize()
    if not things:
        return f"{asked}. No such thing is there."
    if len(things) == 1:
        return f"{asked}. It is {describe(facts, things[0])} [SEG]."
    from_left = sorted(things, key=lambda thing: facts.measures.places(thing)[:, 0].mean())
    names = [describe(facts, thing, with_motion=False) for thing in from_left]
    return f"{asked}. It is {', '.join(names[:-1])} and {names[-1]} [SEG]."
