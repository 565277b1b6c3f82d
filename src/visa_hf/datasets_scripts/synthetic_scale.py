"""A data set as large as ReVOS, made in seconds: for measuring how readers cope with its size.

ReVOS's on-disk format with masks as complex as real ones, from a few hundred patterns; all frames of a video are one
file. Nothing in it means anything: to learn from, use `synthetic.py`.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visa_hf.rle import RLE, encode_mask, mask_area

from .synthetic import write_json_pairs
from .synthetic_dice import Dice

# (H, W) of the videos, and how many of ten have it.
_SIZES = {(480, 854): 7, (720, 1280): 3}
_NUM_PATTERNS = 64  # of each size
_OBJECTS_PER_VIDEO = 8
_TRAIN_SHARE = 0.6
_WORDS = ("animal", "person", "vehicle", "toy", "bag", "ball", "plant", "tool")


def write_scale_dataset(
    output: str | os.PathLike[str],
    *,
    num_videos: int = 1042,
    num_expressions: int = 35074,
    num_frames: int = 60,
    mask_bytes: int = 350_000_000,
    shared_image: bool = True,
    seed: int = 0,
) -> None:
    """Write a data set of ReVOS's size and format into a new folder.

    Args:
        output (path): folder to write; it must not be there. `OUTPUT.partial` is filled first, anew each time.
        num_videos, num_expressions (`int`): in train and valid together. ReVOS has 1,042 and 35,074.
        num_frames (`int`): of each video, give or take a tenth.
        mask_bytes (`int`): about how large `mask_dict.json` gets.
        shared_image (`bool`): all frames of a video are hard links to one file; otherwise, or where the file system
            has no links, copies.
        seed (`int`): of all choices.

    Raises:
        FileExistsError: `output` exists.
        ValueError: a number is not positive.
    """
    numbers = {"num_videos": num_videos, "num_expressions": num_expressions, "num_frames": num_frames}
    for name, number in {**numbers, "mask_bytes": mask_bytes}.items():
        if number < 1:
            raise ValueError(f"`{name}` is {number}; at least 1 is needed.")
    output = Path(output)
    if os.path.lexists(output):
        raise FileExistsError(f"`{output}` exists. Give another `output`, or remove it.")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    dice = Dice("visa-scale", seed)
    videos = list(_listed_videos(dice, num_videos, num_frames))
    num_entries = sum(len(video["frames"]) for video in videos) * _OBJECTS_PER_VIDEO
    patterns = {size: _patterns(dice, size, mask_bytes / num_entries) for size in _SIZES}
    images = {size: _image(dice, size) for size in _SIZES}
    for video in videos:
        _write_frames(partial / "JPEGImages" / video["name"], video, images[video["size"]], shared_image=shared_image)
    num_train = max(1, round(_TRAIN_SHARE * num_videos))
    counts = [num_expressions * (k + 1) // num_videos - num_expressions * k // num_videos for k in range(num_videos)]
    for split, chosen in (("train", range(num_train)), ("valid", range(num_train, num_videos))):
        pairs = ((videos[k]["name"], _meta(dice, videos[k], k, counts[k])) for k in chosen)
        write_json_pairs(partial / f"meta_expressions_{split}_.json", pairs, start='{"videos":{', end="}}")
    write_json_pairs(partial / "mask_dict.json", _masks(dice, videos, patterns))
    write_json_pairs(partial / "mask_dict_foreground.json", _foregrounds(dice, videos, patterns))
    os.rename(partial, output)


def _listed_videos(dice: Dice, num_videos: int, num_frames: int) -> Iterator[dict[str, Any]]:
    for place in range(num_videos):
        size = dice.choice(tuple(_SIZES), tuple(_SIZES.values()))
        count = max(1, round(num_frames * dice.uniform(0.9, 1.1)))
        frames = [f"{number:05d}" for number in range(count)]
        yield {"name": f"video_{place:05d}", "size": size, "frames": frames}


def _patterns(dice: Dice, size: tuple[int, int], mean_chars: float) -> list[RLE]:
    """Make masks with a jagged edge which take about so many characters in JSON: the more columns, the more."""
    columns = mean_chars / 4
    for _ in range(3):
        patterns = _jagged_masks(dice, size, columns)
        chars = sum(len(json.dumps(rle)) for rle in patterns) / len(patterns)
        columns *= mean_chars / chars
    return patterns


def _jagged_masks(dice: Dice, size: tuple[int, int], columns: float) -> list[RLE]:
    height, width = size
    patterns = []
    for number in range(_NUM_PATTERNS):
        wide = min(width, max(1, round(columns * dice.uniform(0.7, 1.3))))
        left = dice.below(width - wide + 1)
        bits = np.random.Philox(key=number + 1).random_raw(wide)
        jitter = (bits % np.uint64(13)).astype(np.int64)
        middle = height // 3 + dice.below(height // 3)
        reach = np.sqrt(np.maximum(1 - np.linspace(-1, 1, wide) ** 2, 0)) * height / 4
        rows = np.arange(height)[:, None]
        mask = np.zeros(size, dtype=np.bool_)
        mask[:, left : left + wide] = np.abs(rows - middle) <= reach + jitter
        patterns.append(encode_mask(mask))
    return patterns


def _image(dice: Dice, size: tuple[int, int]) -> bytes:
    """Make a JPEG file with about as many bytes as a real frame."""
    coarse = np.random.Philox(key=dice.below(2**32)).random_raw(1536).astype("<u8").view(np.uint8)
    noise = Image.fromarray(coarse[:12288].reshape(64, 64, 3)).resize(size[::-1], Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _write_frames(folder: Path, video: dict[str, Any], image: bytes, *, shared_image: bool) -> None:
    folder.mkdir(parents=True)
    first, *rest = (folder / f"{frame}.jpg" for frame in video["frames"])
    first.write_bytes(image)
    for path in rest:
        if not (shared_image and _linked(first, path)):
            path.write_bytes(image)


def _linked(source: Path, path: Path) -> bool:
    try:
        os.link(source, path)
    except OSError:  # this file system has no links, or not so many
        return False
    return True


def _meta(dice: Dice, video: dict[str, Any], place: int, num_expressions: int) -> dict[str, Any]:
    expressions = {}
    for number in range(num_expressions):
        type_id = dice.choice((0, 1, 2), (0.42, 0.5, 0.08))
        things = sorted(dice.shuffled(range(_OBJECTS_PER_VIDEO))[: 1 + dice.below(3)]) if type_id < 2 else []
        text = f"the {dice.choice(_WORDS)} that is next to the {dice.choice(_WORDS)} number {number}"
        expressions[str(number)] = {
            "exp": text + ("?" if type_id == 1 else ""),
            "obj_id": things,
            "anno_id": [place * _OBJECTS_PER_VIDEO + thing for thing in things],
            "type_id": type_id,
        }
    height, width = video["size"]
    return {
        "vid_id": place,
        "height": height,
        "width": width,
        "frames": video["frames"],
        "expressions": expressions,
    }


def _masks(
    dice: Dice, videos: list[dict[str, Any]], patterns: dict[tuple[int, int], list[RLE]]
) -> Iterator[tuple[str, list[RLE | None]]]:
    for place, video in enumerate(videos):
        for thing in range(_OBJECTS_PER_VIDEO):
            known = patterns[video["size"]]
            # One frame in twenty without the object.
            rles = [None if dice.chance(0.05) else dice.choice(known) for _ in video["frames"]]
            yield str(place * _OBJECTS_PER_VIDEO + thing), rles


def _foregrounds(
    dice: Dice, videos: list[dict[str, Any]], patterns: dict[tuple[int, int], list[RLE]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for video in videos:
        height, width = video["size"]
        rles = [dice.choice(patterns[video["size"]]) for _ in video["frames"]]
        ratios = [round(mask_area(rle) / (height * width), 6) for rle in rles]
        yield video["name"], {"masks_rle": rles, "foreground_ratio": ratios}
