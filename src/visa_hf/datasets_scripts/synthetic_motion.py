"""How the shapes of a synthetic clip move: single paths, and meetings such as one overtaking another.

Lengths are planned in pixels and rounded to a 64th of one, so that a path is the same on every machine. This is the
plan only: whether something can be said to overtake or to leave is judged in `synthetic_facts.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .synthetic_dice import Dice

DIRECTIONS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up left": (-0.70703125, -0.70703125),
    "up right": (0.70703125, -0.70703125),
    "down left": (-0.70703125, 0.70703125),
    "down right": (0.70703125, 0.70703125),
}
_STRAIGHT = ("left", "right", "up", "down")
# Fewer frames show no movement that could be told from another.
MIN_MOVING_FRAMES = 6

# Radius in parts of the shorter side of the picture, and the factor by which it varies.
_RADII = (0.09, 0.13, 0.18)
_RADIUS_JITTER = 0.05
_MOTIONS = {
    1: ("still", "within"),
    2: ("still", "within", "within", "enter", "leave", "grow", "shrink", "speed up", "slow down", "spin"),
    3: ("still", "within", "within", "enter", "leave", "cross", "grow", "shrink", "speed up", "slow down", "spin")
    + ("circle", "bounce"),
}
_MEETINGS = {
    1: {"none": 1.0},
    2: {"none": 0.25, "pass": 0.2, "leave": 0.2, "enter": 0.15, "overtake": 0.2},
    3: {"none": 0.08, "pass": 0.14, "leave": 0.2, "enter": 0.18, "overtake": 0.4},
}
# Chance that a shape whose path crosses another's is kept, by level.
_CROSSING = {1: 0.0, 2: 0.2, 3: 0.35}
_MAX_TRIES = 12


@dataclass(frozen=True)
class Path:
    """Where a shape is, and how large and turned, in each of the T frames.

    Attributes:
        centers (`np.ndarray` of shape `(T, 2)`, float64): x and y in pixels; pixel (0, 0) reaches from 0 to 1.
        radii (`np.ndarray` of shape `(T,)`, float64): in pixels, half of what the shape measures across.
        angles (`np.ndarray` of shape `(T,)`, float64): degrees, clockwise.
    """

    centers: np.ndarray
    radii: np.ndarray
    angles: np.ndarray


def draw_paths(dice: Dice, size: tuple[int, int], num_frames: int, level: int, num_shapes: int) -> list[Path]:
    """Draw the paths of a scene, in random order: perhaps a meeting of some shapes, and the others by themselves."""
    planner = _Planner(dice, size, num_frames)
    paths = planner.meeting(level, num_shapes)
    while len(paths) < num_shapes:
        for _ in range(_MAX_TRIES):
            path = planner.single(level)
            if not any(_do_cross(path, other) for other in paths) or dice.chance(_CROSSING[level]):
                break
        paths.append(path)
    return dice.shuffled(paths)


def still_path(center: tuple[float, float], radius: float, num_frames: int) -> Path:
    """Return the path of a thing that stays where it is."""
    return _path(np.tile(np.array(center), (num_frames, 1)), np.full(num_frames, radius), np.zeros(num_frames))


def cos_sin(degrees: float) -> tuple[float, float]:
    """Return cosine and sine, rounded to multiples of 1 / 4096: C libraries differ in the last digit."""
    radians = math.radians(degrees)
    return round(math.cos(radians) * 4096) / 4096, round(math.sin(radians) * 4096) / 4096


def _path(centers: np.ndarray, radii: np.ndarray, angles: np.ndarray) -> Path:
    return Path(_rounded(centers), _rounded(radii), np.floor(angles + 0.5))


def _rounded(lengths: np.ndarray) -> np.ndarray:
    return np.floor(np.asarray(lengths, dtype=np.float64) * 64 + 0.5) / 64


def _do_cross(first: Path, second: Path) -> bool:
    gaps = first.centers - second.centers
    reach = 0.95 * (first.radii + second.radii)
    return bool((gaps[:, 0] ** 2 + gaps[:, 1] ** 2 < reach**2).any())


class _Planner:
    """Draws paths for one size and length of clip. `tau` is the time, 0 in the first frame and 1 in the last."""

    def __init__(self, dice: Dice, size: tuple[int, int], num_frames: int) -> None:
        self._dice = dice
        self._height, self._width = size
        self._short = min(size)
        self._num_frames = num_frames
        self._tau = np.arange(num_frames) / max(num_frames - 1, 1)
        self._is_moving = num_frames >= MIN_MOVING_FRAMES

    def single(self, level: int) -> Path:
        """Draw the path of one shape by itself."""
        kind = self._dice.choice(_MOTIONS[level]) if self._is_moving else "still"
        radius = self._radius()
        names = _STRAIGHT if level == 1 else tuple(DIRECTIONS)
        unit = np.array(DIRECTIONS[self._dice.choice(names, [2.0 if n in _STRAIGHT else 1.0 for n in names])])
        centers = self._centers(kind, unit, radius)
        radii = np.full(self._num_frames, radius)
        if kind in ("grow", "shrink"):
            factor = self._dice.uniform(1.32, 1.45)
            start, end = (1 / factor, factor) if kind == "grow" else (factor, 1 / factor)
            radii = radius * (start + (end - start) * self._tau)
        angles = np.full(self._num_frames, self._dice.uniform(-12, 12))
        if kind == "spin":
            angles += self._dice.choice((-1, 1)) * self._dice.uniform(250, 420) * self._tau
        return _path(centers, radii, angles)

    def meeting(self, level: int, num_shapes: int) -> list[Path]:
        """Draw the paths of two or three shapes that have to do with each other, or none."""
        kinds = _MEETINGS[level]
        kind = self._dice.choice(tuple(kinds), tuple(kinds.values()))
        if num_shapes < 2 or kind == "none":
            return []
        if not self._is_moving:
            return self._overlapping()
        meetings: dict[str, Callable[[], list[Path]]] = {"overtake": self._overtaking, "pass": self._passing}
        return meetings[kind]() if kind in meetings else self._race(kind, min(num_shapes, 2 + self._dice.below(2)))

    def _radius(self) -> float:
        return self._short * self._dice.choice(_RADII) * self._dice.uniform(1 - _RADIUS_JITTER, 1 + _RADIUS_JITTER)

    def _spot(self, radius: float) -> np.ndarray:
        """Draw a place where a shape is inside the picture as a whole."""
        border = min(1.1 * radius + 1, self._short / 2)
        return np.array([self._dice.uniform(border, side - border) for side in (self._width, self._height)])

    def _centers(self, kind: str, unit: np.ndarray, radius: float) -> np.ndarray:
        """Return (T, 2) places for a kind of movement along a direction."""
        tau = self._tau[:, None]
        if kind == "enter":
            end, begin = self._spot(radius), self._dice.uniform(0.08, 0.45)
            return end - unit * self._way_out(end, -unit, radius) / (1 - begin) * (1 - tau)
        if kind == "leave":
            start, done = self._spot(radius), self._dice.uniform(0.5, 0.92)
            return start + unit * self._way_out(start, unit, radius) / done * tau
        if kind == "cross":
            middle = self._spot(radius)
            before, after = self._way_out(middle, -unit, radius), self._way_out(middle, unit, radius)
            begin, done = self._dice.uniform(0.06, 0.25), self._dice.uniform(0.75, 0.94)
            return middle + unit * (-before + (before + after) * (tau - begin) / (done - begin))
        if kind == "circle":
            return self._circling(radius)
        if kind in ("within", "bounce", "speed up", "slow down") or (
            kind in ("grow", "shrink", "spin") and self._dice.chance(0.4)
        ):
            start, way = self._inner_way(unit, radius)
            eased = {"speed up": tau**2, "slow down": 1 - (1 - tau) ** 2}.get(kind, tau)
            if kind == "bounce":
                turns = self._dice.choice((2, 3)) * tau  # there or back, each a turn
                eased = np.abs((turns + 1) % 2 - 1)
            return start + way * eased
        return np.tile(self._spot(radius), (self._num_frames, 1))

    def _inner_way(self, unit: np.ndarray, radius: float) -> tuple[np.ndarray, np.ndarray]:
        """Draw the start and the whole way of a movement that stays inside the picture."""
        border = min(1.1 * radius + 1, 0.3 * self._short)
        room = np.array([self._width, self._height]) - 2 * border
        longest = min(room[axis] / abs(unit[axis]) for axis in (0, 1) if unit[axis])
        way = unit * longest * self._dice.uniform(0.55, 0.95)
        free = room - np.abs(way)
        corner = border + free * np.array([self._dice.uniform(0, 1), self._dice.uniform(0, 1)])
        return np.where(way < 0, corner - way, corner), way

    def _circling(self, radius: float) -> np.ndarray:
        orbit = self._short * self._dice.uniform(0.13, 0.2)
        middle = self._spot(radius + orbit)
        start, turn = self._dice.uniform(0, 360), self._dice.choice((-1, 1)) * self._dice.uniform(400, 600)
        places = [cos_sin(start + turn * tau) for tau in self._tau]
        return middle + orbit * np.array(places)

    def _way_out(self, place: np.ndarray, unit: np.ndarray, radius: float) -> float:
        """Return how far a shape at a place must move until nothing of it is left in the picture."""
        ways = []
        for axis, side in ((0, self._width), (1, self._height)):
            if unit[axis]:
                rest = side - place[axis] if unit[axis] > 0 else place[axis]
                ways.append((rest + 1.1 * radius + 1) / abs(unit[axis]))
        return min(ways)

    def _overlapping(self) -> list[Path]:
        """Two resting shapes, one of them partly behind the other."""
        radii = self._radius(), self._radius()
        middle = self._spot(sum(radii))
        apart = self._dice.uniform(0.45, 0.7) * sum(radii)
        shift = apart * np.array(cos_sin(self._dice.uniform(0, 360)))
        places = (middle - shift / 2, middle + shift / 2)
        return [still_path((p[0], p[1]), r, self._num_frames) for p, r in zip(places, radii, strict=True)]

    def _passing(self) -> list[Path]:
        """One shape, moving, meets another, resting."""
        radius, other_radius = self._radius(), self._radius()
        unit = np.array(DIRECTIONS[self._dice.choice(_STRAIGHT)])
        start, way = self._inner_way(unit, radius)
        meeting = start + way * self._dice.uniform(0.4, 0.6)
        aside = unit[::-1] * self._dice.uniform(-0.35, 0.35) * other_radius
        angle = self._dice.uniform(-12, 12)
        moving = _path(
            start + way * self._tau[:, None], np.full(self._num_frames, radius), np.full(self._num_frames, angle)
        )
        return [moving, still_path((meeting + aside)[:2].tolist(), other_radius, self._num_frames)]

    def _overtaking(self) -> list[Path]:
        """Two shapes move in one direction, almost on one line; the one behind is faster."""
        radii = (self._radius() * 0.8, self._radius() * 0.8)
        unit = np.array(DIRECTIONS[self._dice.choice(_STRAIGHT)])
        length = self._width if unit[0] else self._height
        behind = 1.1 * max(radii) / length + self._dice.uniform(0.01, 0.05)
        ends = 1 - behind
        ahead, passed = behind + self._dice.uniform(0.15, 0.22), ends - self._dice.uniform(0.15, 0.25)
        line = self._dice.uniform(0.25, 0.75) * (self._height if unit[0] else self._width)
        aside = self._dice.uniform(0.2, 0.7) * sum(radii) * self._dice.choice((-1, 1))
        paths = []
        for (start, end), radius, offset in zip(((behind, ends), (ahead, passed)), radii, (0.0, aside), strict=True):
            along = (start + (end - start) * self._tau) * length
            if unit.sum() < 0:
                along = length - along
            across = np.full(self._num_frames, line + offset)
            centers = np.stack((along, across) if unit[0] else (across, along), axis=1)
            paths.append(_path(centers, np.full(self._num_frames, radius), np.zeros(self._num_frames)))
        return paths

    def _race(self, kind: str, num_shapes: int) -> list[Path]:
        """Shapes that leave, or enter, one clearly after the other."""
        paths = []
        for place in range(num_shapes):
            radius, spot = self._radius(), self._spot(0.15 * self._short)
            unit = np.array(DIRECTIONS[self._dice.choice(_STRAIGHT)])
            moment = (place + self._dice.uniform(0.75, 1.0)) / (num_shapes + 0.05)
            tau = self._tau
            if kind == "enter":
                moment, unit, tau = min(moment, 0.92), -unit, 1 - self._tau
            centers = spot + unit * (self._way_out(spot, unit, radius) / moment * tau)[:, None]
            paths.append(_path(centers, np.full(self._num_frames, radius), np.zeros(self._num_frames)))
        return paths
