"""RefCOCO, RefCOCO+, RefCOCOg and RefCLEF from their published folders."""

import pickle

import numpy as np
import pytest
from pycocotools import mask as coco

from tests.datasets_scripts.image_trees import masks, prepare, python2_pickle, rows, write_image, write_json
from tests.datasets_scripts.prepared import refused
from visa_hf.datasets_scripts import ReferSeg
from visa_hf.rle import encode_mask

POLYGONS = [[3.5, 2.0, 20.25, 3.0, 12.0, 17.5], [22.0, 10.0, 29.0, 10.0, 29.0, 18.0]]
BOX = np.zeros((20, 30), dtype=np.bool_)
BOX[4:9, 10:25] = True


def ref(number, annotation_id, image_id, split, sentences):
    return {
        "ref_id": number,
        "ann_id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image_id:012}_{annotation_id}.jpg",  # with the annotation's id: no such file
        "split": split,
        "sent_ids": [sent_id for sent_id, _ in sentences],
        "sentences": [
            {"sent_id": sent_id, "sent": sent, "raw": sent, "tokens": sent.split()} for sent_id, sent in sentences
        ],
    }


def instances(runs_as_list=False):
    runs = encode_mask(BOX)
    if runs_as_list:
        counts = np.diff(np.flatnonzero(np.diff(BOX.ravel(order="F"), prepend=~BOX[0, 0], append=~BOX[-1, -1])))
        runs = {"size": [20, 30], "counts": counts.tolist()}
    return {
        "info": {"description": "café"},
        "annotations": [  # in front of the images, as in some of the files
            {"id": 11, "image_id": 7, "category_id": 1, "segmentation": POLYGONS, "bbox": [3.5, 2, 26, 15.5]},
            {"id": 12, "image_id": 7, "category_id": 1, "segmentation": [runs]},
            {"id": 13, "image_id": 8, "category_id": 1, "segmentation": []},
            {"id": 14, "image_id": 8, "category_id": 1, "segmentation": "nobody refers to this"},
        ],
        "images": [
            {"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "height": 20, "width": 30},
            {"id": 8, "file_name": "COCO_train2014_000000000008.jpg", "height": 9, "width": 9},
        ],
        "categories": [{"id": 1, "name": "person"}],
    }


def references():
    return [
        ref(0, 12, 7, "train", [(100, "the left one"), (101, "woman in red")]),
        ref(1, 11, 7, "train", [(102, "right")]),
        ref(2, 13, 8, "val", [(103, "nothing")]),
        ref(3, 11, 7, "testAB", [(104, "again")]),
        ref(4, 11, 7, "testB", [(105, "and again")]),
    ]


@pytest.fixture
def tree(tmp_path):
    """LISA's root with RefCOCO (references as Python 2 wrote them)."""
    root = tmp_path / "root"
    images = root / "refer_seg" / "images" / "mscoco" / "images" / "train2014"
    write_image(images / "COCO_train2014_000000000007.jpg", 20, 30)
    write_image(images / "COCO_train2014_000000000008.jpg", 9, 9)
    write_json(root / "refer_seg" / "refcoco" / "instances.json", instances())
    (root / "refer_seg" / "refcoco" / "refs(unc).p").write_bytes(python2_pickle(references()))
    return root


def refer(tree):
    return tree / "refer_seg" / "refcoco"


def test_each_sentence_is_an_expression(tree, tmp_path):
    found = rows(ReferSeg, "refcoco_expressions", tree, tmp_path / "cache")
    assert [(row["expression_id"], row["expression"], row["anno_ids"]) for row in found] == [
        ("100", "the left one", ["12"]),
        ("101", "woman in red", ["12"]),
        ("102", "right", ["11"]),
    ]
    assert found[0] == {
        "dataset": "refcoco",
        "video_id": "COCO_train2014_000000000007",
        "expression_id": "100",
        "expression": "the left one",
        "type_id": 0,
        "anno_ids": ["12"],
        "frames": ["refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000007.jpg"],
        "height": 20,
        "width": 30,
    }


def test_masks_are_the_drawn_ones(tree, tmp_path):
    found = masks(ReferSeg, "refcoco_masks", tree, tmp_path / "cache")
    assert list(found) == ["12", "11"]
    assert np.array_equal(found["11"], coco.decode(coco.frPyObjects(POLYGONS, 20, 30)).any(axis=2))
    assert np.array_equal(found["12"], BOX)


def test_runs_as_plain_lists_are_read(tree, tmp_path):
    write_json(refer(tree) / "instances.json", instances(runs_as_list=True))
    assert np.array_equal(masks(ReferSeg, "refcoco_masks", tree, tmp_path / "cache")["12"], BOX)


def test_splits_are_those_of_the_references(tree, tmp_path):
    builder = prepare(ReferSeg, "refcoco_expressions", tree, tmp_path / "cache")
    found = {split: builder.as_dataset(split)["expression_id"][:] for split in builder.info.splits}
    assert found == {"train": ["100", "101", "102"], "val": ["103"], "testA": ["104"], "testB": ["104", "105"]}
    assert masks(ReferSeg, "refcoco_masks", tree, tmp_path / "cache", "val") == {"13": None}
    # An object of two references of a split has one row.
    assert list(masks(ReferSeg, "refcoco_masks", tree, tmp_path / "cache", "testB")) == ["11"]


def test_the_folder_of_the_sets_itself_will_do(tree, tmp_path):
    row = rows(ReferSeg, "refcoco_expressions", tree / "refer_seg", tmp_path / "cache")[0]
    assert row["frames"] == ["images/mscoco/images/train2014/COCO_train2014_000000000007.jpg"]


def test_refclef_has_its_own_images(tree, tmp_path):
    folder = tree / "refer_seg" / "refclef"
    content = instances()
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.jpg"
        write_image(tree / "refer_seg/images/saiapr_tc-12" / image["file_name"], image["height"], image["width"])
    write_json(folder / "instances.json", content)
    (folder / "refs(unc).p").write_bytes(python2_pickle(references()))
    row = rows(ReferSeg, "refclef_expressions", tree, tmp_path / "cache")[0]
    assert (row["dataset"], row["video_id"]) == ("refclef", "7")
    assert row["frames"] == ["refer_seg/images/saiapr_tc-12/7.jpg"]


def test_the_cut_can_be_chosen(tree, tmp_path):
    folder = tree / "refer_seg" / "refcocog"
    write_json(folder / "instances.json", instances())
    (folder / "refs(umd).p").write_bytes(python2_pickle(references()))
    (folder / "refs(google).p").write_bytes(pickle.dumps([ref(0, 12, 7, "val", [(1, "x")])]))
    builder = prepare(ReferSeg, "refcocog_expressions", tree, tmp_path / "cache")
    assert list(builder.info.splits) == ["train", "val", "testA", "testB"]
    builder = prepare(ReferSeg, "refcocog_expressions", tree, tmp_path / "cache", split_by="google")
    assert list(builder.info.splits) == ["val"]
    with pytest.raises(ValueError, match="`split_by` is 'unu'; one of unc, umd, google, berkeley"):
        ReferSeg("refcocog_expressions", data_dir=tree, cache_dir=tmp_path / "cache", split_by="unu")
    with pytest.raises(FileNotFoundError, match=r"refcocog/refs\(unc\).p not found"):
        prepare(ReferSeg, "refcocog_expressions", tree, tmp_path / "cache", split_by="unc")


def test_streaming_and_several_processes_give_the_same_rows(tree, tmp_path):
    for config in ("refcoco_expressions", "refcoco_masks"):
        expected = rows(ReferSeg, config, tree, tmp_path / "cache")
        builder = ReferSeg(config, data_dir=tree, cache_dir=tmp_path / "other")
        assert list(builder.as_streaming_dataset(split="train")) == expected
        builder.download_and_prepare(num_proc=2)
        assert list(builder.as_dataset(split="train")) == expected


def test_a_pickle_with_code_is_refused(tree, tmp_path):
    witness = tmp_path / "executed"

    class Code:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    (refer(tree) / "refs(unc).p").write_bytes(pickle.dumps([Code()]))
    with refused(r"refs\(unc\).p: .*refused"):
        prepare(ReferSeg, "refcoco_expressions", tree, tmp_path / "cache")
    assert not witness.exists()


def changed_instances(change):
    content = instances()
    change(content)
    return content


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (
            lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4, 5, 6, 7]]),
            "instances.json, video 'COCO_train2014_000000000007', expression '102', annotation '11': .*odd number",
            ["100", "101"],
        ),
        (
            lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4, 500, 6]]),
            "annotation '11': .*far outside",
            ["100", "101"],
        ),
        (
            lambda content: content["images"][0].update(height=21),
            "the image has 20 x 30 pixels",
            [],
        ),
        (
            lambda content: content["images"][0].update(file_name="../x.jpg"),
            "instances.json, annotation 'image 7': the path '../x.jpg' is refused",
            [],
        ),
        (
            lambda content: content["images"][0].update(file_name="/x.jpg"),
            "the path '/x.jpg' is refused",
            [],
        ),
        (
            lambda content: content["annotations"][0].update(image_id=8),
            r"refs\(unc\).p, expression '102', annotation '11': the reference is about image 7, .* about image 8",
            ["100", "101"],
        ),
        (
            lambda content: content["annotations"].pop(0),
            "expression '102', annotation '11': `ann_id` 11 is not in instances.json",
            ["100", "101"],
        ),
        (
            lambda content: content["annotations"].append(dict(content["annotations"][0])),
            "instances.json, annotation '11': the id is given to two annotations",
            ["100", "101", "102"],
        ),
        (
            lambda content: content["annotations"][0].update(id="11"),
            "annotation 'an annotation': `id` is '11'; a whole number is needed",
            ["100", "101"],
        ),
    ],
)
def test_damaged_instances_are_refused_or_skipped(tree, tmp_path, change, message, left):
    write_json(refer(tree) / "instances.json", changed_instances(change))
    for config in ("refcoco_expressions", "refcoco_masks"):
        with refused(message):
            prepare(ReferSeg, config, tree, tmp_path / "cache")
    if left:
        found = rows(ReferSeg, "refcoco_expressions", tree, tmp_path / "cache", on_error="skip")
        assert [row["expression_id"] for row in found] == left
        have = masks(ReferSeg, "refcoco_masks", tree, tmp_path / "cache", on_error="skip")
        assert {anno_id for row in found for anno_id in row["anno_ids"]} <= set(have)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sentences": "x"}, "reference 1': `sentences`"),
        ({"split": "training"}, "`split` is 'training'"),
        ({"ann_id": None}, "`ann_id` is None"),
        ({"sentences": [{"sent_id": 102, "sent": " "}]}, "expression '102', annotation 'reference 1': `sent` is ' '"),
        ({"sentences": [{"sent_id": 101, "sent": "x"}]}, "`sent_id` 101 is given to two sentences"),
    ],
)
def test_damaged_references_are_refused_or_skipped(tree, tmp_path, change, message):
    refs = references()
    refs[1].update(change)
    (refer(tree) / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    with refused(message):
        prepare(ReferSeg, "refcoco_expressions", tree, tmp_path / "cache")
    found = rows(ReferSeg, "refcoco_expressions", tree, tmp_path / "cache", on_error="skip")
    assert [row["expression_id"] for row in found] == ["100", "101"]


def test_broken_json_a_missing_list_and_a_missing_image_are_named(tree, tmp_path):
    file = refer(tree) / "instances.json"
    text = file.read_text(encoding="utf-8")
    file.write_text(text[:-40], encoding="utf-8")
    with refused("instances.json: is not valid JSON"):
        prepare(ReferSeg, "refcoco_masks", tree, tmp_path / "cache")
    write_json(file, {"images": [], "annotations": []})
    with refused("instances.json: has no list `categories`"):
        prepare(ReferSeg, "refcoco_masks", tree, tmp_path / "cache")
    file.write_text(text, encoding="utf-8")
    (tree / "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000007.jpg").unlink()
    with refused("frame 'refer_seg/images.*07.jpg': there is no such image"):
        prepare(ReferSeg, "refcoco_masks", tree, tmp_path / "cache")
    (refer(tree) / "refs(unc).p").unlink()
    with pytest.raises(FileNotFoundError, match=r"refcoco/refs\(unc\).p not found(?s:.*)images/saiapr_tc-12"):
        prepare(ReferSeg, "refcoco_masks", tree, tmp_path / "cache")
