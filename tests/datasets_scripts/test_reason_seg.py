"""ReasonSeg from its published folder."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.datasets_scripts.image_trees import masks, prepare, rows, write_image, write_json
from tests.datasets_scripts.prepared import refused
from visa_hf.datasets_scripts import ReasonSeg
from visa_hf.datasets_scripts.reason_seg import draw_regions, read_annotation

SQUARE = [[2, 2], [11.9, 2.7], [11, 11], [2, 11]]  # corners are cut to whole pixels


def annotation(shapes, text=("what is square?",), is_sentence=True):
    return {"text": list(text), "is_sentence": is_sentence, "shapes": shapes}


def shape(label, points):
    return {"label": label, "shape_type": "polygon", "points": points}


@pytest.fixture
def tree(tmp_path):
    """LISA's root with two images for training, one for validation and an explanation."""
    folder = tmp_path / "root" / "reason_seg" / "ReasonSeg"
    write_image(folder / "train" / "a.jpg", 20, 30)
    write_json(
        folder / "train" / "a.json",
        annotation(
            [shape("ignore", [[4, 4], [6, 4], [6, 6], [4, 6]]), shape("target", SQUARE), shape("flag", [[0, 0]])],
            ["what is square?", "which thing has four corners?"],
        ),
    )
    write_image(folder / "train" / "b.jpg", 12, 10)
    write_json(folder / "train" / "b.json", annotation([shape("target", [[1, 1], [8, 1], [1, 8]])], ["tri"], False))
    write_image(folder / "val" / "c.jpg", 16, 16)
    write_json(folder / "val" / "c.json", annotation([]))
    write_json(
        folder / "explanatory" / "train.json",
        [{"image": "a.jpg", "query": "what is square?", "outputs": "Because its sides are equal."}],
    )
    return tmp_path / "root"


def test_each_sentence_is_an_expression(tree, tmp_path):
    found = rows(ReasonSeg, "expressions", tree, tmp_path / "cache")
    assert [(row["video_id"], row["expression_id"], row["expression"]) for row in found] == [
        ("a", "0", "what is square?"),
        ("a", "1", "which thing has four corners?"),
        ("b", "0", "tri"),
    ]
    assert [row["is_sentence"] for row in found] == [True, True, False]
    # The explanation is of the image's question, however it is worded.
    assert [row["explanation"] for row in found] == ["Because its sides are equal."] * 2 + [None]
    assert found[0] | {"expression": "", "explanation": ""} == {
        "dataset": "reason_seg",
        "video_id": "a",
        "expression_id": "0",
        "expression": "",
        "type_id": 1,
        "anno_ids": ["a"],
        "frames": ["reason_seg/ReasonSeg/train/a.jpg"],
        "height": 20,
        "width": 30,
        "is_sentence": True,
        "explanation": "",
    }
    validation = rows(ReasonSeg, "expressions", tree, tmp_path / "cache", "val")
    assert [row["explanation"] for row in validation] == [None]


def test_masks_are_the_drawn_ones_and_ignored_pixels_have_a_row_of_their_own(tree, tmp_path):
    found = masks(ReasonSeg, "masks", tree, tmp_path / "cache")
    assert list(found) == ["a", "a/ignore", "b", "b/ignore"]
    square, hole = np.zeros((2, 20, 30), dtype=np.bool_)
    square[2:12, 2:12] = True
    hole[4:7, 4:7] = True
    assert np.array_equal(found["a"], square & ~hole)  # the small ignore region is drawn over the large target
    assert np.array_equal(found["a/ignore"], hole)
    assert found["b"].sum() == 36  # 8 + 7 + ... + 1, border included
    assert found["b/ignore"] is None
    assert masks(ReasonSeg, "masks", tree, tmp_path / "cache", "val") == {"c": None, "c/ignore": None}


def test_masks_equal_those_of_the_published_script(tmp_path):
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for _ in range(100):
        shapes = [
            shape(
                str(rng.choice(["target", "ignore", "Ignore area", "flag"])), (rng.random((5, 2)) * [40, 25]).tolist()
            )
            for _ in range(6)
        ]
        drawn = np.zeros((25, 40), dtype=np.uint8)
        polygons = [(item["label"], np.array([item["points"]], dtype=np.int32)) for item in shapes]
        polygons = [item for item in polygons if item[0] != "flag"]
        areas = [cv2.fillPoly(np.zeros((25, 40), np.uint8), points, 1).sum() for _, points in polygons]
        for number in np.argsort(areas, kind="stable")[::-1]:
            label, points = polygons[number]
            cv2.fillPoly(drawn, points, 255 if "ignore" in label.lower() else 1)
        target, ignore = draw_regions(shapes, 25, 40)
        assert np.array_equal(target, drawn == 1)
        assert np.array_equal(ignore, drawn == 255)


def test_the_folder_of_the_set_itself_will_do(tree, tmp_path):
    found = rows(ReasonSeg, "expressions", tree / "reason_seg" / "ReasonSeg", tmp_path / "cache")
    assert [row["frames"] for row in found] == [["train/a.jpg"], ["train/a.jpg"], ["train/b.jpg"]]


def test_files_in_cp1252_are_read(tmp_path):
    write_json(tmp_path / "x.json", annotation([], ["the café’s sign"]), encoding="cp1252")
    assert read_annotation(tmp_path / "x.json")[0] == ["the café’s sign"]


def test_an_image_that_is_turned_by_exif_is_measured_upright(tree, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tree / "reason_seg/ReasonSeg/train/a.jpg", exif=exif)
    row = rows(ReasonSeg, "expressions", tree, tmp_path / "cache")[0]
    assert (row["height"], row["width"]) == (30, 20)


def test_streaming_and_several_processes_give_the_same_rows(tree, tmp_path):
    expected = rows(ReasonSeg, "masks", tree, tmp_path / "cache")
    builder = ReasonSeg("masks", data_dir=tree, cache_dir=tmp_path / "other")
    assert list(builder.as_streaming_dataset(split="train")) == expected
    builder.download_and_prepare(num_proc=2)
    assert list(builder.as_dataset(split="train")) == expected


def test_a_changed_annotation_is_read_again(tree, tmp_path):
    rows(ReasonSeg, "expressions", tree, tmp_path / "cache")
    write_json(tree / "reason_seg/ReasonSeg/train/b.json", annotation([], ["other"]))
    assert rows(ReasonSeg, "expressions", tree, tmp_path / "cache")[-1]["expression"] == "other"


def broken(tree, change):
    file = tree / "reason_seg/ReasonSeg/train/b.json"
    value = json.loads(file.read_text())
    value.update(change)
    write_json(file, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": []}, "`text` is \\[\\]"),
        ({"text": [" "]}, "`text`"),
        ({"is_sentence": "yes"}, "`is_sentence` is 'yes'"),
        ({"shapes": {}}, "`shapes`"),
        ({"shapes": [shape("target", [[1, 1], [2], [3, 3]])]}, "annotation '0': the point \\[2\\] has 1 coordinates"),
        ({"shapes": [shape("target", [[1, 1], [2, 2]])]}, "2 points"),
        ({"shapes": [shape("target", [[1, 1], [2, 2], [900, 3]])]}, "far outside the image of 12 x 10"),
        ({"shapes": [shape(None, [[1, 1], [2, 2], [3, 3]])]}, "`label`"),
        ({"shapes": [{"label": "target", "shape_type": "circle", "points": [[1, 1], [3, 3]]}]}, "a circle"),
    ],
)
def test_a_damaged_annotation_is_refused_or_skipped(tree, tmp_path, change, message):
    broken(tree, change)
    with refused(f"b.json.*{message}"):
        prepare(ReasonSeg, "expressions", tree, tmp_path / "cache")
    for config, expected in (("expressions", ["a", "a"]), ("masks", ["a", "a"])):
        found = rows(ReasonSeg, config, tree, tmp_path / "cache", on_error="skip")
        assert [row["video_id"] for row in found] == expected


def test_broken_json_and_missing_files_are_named(tree, tmp_path):
    folder = tree / "reason_seg/ReasonSeg/train"
    (folder / "a.json").write_text('{"text": ["x"')
    with refused("a.json, line 1: is not valid JSON"):
        prepare(ReasonSeg, "masks", tree, tmp_path / "cache")
    (folder / "a.json").unlink()
    with refused("a.json: the image .*a.jpg has no annotation"):
        prepare(ReasonSeg, "masks", tree, tmp_path / "cache")
    (folder / "a.jpg").unlink()
    (folder / "b.jpg").unlink()
    with refused("video 'b', frame 'reason_seg/ReasonSeg/train/b.jpg': there is no such"):
        prepare(ReasonSeg, "masks", tree, tmp_path / "cache")
    (folder / "b.jpg").write_bytes(b"no image")
    with refused("cannot be read"):
        prepare(ReasonSeg, "masks", tree, tmp_path / "cache")


def test_a_folder_without_any_split_shows_the_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="explanatory/train.json"):
        prepare(ReasonSeg, "masks", tmp_path, tmp_path / "cache")
