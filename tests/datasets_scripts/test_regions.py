"""Polygons, COCO segmentations and label images as run lengths."""

import math

import numpy as np
import pytest
from pycocotools import mask as coco

from visa_hf.datasets_scripts import AnnotationError
from visa_hf.datasets_scripts.regions import check_polygon, fill_polygon, label_rles, segmentation_rle
from visa_hf.rle import decode_mask, encode_mask


def test_a_triangle_is_filled_with_its_border():
    mask = fill_polygon(np.array([[1, 1], [5, 1], [1, 5]]), 7, 8)
    drawn = ["........", ".#####..", ".####...", ".###....", ".##.....", ".#......", "........"]
    assert mask.tolist() == [[pixel == "#" for pixel in row] for row in drawn]


def test_a_polygon_of_one_point_is_one_pixel():
    assert np.argwhere(fill_polygon(np.array([[3, 2]]), 5, 6)).tolist() == [[2, 3]]


def test_polygons_are_filled_as_opencv_fills_them():
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for number in range(2000):
        height, width = rng.integers(1, 60, 2).tolist()
        beyond = 0.0 if number % 2 else 0.5
        count = int(rng.integers(1, 12))
        xs = rng.integers(int(-beyond * width), int((1 + beyond) * width), count)
        ys = rng.integers(int(-beyond * height), int((1 + beyond) * height), count)
        points = np.stack([xs, ys], axis=1)
        expected = np.zeros((height, width), dtype=np.uint8)
        cv2.polylines(expected, [points.astype(np.int32)], True, 1, 1)
        cv2.fillPoly(expected, [points.astype(np.int32)], 1)
        assert np.array_equal(fill_polygon(points, height, width), expected > 0), (height, width, points.tolist())


def test_label_images_are_cut_into_the_masks_that_encoding_each_label_gives():
    rng = np.random.default_rng(0)
    for dtype in (np.uint8, np.uint16):
        for _ in range(50):
            height, width = rng.integers(1, 40, 2)
            labels = rng.integers(0, rng.integers(1, 6), (height, width)).astype(dtype)
            expected = {value: encode_mask(labels == value) for value in np.unique(labels).tolist()}
            assert label_rles(labels) == expected


def test_polygons_become_the_union_of_what_pycocotools_makes_of_each():
    polygons = [[1.5, 2.0, 20.25, 3.0, 12.0, 17.5], [10.0, 10.0, 30.0, 10.0, 30.0, 24.0, 10.0, 24.0]]
    expected = coco.decode(coco.frPyObjects(polygons, 25, 31)).any(axis=2)
    assert np.array_equal(decode_mask(segmentation_rle(polygons, 25, 31)), expected)


def test_all_spellings_of_a_run_length_mask_are_read():
    mask = np.zeros((6, 5), dtype=np.bool_)
    mask[1:4, 2:] = True
    rle = encode_mask(mask)
    runs = [13, 3, 3, 3, 3, 3, 2]
    for segmentation in (
        rle,
        [rle],
        {**rle, "counts": rle["counts"].encode()},
        {"size": [6, 5], "counts": runs},
        [{"size": [6, 5], "counts": runs}, {"size": [6, 5], "counts": [30]}],
    ):
        assert segmentation_rle(segmentation, 6, 5) == rle


def test_a_segmentation_without_pixels_is_none():
    assert segmentation_rle([], 6, 5) is None
    assert segmentation_rle({"size": [6, 5], "counts": [30]}, 6, 5) is None


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "7 coordinates, an odd number"),
        ([[1, 2, 3, 4]], "2 points; at least 3"),
        ([[1, 2, 3, 4, math.nan, 6]], "finite numbers"),
        ([[1, 2, 3, 4, "5", 6]], "finite numbers"),
        ([[1, 2, 3, 4, 10**400, 6]], "finite numbers"),
        ([[1, 2, 90, 4, 5, 6]], r"from x = 1 to 90, far outside the image of 20 x 30 \(H x W\)"),
        ([[1, -9, 9, 4, 5, 6]], "from y = -9 to 6, far outside"),
        ([1, 2, 3, 4, 5, 6], "a list of polygons or a run-length mask is needed"),
        (None, "a list of polygons or a run-length mask is needed"),
        ({"size": [20, 31], "counts": [620]}, "size"),
        ({"size": [20, 30], "counts": [599]}, "add up to 600"),
        ({"size": [20, 30], "counts": [601, -1]}, "add up to 600"),
        ({"size": [20, 30], "counts": "zzz"}, "counts"),
        ({"size": [20, 30]}, "counts"),
    ],
)
def test_a_damaged_segmentation_is_refused_by_name(segmentation, message):
    with pytest.raises(AnnotationError, match=message) as caught:
        segmentation_rle(segmentation, 20, 30, file="a.json", video="v", expression="e")
    assert str(caught.value).startswith("a.json, video 'v', expression 'e'")


def test_a_polygon_may_leave_the_image_by_a_little():
    check_polygon([-2, -2, 32, 0, 30, 22], 20, 30)
