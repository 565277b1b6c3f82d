"""Small hand-made folders in the layouts in which the image sets are published, and a way to read them back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visa_hf.rle import decode_mask


def write_image(path: Path, height: int, width: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 60)).save(path)


def write_labels(path: Path, labels: Any, *, palette: bool = False) -> np.ndarray:
    labels = np.asarray(labels, dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels)
    if palette:
        image.putpalette([value for number in range(256) for value in (number * 37 % 256, number * 91 % 256, number)])
    image.save(path)
    return labels


def write_json(path: Path, value: Any, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(json.dumps(value, ensure_ascii=False).encode(encoding))


def python2_pickle(value: Any) -> bytes:
    """Pickle plain data as Python 2 did, with byte strings (protocol 0)."""
    return _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"(d" + b"".join(_opcodes(key) + _opcodes(item) + b"s" for key, item in value.items())
    if isinstance(value, list):
        return b"(l" + b"".join(_opcodes(item) + b"a" for item in value)
    if isinstance(value, str):
        return b"S" + repr(value).encode("ascii") + b"\n"
    return b"I%d\n" % value


def prepare(builder_class: type, config: str, root: Path, cache: Path, **kwargs: Any) -> Any:
    builder = builder_class(config, data_dir=root, cache_dir=cache, **kwargs)
    builder.download_and_prepare()
    return builder


def rows(builder_class: type, config: str, root: Path, cache: Path, split: str = "train", **kwargs: Any) -> list[dict]:
    return list(prepare(builder_class, config, root, cache, **kwargs).as_dataset(split=split))


def masks(builder_class: type, config: str, root: Path, cache: Path, split: str = "train", **kwargs: Any) -> dict:
    """Return the decoded mask of each `anno_id`, `None` where the row has none."""
    found = {}
    for row in rows(builder_class, config, root, cache, split, **kwargs):
        (rle,) = row["rle"]
        assert row["anno_id"] not in found
        found[row["anno_id"]] = None if rle is None else decode_mask(rle)
    return found
