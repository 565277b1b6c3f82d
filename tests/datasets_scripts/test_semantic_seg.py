"""ADE20K, COCO-Stuff, Mapillary, PASCAL-Part and PACO-LVIS from their published folders."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from tests.datasets_scripts.image_trees import masks, prepare, rows, write_image, write_json, write_labels
from tests.datasets_scripts.prepared import refused
from visa_hf.datasets_scripts import ADE20K, PACOLVIS, COCOStuff, Mapillary, PascalPart
from visa_hf.datasets_scripts.class_names import ADE20K_CLASSES, COCO_STUFF_CLASSES
from visa_hf.datasets_scripts.part_annotations import part_query

LABELS = np.zeros((12, 16), dtype=np.uint8)
LABELS[:6] = 3
LABELS[6:, :8] = 150
LABELS[8:10, 2:5] = 3  # a second piece of the same class


@pytest.fixture
def ade20k(tmp_path):
    root = tmp_path / "root"
    write_image(root / "ade20k/images/training/ADE_train_00000001.jpg", 12, 16)
    write_labels(root / "ade20k/annotations/training/ADE_train_00000001.png", LABELS)
    write_image(root / "ade20k/images/training/ADE_train_00000002.jpg", 5, 4)
    write_labels(root / "ade20k/annotations/training/ADE_train_00000002.png", np.full((5, 4), 1))
    write_image(root / "ade20k/images/validation/ADE_val_00000001.jpg", 5, 4)
    write_labels(root / "ade20k/annotations/validation/ADE_val_00000001.png", np.array([[0, 255, 1, 0]] * 5))
    return root


def expressions(builder_class, root, cache, **kwargs):
    found = rows(builder_class, "expressions", root, cache, **kwargs)
    return [(row["video_id"], row["expression_id"], row["expression"], row["anno_ids"]) for row in found]


def test_a_class_in_an_image_is_an_expression(ade20k, tmp_path):
    assert expressions(ADE20K, ade20k, tmp_path / "cache") == [
        ("ADE_train_00000001", "3", "sky", ["ADE_train_00000001/3"]),
        ("ADE_train_00000001", "150", "flag", ["ADE_train_00000001/150"]),
        ("ADE_train_00000002", "1", "wall", ["ADE_train_00000002/1"]),
    ]
    assert rows(ADE20K, "expressions", ade20k, tmp_path / "cache")[0] == {
        "dataset": "ade20k",
        "video_id": "ADE_train_00000001",
        "expression_id": "3",
        "expression": "sky",
        "type_id": 0,
        "anno_ids": ["ADE_train_00000001/3"],
        "frames": ["ade20k/images/training/ADE_train_00000001.jpg"],
        "height": 12,
        "width": 16,
    }


def test_its_mask_is_all_pixels_of_the_class(ade20k, tmp_path):
    found = masks(ADE20K, "masks", ade20k, tmp_path / "cache")
    assert list(found) == ["ADE_train_00000001/3", "ADE_train_00000001/150", "ADE_train_00000002/1"]
    assert np.array_equal(found["ADE_train_00000001/3"], LABELS == 3)
    assert np.array_equal(found["ADE_train_00000001/150"], LABELS == 150)
    assert found["ADE_train_00000002/1"].all()


def test_pixels_of_no_class_give_no_row(ade20k, tmp_path):
    found = masks(ADE20K, "masks", ade20k, tmp_path / "cache", "val")
    assert {anno_id: mask.sum(axis=0).tolist() for anno_id, mask in found.items()} == {
        "ADE_val_00000001/1": [0, 0, 5, 0]
    }
    assert len(rows(ADE20K, "expressions", ade20k, tmp_path / "cache", "val")) == 1


def test_the_names_of_ade20k_are_those_of_its_own_file(ade20k, tmp_path):
    lines = ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{number} \t0.1\t1\t1\t{name}, synonym " for number, name in enumerate(ADE20K_CLASSES, start=1)]
    lines[3] = "3\t0.1\t1\t1\theaven, sky"
    file = ade20k / "ade20k" / "objectInfo150.txt"
    file.write_text("\n".join(lines) + "\n")
    found = expressions(ADE20K, ade20k, tmp_path / "cache")
    assert [row[2] for row in found] == ["heaven", "flag", "wall"]
    file.write_text("\n".join(lines[:-1]))
    with refused("objectInfo150.txt: has 149 classes"):
        prepare(ADE20K, "expressions", ade20k, tmp_path / "cache")
    file.write_text("Idx\nwall\n")
    with refused("objectInfo150.txt, line 2: five columns"):
        prepare(ADE20K, "expressions", ade20k, tmp_path / "cache")


def test_the_folder_of_ade20k_itself_will_do(ade20k, tmp_path):
    row = rows(ADE20K, "expressions", ade20k / "ade20k", tmp_path / "cache")[0]
    assert row["frames"] == ["images/training/ADE_train_00000001.jpg"]


def test_label_images_stream_and_are_prepared_by_several_processes(ade20k, tmp_path):
    for config in ("expressions", "masks"):
        expected = rows(ADE20K, config, ade20k, tmp_path / "cache")
        builder = ADE20K(config, data_dir=ade20k, cache_dir=tmp_path / "other")
        assert builder.as_streaming_dataset(split="train").num_shards == 2
        assert list(builder.as_streaming_dataset(split="train")) == expected
        builder.download_and_prepare(num_proc=2)
        assert list(builder.as_dataset(split="train")) == expected


def damage(name):
    """Return a function that damages the first image or label image of ADE20K in one way."""

    def change(root):
        image = root / "ade20k/images/training/ADE_train_00000001.jpg"
        labels = root / "ade20k/annotations/training/ADE_train_00000001.png"
        if name == "size":
            write_labels(labels, LABELS[:, :15])
        elif name == "image":
            image.unlink()
        elif name == "class":
            write_labels(labels, np.where(LABELS == 150, 151, LABELS))
        elif name == "colour":
            Image.new("RGB", (16, 12)).save(labels)
        else:
            labels.write_bytes(labels.read_bytes()[:30])

    return change


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("size", "ADE_train_00000001.png, frame '.*1.jpg': the image has 12 x 16 pixels .* annotation 12 x 15"),
        ("image", "frame 'ade20k/images/training/ADE_train_00000001.jpg': there is no such image"),
        ("class", "frame '.*1.jpg': the label image has the unknown class 151"),
        ("colour", "ADE_train_00000001.png: the label image has the mode 'RGB'"),
        ("broken", "ADE_train_00000001.png: the label image cannot be read"),
    ],
)
def test_damaged_label_images_are_refused_or_skipped(ade20k, tmp_path, name, message):
    damage(name)(ade20k)
    for config in ("expressions", "masks"):
        with refused(message):
            prepare(ADE20K, config, ade20k, tmp_path / "cache")
        found = rows(ADE20K, config, ade20k, tmp_path / "cache", on_error="skip")
        assert [row["video_id"] for row in found] == ["ADE_train_00000002"]


def test_a_changed_label_image_and_an_image_that_comes_are_seen(ade20k, tmp_path):
    damage("image")(ade20k)
    assert len(rows(ADE20K, "masks", ade20k, tmp_path / "cache", on_error="skip")) == 1
    write_image(ade20k / "ade20k/images/training/ADE_train_00000001.jpg", 12, 16)
    assert len(rows(ADE20K, "masks", ade20k, tmp_path / "cache", on_error="skip")) == 3
    write_labels(ade20k / "ade20k/annotations/training/ADE_train_00000001.png", np.full((12, 16), 2))
    assert len(rows(ADE20K, "masks", ade20k, tmp_path / "cache", on_error="skip")) == 2


def test_missing_folders_show_the_layout(ade20k, tmp_path):
    with pytest.raises(FileNotFoundError, match="annotations/training not found(?s:.*)objectInfo150.txt"):
        prepare(ADE20K, "masks", tmp_path, tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="cocostuff/train2017 not found"):
        prepare(COCOStuff, "masks", ade20k, tmp_path / "cache")


@pytest.fixture
def cocostuff(tmp_path):
    root = tmp_path / "root"
    write_image(root / "coco/train2017/000000000009.jpg", 6, 8)
    labels = np.full((6, 8), 255)
    labels[0], labels[1], labels[2], labels[5] = 0, 95, 156, 181  # person, building-other, sky, wood
    write_labels(root / "cocostuff/train2017/000000000009.png", labels)
    return root


def test_classes_of_cocostuff_with_a_dash_are_left_out(cocostuff, tmp_path):
    assert COCO_STUFF_CLASSES[95] == "building-other"
    assert [row[1:3] for row in expressions(COCOStuff, cocostuff, tmp_path / "cache")] == [
        ("0", "person"),
        ("156", "sky"),
        ("181", "wood"),
    ]
    found = masks(COCOStuff, "masks", cocostuff, tmp_path / "cache")
    assert {anno_id: np.flatnonzero(mask.all(axis=1)).tolist() for anno_id, mask in found.items()} == {
        "000000000009/0": [0],
        "000000000009/156": [2],
        "000000000009/181": [5],
    }
    row = rows(COCOStuff, "expressions", cocostuff, tmp_path / "cache")[0]
    assert row["frames"] == ["coco/train2017/000000000009.jpg"]


def test_the_names_of_cocostuff_are_those_of_its_own_file(cocostuff, tmp_path):
    lines = ["0: unlabeled", *(f"{number}: {name}" for number, name in enumerate(COCO_STUFF_CLASSES, start=1))]
    lines[1] = "1: human being"
    file = cocostuff / "cocostuff" / "labels.txt"
    file.write_text("\n".join(lines) + "\n")
    assert [row[2] for row in expressions(COCOStuff, cocostuff, tmp_path / "cache")] == ["human being", "sky", "wood"]
    file.write_text("\n".join(lines[1:]))
    with refused("labels.txt, line 1: `0: NAME` is needed, not '1: human being'"):
        prepare(COCOStuff, "masks", cocostuff, tmp_path / "cache")


@pytest.fixture
def mapillary(tmp_path):
    folder = tmp_path / "root" / "mapillary"
    names = ["Bird", "Ambiguous", "Road", "Ambiguous", "Unlabeled"]
    write_json(folder / "config_v2.0.json", {"labels": [{"name": f"x--{name}", "readable": name} for name in names]})
    write_image(folder / "training/images/abc.jpg", 6, 8)
    labels = np.full((6, 8), 4)
    labels[0], labels[1], labels[2], labels[3] = 3, 1, 2, 255
    write_labels(folder / "training/v2.0/labels/abc.png", labels, palette=True)
    return tmp_path / "root"


def test_labels_of_mapillary_with_one_name_are_one_class(mapillary, tmp_path):
    assert expressions(Mapillary, mapillary, tmp_path / "cache") == [
        ("abc", "1", "Ambiguous", ["abc/1", "abc/3"]),
        ("abc", "2", "Road", ["abc/2"]),
    ]
    found = masks(Mapillary, "masks", mapillary, tmp_path / "cache")
    assert {anno_id: np.flatnonzero(mask.all(axis=1)).tolist() for anno_id, mask in found.items()} == {
        "abc/1": [1],
        "abc/2": [2],
        "abc/3": [0],
    }
    own = rows(Mapillary, "expressions", mapillary / "mapillary", tmp_path / "cache")
    assert own[0]["frames"] == ["training/images/abc.jpg"]


def test_a_damaged_list_of_classes_of_mapillary_is_refused(mapillary, tmp_path):
    write_json(mapillary / "mapillary/config_v2.0.json", {"labels": [{"readable": ""}]})
    with refused("config_v2.0.json: `readable` is ''"):
        prepare(Mapillary, "masks", mapillary, tmp_path / "cache")
    write_json(mapillary / "mapillary/config_v2.0.json", [])
    with refused("config_v2.0.json: has no `labels`"):
        prepare(Mapillary, "masks", mapillary, tmp_path / "cache")


TRIANGLE, SQUARE = [3.0, 1.0, 14.5, 2.0, 5.0, 9.5], [1.0, 1.0, 6.0, 1.0, 6.0, 6.0, 1.0, 6.0]


def part(number, image_id, category_id, segmentation):
    return {"id": number, "image_id": image_id, "category_id": category_id, "segmentation": segmentation, "area": 1}


def pascal_part_file():
    return {
        "categories": [{"id": 0, "name": "dog:head"}, {"id": 1, "name": "dog:leg"}, {"id": 2, "name": "bus:door"}],
        "images": [
            {"id": 1, "file_name": "2008_000001.jpg", "height": 12, "width": 16},
            {"id": 2, "file_name": "2008_000002.jpg", "height": 12, "width": 16},
            {"id": 3, "file_name": "2008_000003.jpg", "height": 12, "width": 16},  # without annotations, without file
        ],
        "annotations": [
            part(1, 1, 1, [TRIANGLE]),
            part(2, 2, 2, [SQUARE]),
            part(3, 1, 1, [SQUARE]),
            part(4, 1, 0, [SQUARE, TRIANGLE]),
            part(5, 1, 2, []),
        ],
    }


@pytest.fixture
def pascal_part(tmp_path):
    folder = tmp_path / "root" / "vlpart" / "pascal_part"
    write_json(folder / "train.json", pascal_part_file())
    for name in ("2008_000001", "2008_000002"):
        write_image(folder / f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg", 12, 16)
    return tmp_path / "root"


def drawn(*polygons):
    return coco.decode(coco.frPyObjects(list(polygons), 12, 16)).any(axis=2)


def test_parts_of_one_name_are_one_expression_and_each_has_its_mask(pascal_part, tmp_path):
    assert expressions(PascalPart, pascal_part, tmp_path / "cache") == [
        ("2008_000001", "1", "the leg of the dog", ["1", "3"]),
        ("2008_000001", "0", "the head of the dog", ["4"]),
        ("2008_000002", "2", "the door of the bus", ["2"]),
    ]
    found = masks(PascalPart, "masks", pascal_part, tmp_path / "cache")
    expected = {"1": drawn(TRIANGLE), "3": drawn(SQUARE), "4": drawn(SQUARE, TRIANGLE), "2": drawn(SQUARE)}
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[anno_id], mask) for anno_id, mask in expected.items())
    row = rows(PascalPart, "expressions", pascal_part, tmp_path / "cache")[0]
    assert row["frames"] == ["vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg"]
    own = rows(PascalPart, "expressions", pascal_part / "vlpart/pascal_part", tmp_path / "cache")[0]
    assert own["frames"] == ["VOCdevkit/VOC2010/JPEGImages/2008_000001.jpg"]


def test_parts_stream_and_are_prepared_by_several_processes(pascal_part, tmp_path):
    for config in ("expressions", "masks"):
        expected = rows(PascalPart, config, pascal_part, tmp_path / "cache")
        builder = PascalPart(config, data_dir=pascal_part, cache_dir=tmp_path / "other")
        assert list(builder.as_streaming_dataset(split="train")) == expected
        builder.download_and_prepare(num_proc=2)
        assert list(builder.as_dataset(split="train")) == expected


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (
            lambda content: content["annotations"][2].update(segmentation=[SQUARE[:-1]]),
            "train.json, video '2008_000001', expression 'the leg of the dog', annotation '3': .*odd number",
            ["the head of the dog", "the door of the bus"],
        ),
        (
            lambda content: content["annotations"][0].update(category_id=9),
            "annotation '1': `category_id` is 9",
            ["the leg of the dog", "the head of the dog", "the door of the bus"],
        ),
        (
            lambda content: content["annotations"][0].update(category_id=[]),
            r"annotation '1': `category_id` is \[\]",
            ["the leg of the dog", "the head of the dog", "the door of the bus"],
        ),
        (
            lambda content: content["annotations"][0].update(image_id=9),
            "annotation '1': `image_id` is 9, which none of the images has",
            ["the leg of the dog", "the head of the dog", "the door of the bus"],
        ),
        (
            lambda content: content["categories"][0].update(name="a:b:c"),
            "the category 'a:b:c' is neither",
            ["the leg of the dog", "the door of the bus"],
        ),
        (
            lambda content: content["images"][1].update(width=15),
            "frame '.*2008_000002.jpg': the image has 12 x 16 pixels .* annotation 12 x 15",
            ["the leg of the dog", "the head of the dog"],
        ),
        (
            lambda content: content["images"][1].update(file_name="x/2008_000001.jpg"),
            "two images have one name: 2008_000001.jpg and x/2008_000001.jpg",
            ["the leg of the dog", "the head of the dog"],
        ),
        (
            lambda content: content["images"][1].update(file_name="C:/2008_000002.jpg"),
            "the path 'C:/2008_000002.jpg' is refused",
            ["the leg of the dog", "the head of the dog"],
        ),
    ],
)
def test_damaged_parts_are_refused_or_skipped(pascal_part, tmp_path, change, message, left):
    content = pascal_part_file()
    change(content)
    write_json(pascal_part / "vlpart/pascal_part/train.json", content)
    for config in ("expressions", "masks"):
        with refused(message):
            prepare(PascalPart, config, pascal_part, tmp_path / "cache")
    found = rows(PascalPart, "expressions", pascal_part, tmp_path / "cache", on_error="skip")
    assert [row["expression"] for row in found] == left
    have = masks(PascalPart, "masks", pascal_part, tmp_path / "cache", on_error="skip")
    assert {anno_id for row in found for anno_id in row["anno_ids"]} <= set(have)


@pytest.mark.parametrize("folder", ["annotations", "annotations/paco_lvis_v1"])
def test_objects_and_parts_of_paco_are_expressions(tmp_path, folder):
    root = tmp_path / "root"
    content = {
        "info": {},
        "annotations": [part(1, 9, 100, [SQUARE]), part(2, 9, 7, [TRIANGLE])],
        "images": [{"id": 9, "file_name": "train2017/000000000009.jpg", "height": 12, "width": 16}],
        "categories": [
            {"id": 7, "name": "trash_can", "supercategory": "OBJECT"},
            {"id": 100, "name": "trash_can:lid", "supercategory": "PART"},
        ],
    }
    write_json(root / f"vlpart/paco/{folder}/paco_lvis_v1_train.json", content)
    write_image(root / "coco/train2017/000000000009.jpg", 12, 16)
    assert expressions(PACOLVIS, root, tmp_path / "cache") == [
        ("000000000009", "100", "the lid of the trash can", ["1"]),
        ("000000000009", "7", "trash can", ["2"]),
    ]
    row = rows(PACOLVIS, "expressions", root, tmp_path / "cache")[0]
    assert row["frames"] == ["coco/train2017/000000000009.jpg"]


def test_how_a_category_is_asked_for():
    assert part_query("mug") == "mug"
    assert part_query("mug:handle") == "the handle of the mug"
    assert part_query("trash_can:pull_tab") == "the pull tab of the trash can"
    assert part_query("bat_(animal):end_(tip)") == "the end of the bat"
