"""What is measured in a synthetic clip: how much of each thing is inside the picture, visible or hidden, and its way.

Plain numbers, in pixels and frames; what they mean is judged in `synthetic_facts.py`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from .synthetic_drawing import Silhouettes
from .synthetic_motion import MIN_MOVING_FRAMES
from .synthetic_scene import Scene

# A way is straight if it is hardly longer than the distance between its ends.
_STRAIGHTNESS = 0.97


class Measures:
    """Numbers about N things in T frames.

    Args:
        scene (`Scene`): for names and paths.
        labels (`np.ndarray` of shape `(T, H, W)`, uint8): 1 + place of the visible thing, 0 for the background.
        silhouettes: all of each thing, hidden or not.

    Attributes:
        full, inside, visible (`np.ndarray` of shape `(N, T)`, int64): pixels of the whole thing, of what is inside the
            picture, and of what is visible.
        covered (`np.ndarray` of shape `(N, N, T)`, int64): [i, j] pixels of i at which j is seen.
        seen (`np.ndarray` of shape `(N, T)`, bool): enough is visible to say where it is.
        centers, radii, angles: of each thing, as in `Path`.
        has_motion (`bool`): whether the clip is long enough to speak of movement.
    """

    def __init__(self, scene: Scene, labels: np.ndarray, silhouettes: list[Silhouettes]) -> None:
        count, num_frames = len(scene.shapes), scene.num_frames
        self.num_things, self.num_frames, self.size = count, num_frames, scene.size
        self.short = min(scene.size)
        self.has_motion = num_frames >= MIN_MOVING_FRAMES
        self.centers = [shape.path.centers for shape in scene.shapes]
        self.radii = [shape.path.radii for shape in scene.shapes]
        self.angles = [shape.path.angles for shape in scene.shapes]
        self.full = np.zeros((count, num_frames), dtype=np.int64)
        self.covered = np.zeros((count, count, num_frames), dtype=np.int64)
        for i, silhouette in enumerate(silhouettes):
            whole = silhouette.distances <= 0
            self.full[i] = whole.sum(axis=(1, 2))
            for t in range(num_frames):
                in_picture, in_window = silhouette.window(t, scene.size)
                on_top = labels[t][in_picture][whole[t][in_window]]
                self.covered[i, :, t] = np.bincount(on_top, minlength=count + 1)[1:]
        self.inside = self.covered.sum(axis=1)
        self.visible = self.covered[np.arange(count), np.arange(count)]
        self.seen = (self.visible > 0) & (self.visible >= 0.25 * self.full)
        self.walked = [self._walked(i) for i in range(count)]
        self.ways = [self._way(i) for i in range(count)]

    def is_well_visible(self) -> bool:
        """Say whether each thing can be recognised for a while."""
        needed = max(2, self.num_frames // 5) if self.has_motion else 1
        is_well_seen = (self.visible >= 0.6 * self.full) & (self.visible >= 12)
        return bool((is_well_seen.sum(axis=1) >= needed).all())

    def places(self, i: int) -> np.ndarray:
        """Return the centres in the frames in which a thing is seen, (frames, 2)."""
        return self.centers[i][self.seen[i]]

    def _walked(self, i: int) -> float:
        """Return the length of the way that is seen."""
        return math.fsum(length(step) for step in np.diff(self.places(i), axis=0))

    def _way(self, i: int) -> np.ndarray | None:
        """Return the way from the first to the last frame in which a thing is seen, if it went straight ahead."""
        places = self.places(i)
        if len(places) < 4:
            return None
        way = places[-1] - places[0]
        return way if length(way) >= _STRAIGHTNESS * self.walked[i] else None

    def pace(self, i: int) -> float | None:
        """Return how many times as fast a thing is at the end as at the beginning, if it is seen all the time."""
        if self.ways[i] is None or not self.seen[i].all() or self.num_frames < MIN_MOVING_FRAMES:
            return None
        places, third = self.centers[i], self.num_frames // 3
        first, last = length(places[third] - places[0]), length(places[-1] - places[-1 - third])
        return max(last, 1e-6) / max(first, 1e-6)

    def speed(self, i: int) -> float | None:
        """Return the pixels a frame between the first and last frame in which a thing is seen."""
        frames = np.flatnonzero(self.seen[i])
        return self.walked[i] / float(frames[-1] - frames[0]) if len(frames) >= 4 else None

    def growth(self, i: int) -> float | None:
        """Return how many times as large a thing is at the end as at the beginning."""
        radii = self.radii[i][self.seen[i]]
        return float(radii[-1] / radii[0]) if self.has_motion and len(radii) >= 4 else None

    def entry(self, i: int) -> float:
        """Return the first frame of which more than half of a thing is inside."""
        frames = np.flatnonzero(self.inside[i] >= 0.5 * self.full[i])
        return float(frames[0]) if len(frames) else math.inf

    def exit(self, i: int) -> float:
        """Return the frame after the last of which more than half of a thing is inside."""
        frames = np.flatnonzero(self.inside[i] >= 0.5 * self.full[i])
        return float(frames[-1] + 1) if len(frames) else math.inf

    def hidden_part(self, i: int) -> float:
        """Return the largest part of a thing that lies behind others in one frame."""
        return float(((self.inside[i] - self.visible[i]) / self.full[i]).max())


def length(vector: Sequence[float] | np.ndarray) -> float:
    """Return the length of a vector (x, y)."""
    return math.sqrt(float(vector[0]) ** 2 + float(vector[1]) ** 2)


def angle_between(first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray) -> float:
    """Return the angle between two vectors, in degrees, 0 to 180; 180 if one has no length."""
    lengths = length(first) * length(second)
    if lengths == 0:
        return 180.0
    cosine = (float(first[0]) * float(second[0]) + float(first[1]) * float(second[1])) / lengths
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def total_turn(steps: np.ndarray) -> float:
    """Return by how many degrees a way turns in all, clockwise positive; `steps` (T - 1, 2)."""
    turns = []
    for (x, y), (next_x, next_y) in zip(steps[:-1], steps[1:], strict=True):
        turns.append(math.degrees(math.atan2(x * next_y - y * next_x, x * next_x + y * next_y)))
    return math.fsum(turns)


def num_reversals(steps: np.ndarray) -> int:
    """Count how often a way turns back; `steps` (T - 1, 2)."""
    moving = [step for step in steps if length(step) > 0.3]
    return sum(float(a[0] * b[0] + a[1] * b[1]) < 0 for a, b in zip(moving[:-1], moving[1:], strict=True))


def _is_larger(m: Measures, i: int, j: int) -> bool:
    is_wider = m.radii[i].min() >= 1.18 * m.radii[j].max()
    return bool(is_wider and m.full[i].min() >= 1.3 * m.full[j].max())


def _is_faster(m: Measures, i: int, j: int) -> bool:
    first, second = m.speed(i), m.speed(j)
    return first is not None and second is not None and first >= 1.6 * second and first - second >= 0.004 * m.short


def _is_later(moment: Callable[[Measures, int], float]) -> Callable[[Measures, int, int], bool]:
    def exceeds(m: Measures, i: int, j: int) -> bool:
        return moment(m, i) - moment(m, j) >= max(2, m.num_frames / 8)

    return exceeds


def _is_further(axis: int, frame: int | None) -> Callable[[Measures, int, int], bool]:
    """Make an order of places along an axis, in the first or last frame or in all frames in which both are seen."""

    def exceeds(m: Measures, i: int, j: int) -> bool:
        gaps = (m.centers[i] - m.centers[j])[:, axis]
        if frame is not None:
            return bool(gaps[frame] >= 0.1 * m.short)
        seen = m.seen[i] & m.seen[j]
        return bool(seen.sum() >= 0.5 * m.num_frames and (gaps[seen] >= 0.1 * m.short).all())

    return exceeds


# Key -> whether i is clearly beyond j, with a margin that a person can see.
ORDERS: dict[str, Callable[[Measures, int, int], bool]] = {
    "size": _is_larger,
    "speed": _is_faster,
    "entry": _is_later(Measures.entry),
    "exit": _is_later(Measures.exit),
    "x": _is_further(0, None),
    "y": _is_further(1, None),
    "x first": _is_further(0, 0),
    "y first": _is_further(1, 0),
    "x last": _is_further(0, -1),
    "y last": _is_further(1, -1),
}
