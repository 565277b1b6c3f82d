"""Paints a synthetic scene: the visible pixels of each shape, and the frames.

Only exactly rounded operations are used (+, -, *, /, square root, comparison) and noise comes from a bit generator,
so that the pixels are the same on every machine. A pixel belongs to the last shape whose outline its centre lies in;
the masks are these labels, whether the edges in the picture are smooth or not.
"""

from dataclasses import dataclass

import numpy as np

from .synthetic_motion import cos_sin
from .synthetic_scene import PILLAR, Backdrop, Scene, Shape

# Parts of the shorter side: dark line just inside the outline.
_OUTLINE_WIDTH = 1 / 110
_OUTLINE_SHADE = 0.5


@dataclass(frozen=True)
class Silhouettes:
    """All of a shape, hidden or not, in windows that move with it.

    Attributes:
        corners (`np.ndarray` of shape `(T, 2)`, int64): (top, left) of each frame's window, perhaps
            outside the picture.
        distances (`np.ndarray` of shape `(T, P, Q)`, float32): pixels from the outline, negative inside.
    """

    corners: np.ndarray
    distances: np.ndarray

    def window(self, frame: int, size: tuple[int, int]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return where the window of a frame lies in the picture, and which part of the window that is."""
        places, parts = [], []
        for corner, length, side in zip(self.corners[frame], self.distances.shape[1:], size, strict=True):
            start, stop = max(int(corner), 0), min(int(corner) + length, side)
            stop = max(start, stop)
            places.append(slice(start, stop))
            parts.append(slice(start - int(corner), stop - int(corner)))
        return (places[0], places[1]), (parts[0], parts[1])


def outline_shapes(scene: Scene) -> tuple[np.ndarray, list[Silhouettes]]:
    """Find out which pixel belongs to which shape.

    Returns:
        `np.ndarray` of shape `(T, H, W)`, uint8: 0 for the background, 1 + place in `scene.shapes` for a shape; and
        the silhouettes of each shape.
    """
    labels = np.zeros((scene.num_frames, *scene.size), dtype=np.uint8)
    silhouettes = []
    for place, shape in enumerate(scene.shapes):
        silhouette = _silhouettes(shape, scene)
        silhouettes.append(silhouette)
        for frame in range(scene.num_frames):
            in_picture, in_window = silhouette.window(frame, scene.size)
            labels[frame][in_picture][silhouette.distances[frame][in_window] <= 0] = place + 1
    return labels, silhouettes


def paint_frames(scene: Scene, silhouettes: list[Silhouettes], *, antialias: bool) -> np.ndarray:
    """Paint the frames.

    Args:
        scene (`Scene`): what to paint.
        silhouettes: of its shapes, from `outline_shapes`.
        antialias (`bool`): whether edges and patterns are smooth; masks are the same.

    Returns:
        `np.ndarray` of shape `(T, H, W, 3)`, uint8: RGB.
    """
    frames = np.empty((scene.num_frames, *scene.size, 3), dtype=np.float32)
    frames[:] = _paint_backdrop(scene.backdrop, scene.size)
    line = max(1.0, min(scene.size) * _OUTLINE_WIDTH)
    for shape, silhouette in zip(scene.shapes, silhouettes, strict=True):
        paint = _paint_shape(shape, silhouette, line, antialias=antialias)  # (T, P, Q, 3)
        cover = _step(-silhouette.distances, antialias=antialias)
        for frame in range(scene.num_frames):
            in_picture, in_window = silhouette.window(frame, scene.size)
            region = frames[frame][in_picture]
            region += cover[frame][in_window][..., None] * (paint[frame][in_window] - region)
    frames *= _light(scene)
    return np.rint(np.clip(frames, 0, 255)).astype(np.uint8)


def _step(distances: np.ndarray, *, antialias: bool) -> np.ndarray:
    """Return 1 where a signed distance in pixels is positive, else 0; smooth over one pixel, if wanted."""
    if antialias:
        return np.clip(distances + np.float32(0.5), 0, 1)
    return (distances >= 0).astype(np.float32)


def _silhouettes(shape: Shape, scene: Scene) -> Silhouettes:
    centers, radii = shape.path.centers, shape.path.radii
    if shape.look.form == PILLAR:  # as high as the picture
        height = scene.size[0]
        half = int(np.ceil(radii.max())) + 2
        columns = np.arange(2 * half + 1)
        lefts = np.floor(centers[:, 0]).astype(np.int64) - half
        offsets = np.abs(lefts[:, None] + columns + 0.5 - centers[:, :1]) - radii[:, None]  # (T, Q)
        distances = np.repeat(offsets[:, None, :], height, axis=1).astype(np.float32)
        return Silhouettes(np.stack((np.zeros_like(lefts), lefts), axis=1), distances)
    u, v, corners = _own_coordinates(shape)
    distances = _distance(shape.look.form, u, v)
    distances *= radii.astype(np.float32)[:, None, None]
    return Silhouettes(corners, distances)


def _own_coordinates(shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where each pixel of the windows lies in the shape, in radii, (T, P, P) each, and the windows' corners."""
    path = shape.path
    half = int(np.ceil(path.radii.max() * 1.1)) + 2
    lefts_tops = np.floor(path.centers).astype(np.int64) - half  # (T, 2), x first
    steps = np.arange(2 * half + 1) + 0.5
    x = ((lefts_tops[:, :1] + steps - path.centers[:, :1]) / path.radii[:, None]).astype(np.float32)[:, None, :]
    y = ((lefts_tops[:, 1:] + steps - path.centers[:, 1:]) / path.radii[:, None]).astype(np.float32)[:, :, None]
    turns = np.array([cos_sin(angle + 90 * shape.turns) for angle in path.angles], dtype=np.float32)
    cos, sin = turns[:, 0, None, None], turns[:, 1, None, None]
    return x * cos + y * sin, y * cos - x * sin, lefts_tops[:, ::-1]


def _distance(form: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the signed distance from the outline of a form whose radius is 1; v points down."""
    if form == "circle":
        return np.sqrt(u * u + v * v) - np.float32(0.92)
    if form == "ring":
        return np.abs(np.sqrt(u * u + v * v) - np.float32(0.72)) - np.float32(0.25)
    if form == "crescent":
        outer = np.sqrt(u * u + v * v) - np.float32(0.98)
        inner = np.sqrt((u - 0.5) * (u - 0.5) + v * v) - np.float32(0.72)
        return np.maximum(outer, -inner)
    if form == "ellipse":
        a, b = np.float32(1.0), np.float32(0.55)
        first = np.sqrt((u / a) * (u / a) + (v / b) * (v / b))
        second = np.sqrt((u / (a * a)) * (u / (a * a)) + (v / (b * b)) * (v / (b * b)))
        return first * (first - 1) / np.maximum(second, np.float32(1e-3))
    if form == "square":
        return _box(u, v, 0.8, 0.8)
    if form == "cross":
        return np.minimum(_box(u, v, 0.98, 0.32), _box(u, v, 0.32, 0.98))
    if form == "triangle":
        return np.maximum.reduce(_half_planes(u, v + np.float32(-0.2), 3, 0.58))
    if form == "star":  # the points that lie inside at least four of the five lines
        planes = _half_planes(u, v, 5, 0.405)
        largest, second = np.maximum(planes[0], planes[1]), np.minimum(planes[0], planes[1])
        for plane in planes[2:]:
            second = np.maximum(second, np.minimum(largest, plane))
            largest = np.maximum(largest, plane)
        return second
    if form == "heart":
        w = v - np.float32(0.12)
        half = np.float32(0.5)
        turned_u, turned_v = (u + w) * np.float32(0.70710677), (w - u) * np.float32(0.70710677)
        body = _box(turned_u, turned_v, 0.5, 0.5)
        for side in (-1, 1):
            du, dv = u - np.float32(side * 0.35355338), w + np.float32(0.35355338)
            body = np.minimum(body, np.sqrt(du * du + dv * dv) - half)
        return body
    shaft = _box(u - np.float32(-0.45), v, 0.5, 0.24)  # an arrow that points right
    tip = np.maximum(-u, (u + np.abs(v) - np.float32(0.96)) * np.float32(0.70710677))
    return np.minimum(shaft, np.maximum(tip, np.abs(v) - np.float32(0.8)))


def _box(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - np.float32(half_width), np.abs(v) - np.float32(half_height))


def _half_planes(u: np.ndarray, v: np.ndarray, count: int, inner_radius: float) -> list[np.ndarray]:
    """Return the distances from the sides of a regular polygon that stands on one of them."""
    planes = []
    for side in range(count):
        cos, sin = cos_sin(90 + 360 * side / count)
        planes.append(u * np.float32(cos) + v * np.float32(sin) - np.float32(inner_radius))
    return planes


def _paint_shape(shape: Shape, silhouette: Silhouettes, line: float, *, antialias: bool) -> np.ndarray:
    """Return the colours of a shape's windows, (T, P, Q, 3): pattern and dark outline."""
    main = np.array(shape.rgb, dtype=np.float32)
    paint = np.broadcast_to(main, (*silhouette.distances.shape, 3))
    if shape.look.texture != "plain":
        u, v, _ = _own_coordinates(shape)
        share = _pattern(shape, u, v, antialias=antialias)
        paint = main + share[..., None] * (np.array(shape.second_rgb, dtype=np.float32) - main)
    edge = _step(silhouette.distances + np.float32(line), antialias=antialias)
    return paint * (1 - edge * np.float32(1 - _OUTLINE_SHADE))[..., None]


def _pattern(shape: Shape, u: np.ndarray, v: np.ndarray, *, antialias: bool) -> np.ndarray:
    """Return how much of the second colour each pixel has, (T, P, Q), in [0, 1]."""
    cos, sin = cos_sin(45 * shape.pattern_turns)
    period = np.float32(shape.period)
    pixels = period * shape.path.radii.astype(np.float32)[:, None, None]  # of one period
    first = (u * np.float32(cos) + v * np.float32(sin)) / period
    if shape.look.texture == "striped":
        return _step((np.abs(first - np.floor(first) - 0.5) - np.float32(0.28)) * pixels, antialias=antialias)
    second = (v * np.float32(cos) - u * np.float32(sin)) / period
    x, y = first - np.floor(first) - np.float32(0.5), second - np.floor(second) - np.float32(0.5)
    if shape.look.texture == "dotted":
        return _step((np.float32(0.3) - np.sqrt(x * x + y * y)) * pixels, antialias=antialias)
    edge_x, edge_y = np.minimum(np.abs(x), 0.5 - np.abs(x)), np.minimum(np.abs(y), 0.5 - np.abs(y))
    return _step(np.where((x < 0) == (y < 0), 1, -1) * np.minimum(edge_x, edge_y) * pixels, antialias=antialias)


def _paint_backdrop(backdrop: Backdrop, size: tuple[int, int]) -> np.ndarray:
    """Return the empty picture, (H, W, 3), float32."""
    first, second = (np.array(rgb, dtype=np.float32) for rgb in (backdrop.rgb, backdrop.second_rgb))
    if backdrop.kind == "plain":
        return np.broadcast_to(first, (*size, 3))
    share = _share(backdrop, size)
    return first + share[..., None] * (second - first)


def _share(backdrop: Backdrop, size: tuple[int, int]) -> np.ndarray:
    """Return how much of the second colour each pixel of the background has, (H, W), in [0, 1]."""
    height, width = size
    if backdrop.kind == "gradient":
        down, right = np.arange(height) / height, np.arange(width) / width
        turned = backdrop.noise_key % 4
        share = (down[:, None] + right[None, :]) / 2 if turned < 2 else np.repeat(down[:, None], width, axis=1)
        return (1 - share if turned % 2 else share).astype(np.float32)
    if backdrop.kind == "tiles":
        side = max(4, min(size) // 8)
        return (((np.arange(height) // side)[:, None] + np.arange(width) // side) % 2).astype(np.float32)
    if backdrop.kind == "clouds":
        return _smooth_noise(backdrop.noise_key, size, max(1, min(size) // 5))
    return (_smooth_noise(backdrop.noise_key, size, max(1, min(size) // 3)) + _noise(backdrop.noise_key, size)) / 2


def _noise(key: int, size: tuple[int, int]) -> np.ndarray:
    """Return values in [0, 1) without order, (H, W), float32: raw bits, whose order numpy keeps for ever."""
    count = size[0] * size[1]
    bits = np.random.Philox(key=key).random_raw(-(-count // 8)).astype("<u8").view(np.uint8)
    return bits[:count].reshape(size).astype(np.float32) / 256


def _smooth_noise(key: int, size: tuple[int, int], cell: int) -> np.ndarray:
    """Return noise on a coarse grid, interpolated bilinearly."""
    grid = _noise(key + 1, (size[0] // cell + 2, size[1] // cell + 2))
    rows, cols = (np.arange(side, dtype=np.float32) / np.float32(cell) for side in size)
    top, left = rows.astype(np.int64), cols.astype(np.int64)
    down, right = (rows - top)[:, None], cols - left
    upper = grid[top][:, left] * (1 - right) + grid[top][:, left + 1] * right
    lower = grid[top + 1][:, left] * (1 - right) + grid[top + 1][:, left + 1] * right
    return upper * (1 - down) + lower * down


def _light(scene: Scene) -> np.ndarray:
    """Return what the colours are multiplied with, (T, H, W, 1) or smaller, float32."""
    height, width = scene.size
    across, down = scene.backdrop.light
    field = 1 + across * (np.arange(width) / width - 0.5) + down * (np.arange(height) / height - 0.5)[:, None]
    turn = [1 + scene.backdrop.flicker * cos_sin(270 * t / scene.num_frames)[1] for t in range(scene.num_frames)]
    return (np.array(turn)[:, None, None] * field).astype(np.float32)[..., None]
