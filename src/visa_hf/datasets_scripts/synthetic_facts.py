"""What is true in a synthetic clip: yes, no, or not clear enough to say.

A sentence's meaning is a small program (nested tuples, see `Facts.truth`). Every judgement has a margin: what a person
could see otherwise is neither true nor false, and no sentence is made of it. Words are in `synthetic_words.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .synthetic_measures import ORDERS, Measures, angle_between, length, num_reversals, total_turn
from .synthetic_motion import DIRECTIONS
from .synthetic_scene import PILLAR, Look
from .synthetic_words import CONCEPTS

# (name, *arguments); arguments are strings, numbers or programs.
Program = tuple[Any, ...]
# Bit i stands for thing i: the things of which something is true, and those of which it is not clearly false.
Truth = tuple[int, int]

_SIDES = {"left": (0, False), "right": (0, True), "top": (1, False), "bottom": (1, True)}  # axis, far end
_OUTWARDS = {"left": "left", "right": "right", "top": "up", "bottom": "down"}


def both(*truths: Truth) -> Truth:
    """Return the conjunction of one or more judgements."""
    yes, maybe = truths[0]
    for other_yes, other_maybe in truths[1:]:
        yes, maybe = yes & other_yes, maybe & other_maybe
    return yes, maybe


def members(bits: int) -> Iterator[int]:
    """Yield the places of the bits that are set."""
    return (place for place in range(bits.bit_length()) if bits >> place & 1)


class Facts:
    """Judgements about the things in a clip.

    Args:
        looks (`list[Look]`): of each thing.
        measures (`Measures`): numbers about them.
    """

    def __init__(self, looks: list[Look], measures: Measures) -> None:
        self.looks, self.measures = looks, measures
        self.num_things = len(looks)
        self.all = (1 << len(looks)) - 1
        self._cache: dict[Program, Truth] = {}
        self._pairs: dict[tuple[str, int, int], bool | None] = {}

    def truth(self, program: Program) -> Truth:
        """Judge a meaning for all things at once.

        Programs: `("and", p, ...)`, `("or", p, ...)`, `("not", p)`; `("most", key, sign, p)`: the last (sign 1) or
        first (-1) in an order, among those of which p holds; `("related", relation, p)`: stands in a relation to the
        one thing of which p holds; and the names of the judgements below with their arguments: `("moves", "left")`.
        """
        if program not in self._cache:
            self._cache[program] = self._judge(program)
        return self._cache[program]

    def pair(self, relation: str, i: int, j: int) -> bool | None:
        """Judge a relation of two different things."""
        key = (relation, i, j)
        if key not in self._pairs:
            self._pairs[key] = _RELATIONS[relation](self, i, j)
        return self._pairs[key]

    def _judge(self, program: Program) -> Truth:
        name, *arguments = program
        if name == "and":
            return both(*(self.truth(part) for part in arguments))
        if name == "or":
            truths = [self.truth(part) for part in arguments]
            return _union(yes for yes, _ in truths), _union(maybe for _, maybe in truths)
        if name == "not":
            yes, maybe = self.truth(arguments[0])
            return self.all & ~maybe, self.all & ~yes
        if name == "most":
            return self._most(*arguments)
        if name == "related":
            return self._related(*arguments)
        return _truth_of(_JUDGES[name](self, i, *arguments) for i in range(self.num_things))

    def _most(self, key: str, sign: int, domain: Program) -> Truth:
        """Find the end of an order: true if clearly beyond all others there, false if one is clearly beyond it."""
        exceeds = ORDERS[key] if sign > 0 else lambda m, i, j: ORDERS[key](m, j, i)
        inside, maybe_inside = self.truth(domain)
        yes = maybe = 0
        for i in members(maybe_inside):
            if not any(exceeds(self.measures, j, i) for j in members(inside & ~(1 << i))):
                maybe |= 1 << i
            if inside >> i & 1 and all(exceeds(self.measures, i, j) for j in members(maybe_inside & ~(1 << i))):
                yes |= 1 << i
        return yes, maybe

    def _related(self, relation: str, other: Program) -> Truth:
        yes, maybe = self.truth(other)
        if maybe == 0:
            return 0, 0
        if yes != maybe or yes.bit_count() != 1:
            return 0, self.all
        j = yes.bit_length() - 1
        return _truth_of(False if i == j else self.pair(relation, i, j) for i in range(self.num_things))


def _union(bits: Iterable[int]) -> int:
    union = 0
    for some in bits:
        union |= some
    return union


def _truth_of(answers: Iterable[bool | None]) -> Truth:
    yes = maybe = 0
    for i, answer in enumerate(answers):
        yes |= bool(answer) << i
        maybe |= (answer is not False) << i
    return yes, maybe


def _clearly(value: float | None, least: float, most_otherwise: float) -> bool | None:
    """Say whether a value is at least this; not if it is below that, and unclear between them."""
    if value is None or most_otherwise < value < least:
        return None
    return value >= least


def _any_of(answers: list[bool | None]) -> bool | None:
    return True if any(answers) else (None if None in answers else False)


# How a thing looks


def _has(attribute: str) -> Callable[..., bool | None]:
    return lambda facts, i, value: getattr(facts.looks[i], attribute) == value


def _is_shape(facts: Facts, i: int) -> bool | None:
    return facts.looks[i].form != PILLAR


def _is_concept(facts: Facts, i: int, name: str) -> bool | None:
    concept = CONCEPTS[name]
    value = getattr(facts.looks[i], concept.attribute)
    if facts.looks[i].form == PILLAR or value in concept.arguable:
        return None
    return value in concept.values


def _is_unlike(facts: Facts, i: int, attribute: str) -> bool | None:
    """Say whether a shape alone differs in an attribute from all others, which are alike in it."""
    shapes = [j for j in range(facts.num_things) if _is_shape(facts, j)]
    others = [getattr(facts.looks[j], attribute) for j in shapes if j != i]
    if i not in shapes or getattr(facts.looks[i], attribute) in others:
        return False
    # Where all differ from each other, one could say it of any.
    return True if len(set(others)) == 1 and len(others) > 1 else None


# How it moves


def _is_moving(facts: Facts, i: int) -> bool | None:
    m = facts.measures
    if not m.has_motion or m.seen[i].sum() < 4:
        return None
    return _clearly(m.walked[i] / m.short, 0.15, 0.01)


def _is_still(facts: Facts, i: int) -> bool | None:
    is_moving, m = _is_moving(facts, i), facts.measures
    if is_moving is not False:
        return None if is_moving is None else False
    return None if np.ptp(m.radii[i]) > 0 or np.ptp(m.angles[i]) > 0 else True


def _moves(facts: Facts, i: int, direction: str) -> bool | None:
    is_moving, way = _is_moving(facts, i), facts.measures.ways[i]
    if not is_moving or way is None:
        return None if is_moving else is_moving
    if length(way) < 0.15 * facts.measures.short:
        return None
    # Neighbouring directions lie 45 degrees apart: "left" is not said of what moves up and to the left, nor denied.
    angle = angle_between(way, DIRECTIONS[direction])
    return True if angle <= 8 else (False if angle >= 60 or (" " in direction and angle >= 30) else None)


def _circles(facts: Facts, i: int) -> bool | None:
    m = facts.measures
    if not m.has_motion:
        return None
    steps = np.diff(m.centers[i], axis=0)
    if _is_moving(facts, i) is False or m.ways[i] is not None or num_reversals(steps):
        return False
    return True if abs(total_turn(steps)) >= 300 and m.seen[i].sum() >= 0.75 * m.num_frames else None


def _bounces(facts: Facts, i: int) -> bool | None:
    m = facts.measures
    if not m.has_motion:
        return None
    if _is_moving(facts, i) is False or m.ways[i] is not None:
        return False
    if not num_reversals(np.diff(m.centers[i], axis=0)):
        return False
    return True if m.seen[i].sum() >= 0.75 * m.num_frames else None


def _speeds_up(facts: Facts, i: int) -> bool | None:
    if _is_moving(facts, i) is False:
        return False
    return _clearly(facts.measures.pace(i), 2.2, 1.2)


def _slows_down(facts: Facts, i: int) -> bool | None:
    if _is_moving(facts, i) is False:
        return False
    pace = facts.measures.pace(i)
    return _clearly(None if pace is None else 1 / pace, 2.2, 1.2)


def _grows(facts: Facts, i: int) -> bool | None:
    return _clearly(facts.measures.growth(i), 1.4, 1.05)


def _shrinks(facts: Facts, i: int) -> bool | None:
    growth = facts.measures.growth(i)
    return _clearly(None if growth is None else 1 / growth, 1.4, 1.05)


def _spins(facts: Facts, i: int) -> bool | None:
    m = facts.measures
    if not m.has_motion or m.seen[i].sum() < 4:
        return None
    turned = float(np.ptp(m.angles[i][m.seen[i]]))
    return None if facts.looks[i].form in ("circle", "ring") and turned > 0 else _clearly(turned, 150, 5)


# Coming, going, hiding


def _is_outside(facts: Facts, i: int, frame: int) -> bool | None:
    """Say whether a thing is outside in the first (0) or last (-1) frame, though well seen at other times."""
    m = facts.measures
    inside, visible, full = m.inside[i], m.visible[i], m.full[i]
    if not m.has_motion:
        return None
    if inside[frame] == 0:
        return True if (visible >= 0.6 * full).sum() >= 2 else None
    is_clear = inside[frame] >= 0.7 * full[frame] and visible[frame] >= 0.3 * full[frame]
    if not is_clear or _comes_and_goes(facts, i):
        return None
    return False


def _comes_and_goes(facts: Facts, i: int) -> bool:
    """Say whether a thing is in the picture, out of it and in it again."""
    there = np.flatnonzero(facts.measures.inside[i] > 0)
    return bool(there[-1] - there[0] + 1 != len(there))


def _enters(facts: Facts, i: int) -> bool | None:
    return _is_outside(facts, i, 0)


def _leaves(facts: Facts, i: int) -> bool | None:
    return _is_outside(facts, i, -1)


def _enters_from(facts: Facts, i: int, side: str) -> bool | None:
    return _crosses(facts, i, side, 0)


def _leaves_to(facts: Facts, i: int, side: str) -> bool | None:
    return _crosses(facts, i, side, -1)


def _crosses(facts: Facts, i: int, side: str, frame: int) -> bool | None:
    is_outside, m = _is_outside(facts, i, frame), facts.measures
    if not is_outside:
        return is_outside
    way = m.ways[i]
    if way is None:
        return None
    outwards = way if frame == -1 else -way
    angle = angle_between(outwards, DIRECTIONS[_OUTWARDS[side]])
    return True if angle <= 8 else (False if angle >= 80 else None)


def _is_hidden(facts: Facts, i: int) -> bool | None:
    return _clearly(facts.measures.hidden_part(i), 0.35, 0.02)


def _vanishes(facts: Facts, i: int) -> bool | None:
    """Say whether a thing is gone behind others for a while, and seen before and after."""
    m = facts.measures
    if not m.has_motion:
        return None
    gone = np.flatnonzero((m.visible[i] <= 0.03 * m.full[i]) & (m.inside[i] >= 0.7 * m.full[i]))
    if len(gone) == 0:
        return False if m.hidden_part(i) <= 0.8 else None
    well = np.flatnonzero(m.visible[i] >= 0.6 * m.full[i])
    return True if len(well) and well[0] < gone[0] and well[-1] > gone[-1] else None


def _of_any(relation: str) -> Callable[..., bool | None]:
    return lambda facts, i: _any_of([facts.pair(relation, i, j) for j in range(facts.num_things) if j != i])


# Where it is


def _is_in(facts: Facts, i: int, side: str) -> bool | None:
    """Say whether a thing is in one half of the picture as long as it is seen."""
    m = facts.measures
    axis, is_far = _SIDES[side]
    places = m.places(i)[:, axis] / m.size[1 - axis]
    from_side = 1 - places if is_far else places
    if len(places) == 0:
        return None
    return True if (from_side <= 0.4).all() else (False if (from_side >= 0.6).all() else None)


# Relations of two things


def _lies(axis: int, sign: int) -> Callable[[Facts, int, int], bool | None]:
    """Make a judge of "i lies to the left of j" and the like, as long as both are seen."""

    def judge(facts: Facts, i: int, j: int) -> bool | None:
        m = facts.measures
        seen = m.seen[i] & m.seen[j]
        if seen.sum() < 0.5 * m.num_frames:
            return None
        gaps = (m.centers[i] - m.centers[j])[seen] * sign
        along, aside = gaps[:, axis], np.abs(gaps[:, 1 - axis])
        if (along <= -0.05 * m.short).all():
            return False
        is_clear = (along >= 0.12 * m.short) & (aside <= 1.2 * along)
        # Straight above is not to the left, if the middles are near to one line.
        is_other = (aside >= 0.12 * m.short) & (np.abs(along) <= 0.3 * aside)
        return True if is_clear.all() else (False if is_other.all() else None)

    return judge


def _is_behind(facts: Facts, i: int, j: int) -> bool | None:
    """Say whether a good part of i is hidden by j in some frame."""
    m = facts.measures
    return _clearly(float((m.covered[i, j] / m.full[i]).max()), 0.3, 0.01)


def _is_in_front_of(facts: Facts, i: int, j: int) -> bool | None:
    return facts.pair("behind", j, i)


def _overtakes(facts: Facts, i: int, j: int) -> bool | None:
    """Say whether i passes j while both go the same way, on lines next to each other."""
    m = facts.measures
    if not m.has_motion or PILLAR in (facts.looks[i].form, facts.looks[j].form):
        return None if not m.has_motion else False
    if _is_moving(facts, i) is False or _is_moving(facts, j) is False:
        return False
    ways, seen = (m.ways[i], m.ways[j]), m.seen[i] & m.seen[j]
    gaps = (m.centers[i] - m.centers[j])[seen]
    if all(length(gap) > 0.45 * m.short for gap in gaps):
        return False  # never near each other
    if ways[0] is None or ways[1] is None or seen.sum() < 4:
        return None
    angle = angle_between(ways[0], ways[1])
    if angle > 15:
        return False if angle >= 40 else None
    unit = ways[1] / length(ways[1])
    x, y = gaps[:, 0], gaps[:, 1]
    along, aside = x * unit[0] + y * unit[1], np.abs(y * unit[0] - x * unit[1])
    if along[0] >= 0.02 * m.short or along[-1] <= -0.05 * m.short:
        return False  # ahead from the beginning, or behind to the end
    is_clear = along[0] <= -0.08 * m.short and along[-1] >= 0.08 * m.short
    return True if is_clear and aside.max() <= 0.35 * m.short else None


def _is_overtaken_by(facts: Facts, i: int, j: int) -> bool | None:
    return facts.pair("overtakes", j, i)


def _shares(attribute: str) -> Callable[[Facts, int, int], bool | None]:
    def judge(facts: Facts, i: int, j: int) -> bool | None:
        if PILLAR in (facts.looks[i].form, facts.looks[j].form):
            return False
        return bool(getattr(facts.looks[i], attribute) == getattr(facts.looks[j], attribute))

    return judge


def _is_seen_in(facts: Facts, i: int, frame: int) -> bool | None:
    """Say whether a thing is seen in the first (0) or last (-1) frame."""
    m = facts.measures
    return _clearly(float(m.visible[i, frame] / m.full[i, frame]), 0.5, 0.0) if m.has_motion else None


_JUDGES: dict[str, Callable[..., bool | None]] = {
    "shape": _is_shape,
    "color": _has("color"),
    "form": _has("form"),
    "texture": _has("texture"),
    "concept": _is_concept,
    "unlike": _is_unlike,
    "moving": _is_moving,
    "still": _is_still,
    "moves": _moves,
    "circles": _circles,
    "bounces": _bounces,
    "speeds up": _speeds_up,
    "slows down": _slows_down,
    "grows": _grows,
    "shrinks": _shrinks,
    "spins": _spins,
    "enters": _enters,
    "leaves": _leaves,
    "enters from": _enters_from,
    "leaves to": _leaves_to,
    "hidden": _is_hidden,
    "vanishes": _vanishes,
    "hides": _of_any("in front of"),
    "overtakes": _of_any("overtakes"),
    "overtaken": _of_any("overtaken by"),
    "in": _is_in,
    "seen in": _is_seen_in,
}
_RELATIONS: dict[str, Callable[[Facts, int, int], bool | None]] = {
    "left of": _lies(0, -1),
    "right of": _lies(0, 1),
    "above": _lies(1, -1),
    "below": _lies(1, 1),
    "behind": _is_behind,
    "in front of": _is_in_front_of,
    "overtakes": _overtakes,
    "overtaken by": _is_overtaken_by,
    "same color": _shares("color"),
    "same form": _shares("form"),
    "same texture": _shares("texture"),
}
