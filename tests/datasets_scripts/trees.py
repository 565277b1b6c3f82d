"""Small hand-made data sets in the layouts that their authors publish, for the tests of the builders.

Every object is a rectangle whose place tells which object, video and frame it is. What is odd about the published
sets is here too: null masks, videos of one frame, ids as text, as numbers and as lists.
"""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visa_hf.rle import RLE, encode_mask

SIZE = (12, 16)  # (H, W)


def box(top: int, left: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask of 4 x 5 pixels, cut off at the border."""
    mask = np.zeros(size, dtype=np.bool_)
    mask[top : top + 4, left : left + 5] = True
    return mask


def object_masks(number: int, num_frames: int, hidden: Sequence[int] = ()) -> list[np.ndarray | None]:
    """The masks of object `number`, which moves to the right; `None` in the frames where it is `hidden`."""
    return [None if frame in hidden else box(number * 2, 2 * frame) for frame in range(num_frames)]


def rles(masks: Sequence[np.ndarray | None]) -> list[RLE | None]:
    return [None if mask is None else encode_mask(mask) for mask in masks]


def write_frames(folder: Path, names: Sequence[str], size: tuple[int, int] = SIZE) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.fromarray(np.full((*size, 3), 20 * number, dtype=np.uint8)).save(folder / f"{name}.jpg")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def expression(text: str, **ids: Any) -> dict[str, Any]:
    return {"exp": text, **ids}


def video(names: Sequence[str], expressions: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"frames": list(names), "expressions": {str(i): item for i, item in enumerate(expressions)}, **more}


FRAMES = ("00000", "00001", "00002")

REVOS_TRAIN = {
    "sea/turtles": video(
        FRAMES,
        [
            expression("the left turtle", obj_id=[0], anno_id=[10], type_id=0),
            expression("what swims?", obj_id=[0, 1], anno_id=[10, 11], type_id=1),
            expression("the submarine", obj_id=[], anno_id=[], type_id=2),
        ],
        vid_id=0,
        height=SIZE[0],
        width=SIZE[1],
    ),
    "still": video(
        FRAMES[:1],
        [expression("a stone", obj_id=["0"], anno_id=["12"], type_id=0)],
        vid_id=1,
        height=SIZE[0],
        width=SIZE[1],
    ),
}
REVOS_VALID = {
    "birds": video(
        FRAMES,
        [expression("which one flies off first?", obj_id=[0], anno_id=[20], type_id=1)],
        vid_id=2,
        height=SIZE[0],
        width=SIZE[1],
    )
}


def revos_masks() -> dict[str, list[RLE | None]]:
    return {
        "10": rles(object_masks(0, 3, hidden=[1])),
        "11": rles(object_masks(1, 3)),
        "99": rles(object_masks(3, 3)),  # of no expression
        "12": rles(object_masks(2, 1)),
        "20": rles(object_masks(1, 3, hidden=[0, 1, 2])),
    }


def write_revos(
    root: Path, train: Any = REVOS_TRAIN, valid: Any = REVOS_VALID, masks: Any = None, frames: bool = True
) -> Path:
    write_json(root / "meta_expressions_train_.json", {"videos": train})
    write_json(root / "meta_expressions_valid_.json", {"videos": valid})
    write_json(root / "mask_dict.json", revos_masks() if masks is None else masks)
    foreground = {"masks_rle": rles([box(0, 0), box(2, 2), box(4, 4)]), "foreground_ratio": [0.1, 0.25, 0]}
    foreground["masks_rle"][1] = [encode_mask(box(2, 2)), encode_mask(box(2, 9))]  # some entries are lists
    write_json(root / "mask_dict_foreground.json", {"birds": foreground})
    for name, data in {**train, **valid}.items() if frames else ():
        write_frames(root / "JPEGImages" / name, data["frames"])
    return root


def write_mevis(root: Path) -> Path:
    cats = [expression("moving cats", obj_id=[0, 1], anno_id=[0, 1]), expression("a cat", obj_id=[1], anno_id=[1])]
    data = {
        "ab12": video(FRAMES, cats, vid_id=0),
        "single": video(FRAMES[:1], [expression("a dog", obj_id=[0], anno_id=[2])], vid_id=1),
    }
    masks = {"0": rles(object_masks(0, 3)), "1": rles(object_masks(1, 3, hidden=[0])), "2": rles(object_masks(2, 1))}
    for split in ("train", "valid_u"):
        write_json(root / split / "meta_expressions.json", {"videos": data})
        write_json(root / split / "mask_dict.json", masks)
    hidden = {"cd34": video(FRAMES, [expression("what jumps")], vid_id=2)}
    write_json(root / "valid" / "meta_expressions.json", {"videos": hidden})
    for split, videos in (("train", data), ("valid_u", data), ("valid", hidden)):
        for name, item in videos.items():
            write_frames(root / split / "JPEGImages" / name, item["frames"])
    return root


def write_lv_vis(root: Path) -> Path:
    data = {"00000": video(FRAMES, [expression("polar_bear", obj_id=[0], anno_id=[0], type_id=0)])}
    write_json(root / "train" / "meta_expressions.json", {"videos": data})
    write_json(root / "train" / "mask_dict.json", {"0": rles(object_masks(1, 3))})
    write_frames(root / "train" / "JPEGImages" / "00000", FRAMES)
    return root


def write_palette_pngs(folder: Path, names: Sequence[str], masks: dict[int, list[np.ndarray | None]]) -> None:
    """Masks of objects as palette images, whose colours say nothing: the pixels are the objects' numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    for frame, name in enumerate(names):
        labels = np.zeros(SIZE, dtype=np.uint8)
        for number, of_object in masks.items():
            if of_object[frame] is not None:
                labels[of_object[frame]] = number
        image = Image.frombytes("P", (SIZE[1], SIZE[0]), labels.tobytes())
        image.putpalette([(37 * value) % 256 for value in range(3 * 256)])
        image.save(folder / f"{name}.png")


def separate_objects(num_frames: int, hidden: Sequence[int] = ()) -> dict[int, list[np.ndarray | None]]:
    """Objects 1 and 2, which do not overlap, so that palette images can hold them."""
    return {
        1: [box(0, 2 * frame) for frame in range(num_frames)],
        2: [None if frame in hidden else box(6, 2 * frame) for frame in range(num_frames)],
    }


def pickled(videos: dict[str, Any], masks: dict[str, dict[int, list[np.ndarray | None]]], path: Path) -> None:
    """`mask_dict.pkl` as published: counts as bytes, under the running number of the expression."""
    numbered: dict[str, Any] = {}
    for name in sorted(videos):
        for key in sorted(videos[name]["expressions"]):
            number = videos[name]["expressions"][key]["obj_id"]
            chosen = masks[name][int(number[0] if isinstance(number, list) else number)]
            numbered[str(len(numbered))] = [
                None if rle is None else {"size": rle["size"], "counts": rle["counts"].encode()}
                for rle in rles(chosen)
            ]
    path.write_bytes(pickle.dumps(numbered))


YOUTUBE_TRAIN = {
    "zebra": video(
        ("00000", "00005", "00010"),
        # More than ten, so that their order as text is not their order as numbers; ids as text, number and list.
        [expression(f"zebra {i}", obj_id=("1", 2, ["2"], "1")[i % 4]) for i in range(11)],
    ),
    "apple": video(("00000",), [expression("an apple", obj_id="1")]),
}


def youtube_masks() -> dict[str, dict[int, list[np.ndarray | None]]]:
    return {"zebra": separate_objects(3, hidden=[2]), "apple": separate_objects(1)}


def write_ref_youtube_vos(root: Path, with_pickle: bool = False) -> Path:
    write_json(root / "meta_expressions" / "train" / "meta_expressions.json", {"videos": YOUTUBE_TRAIN})
    hidden = {name: video(FRAMES[:2], [expression(f"about {name}")]) for name in ("v1", "t1", "v2", "t2")}
    write_json(root / "meta_expressions" / "valid" / "meta_expressions.json", {"videos": hidden})
    test = {name: hidden[name] for name in ("t1", "t2")}
    write_json(root / "meta_expressions" / "test" / "meta_expressions.json", {"videos": test})
    objects = {"1": {"category": "x", "frames": []}, "2": {"category": "y", "frames": []}}
    write_json(root / "train" / "meta.json", {"videos": {name: {"objects": objects} for name in YOUTUBE_TRAIN}})
    _write_frames_and_masks(root / "train", YOUTUBE_TRAIN, youtube_masks(), with_pickle)
    for name in ("v1", "v2"):
        write_frames(root / "valid" / "JPEGImages" / name, FRAMES[:2])
    return root


def write_ref_davis(root: Path, with_pickle: bool = False) -> Path:
    eight = [expression(f"object {i // 4 + 1} by annotator {i % 4}", obj_id=str(i // 4 + 1)) for i in range(8)]
    for split in ("train", "valid"):
        data = {f"goat-{split}": video(FRAMES, eight)}
        write_json(root / "meta_expressions" / split / "meta_expressions.json", {"videos": data})
        masks = {f"goat-{split}": separate_objects(3, hidden=[0])}
        _write_frames_and_masks(root / split, data, masks, with_pickle)
    return root


def _write_frames_and_masks(folder: Path, videos: dict[str, Any], masks: Any, with_pickle: bool) -> None:
    for name, data in videos.items():
        write_frames(folder / "JPEGImages" / name, data["frames"])
        if not with_pickle:
            write_palette_pngs(folder / "Annotations" / name, data["frames"], masks[name])
    if with_pickle:
        pickled(videos, masks, folder / "mask_dict.pkl")
