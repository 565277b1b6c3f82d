"""Run lengths against a codec written here on its own, one number at a time, from the format's description."""

import numpy as np
import pytest
from pycocotools import mask as coco

from visa_hf.rle import (
    decode_mask,
    decode_masks,
    decode_strips,
    encode_mask,
    encode_masks,
    mask_area,
    mask_iou,
    stack_strips,
)


def reference_encode(mask: np.ndarray) -> str:
    pixels = mask.T.reshape(-1).astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], pixels))))
    runs = [int(run) for run in np.diff(np.concatenate(([0], edges, [len(pixels)])))]
    text = ""
    for place, run in enumerate(runs):
        number = run - runs[place - 2] if place > 2 else run
        while True:
            group, number = number & 0x1F, number >> 5
            is_last = number == (-1 if group & 0x10 else 0)
            text += chr(48 + group + (0 if is_last else 0x20))
            if is_last:
                break
    return text


def reference_decode(counts: str, height: int, width: int) -> np.ndarray:
    runs: list[int] = []
    number = shift = 0
    for character in counts:
        group = ord(character) - 48
        number |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            number -= (1 << shift) if group & 0x10 else 0
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def ellipse(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return ((y - height / 2) / (height / 3)) ** 2 + ((x - width / 3) / (width / 4)) ** 2 < 1


def masks_of_all_kinds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    first_pixel, last_pixel = np.zeros((7, 5), bool), np.zeros((7, 5), bool)
    first_pixel[0, 0], last_pixel[-1, -1] = True, True
    return {
        "empty": np.zeros((9, 13), bool),
        "full": np.ones((9, 13), bool),
        "one pixel": np.ones((1, 1), bool),
        "one row": rng.random((1, 200)) < 0.5,
        "one column": rng.random((200, 1)) < 0.5,
        "noise": rng.random((37, 53)) < 0.5,
        "sparse": rng.random((120, 90)) < 0.01,
        "ellipse": ellipse(480, 854),
        "first pixel": first_pixel,
        "last pixel": last_pixel,
        "large and empty": np.zeros((2000, 3000), bool),
    }


@pytest.mark.parametrize("kind", masks_of_all_kinds())
def test_masks_are_encoded_as_the_reference_codec_does(kind: str) -> None:
    mask = masks_of_all_kinds()[kind]
    rle = encode_mask(mask)
    assert rle == {"size": list(mask.shape), "counts": reference_encode(mask)}
    decoded = decode_mask(rle)
    assert decoded.dtype == np.bool_ and decoded.flags.c_contiguous
    assert np.array_equal(decoded, mask)
    assert np.array_equal(reference_decode(rle["counts"], *mask.shape), mask)
    assert np.array_equal(coco.decode({**rle, "counts": rle["counts"].encode()}) == 1, mask)
    assert mask_area(rle) == mask.sum()


def test_a_mask_worked_out_by_hand() -> None:
    # Columns: 0 1 1 | 0 0 1: runs 1, 2, 2, 1; the fourth is written as 1 - 2 = -1: group 0b11111, sign bit included.
    mask = np.array([[0, 0], [1, 0], [1, 1]], bool)
    assert encode_mask(mask) == {"size": [3, 2], "counts": "122O"}


def test_masks_that_are_not_contiguous_are_encoded_alike() -> None:
    mask = ellipse(60, 80)
    assert encode_mask(mask[::2, ::-1]) == encode_mask(np.ascontiguousarray(mask[::2, ::-1]))
    assert encode_mask(np.asfortranarray(mask)) == encode_mask(mask)


def test_frames_without_a_mask_stay_none_and_decode_to_empty() -> None:
    mask = ellipse(20, 30)
    rles = encode_masks([mask, None, ~mask])
    assert rles[1] is None
    assert np.array_equal(decode_masks(rles), np.stack([mask, np.zeros_like(mask), ~mask]))
    assert encode_masks(np.stack([mask, ~mask])) == [rles[0], rles[2]]
    assert decode_masks([None, None], size=(4, 6)).shape == (2, 4, 6)
    assert decode_masks([], size=(4, 6)).shape == (0, 4, 6)


def test_iou_is_that_of_the_pixels() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.random((31, 17)) < 0.6, rng.random((31, 17)) < 0.4
    expected = (first & second).sum() / (first | second).sum()
    assert mask_iou(encode_mask(first), encode_mask(second)) == pytest.approx(expected, abs=1e-12)
    empty = np.zeros((31, 17), bool)
    assert mask_iou(encode_mask(empty), encode_mask(empty)) == 1.0
    assert mask_iou(encode_mask(first), encode_mask(empty)) == 0.0


def test_sizes_that_differ_are_refused() -> None:
    small, large = encode_mask(ellipse(20, 30)), encode_mask(ellipse(30, 20))
    with pytest.raises(ValueError, match=r"Mask 1 has size \(30, 20\) \(H, W\), but \(20, 30\) is needed"):
        decode_masks([small, large])
    with pytest.raises(ValueError, match="must be of one size to compare"):
        mask_iou(small, large)
    with pytest.raises(ValueError, match=r"Give `size=\(H, W\)`"):
        decode_masks([None])


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (np.zeros((3, 4), np.uint8), TypeError, "an array of uint8; a bool array is needed"),
        (np.zeros((3, 4), np.float32), TypeError, "an array of float32"),
        ([[True]], TypeError, "of type list"),
        (np.zeros((1, 3, 4), bool), ValueError, r"shape \(1, 3, 4\); \(H, W\) is needed"),
        (np.zeros((0, 4), bool), ValueError, "at least 1"),
    ],
)
def test_what_is_no_mask_is_not_encoded(mask: np.ndarray, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        encode_mask(mask)


@pytest.mark.parametrize(
    ("rle", "error", "text"),
    [
        (None, TypeError, "of type NoneType; a dict with `size` and `counts`"),
        ({"size": [3, 2]}, TypeError, r"keys \['size'\]"),
        ({"size": [3, 2.0], "counts": "122O"}, TypeError, "two integers"),
        ({"size": [3], "counts": "122O"}, TypeError, "two integers"),
        ({"size": [3, 2], "counts": b"122O"}, TypeError, "of type bytes"),
        ({"size": [3, 2], "counts": [1, 2, 2, 1]}, TypeError, "A list of runs"),
        ({"size": [0, 2], "counts": "0"}, ValueError, "at least 1"),
        ({"size": [3, 2], "counts": ""}, ValueError, "not COCO run lengths"),
        ({"size": [3, 2], "counts": "12 2"}, ValueError, "not COCO run lengths"),
        ({"size": [3, 2], "counts": "12é"}, ValueError, "not COCO run lengths"),
        ({"size": [3, 2], "counts": "122o"}, ValueError, "in the middle of a number"),
        ({"size": [3, 2], "counts": "o" * 8 + "0"}, ValueError, "too large"),
        ({"size": [3, 2], "counts": "122K"}, ValueError, "negative length"),
        ({"size": [3, 2], "counts": "122"}, ValueError, "fill 5 pixels, but its size .* has 6"),
        ({"size": [2, 2], "counts": "122O"}, ValueError, "fill 6 pixels, but its size .* has 4"),
        ({"size": [3, 2], "counts": "1" + "o" * 6 + "0"}, ValueError, "fill"),
    ],
)
def test_malformed_run_lengths_are_refused(rle: object, error: type[Exception], text: str) -> None:
    for function in (decode_mask, mask_area):
        with pytest.raises(error, match=text):
            function(rle)


def test_random_damage_never_gets_past_the_checks() -> None:
    """Whatever the string: either an error with a text, or a mask of the size that was given."""
    rng = np.random.default_rng(2)
    counts = encode_mask(ellipse(40, 50))["counts"]
    for _ in range(2000):
        characters = list(counts)
        for place in rng.integers(0, len(characters), size=3):
            characters[place] = chr(rng.integers(40, 120))
        text = "".join(characters[: rng.integers(1, len(characters) + 1)])
        try:
            assert decode_mask({"size": [40, 50], "counts": text}).shape == (40, 50)
        except ValueError as error:
            assert "The mask's `counts`" in str(error)


@pytest.mark.parametrize("kind", masks_of_all_kinds())
def test_strips_hold_an_eighth_of_the_columns_each(kind: str) -> None:
    mask = masks_of_all_kinds()[kind]
    strips = decode_strips(encode_mask(mask))
    columns = -(-mask.shape[1] // 8)
    assert strips.shape == (columns, mask.shape[0]) and strips.dtype == np.uint8
    unpacked = np.concatenate([(strips >> np.uint8(bit)) & 1 for bit in range(8)])  # (8 * columns, H)
    assert np.array_equal(unpacked[: mask.shape[1]].T == 1, mask)
    assert not unpacked[mask.shape[1] :].any()
    assert np.array_equal(strips, stack_strips(mask.T))


def test_runs_of_length_0_change_nothing() -> None:
    # Runs 0, 2, 0, 1, 3: written as they are, from the fourth on as differences: 1 - 2 and 3 - 0.
    rle = {"size": [3, 2], "counts": "020O3"}
    assert np.array_equal(decode_mask(rle), np.array([[1, 0], [1, 0], [1, 0]], bool))
    assert mask_area(rle) == 3


def test_runs_that_only_add_up_when_numbers_wrap_around_are_refused():
    def number(value):
        text, more = "", True
        while more:
            group = value & 0x1F
            value >>= 5
            more = not ((value == 0 and not group & 0x10) or (value == -1 and group & 0x10))
            text += chr(48 + group + (0x20 if more else 0))
        return text

    # Runs that grow by `step`, twice each, and a last one that makes their sum 2**64 + 6.
    count = 2**16
    step = 2**64 // (count * (count + 1))
    rest = 2**64 + 6 - step * count * (count + 1)
    counts = number(0) + number(step) * (2 * count - 1) + number(step + rest)
    for read in (mask_area, decode_mask):
        with pytest.raises(ValueError, match="fill 18446744073709551616 pixels, but its size .* has 6"):
            read({"size": [2, 3], "counts": counts})
