"""What is in a synthetic clip: shapes, how they look, and what is behind them. Nothing is drawn here.

Shapes of one scene share colours, forms and textures on purpose, so that one word seldom suffices to name one of them.
Paths are in `synthetic_motion.py`, painting in `synthetic_drawing.py`; what a sentence may say about a scene is found
out from the painted labels in `synthetic_facts.py`, not from the plan made here.
"""

from dataclasses import dataclass

from .synthetic_dice import Dice
from .synthetic_motion import Path, draw_paths, still_path

COLORS = {
    "red": (205, 38, 38),
    "green": (46, 156, 58),
    "blue": (42, 72, 200),
    "yellow": (243, 224, 52),
    "white": (242, 242, 242),
    "purple": (126, 48, 162),
    "orange": (242, 138, 24),
    "black": (26, 26, 28),
    "pink": (243, 142, 190),
    "cyan": (58, 205, 216),
}
FORMS = ("circle", "square", "triangle", "star", "ring", "cross", "ellipse", "heart", "crescent", "arrow")
TEXTURES = ("plain", "striped", "dotted", "chequered")
ATTRIBUTES = {"color": tuple(COLORS), "form": FORMS, "texture": TEXTURES}
LEVELS = (1, 2, 3)
# Not one of the shapes that sentences call so, but a thing that can hide them.
PILLAR, PILLAR_COLOR = "pillar", "grey"

# How many of the names above, from the first on, a level knows.
_NUM_COLORS = {1: 6, 2: 8, 3: 10}
_NUM_FORMS = {1: 6, 2: 8, 3: 10}
_NUM_TEXTURES = {1: 2, 2: 4, 3: 4}
_NUM_SHAPES = {1: (2, 4), 2: (3, 5), 3: (3, 6)}
# How much rather a look is taken that shares 0, 1 or 2 properties with one that is there, by itself or as a whole.
_SHARING = (1.0, 5.0, 25.0)
_BACKDROPS = {
    1: ("plain", "gradient"),
    2: ("plain", "gradient", "clouds"),
    3: ("gradient", "clouds", "grain", "tiles"),
}
# These forms have a front or a long side: they are shown in all four directions.
_TURNED = ("ellipse", "crescent", "arrow")


@dataclass(frozen=True)
class Look:
    """How a shape looks, in the words that sentences use."""

    color: str
    form: str
    texture: str


@dataclass(frozen=True)
class Shape:
    """One thing in a scene.

    Attributes:
        look (`Look`): names of colour, form and texture.
        path (`Path`): its movement.
        rgb, second_rgb (`tuple[int, int, int]`): main colour, and that of the stripes, dots or fields.
        period (`float`): of the pattern, in radii.
        pattern_turns (`int`): how the stripes lie in the shape, in steps of 45 degrees.
        turns (`int`): how the shape is turned besides `path.angles`, in steps of 90 degrees.
    """

    look: Look
    path: Path
    rgb: tuple[int, int, int]
    second_rgb: tuple[int, int, int]
    period: float
    pattern_turns: int
    turns: int


@dataclass(frozen=True)
class Backdrop:
    """What lies behind the shapes, and the light.

    Attributes:
        kind (`str`): "plain", "gradient", "clouds", "grain" or "tiles".
        rgb, second_rgb (`tuple[int, int, int]`): its colours.
        light (`tuple[float, float]`): how much brighter it gets from left to right and from top to bottom, as a part.
        flicker (`float`): largest change of the light over time, as a part.
        noise_key (`int`): seed of clouds and grain.
    """

    kind: str
    rgb: tuple[int, int, int]
    second_rgb: tuple[int, int, int]
    light: tuple[float, float]
    flicker: float
    noise_key: int


@dataclass(frozen=True)
class Scene:
    """All that is needed to paint a clip: `size` is (H, W); a later shape lies in front of an earlier one."""

    size: tuple[int, int]
    num_frames: int
    shapes: tuple[Shape, ...]
    backdrop: Backdrop


def is_held_out(look: Look) -> bool:
    """Say whether a composition of colour, form and texture never occurs in "train" and "valid", only in "unseen".

    One in seven is. Each colour, form and texture, and each pair of two of them, is seen in training.
    """
    place = tuple(COLORS).index(look.color) + FORMS.index(look.form) + 2 * (TEXTURES.index(look.texture) // 2)
    return place % 7 == 3


def allowed_looks(level: int, *, is_unseen: bool) -> list[Look]:
    """List the compositions that clips of a level draw from, of the held-out ones or of all others."""
    looks = (
        Look(color, form, texture)
        for color in tuple(COLORS)[: _NUM_COLORS[level]]
        for form in FORMS[: _NUM_FORMS[level]]
        for texture in TEXTURES[: _NUM_TEXTURES[level]]
    )
    return [look for look in looks if is_held_out(look) == is_unseen]


def plan_scene(
    dice: Dice,
    *,
    size: tuple[int, int],
    num_frames: int,
    level: int,
    num_objects: tuple[int, int] | None,
    is_unseen: bool,
) -> Scene:
    """Draw a scene by lot. It is a plan only: shapes may turn out to be hidden all the time."""
    low, high = num_objects or _NUM_SHAPES[level]
    num_shapes = low + dice.below(high - low + 1)
    looks = _draw_looks(dice, allowed_looks(level, is_unseen=is_unseen), num_shapes)
    paths = draw_paths(dice, size, num_frames, level, num_shapes)
    shapes = [_dressed(dice, look, path, level) for look, path in zip(looks, paths, strict=True)]
    has_pillar = level == 3 and num_shapes < high and dice.chance(0.4)
    if has_pillar:  # in front of all shapes but perhaps one
        shapes.insert(num_shapes - dice.below(2), _draw_pillar(dice, size, num_frames))
    return Scene(size, num_frames, tuple(shapes), _draw_backdrop(dice, level, has_pillar=has_pillar))


def _draw_looks(dice: Dice, allowed: list[Look], num_shapes: int) -> list[Look]:
    """Draw looks of which each shares something with one of those before it; equal looks are rare."""
    looks = [dice.choice(allowed)]
    while len(looks) < num_shapes:
        model = dice.choice(looks)
        weights = [_weight(look, model) * (0.1 if look in looks else 1.0) for look in allowed]
        looks.append(dice.choice(allowed, weights))
    return looks


def _weight(look: Look, model: Look) -> float:
    shared = (look.color == model.color) + (look.form == model.form) + (look.texture == model.texture)
    return _SHARING[min(shared, 2)]


def _dressed(dice: Dice, look: Look, path: Path, level: int) -> Shape:
    """Give a path a look: the exact colours and pattern."""
    spread = 6 if level == 1 else 13
    red, green, blue = (min(255, max(0, c + dice.below(2 * spread + 1) - spread)) for c in COLORS[look.color])
    rgb = (red, green, blue)
    return Shape(
        look=look,
        path=path,
        rgb=rgb,
        second_rgb=_second_color(rgb, look.color),
        # At least 6 pixels, or nobody would see what it is.
        period=min(1.2, max(dice.uniform(0.5, 0.62), 6 / float(path.radii.min()))),
        pattern_turns=dice.below(4),
        turns=dice.below(4) if look.form in _TURNED else 0,
    )


def _second_color(rgb: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """Return a darker tone for bright colours and a brighter one for dark colours."""
    if name == "white":
        return (132, 132, 138)
    if name == "black":
        return (122, 122, 126)
    is_bright = 299 * rgb[0] + 587 * rgb[1] + 114 * rgb[2] > 120_000
    goal, part = (0, 45) if is_bright else (255, 55)
    red, green, blue = (c + (goal - c) * part // 100 for c in rgb)
    return red, green, blue


def _draw_pillar(dice: Dice, size: tuple[int, int], num_frames: int) -> Shape:
    """A grey post from top to bottom, as wide as a shape."""
    height, width = size
    half_width = min(size) * dice.uniform(0.1, 0.16)
    place = (dice.uniform(0.35, 0.65) * width, height / 2)
    path = still_path(place, half_width, num_frames)
    tone = 66 + dice.below(16)
    return Shape(Look(PILLAR_COLOR, PILLAR, "plain"), path, (tone, tone, tone), (tone, tone, tone), 1.0, 0, 0)


def _draw_backdrop(dice: Dice, level: int, *, has_pillar: bool) -> Backdrop:
    """Dull colours of middle brightness: each colour of `COLORS` stands out."""
    low = 130 if has_pillar else 110
    tints = []
    for _ in range(2):
        tone = low + dice.below(60)
        red, green, blue = (tone + dice.below(25) - 12 for _ in range(3))
        tints.append((red, green, blue))
    strength = 0.0 if level == 1 else 0.18
    return Backdrop(
        kind=dice.choice(_BACKDROPS[level]),
        rgb=tints[0],
        second_rgb=tints[1],
        light=(dice.uniform(-strength, strength), dice.uniform(-strength, strength)),
        flicker=dice.uniform(0, 0.08) if level == 3 else 0.0,
        noise_key=dice.below(2**32),
    )
