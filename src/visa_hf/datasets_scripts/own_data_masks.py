"""One mask of your own data, as it may stand in a JSON line, to run lengths: COCO RLE, polygons, or an image file.

Everything is checked here, since a mask that is silently wrong is worse than none: sizes, ranges, and whether it is
clear which pixels belong to the object. What stands around a mask in a line is read in `own_data_lines`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from visa_hf.datasets_scripts.annotations import check_relative
from visa_hf.datasets_scripts.brief import brief
from visa_hf.datasets_scripts.image_files import PILLOW_ERRORS, open_image
from visa_hf.datasets_scripts.mask_checks import all_fill
from visa_hf.rle import RLE, encode_mask, mask_area

# An empty mask is a single number, or a few by careless encoders; what is longer need not be looked at.
_LONGEST_EMPTY = 24
FORMS = (
    '{"size": [H, W], "counts": "..."}, [[x, y, x, y, x, y, ...], ...], "mask.png", '
    '{"path": "mask.png", "ids": [1]}, or null for a frame without the object'
)


def is_rle(value: Any) -> bool:
    """Whether a value has the form of run lengths, in order or not."""
    return isinstance(value, dict) and set(value) == {"size", "counts"}


def read_mask(value: Any, size: tuple[int, int], root: Path, *, is_good_rle: bool = False) -> RLE | None:
    """Read a mask.

    Args:
        value: what stands in the JSON line: a COCO RLE, a list of polygons (their union; `[]` is an empty mask), the
            path of an image relative to `root`, a dict of such a path and the `ids` (pixel values) of the object, or
            `None` for an empty mask.
        size (`tuple[int, int]`): (H, W) of the frame.
        root (`Path`): folder that paths are relative to.
        is_good_rle (`bool`): run lengths that were found to be in order before.

    Returns:
        The run lengths, or `None` for an empty mask.

    Raises:
        ValueError: it is none of these, is damaged, or does not fit the frame.
    """
    if value is None:
        return None
    if is_good_rle:
        return _known(value)
    if isinstance(value, str):
        return _known(encode_mask(_read_image(root, value, None, size)))
    if isinstance(value, list):
        return _known(_from_polygons(value, size))
    if is_rle(value):
        return _known(_checked_rle(value, size))
    if isinstance(value, dict):
        keys = set(value)
        if keys in ({"path"}, {"path", "ids"}):
            return _known(encode_mask(_read_image(root, value["path"], value.get("ids"), size)))
        raise ValueError(f"the mask is an object with the keys {sorted(keys)}. Give {FORMS}.")
    raise ValueError(f"the mask is {brief(value)}. Give {FORMS}.")


def _known(rle: RLE) -> RLE | None:
    """Run lengths, or `None` if they are empty."""
    is_empty = len(rle["counts"]) <= _LONGEST_EMPTY and not mask_area(rle)
    return None if is_empty else rle


def _checked_rle(value: dict[str, Any], size: tuple[int, int]) -> RLE:
    rle = RLE(size=value["size"], counts=value["counts"])
    try:
        mask_area(rle)  # reads all runs
    except (TypeError, ValueError) as error:
        raise ValueError(f"the run lengths cannot be read: {error}") from error
    if tuple(rle["size"]) != size:
        raise ValueError(_size_error("the run lengths are", (rle["size"][0], rle["size"][1]), size))
    if not all_fill([rle], *size):  # a sum of huge runs can wrap around to the right number
        raise ValueError("the run lengths hold one that is longer than the frame: the mask is damaged.")
    return rle


def _size_error(what: str, got: tuple[int, int], size: tuple[int, int]) -> str:
    return (
        f"{what} {got[0]} x {got[1]} (height x width), but the frames of the video are {size[0]} x {size[1]}. "
        "A mask needs the size of its frame."
    )


# Polygons


def _from_polygons(polygons: list[Any], size: tuple[int, int]) -> RLE:
    """Fill polygons as COCO does, and unite them."""
    from pycocotools import mask as coco

    height, width = size
    if not polygons:
        return encode_mask(np.zeros(size, dtype=np.bool_))
    if not any(isinstance(polygon, list) for polygon in polygons):
        raise ValueError("the polygon is a flat list. Give a list of polygons: [[x, y, x, y, x, y, ...]].")
    for number, polygon in enumerate(polygons):
        _check_polygon(polygon, number, size)
    filled = coco.frPyObjects([[float(number) for number in polygon] for polygon in polygons], height, width)
    for number, part in enumerate(filled):
        if not coco.area(part):
            raise ValueError(f"polygon {number} covers no pixel: it is too small or has no area. Remove it.")
    united = coco.merge(filled)
    return {"size": [height, width], "counts": united["counts"].decode("ascii")}


def _check_polygon(polygon: Any, number: int, size: tuple[int, int]) -> None:
    height, width = size
    if not isinstance(polygon, list):
        raise ValueError(f"polygon {number} is {brief(polygon)}, not a list of numbers x, y, x, y, ....")
    wrong = [value for value in polygon if type(value) not in (int, float) or value != value or abs(value) == math.inf]
    if wrong:
        raise ValueError(f"polygon {number} holds {brief(wrong[0])}, which is no number.")
    if len(polygon) % 2:
        raise ValueError(f"polygon {number} has {len(polygon)} numbers, an odd count. Points are pairs x, y.")
    if len(polygon) < 6:
        raise ValueError(f"polygon {number} has {len(polygon) // 2} points; at least 3 are needed.")
    for x, y in zip(polygon[::2], polygon[1::2], strict=True):
        if not (0 <= x <= width and 0 <= y <= height):
            raise ValueError(
                f"polygon {number} has the point ({x}, {y}), outside the frame, which is {width} wide and {height} "
                "high. Give pixels: x to the right, y downwards."
            )


# Image files


def _read_image(root: Path, path: Any, ids: Any, size: tuple[int, int]) -> np.ndarray:
    """Read a mask image: `(H, W)`, bool."""
    if not isinstance(path, str):
        raise ValueError(f"the path of the mask is {brief(path)}, not a string.")
    file = root / check_relative(path)
    wanted = None if ids is None else _checked_ids(ids)
    if not file.is_file():
        raise ValueError(f"there is no mask at `{path}`. Paths are relative to the folder of the data.")
    try:
        with open_image(file) as image:
            form, got, mode = image.format, (image.height, image.width), image.mode
            is_png = form == "PNG"
            is_spread = is_png and mode == "L" and image.tile[0].args != "L"
            # Only when the size is right: a small file may hold a huge picture.
            pixels = np.asarray(image) if is_png and got == size else None
    except PILLOW_ERRORS as error:
        raise ValueError(f"the mask `{path}` is not an image that can be read ({error}). Give a PNG.") from error
    if not is_png:  # JPEG, above all, invents values around an edge
        raise ValueError(f"the mask `{path}` is a {form} file, but a PNG is needed.")
    if pixels is None:
        raise ValueError(_size_error(f"the mask `{path}` is", got, size))
    if is_spread:  # Pillow spreads 2 or 4 bits over 0 to 255: other values
        raise ValueError(
            f"the mask `{path}` is grey with fewer than 8 bits. Save it with 8 bits, or as a palette PNG."
        )
    values = _label_map(pixels, mode, path)
    if wanted is not None:
        return np.isin(values, wanted)
    others = np.unique(values[values > 0])
    if len(others) > 1:
        shown = ", ".join(map(str, others[:4])) + (", ..." if len(others) > 4 else "")
        raise ValueError(
            f"the mask `{path}` has {len(others)} values beside 0 ({shown}), so it is not clear which are the object. "
            f'Name them, {{"path": "{path}", "ids": [{others[0]}]}}, or save a mask of two values.'
        )
    return values > 0


def _label_map(pixels: np.ndarray, mode: str, path: str) -> np.ndarray:
    """The values of the pixels, `(H, W)`: places in the palette, or grey levels. `mode` is Pillow's."""
    if mode in ("P", "L", "I", "I;16"):
        return pixels
    if mode == "1":
        return pixels.astype(np.uint8)
    if mode in ("RGB", "RGBA", "LA"):
        is_opaque = mode == "RGB" or bool((pixels[..., -1] == 255).all())
        colors = pixels if mode == "RGB" else pixels[..., :-1]
        if is_opaque and (colors == colors[..., :1]).all():
            return colors[..., 0]
    raise ValueError(
        f"the mask `{path}` has colours or transparency (mode {mode}), so it is not clear which pixels are the "
        "object. Give a black and white PNG, or a palette PNG."
    )


def _checked_ids(ids: Any) -> list[int]:
    is_list = isinstance(ids, list) and len(ids) > 0 and all(type(value) is int for value in ids)
    if not is_list or min(ids) < 1:
        raise ValueError(f"`ids` is {brief(ids)}; a list of pixel values from 1 on is needed (0 is the background).")
    return ids
