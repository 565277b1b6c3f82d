"""Words for what can be true in a synthetic clip: noun phrases, clauses, and what everybody knows about the world.

Each clause has several wordings. Which clause is true of what is judged in `synthetic_facts.py`; sentences are put
together in `synthetic_expressions.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .synthetic_dice import Dice


@dataclass(frozen=True)
class Clause:
    """Something that is said of a thing, in words.

    Attributes:
        program (`tuple`): its meaning, see `Facts.truth`.
        idea (`str`): what kind of thought it is; evaluation can be split by it.
        verbs (`tuple[str, ...]`): after "the circle that" or "which circle"; words that differ between singular and
            plural as "moves|move left", whole phrases as "is a wheel || are wheels". The first also fits one frame.
        modifiers (`tuple[str, ...]`): after "the circle": "moving left". The first also fits one frame.
    """

    program: tuple[Any, ...]
    idea: str
    verbs: tuple[str, ...]
    modifiers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Concept:
    """Knowledge of the world: which colours, forms or textures something fits, and of which one could argue."""

    attribute: str
    values: tuple[str, ...]
    verbs: tuple[str, ...]
    modifiers: tuple[str, ...] = ()
    arguable: tuple[str, ...] = ()


def _color_of(values: tuple[str, ...], *things: str, arguable: tuple[str, ...] = ()) -> Concept:
    verbs = tuple(f"has|have the colour of {thing}" for thing in things)
    modifiers = tuple(f"with the colour of {thing}" for thing in things)
    return Concept("color", values, verbs, (*modifiers, f"in the colour of {things[0]}"), arguable)


def _mixed_of(value: str, first: str, second: str, arguable: tuple[str, ...] = ()) -> Concept:
    mixed = f"{first} and {second} paint"
    return Concept(
        "color",
        (value,),
        (f"has|have the colour that {mixed} give together", f"could be painted by mixing {first} and {second}"),
        (f"with the colour that {mixed} give together", f"in the colour you get by mixing {first} and {second}"),
        arguable,
    )


CONCEPTS: dict[str, Concept] = {
    "grass": _color_of(("green",), "grass", "fresh leaves", "a frog"),
    "blood": _color_of(("red",), "blood", "a ripe tomato", "a fire engine"),
    "lemon": _color_of(("yellow",), "a lemon", "a ripe banana", "the yolk of an egg"),
    "carrot": _color_of(("orange",), "a carrot", "a pumpkin"),
    "sky": _color_of(("blue",), "a clear sky", "the deep sea", arguable=("cyan",)),
    "snow": _color_of(("white",), "snow", "milk"),
    "coal": _color_of(("black",), "coal", "the night", "a raven"),
    "flamingo": _color_of(("pink",), "a flamingo", "a piglet", arguable=("orange",)),
    "aubergine": _color_of(("purple",), "an aubergine", "violets", arguable=("black", "blue")),
    "red and yellow": _mixed_of("orange", "red", "yellow"),
    "blue and yellow": _mixed_of("green", "blue", "yellow", ("cyan",)),
    "red and blue": _mixed_of("purple", "red", "blue"),
    "red and white": _mixed_of("pink", "red", "white"),
    "stop": Concept(
        "color",
        ("red",),
        ("has|have the colour that tells drivers to stop",),
        ("with the colour that tells drivers to stop", "in the colour of a traffic light that says stop"),
    ),
    "go": Concept(
        "color",
        ("green",),
        ("has|have the colour that tells drivers to go",),
        ("with the colour that tells drivers to go", "in the colour of a traffic light that says go"),
        ("cyan",),
    ),
    "three corners": Concept(
        "form", ("triangle",), ("has|have three corners", "has|have exactly three sides"), ("with three corners",)
    ),
    "four corners": Concept(
        "form",
        ("square",),
        ("has|have four equal sides", "has|have exactly four corners"),
        ("with four equal sides",),
        ("cross", "arrow", "star"),
    ),
    "five points": Concept("form", ("star",), ("has|have five points", "has|have five tips"), ("with five points",)),
    "no corners": Concept(
        "form",
        ("circle", "ring", "ellipse"),
        ("has|have no corners", "has|have no corner at all"),
        ("without corners", "without any corner"),
        ("heart", "crescent"),
    ),
    "roll": Concept(
        "form",
        ("circle", "ring"),
        ("could roll", "would roll down a hill", "could be used as a wheel || could be used as wheels"),
        (),
        ("ellipse",),
    ),
    "hole": Concept(
        "form",
        ("ring",),
        ("has|have a hole", "could be worn on a finger", "looks like a tyre || look like tyres"),
        ("with a hole in the middle", "with the form of a doughnut"),
    ),
    "moon": Concept(
        "form",
        ("crescent",),
        ("looks|look like a new moon", "has|have the form of a banana"),
        ("with the form of a new moon", "with the form of a banana"),
        ("circle",),
    ),
    "egg": Concept(
        "form", ("ellipse",), ("has|have the form of an egg", "is|are oval"), ("with the form of an egg",), ("circle",)
    ),
    "love": Concept(
        "form",
        ("heart",),
        ("stands|stand for love", "belongs|belong on a valentine card"),
        ("with the form that stands for love",),
    ),
    "way": Concept(
        "form",
        ("arrow",),
        ("could show the way", "could point at something"),
        ("with the form of a signpost",),
        ("triangle",),
    ),
    "plus": Concept(
        "form",
        ("cross",),
        ("looks|look like a plus sign", "means|mean addition in a sum"),
        ("with the form of a plus sign",),
    ),
    "tent": Concept(
        "form",
        ("triangle",),
        ("has|have the form of a tent", "looks|look like the roof of a house"),
        ("with the form of a tent",),
        ("arrow",),
    ),
    "sea": Concept(
        "form",
        ("star",),
        ("has|have the form of a sea animal with five arms",),
        ("with the form of a sheriff's badge",),
    ),
    "box": Concept(
        "form",
        ("square",),
        ("has|have the form of a box", "looks|look like a window pane"),
        ("with the form of a box",),
    ),
    "ball": Concept(
        "form",
        ("circle",),
        ("looks|look like a ball", "has|have the form of a full moon"),
        ("with the form of a ball",),
        ("ring", "ellipse"),
    ),
    "zebra": Concept(
        "texture",
        ("striped",),
        ("has|have a pattern like a zebra", "is|are patterned like a tiger"),
        ("with the pattern of a zebra", "with the pattern of a tiger"),
    ),
    "ladybird": Concept(
        "texture",
        ("dotted",),
        ("has|have a pattern like a ladybird", "is|are spotted like a leopard"),
        ("with the pattern of a ladybird", "with spots like a leopard"),
    ),
    "chess": Concept(
        "texture",
        ("chequered",),
        ("has|have a pattern like a chessboard", "could be used to play chess on"),
        ("with the pattern of a chessboard", "with the pattern of the flag that ends a race"),
    ),
    "no pattern": Concept(
        "texture", ("plain",), ("has|have no pattern", "shows|show no pattern"), ("without a pattern",)
    ),
}

_DIRECTION_WORDS = {
    "left": ("left", "to the left"),
    "right": ("right", "to the right"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up left": ("up and to the left", "towards the upper left"),
    "up right": ("up and to the right", "towards the upper right"),
    "down left": ("down and to the left", "towards the lower left"),
    "down right": ("down and to the right", "towards the lower right"),
}
_SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}


def _moving_clauses() -> list[Clause]:
    clauses = []
    for direction, (short, long) in _DIRECTION_WORDS.items():
        verbs = (f"moves|move {short}", f"goes|go {short}", f"is|are moving {long}", f"travels|travel {long}")
        clauses.append(
            Clause(("moves", direction), "motion", verbs, (f"moving {short}", f"going {short}", f"moving {long}"))
        )
    clauses += [
        Clause(("still",), "motion", ("does|do not move", "stands|stand still"), ("standing still",)),
        Clause(("moving",), "motion", ("moves|move", "is|are moving"), ("in motion",)),
        Clause(("circles",), "motion", ("moves|move in a circle", "goes|go round and round"), ("moving in a circle",)),
        Clause(("bounces",), "motion", ("moves|move back and forth", "turns|turn back"), ("moving back and forth",)),
        Clause(("speeds up",), "motion", ("speeds|speed up", "gets|get faster"), ("speeding up", "getting faster")),
        Clause(("slows down",), "motion", ("slows|slow down", "gets|get slower"), ("slowing down", "getting slower")),
        Clause(("grows",), "motion", ("grows|grow", "gets|get larger"), ("growing", "getting larger")),
        Clause(("shrinks",), "motion", ("shrinks|shrink", "gets|get smaller"), ("shrinking", "getting smaller")),
        Clause(("spins",), "motion", ("spins|spin", "turns around itself || turn around themselves"), ("spinning",)),
    ]
    return clauses


def _border_clauses() -> list[Clause]:
    clauses = [
        Clause(
            ("enters",),
            "border",
            ("enters|enter the picture", "comes|come into the picture"),
            ("entering the picture",),
        ),
        Clause(
            ("leaves",), "border", ("leaves|leave the picture", "goes|go out of the picture"), ("leaving the picture",)
        ),
    ]
    for side, place in _SIDES.items():
        entering = (f"enters|enter from the {side}", f"comes|come in {place}")
        leaving = (f"leaves|leave {place}", f"goes|go out of the picture {place}")
        clauses += [
            Clause(("enters from", side), "border", entering, (f"entering from the {side}", f"coming in {place}")),
            Clause(("leaves to", side), "border", leaving, (f"leaving {place}",)),
        ]
    return clauses


# Said as it is seen.
REFERRING_CLAUSES = (
    *_moving_clauses(),
    *_border_clauses(),
    *(
        Clause(("in", side), "place", (f"is|are in the {half} half of the picture",), (f"in the {half} half",))
        for side, half in (("left", "left"), ("right", "right"), ("top", "upper"), ("bottom", "lower"))
    ),
)

# (key, sign) of an order -> the event that it is an order of, and verbs.
ORDER_VERBS = {
    ("exit", -1): (
        "leaves",
        ("will leave the picture first", "is the first to leave the picture", "will be gone first"),
    ),
    ("exit", 1): ("leaves", ("will leave the picture last", "is the last to leave the picture")),
    ("entry", -1): ("enters", ("comes into the picture first", "is the first to enter the picture")),
    ("entry", 1): ("enters", ("comes into the picture last", "is the last to enter the picture")),
}

# Wants a conclusion, or knowledge of the world.
REASONING_CLAUSES = (
    *(Clause(("concept", name), "knowledge", c.verbs, c.modifiers) for name, c in CONCEPTS.items()),
    # Of one shape of many in `EXTREMES`; here for pictures that no shape leaves or enters.
    *(Clause(("most", key, sign, (event,)), "order", verbs) for (key, sign), (event, verbs) in ORDER_VERBS.items()),
    Clause(
        ("leaves",),
        "memory",
        ("is|are no longer there at the end", "will be gone at the end", "is|are missing in the last frame"),
    ),
    Clause(
        ("enters",),
        "memory",
        ("was|were not there at the beginning", "is|are missing in the first frame", "joins|join the others later"),
    ),
    Clause(
        ("still",),
        "metaphor",
        ("seems|seem to be asleep", "seems to be glued to its place || seem to be glued to their places"),
    ),
    Clause(("moves", "down"), "metaphor", ("seems|seem to be falling", "moves|move the way a stone falls")),
    Clause(("moves", "up"), "metaphor", ("rises|rise like a balloon", "moves|move the way smoke does")),
    Clause(("moves", "right"), "metaphor", ("moves|move the way we read", "moves|move in the direction of reading")),
    Clause(
        ("bounces",), "metaphor", ("cannot make up its mind where to go || cannot make up their minds where to go",)
    ),
    Clause(
        ("circles",), "metaphor", ("moves|move like a planet round the sun", "seems|seem to ride on a merry-go-round")
    ),
    Clause(("grows",), "metaphor", ("seems|seem to come closer", "looks|look like a balloon being filled")),
    Clause(("shrinks",), "metaphor", ("seems|seem to go away from us", "looks|look like a balloon losing its air")),
    Clause(("slows down",), "metaphor", ("seems|seem to be braking", "seems|seem to be running out of power")),
    Clause(
        ("speeds up",),
        "metaphor",
        ("seems|seem to be in more and more of a hurry", "behaves|behave like a car after a green light"),
    ),
    Clause(("spins",), "metaphor", ("moves|move like a windmill", "seems|seem to be dizzy")),
    Clause(
        ("hidden",), "hiding", ("is|are partly hidden by something", "is|are hidden behind something at some point")
    ),
    Clause(("hides",), "hiding", ("hides|hide something else", "is|are in front of something else at some point")),
    Clause(
        ("vanishes",), "hiding", ("vanishes|vanish behind something and comes|come back", "cannot be seen for a while")
    ),
    Clause(
        ("overtakes",),
        "overtaking",
        ("overtakes|overtake something", "passes|pass another one on the way"),
        ("overtaking something",),
    ),
    Clause(
        ("overtaken",),
        "overtaking",
        ("is|are being overtaken", "is|are too slow to stay ahead"),
        ("being overtaken",),
    ),
    Clause(("unlike", "color"), "odd one out", ("has another colour than all the others",)),
    Clause(("unlike", "form"), "odd one out", ("has another form than all the others",)),
    Clause(("unlike", "texture"), "odd one out", ("has another pattern than all the others",)),
)

# Of one thing and another that is named: "{}" stands for it.
RELATION_CLAUSES: Mapping[str, Clause] = {
    "left of": Clause((), "relation", ("is|are to the left of {}",), ("to the left of {}", "left of {}")),
    "right of": Clause((), "relation", ("is|are to the right of {}",), ("to the right of {}", "right of {}")),
    "above": Clause((), "relation", ("is|are above {}",), ("above {}", "over {}")),
    "below": Clause((), "relation", ("is|are below {}",), ("below {}", "under {}")),
    "behind": Clause(
        (),
        "occlusion",
        ("is|are partly hidden by {}", "is|are hidden behind {} at some point"),
        ("partly hidden by {}", "hidden behind {} at some point"),
    ),
    "in front of": Clause(
        (),
        "occlusion",
        ("covers|cover a part of {}", "is|are in front of {} at some point"),
        ("covering a part of {}",),
    ),
    "overtakes": Clause(
        (), "overtaking", ("overtakes|overtake {}", "passes|pass {}"), ("overtaking {}", "passing {}")
    ),
    "overtaken by": Clause((), "overtaking", ("is|are overtaken by {}",), ("overtaken by {}", "being passed by {}")),
}
# The same, where one must first look what the other is like.
LIKENESS_CLAUSES: Mapping[str, Clause] = {
    "same color": Clause((), "likeness", ("has|have the same colour as {}",), ("with the same colour as {}",)),
    "same form": Clause((), "likeness", ("has|have the same form as {}",), ("with the same form as {}",)),
    "same texture": Clause((), "likeness", ("has|have the same pattern as {}",), ("with the same pattern as {}",)),
}


@dataclass(frozen=True)
class Extreme:
    """The end of an order, said of things of a kind: "the largest red circle".

    Attributes:
        key (`str`), sign (`int`): of the order, see `Facts.truth`.
        domain (`tuple[Program, ...]`): what must be true of a thing for the order to make sense.
        adjective, comparative (`str`): before the noun: "largest"; "larger" of two. May be empty.
        modifiers, verbs (`tuple[str, ...]`): after it, as in `Clause`.
        type_id, idea: as in `Clause`; 0 referring, 1 reasoning.
    """

    key: str
    sign: int
    idea: str
    type_id: int
    adjective: str = ""
    comparative: str = ""
    modifiers: tuple[str, ...] = ()
    verbs: tuple[str, ...] = ()
    domain: tuple[tuple[Any, ...], ...] = ()


def _place_extremes() -> list[Extreme]:
    extremes = []
    for axis, sign, word, place in (
        ("x", -1, "leftmost", "furthest to the left"),
        ("x", 1, "rightmost", "furthest to the right"),
        ("y", -1, "topmost", "highest up"),
        ("y", 1, "lowest", "lowest down"),
    ):
        for frame, moment, seen in (("first", "at the beginning", 0), ("last", "at the end", -1)):
            modifiers = (f"{place} {moment}", f"that is {place} {moment}")
            extremes.append(Extreme(f"{axis} {frame}", sign, "place", 0, "", "", modifiers, (), (("seen in", seen),)))
        extremes.append(Extreme(axis, sign, "place", 0, word, "", (f"that is {place}",)))
    return extremes


EXTREMES = (
    Extreme("size", 1, "size", 0, "largest", "larger", ("that is larger than the others",)),
    Extreme("size", -1, "size", 0, "smallest", "smaller", ("that is smaller than the others",)),
    Extreme("size", 1, "size", 1, verbs=("would need the most paint", "would be the hardest to hide")),
    Extreme("size", -1, "size", 1, verbs=("would need the least paint", "would fit into the smallest box")),
    Extreme("speed", 1, "speed", 0, "fastest", "faster", (), (), (("moving",),)),
    Extreme("speed", -1, "speed", 0, "slowest moving", "slower moving", (), (), (("moving",),)),
    Extreme(
        "speed", 1, "speed", 1, verbs=("would win a race", "covers the most ground in a second"), domain=(("moving",),)
    ),
    Extreme("speed", -1, "speed", 1, verbs=("moves but would lose a race",), domain=(("moving",),)),
    *_place_extremes(),
    *(
        Extreme(key, sign, "order", 1, verbs=verbs, domain=((event,),))
        for (key, sign), (event, verbs) in ORDER_VERBS.items()
    ),
)


def noun_phrase(look: Mapping[str, str], noun: str, dice: Dice, *, is_plural: bool = False) -> tuple[str, str]:
    """Name some of colour, form and texture, without an article: ("striped red circle", "").

    A pattern is now and then said after the noun: ("red circle", "with stripes").
    """
    texture, after = look.get("texture", ""), ""
    if texture in _WITH_PATTERN and dice.chance(0.3):
        texture, after = "", _WITH_PATTERN[texture]
    head = look.get("form", noun)
    if is_plural:
        head = _PLURALS.get(head, head + "s")
    return " ".join(word for word in (texture, look.get("color", ""), head) if word), after


_WITH_PATTERN = {"striped": "with stripes", "dotted": "with dots", "chequered": "with a chequered pattern"}
_PLURALS = {"cross": "crosses"}


def inflected(words: str, *, is_plural: bool) -> str:
    """Choose the number of a verb phrase: "moves|move left" is "moves left" or "move left".

    Where more than single words differ, the whole phrase is given twice: "is a wheel || are wheels".
    """
    if " || " in words:
        singular, plural = words.split(" || ")
        return plural if is_plural else singular
    chosen = []
    for word in words.split(" "):
        singular, _, plural = word.partition("|")
        chosen.append(plural if is_plural and plural else singular)
    return " ".join(chosen)
