"""Your own data: what is read of a line, what is refused and in which words, and what the builder makes of it."""

import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.datasets_scripts.prepared import prepared, refused
from tests.media import cut_off, damage_packet, test_frame, write_constant_rate, write_folder, write_video
from visa_hf.datasets_scripts.frame_store import FrameStore
from visa_hf.datasets_scripts.own_data import OwnData
from visa_hf.datasets_scripts.own_data_check import check_own_data, draw_preview, inspect_own_data
from visa_hf.datasets_scripts.own_data_masks import read_mask
from visa_hf.datasets_scripts.samples import ExpressionSource
from visa_hf.datasets_scripts.sampling import SamplingRecipe, random_generator
from visa_hf.rle import decode_mask, decode_masks, encode_mask

SIZE = (64, 96)
BOX = np.zeros(SIZE, dtype=np.bool_)
BOX[10:20, 30:60] = True
RLE_OF_BOX = encode_mask(BOX)
# COCO fills the pixels whose centres lie inside.
POLYGON_OF_BOX = [[30, 10, 60, 10, 60, 20, 30, 20]]


def line(**values):
    return {"video": "clip.mp4", "expression": "the box", "masks": {"0": RLE_OF_BOX}, **values}


def write_lines(folder, lines, name="train.jsonl"):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in lines)
    (folder / name).write_text(text, encoding="utf-8")


def messages(folder):
    return [str(problem) for problem in check_own_data(folder)]


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A clip of 12 frames as a file and as a folder, and an image, all 64 x 96."""
    folder = tmp_path_factory.mktemp("own")
    write_video(folder / "clip.mp4", 12, size=SIZE)
    write_folder(folder / "walk", 12, size=SIZE)
    Image.fromarray(test_frame(3, *SIZE)).save(folder / "still.jpg")
    return folder


@pytest.fixture
def data(media, tmp_path):
    for item in media.iterdir():
        os.symlink(item, tmp_path / item.name)
    return tmp_path


def save_png(path, values, mode=None, palette=False):
    image = Image.fromarray(values, mode=mode)
    if palette:
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [9] * 756)
    image.save(path)


# One mask


def test_all_forms_of_a_mask_give_the_same_pixels(tmp_path):
    boxes = BOX.astype(np.uint8)
    save_png(tmp_path / "zero_one.png", boxes)
    save_png(tmp_path / "black_white.png", boxes * 255)
    save_png(tmp_path / "bits.png", BOX)
    save_png(tmp_path / "palette.png", boxes * 3, mode="P", palette=True)
    save_png(tmp_path / "rgb.png", np.repeat(boxes[..., None] * 255, 3, axis=2))
    save_png(tmp_path / "opaque.png", np.dstack([boxes * 255] * 3 + [np.full(SIZE, 255, np.uint8)]))
    save_png(tmp_path / "deep.png", boxes.astype(np.uint16) * 1000)
    others = boxes * 3
    others[40:50, 5:9] = 1
    save_png(tmp_path / "objects.png", others, mode="P", palette=True)
    forms = [RLE_OF_BOX, POLYGON_OF_BOX, {"path": "objects.png", "ids": [3]}, {"path": "zero_one.png"}]
    names = ("zero_one", "black_white", "bits", "palette", "rgb", "opaque", "deep")
    for form in [*forms, *(f"{name}.png" for name in names)]:
        mask = read_mask(form, SIZE, tmp_path)
        np.testing.assert_array_equal(decode_mask(mask), BOX, err_msg=str(form))


def test_several_polygons_and_several_ids_are_united(tmp_path):
    mask = read_mask([*POLYGON_OF_BOX, [0, 0, 4, 0, 4, 4, 0, 4], [0, 0, 4, 0, 4, 2, 0, 2]], SIZE, tmp_path)
    expected = BOX.copy()
    expected[:4, :4] = True
    np.testing.assert_array_equal(decode_mask(mask), expected)
    labels = np.zeros(SIZE, np.uint8)
    labels[0, :5], labels[1, :5], labels[2, :5] = 1, 2, 3
    save_png(tmp_path / "labels.png", labels)
    mask = read_mask({"path": "labels.png", "ids": [1, 3]}, SIZE, tmp_path)
    np.testing.assert_array_equal(decode_mask(mask), np.isin(labels, [1, 3]))


@pytest.mark.parametrize(
    "empty", [None, [], encode_mask(np.zeros(SIZE, np.bool_)), "empty.png", {"path": "empty.png", "ids": [7]}]
)
def test_an_empty_mask_is_none_whatever_its_form(empty, tmp_path):
    save_png(tmp_path / "empty.png", np.zeros(SIZE, np.uint8))
    assert read_mask(empty, SIZE, tmp_path) is None


def write_png(path, width, height, num_bits, rows):
    """A grey PNG whose header need not be true."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, num_bits, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def grey_of_2_bits(path):
    write_png(path, 96, 64, 2, b"".join(b"\0" + bytes(24) for _ in range(64)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "the mask is 7. Give {"),
        ({"size": [64, 96]}, r"the mask is an object with the keys \['size'\]. Give {"),
        ({"size": [64, 96], "counts": "~~"}, "the run lengths cannot be read: "),
        ({"size": [64, 96], "counts": [1, 2]}, "the run lengths cannot be read: .*of type list"),
        ({"size": [64, 96], "counts": "01"}, "the run lengths cannot be read: .*fill 1 pixels"),
        (
            encode_mask(BOX.T.copy()),
            r"the run lengths are 96 x 64 \(height x width\), but the frames of the video are 64",
        ),
        ([1, 2, 3, 4, 5, 6], "the polygon is a flat list"),
        ([[1, 2, 3, 4, 5]], "polygon 0 has 5 numbers, an odd count"),
        ([[1, 2, 3, 4]], "polygon 0 has 2 points; at least 3 are needed"),
        ([[1, 2, 3, 4, 5, 6], "x"], "polygon 1 is 'x', not a list of numbers"),
        ([[1, 2, 3, True, 5, 6]], "polygon 0 holds True, which is no number"),
        ([[1, 2, 97, 4, 5, 6]], r"polygon 0 has the point \(97, 4\), outside the frame, which is 96 wide and 64 high"),
        ([[1, -1, 9, 4, 5, 6]], r"has the point \(1, -1\), outside"),
        ([[5, 5, 9, 9, 7, 7]], "polygon 0 covers no pixel"),
        ("missing.png", "there is no mask at `missing.png`. Paths are relative"),
        ("../up.png", "the path '../up.png' is refused"),
        ("/etc/hostname", "the path '/etc/hostname' is refused"),
        ({"path": 3}, "the path of the mask is 3, not a string"),
        ("small.png", r"the mask `small.png` is 8 x 9 \(height x width\), but the frames of the video are 64 x 96"),
        ("text.png", "the mask `text.png` is not an image that can be read"),
        ("jpeg.png", "the mask `jpeg.png` is a JPEG file, but a PNG is needed"),
        ("two.png", r"the mask `two.png` has 2 values beside 0 \(1, 2\), so it is not clear .* \"ids\": \[1\]"),
        ("colour.png", r"the mask `colour.png` has colours or transparency \(mode RGB\)"),
        ("cutout.png", r"has colours or transparency \(mode RGBA\)"),
        ("coarse.png", "the mask `coarse.png` is grey with fewer than 8 bits"),
        ({"path": "two.png", "ids": []}, r"`ids` is \[\]; a list of pixel values from 1 on is needed"),
        ({"path": "two.png", "ids": [0]}, r"`ids` is \[0\]"),
        ({"path": "two.png", "ids": [True]}, r"`ids` is \[True\]"),
        ({"path": "two.png", "ids": 2}, "`ids` is 2"),
    ],
)
def test_a_mask_that_is_wrong_or_unclear_is_refused(value, message, tmp_path):
    labels = np.zeros(SIZE, np.uint8)
    labels[0, 0], labels[1, 1] = 1, 2
    save_png(tmp_path / "two.png", labels)
    save_png(tmp_path / "small.png", np.zeros((8, 9), np.uint8))
    save_png(tmp_path / "colour.png", np.dstack([labels, labels * 2, labels]))
    save_png(tmp_path / "cutout.png", np.dstack([labels, labels, labels, labels]))
    Image.fromarray(labels).save(tmp_path / "jpeg.png", format="JPEG")
    (tmp_path / "text.png").write_text("no image")
    grey_of_2_bits(tmp_path / "coarse.png")
    with pytest.raises(ValueError, match=message):
        read_mask(value, SIZE, tmp_path)


# The builder


def own(folder, config, cache, split="train", **options):
    return prepared(OwnData, config, folder, cache, split, **options)


def test_rows_hold_what_the_lines_say(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    write_lines(
        data,
        [
            line(masks={"7": RLE_OF_BOX, "2": POLYGON_OF_BOX, "4": None}),
            line(video="walk/", expression="who walks?", type_id=1, expression_id="a-1", explanation="It has legs."),
            line(expression="the elephant", type_id=2, masks={}),
            line(video="still.jpg", expression="It", masks={"0": []}, type_id=2, answer="Nothing of that kind."),
            line(video="./clip.mp4", expression="second", answer="Sure, [SEG]."),
        ],
    )
    write_lines(data, [{"video": "walk", "expression": "the box"}], "valid.jsonl")
    rows = own(data, "expressions", cache)
    assert rows["dataset"] == ["own_data"] * 5
    assert rows["video_id"] == ["clip.mp4", "walk", "clip.mp4", "still.jpg", "clip.mp4"]
    assert rows["expression_id"] == ["0", "a-1", "1", "0", "2"]
    assert rows["type_id"] == [0, 1, 2, 2, 0]
    assert rows["annotated"] == [[2, 4, 7], [0], list(range(12)), [0], [0]]
    assert rows["anno_ids"] == [["clip.mp4:0"], ["walk:a-1"], [], [], ["clip.mp4:2"]]
    assert rows["answer"] == [None, None, None, "Nothing of that kind.", "Sure, [SEG]."]
    assert rows["explanation"] == [None, "It has legs.", None, None, None]
    assert rows["frames"][0] == [f"clip.mp4#{number}" for number in range(12)]
    assert rows["frames"][1] == [f"walk/frame{number}.png" for number in range(1, 13)]
    assert rows["frames"][3] == ["still.jpg"]
    assert {(row["height"], row["width"]) for row in rows} == {SIZE}

    masks = own(data, "masks", cache)
    assert masks["anno_id"] == ["clip.mp4:0", "walk:a-1", "clip.mp4:2"]
    assert [index for index, rle in enumerate(masks[0]["rle"]) if rle] == [2, 7]
    expected = np.zeros((12, *SIZE), np.bool_)
    expected[[2, 7]] = BOX
    np.testing.assert_array_equal(decode_masks(masks[0]["rle"]), expected)

    videos = own(data, "videos", cache)
    assert videos["video_id"] == ["clip.mp4", "walk", "still.jpg"]
    assert videos[0]["frames"] == rows[0]["frames"] and videos[0]["foreground_rle"] == []

    (unknown,) = own(data, "expressions", cache, "valid")
    assert (unknown["annotated"], unknown["anno_ids"], unknown["type_id"]) == ([], [], 0)
    with pytest.raises(ValueError, match='Unknown split "valid"'):  # nothing is known there
        own(data, "masks", cache, "valid")
    streamed = list(OwnData("expressions", data_dir=data).as_streaming_dataset("train"))
    assert streamed == list(rows)


def test_data_to_predict_on_needs_no_masks(data, tmp_path):
    write_lines(data, [{"video": "walk", "expression": "the box"}], "test.jsonl")
    assert len(own(data, "expressions", tmp_path / "cache", "test")) == 1
    with refused("no line of any file has a mask"):
        own(data, "masks", tmp_path / "cache", "test")


def test_the_frames_named_are_those_of_the_video(data, tmp_path_factory):
    from tests.media import read_code

    write_lines(data, [line(), line(video="walk"), line(video="still.jpg")])
    rows = own(data, "expressions", tmp_path_factory.mktemp("cache"))
    store = FrameStore(data)
    for row, numbers in zip(rows, [range(12), range(12), [3]], strict=True):
        assert [read_code(frame) for frame in store.read(row["frames"])] == list(numbers)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"video": ', "line 1: the line is not JSON"),
        ("[" * 100_000, "line 1: the line is nested too deeply"),
        ('{"video": "stills/a.jpg", "expression": "x", "masks": [1]}', "`masks` is of type list"),
        ("", "train.jsonl: the file is empty"),
    ],
)
def test_masks_too_say_what_is_wrong_with_the_only_line(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    (tmp_path / "stills").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "stills/a.jpg")
    with refused(message):
        own(tmp_path, "masks", tmp_path / "cache")


def test_images_made_to_fill_the_memory_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    write_png(tmp_path / "huge.png", 60_000, 60_000, 8, b"")
    write_lines(
        tmp_path,
        [
            {"video": "huge.png", "expression": "x", "masks": {"0": None}},
            {"video": "a.jpg", "expression": "y", "masks": {"0": "huge.png"}},
            {"video": "a.jpg", "expression": "z", "masks": {"0": [[10**400, 1, 2, 3, 4, 5]]}},
        ],
    )
    first, second, third = check_own_data(tmp_path)
    assert "3600000000 pixels" in first.message and "3600000000 pixels" in second.message
    assert "outside the frame" in third.message


def test_a_link_that_leads_nowhere_is_told_like_any_missing_file(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "a.jpg")
    write_lines(tmp_path, [{"video": "a.jpg", "expression": "x", "masks": {"0": None}}])
    with refused("line 1, video 'a.jpg', expression '0': there is no video at `a.jpg`"):
        own(tmp_path, "expressions", tmp_path / "cache")


def test_a_changed_line_mask_or_frame_is_read_again(data, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    save_png(data / "mask.png", BOX.astype(np.uint8))
    (data / "new").mkdir()
    for number in range(2):
        Image.fromarray(test_frame(number, *SIZE)).save(data / "new" / f"{number}.png")
    write_lines(data, [line(video="new", masks={"1": "mask.png"})])
    first = own(data, "masks", cache)
    save_png(data / "mask.png", BOX[::-1].astype(np.uint8))
    second = own(data, "masks", cache)
    assert first[0]["rle"][1] != second[0]["rle"][1]
    Image.fromarray(test_frame(2, *SIZE)).save(data / "new" / "2.png")
    assert len(own(data, "masks", cache)[0]["rle"]) == 3
    write_lines(data, [line(video="new", masks={"1": "mask.png"}), line(video="new", expression="other")])
    assert len(own(data, "masks", cache)) == 2


def test_training_takes_its_targets_from_annotated_frames_alone(data, tmp_path):
    masks = {"2": RLE_OF_BOX, "4": None, "7": POLYGON_OF_BOX}
    write_lines(data, [line(masks=masks), line(video="walk", expression="no such thing", type_id=2, masks={})])
    rows, rles = (own(data, config, tmp_path / "cache") for config in ("expressions", "masks"))
    source = ExpressionSource("own", rows, rles, data, SamplingRecipe(foreign_probability=0))
    targets: dict[str, set[int]] = {"clip.mp4": set(), "walk": set()}
    for draw in range(80):
        sample = source.sample(random_generator(0, draw), draw)
        (conversation,) = sample.conversations
        expected = BOX if sample.video_id == "clip.mp4" and sample.target_idx != 4 else np.zeros_like(BOX)
        np.testing.assert_array_equal(conversation.masks, expected[None])
        targets[sample.video_id].add(sample.target_idx)
    assert targets == {"clip.mp4": {2, 4, 7}, "walk": set(range(12))}


def test_the_builder_refuses_what_the_check_lists_and_can_skip_it(data, tmp_path_factory, caplog):
    cache = tmp_path_factory.mktemp("cache")
    write_lines(data, [line(), line(expression="late", masks={"12": None, "0": 5}), line(expression="third")])
    text = r"train.jsonl, line 2, video 'clip.mp4', expression '1': frame 12 is beyond the video, .* from 0. \(1 more"
    with refused(text):
        own(data, "masks", cache)
    rows = own(data, "expressions", cache, on_error="skip")
    # The line that is left out keeps its number: ids do not depend on what else is in order.
    assert rows["expression_id"] == ["0", "2"]
    assert rows["anno_ids"] == [[name] for name in own(data, "masks", cache, on_error="skip")["anno_id"]]
    assert "1 rows were left out" in caplog.text and "expression '1': frame 12" in caplog.text


def test_a_folder_without_lines_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no JSONL file. Write one for each split, `train.jsonl`"):
        own(tmp_path, "expressions", tmp_path / "cache")
    with pytest.raises(FileNotFoundError, match="holds no JSONL file"):
        check_own_data(tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        check_own_data(tmp_path / "nowhere")
    write_lines(tmp_path, ["", "  "])
    with refused("train.jsonl: the file is empty"):
        own(tmp_path, "expressions", tmp_path / "cache")
    (tmp_path / "train.jsonl").rename(tmp_path / "my-data.jsonl")
    with refused("gives a split the name 'my-data'"):
        own(tmp_path, "expressions", tmp_path / "cache")
    assert messages(tmp_path) == [
        "my-data.jsonl: the file gives a split the name 'my-data'; letters, digits and _ are allowed, and not "
        '"all". Rename the file.'
    ]


# The check


def test_good_data_has_no_problem(data):
    write_lines(data, [line(), "", line(video="walk"), line(expression="none", type_id=2, masks={"3": []})])
    write_lines(data, ["﻿" + json.dumps({"video": "walk", "expression": "the box"})], "valid.jsonl")
    report = inspect_own_data(data, decode=True)
    assert report.problems == []
    assert report.summary() == (
        "4 expressions in order (train 3, valid 1; 3 referring, 0 reasoning, 1 no such object) of 2 videos, "
        "2 masks and 12 frames without the object; 0 problems"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"video": "clip.mp4"', "the line is not JSON: "),
        ("[]", "the line is no JSON object"),
        ('{"video": "walk", "video": "clip.mp4"}', "the key `video` stands there twice"),
        ('{"video": NaN}', "NaN is no number that JSON knows"),
        ("[" * 100_000, "the line is nested too deeply"),
        (line(expresion="x"), "unknown key `expresion`: did you mean `expression`?"),
        (line(foo=1), "unknown key `foo`: known are video, expression, "),
        ({"expression": "x"}, "`video` is missing"),
        (line(video=3), "`video` is 3, not a string"),
        (line(video="no.mp4"), "there is no video at `no.mp4`. Paths are relative to the folder of the data"),
        (line(video="/clip.mp4"), "the path '/clip.mp4' is refused"),
        (line(video="../clip.mp4"), "the path '../clip.mp4' is refused"),
        (line(video="text.mp4"), "is not a video in a known format"),
        (line(video="cut.mp4"), "is truncated"),
        (line(video="nothing"), "holds no images"),
        (line(video="mixed"), "is 32 x 48 (height x width), but the first frame 64 x 96"),
        (line(video="turned.jpg"), "asks by EXIF to be turned"),
        (line(video="deep.png"), "has more than 8 bits per channel"),
        (line(video="text.png"), "is not an image that can be read"),
        ({"video": "clip.mp4", "type_id": 2}, "`expression` is missing"),
        (line(expression=" \t"), "`expression` is empty"),
        (line(expression=None), "`expression` is None, not a string"),
        (line(expression="[SEG] of <image>"), "`expression` holds [SEG], <image>, which the model reads as a special"),
        (line(expression="\ud800"), "`expression` holds half a character"),
        (line(type_id=3), "`type_id` is 3; 0 (referring), 1 (reasoning) or 2 (no such object) is needed"),
        (line(type_id=True), "`type_id` is True; 0"),
        (line(type_id="0"), "`type_id` is '0'; 0"),
        (line(type_id=2), "`type_id` is 2, no such object, but the mask of frame 0 is not empty"),
        (line(masks={"3": [], "5": None}), "every mask is empty, but `type_id` is 0: an object"),
        (line(masks={}), "`masks` is missing or empty, so nothing can be learnt"),
        (line(masks=[RLE_OF_BOX]), '`masks` is of type list; {"<frame number>": mask} is needed'),
        (line(masks={"12": RLE_OF_BOX}), "frame 12 is beyond the video, which has 12 frames, numbered from 0"),
        (line(masks={"-1": RLE_OF_BOX}), "`masks` has the key '-1'; frames are numbered from 0"),
        (line(masks={"00003": RLE_OF_BOX}), "`masks` has the key '00003'; frames are numbered from 0"),
        (line(masks={"3": [[1, 2, 3]]}), "frame 3: polygon 0 has 3 numbers, an odd count"),
        (line(masks={"3": "no.png"}), "frame 3: there is no mask at `no.png`"),
        (line(expression_id="a/b"), "`expression_id` is 'a/b'; letters, digits"),
        (line(expression_id=".."), "`expression_id` is '..'; letters, digits"),
        (line(expression_id=1.5), "`expression_id` is 1.5; letters, digits"),
        (line(answer="It is here."), "`answer` has 0 times [SEG]; the place of the mask is needed once"),
        (line(answer="[SEG] [SEG]"), "`answer` has 2 times [SEG]"),
        (line(answer="</s> [SEG]"), "`answer` holds </s>, which the model reads as a special token"),
        (line(explanation="[SEG]"), "`explanation` holds [SEG]"),
        (line(answer="[SEG]", explanation="So."), "both `answer` and `explanation` are given"),
    ],
)
def test_each_problem_is_told_with_file_and_line(row, message, data):
    (data / "text.mp4").write_text("no video at all")
    (data / "text.png").write_text("no image")
    (data / "nothing").mkdir()
    cut_off(data / "clip.mp4", data / "cut.mp4", 0.6)
    (data / "mixed").mkdir()
    Image.fromarray(test_frame(0, *SIZE)).save(data / "mixed" / "0.png")
    Image.fromarray(test_frame(1, 32, 48)).save(data / "mixed" / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(test_frame(0, *SIZE)).save(data / "turned.jpg", exif=exif)
    Image.fromarray(np.zeros(SIZE, np.uint16)).save(data / "deep.png")
    write_lines(data, [line(expression="a good one"), "", row])
    (found,) = messages(data)
    assert found.startswith("train.jsonl:3: ") and message in found


def test_all_problems_are_listed_not_just_the_first(data):
    write_lines(
        data,
        [
            {"video": "no.mp4", "expression": "", "type_id": 9, "mask": {}},
            line(masks={"99": None, "1": "no.png", "2": RLE_OF_BOX}, type_id=2),
            line(video="no.mp4"),
        ],
    )
    write_lines(data, [], "valid.jsonl")
    (data / "test.jsonl").write_bytes(b'{"video": "\xff"}\n' + json.dumps(line()).encode() + b"\n")
    found = messages(data)
    assert [text.split(": ")[0] for text in found] == [
        "test.jsonl:1",
        *["train.jsonl:1"] * 4,
        *["train.jsonl:2"] * 3,
        "train.jsonl:3",
        "valid.jsonl",
    ]
    assert "the line is not UTF-8 (byte 11)" in found[0]
    assert "unknown key `mask`: did you mean `masks`?" in found[1]
    assert found[-1] == "valid.jsonl: the file is empty. Write a JSON object a line, or remove it."


def test_repeated_lines_are_told_with_the_first_one(data):
    write_lines(data, [line(), line(video="walk"), line(expression="The  BOX"), line(expression_id=0, expression="b")])
    assert messages(data) == [
        "train.jsonl:3: the expression 'The  BOX' was given in line 1 already for `clip.mp4`. One line holds all "
        "frames and all objects that an expression means.",
        "train.jsonl:4: the id '0' was given in line 1 already to an expression of `clip.mp4`.",
    ]


def test_damage_inside_a_video_is_found_by_decoding(data):
    clip = write_constant_rate(data / "whole.mp4", 60, size=SIZE)
    damage_packet(clip, data / "damaged.mp4", 20)
    write_lines(data, [line(video="damaged.mp4"), line(video="damaged.mp4", expression="b"), line()])
    assert messages(data) == []
    found = [str(problem) for problem in check_own_data(data, decode=True)]
    assert [text.split(": ")[0] for text in found] == ["train.jsonl:1", "train.jsonl:2"]
    assert all("damaged" in text for text in found)


def test_the_preview_shows_masks_over_their_frames(data, tmp_path):
    Image.fromarray(np.zeros((100, 50, 3), np.uint8)).save(data / "tall.png")
    tall = np.zeros((100, 50), np.bool_)
    tall[:, 25:] = True
    write_lines(data, [line(masks={"5": RLE_OF_BOX}), line(video="tall.png", masks={"0": encode_mask(tall)})])
    report = inspect_own_data(data)
    assert draw_preview(report, data, tmp_path / "sheet.png") == 2
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (258, 2 * 320 + 4, 3)
    # The first frame is 64 x 96, drawn 213 x 320: its box covers x from 100 to 200, y from 33 to 67.
    orange = np.all(sheet == (213, 94, 0), axis=2)  # contours
    rows, columns = np.nonzero(orange[:, :320])
    assert abs(rows.min() - 33) <= 1 and abs(rows.max() - 66) <= 1
    assert abs(columns.min() - 100) <= 1 and abs(columns.max() - 199) <= 1
    # The second is 240 x 120, its right half the object, half covered by the colour.
    assert tuple(sheet[120, 324 + 90]) == (106, 47, 0) and tuple(sheet[120, 324 + 30]) == (0, 0, 0)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_examples_stay_few_and_spread(data):
    write_lines(data, [line(expression=f"box {number}") for number in range(200)])
    numbers = [number for _, number, _ in inspect_own_data(data).examples]
    assert numbers == list(range(1, 201, 4))


def test_a_preview_of_nothing_writes_nothing(data, tmp_path):
    write_lines(data, [{"video": "walk", "expression": "x"}], "valid.jsonl")
    assert draw_preview(inspect_own_data(data), data, tmp_path / "out.jpg") == 0
    assert not (tmp_path / "out.jpg").exists()
    with pytest.raises(ValueError, match="must end in .jpg or .png"):
        draw_preview(inspect_own_data(data), data, Path("out.pdf"))
