"""ReVOS on a small tree in its published layout: rows, caches, processes, and what is refused."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.datasets_scripts.trees import (
    FRAMES,
    REVOS_TRAIN,
    SIZE,
    box,
    object_masks,
    revos_masks,
    rles,
    write_revos,
)
from visa_hf.datasets_scripts import AnnotationError, ReVOS, mask_files
from visa_hf.datasets_scripts.frame_store import FrameStore
from visa_hf.datasets_scripts.image_files import image_size
from visa_hf.rle import decode_mask, encode_mask

Prepare = Callable[..., ReVOS]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_revos(tmp_path / "ReVOS")


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    def run(root: Path, config: str = "expressions", num_proc: int | None = None, **kwargs: Any) -> ReVOS:
        builder = ReVOS(config, data_dir=root, cache_dir=tmp_path / "cache", **kwargs)
        builder.download_and_prepare(num_proc=num_proc)
        return builder

    return run


def change_train(root: Path, change: Callable[[Any], Any]) -> None:
    path = root / "meta_expressions_train_.json"
    meta = json.loads(path.read_text())
    change(meta["videos"])
    path.write_text(json.dumps(meta))


def change_masks(root: Path, change: Callable[[Any], Any]) -> None:
    path = root / "mask_dict.json"
    masks = json.loads(path.read_text())
    change(masks)
    path.write_text(json.dumps(masks))


def test_a_row_per_expression_says_all_that_is_published(root: Path, prepare: Prepare) -> None:
    rows = prepare(root).as_dataset(split="train")
    assert rows[1] == {
        "dataset": "revos",
        "video_id": "sea/turtles",
        "expression_id": "1",
        "expression": "what swims?",
        "type_id": 1,
        "anno_ids": ["10", "11"],
        "frames": [f"JPEGImages/sea/turtles/{name}.jpg" for name in FRAMES],
        "height": SIZE[0],
        "width": SIZE[1],
    }
    assert rows["expression_id"] == ["0", "1", "2", "0"]
    assert rows["type_id"] == [0, 1, 2, 0]
    assert rows[2]["anno_ids"] == []
    assert len(rows[3]["frames"]) == 1


def test_a_row_per_object_holds_its_masks_in_every_frame(root: Path, prepare: Prepare) -> None:
    builder = prepare(root, "masks")
    rows = builder.as_dataset(split="train")
    assert rows["anno_id"] == ["10", "11", "12"]
    assert rows["video_id"] == ["sea/turtles", "sea/turtles", "still"]
    assert rows[0]["rle"] == rles(object_masks(0, 3, hidden=[1]))
    np.testing.assert_array_equal(decode_mask(rows[1]["rle"][2]), box(2, 4))
    assert builder.as_dataset(split="valid")[0]["rle"] == [None, None, None]


def test_a_row_per_video_holds_the_foreground_where_it_is_published(root: Path, prepare: Prepare) -> None:
    builder = prepare(root, "videos")
    train, valid = builder.as_dataset(split="train"), builder.as_dataset(split="valid")
    assert train["video_id"] == ["sea/turtles", "still"]
    assert train[0]["foreground_rle"] == train[0]["foreground_ratio"] == []
    row = valid[0]
    assert row["foreground_ratio"] == [np.float32(0.1), 0.25, 0]
    assert row["foreground_rle"][1] == encode_mask(box(2, 2) | box(2, 9))
    assert (row["height"], row["width"]) == SIZE


@pytest.mark.parametrize("config", ["expressions", "masks", "videos"])
def test_two_processes_and_streaming_give_the_rows_of_one_process(root: Path, tmp_path: Path, config: str) -> None:
    alone = ReVOS(config, data_dir=root, cache_dir=tmp_path / "one")
    alone.download_and_prepare()
    shared = ReVOS(config, data_dir=root, cache_dir=tmp_path / "two")
    shared.download_and_prepare(num_proc=2)
    expected = alone.as_dataset(split="train").to_list()
    assert shared.as_dataset(split="train").to_list() == expected
    stream = ReVOS(config, data_dir=root, cache_dir=tmp_path / "three").as_streaming_dataset(split="train")
    assert list(stream) == expected
    assert stream.num_shards == len(REVOS_TRAIN)


def test_every_named_mask_is_there(root: Path, prepare: Prepare) -> None:
    for split in ("train", "valid"):
        expressions = prepare(root).as_dataset(split=split)
        masks = prepare(root, "masks").as_dataset(split=split)
        assert {anno_id for row in expressions["anno_ids"] for anno_id in row} <= set(masks["anno_id"])


def test_a_changed_file_is_never_answered_from_a_stale_cache(root: Path, prepare: Prepare) -> None:
    assert prepare(root).as_dataset(split="train")[0]["expression"] == "the left turtle"
    path = root / "meta_expressions_train_.json"
    before = path.stat()
    path.write_text(path.read_text().replace("the left turtle", "the best turtle"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    assert prepare(root).as_dataset(split="train")[0]["expression"] == "the best turtle"


def test_masks_that_change_are_read_again_for_expressions_too(root: Path, prepare: Prepare) -> None:
    prepare(root)
    change_masks(root, lambda masks: masks.pop("11"))
    with pytest.raises(AnnotationError, match="'11': it is named by an expression, but has no masks here"):
        prepare(root)


def test_an_image_that_is_gone_is_noticed(root: Path, prepare: Prepare) -> None:
    prepare(root)
    (root / "JPEGImages/birds/00001.jpg").unlink()
    with pytest.raises(AnnotationError, match=r"video 'birds', frame '00001': the image .*00001.jpg is missing"):
        prepare(root)


def test_an_unchanged_folder_is_answered_from_the_cache(root: Path, prepare: Prepare) -> None:
    first, again = prepare(root), ReVOS(data_dir=str(root) + "/.", cache_dir=root.parent / "cache")
    assert again.cache_dir == first.cache_dir
    assert again.as_dataset(split="train").to_list() == first.as_dataset(split="train").to_list()


def test_prepared_frames_stay_valid_when_the_folder_moves(root: Path, prepare: Prepare) -> None:
    frame = prepare(root).as_dataset(split="train")[0]["frames"][0]
    moved = shutil.move(root, root.parent / "elsewhere")
    assert (Path(moved) / frame).is_file()


def test_half_of_the_splits_is_enough(root: Path, prepare: Prepare) -> None:
    (root / "meta_expressions_train_.json").unlink()
    assert list(prepare(root).as_dataset()) == ["valid"]


def test_missing_files_are_named_with_the_layout(root: Path, tmp_path: Path, prepare: Prepare) -> None:
    with pytest.raises(ValueError, match="ReVOS needs `data_dir`"):
        ReVOS()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere(.|\n)*mask_dict.json"):
        ReVOS(data_dir=tmp_path / "nowhere")
    (root / "mask_dict.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"ReVOS: mask_dict.json not found(.|\n)*meta_expressions_train_.json"):
        prepare(root)


def _rename(videos: Any, new: str) -> None:
    videos[new] = videos.pop("still")


BAD_LISTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "digits that are none": (
        lambda v: v["still"].update(frames=["²", "1"]),
        "`frames` are not in time order",
    ),
    "absolute": (lambda v: _rename(v, "/etc"), r"video '/etc': the path '/etc' is refused"),
    "upwards": (lambda v: _rename(v, "a/../../b"), r"the path 'a/../../b' is refused"),
    "frame upwards": (
        lambda v: v["still"].update(frames=["../00000"]),
        r"train_.json, video 'still', frame '../00000': the path '../00000' is refused",
    ),
    "frames": (lambda v: v["still"].update(frames=[]), "video 'still': `frames` is missing or empty"),
    "frames twice": (
        lambda v: v["sea/turtles"]["frames"].append("00002"),
        "video 'sea/turtles': a frame is listed twice",
    ),
    "order": (lambda v: v["sea/turtles"]["frames"].reverse(), "`frames` are not in time order"),
    "size": (
        lambda v: v["still"].update(height=99),
        r"video 'still': the annotation says \[99, 16\] .* has \[12, 16\]",
    ),
    "text": (lambda v: v["still"]["expressions"]["0"].update(exp=" "), "expression '0': `exp` is ' '; text is needed"),
    "surrogate": (lambda v: v["still"]["expressions"]["0"].update(exp="a\ud800"), "which is not valid Unicode"),
    "type": (lambda v: v["still"]["expressions"]["0"].update(type_id=3), "expression '0': `type_id` is 3"),
    "type text": (lambda v: v["still"]["expressions"]["0"].update(type_id="0"), "`type_id` is '0'"),
    "nothing": (lambda v: v["still"]["expressions"]["0"].update(anno_id=[]), "no object is named"),
    "id": (lambda v: v["still"]["expressions"]["0"].update(anno_id=[1.5]), "`anno_id` is 1.5; text is needed"),
    "unknown": (
        lambda v: v["still"]["expressions"]["0"].update(anno_id=[7]),
        "mask_dict.json, video 'still', annotation '7': it is named by an expression, but has no masks here",
    ),
    "two videos": (
        lambda v: v["still"]["expressions"]["0"].update(anno_id=[10]),
        "the video 'still' names the same annotation",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_refused_with_their_place(root: Path, prepare: Prepare, case: str) -> None:
    change, message = BAD_LISTS[case]
    change_train(root, change)
    with pytest.raises(AnnotationError, match=message):
        prepare(root)
    kept = prepare(root, on_error="skip").as_dataset(split="train")
    bad_video = "sea/turtles" if "turtles" in message or case in ("order", "two videos") else "still"
    assert bad_video not in kept["video_id"] or case == "two videos"
    assert len(kept) >= 1


BAD_MASKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "size": (
        lambda m: m["11"].__setitem__(2, encode_mask(box(0, 0, (16, 12)))),
        r"mask_dict.json, video 'sea/turtles', annotation '11', frame '00002': the mask has size \[16, 12\] \(H, W\), "
        r"but the frame has \[12, 16\]",
    ),
    "short": (lambda m: m["11"].pop(), "annotation '11': there are 2 masks for 3 frames"),
    "long": (lambda m: m["11"].append(None), "annotation '11': there are 4 masks for 3 frames"),
    "no list": (lambda m: m.update({"11": "x"}), "annotation '11': the masks are 'x'; a list"),
    "no mask": (lambda m: m["11"].__setitem__(0, 5), "frame '00000': the mask is 5; a dict"),
    "area": (lambda m: m["11"][1].update(counts="1"), r"frame '00001': The mask's `counts` fill 1 pixels"),
    "cut": (lambda m: m["11"][1].update(counts="P"), r"frame '00001': .*end in the middle of a number"),
}


@pytest.mark.parametrize("case", BAD_MASKS)
@pytest.mark.parametrize("config", ["expressions", "masks"])
def test_bad_masks_are_refused_with_their_place(root: Path, prepare: Prepare, config: str, case: str) -> None:
    change, message = BAD_MASKS[case]
    change_masks(root, change)
    with pytest.raises(AnnotationError, match=message):
        prepare(root, config)


@pytest.mark.parametrize("num_proc", [None, 2])
def test_skipped_rows_are_counted_and_told(
    root: Path, prepare: Prepare, caplog: pytest.LogCaptureFixture, num_proc: int | None
) -> None:
    change_masks(root, lambda masks: masks["11"].pop())
    (root / "JPEGImages/still/00000.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING, logger="visa_hf"):
        expressions = prepare(root, num_proc=num_proc, on_error="skip").as_dataset(split="train")
        told = [record.message for record in caplog.records if record.name.startswith("visa_hf")]
    assert expressions["expression_id"] == ["0", "2"]
    assert len(told) == 1
    assert "ReVOS: 2 rows were left out" in told[0]
    assert "there are 2 masks for 3 frames" in told[0]
    assert "video 'still', frame 'JPEGImages/still/00000.jpg': the image cannot be read" in told[0]
    masks = prepare(root, "masks", num_proc=num_proc, on_error="skip").as_dataset(split="train")
    assert masks["anno_id"] == ["10"]


def test_streaming_tells_of_each_row_that_is_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_train(root, lambda videos: videos["still"]["expressions"]["0"].pop("exp"))
    builder = ReVOS(data_dir=root, cache_dir=root.parent / "cache", on_error="skip")
    with caplog.at_level(logging.WARNING, logger="visa_hf"):
        assert len(list(builder.as_streaming_dataset(split="train"))) == 3
    assert "a row is left out" in caplog.text and "video 'still', expression '0'" in caplog.text


def test_an_error_in_a_worker_arrives_with_its_text(root: Path, prepare: Prepare) -> None:
    change_masks(root, lambda masks: masks["11"].pop())
    with pytest.raises(AnnotationError, match="annotation '11': there are 2 masks for 3 frames"):
        prepare(root, "masks", num_proc=2)


def test_a_failed_preparation_leaves_nothing_that_is_taken_for_whole(root: Path, prepare: Prepare) -> None:
    whole = (root / "mask_dict.json").read_bytes()
    change_masks(root, lambda masks: masks["20"].pop())
    with pytest.raises(AnnotationError):
        prepare(root, "masks")
    with pytest.raises(FileNotFoundError):
        ReVOS("masks", data_dir=root, cache_dir=root.parent / "cache").as_dataset(split="train")
    (root / "mask_dict.json").write_bytes(whole)
    assert len(prepare(root, "masks").as_dataset(split="valid")) == 1


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("meta_expressions_train_.json", '{"videos": {', r"train_.json, line 1: is not valid JSON"),
        ("meta_expressions_train_.json", '{"video": {}}', "has no `videos`"),
        ("meta_expressions_train_.json", '{"videos": {"a": {}, "a": {}}}', "the key 'a' occurs twice .*`videos`"),
        (
            "meta_expressions_train_.json",
            '{"videos": {"a": {"expressions": {"0": {}, "0": {}}}}}',
            "the key '0' occurs twice in the object at `videos.a.expressions`",
        ),
        ("mask_dict.json", '{"10": [null', r"mask_dict.json: is not valid JSON"),
        ("mask_dict.json", '{"10": [], "10": []}', r"mask_dict.json: the key '10' occurs twice"),
        ("mask_dict.json", "[]", r"holds no JSON object"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_broken_files_are_refused(
    root: Path, prepare: Prepare, file: str, text: str, message: str, on_error: str
) -> None:
    (root / file).write_text(text)
    for config in ("expressions", "masks"):
        with pytest.raises(AnnotationError, match=message):
            prepare(root, config, on_error=on_error)


def test_frames_of_several_sizes_are_refused(root: Path, prepare: Prepare) -> None:
    (root / "JPEGImages/birds/00002.jpg").write_bytes((root / "JPEGImages/birds/00002.jpg").read_bytes()[:20])
    with pytest.raises(AnnotationError, match=r"frame 'JPEGImages/birds/00002.jpg': the image cannot be read"):
        prepare(root, "videos")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_and_masks_are_those_of_the_upright_picture(
    root: Path, prepare: Prepare, tmp_path: Path, orientation: int
) -> None:
    """Builders, the other sets' reader of sizes, and the store that decodes frames follow one rule."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = SIZE if orientation < 5 else SIZE[::-1]
    frame = "JPEGImages/birds/00000.jpg"
    for suffix in ("jpg", "png"):
        name = f"JPEGImages/birds/x.{suffix}"
        Image.new("RGB", (stored[1], stored[0])).save(root / name, exif=exif)
        assert image_size(root, name) == SIZE
        assert FrameStore(root).read([name])[0].shape == (*SIZE, 3)
    for name in FRAMES:
        shutil.copy(root / "JPEGImages/birds/x.jpg", root / f"JPEGImages/birds/{name}.jpg")
    row = prepare(root, "videos").as_dataset(split="valid")[0]
    assert (row["height"], row["width"]) == FrameStore(root).read([frame])[0].shape[:2] == SIZE
    assert prepare(root, "masks").as_dataset(split="valid").num_rows == 1


def test_masks_are_never_all_in_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is parsed at once is the masks of one object."""
    sizes: list[int] = []

    def loads(text: bytes) -> Any:
        sizes.append(len(text))
        return json.loads(text)

    monkeypatch.setattr(mask_files, "json", SimpleNamespace(loads=loads))
    ReVOS("masks", data_dir=root, cache_dir=root.parent / "cache").download_and_prepare()
    assert len(sizes) == 4
    assert max(sizes) <= max(len(json.dumps(masks)) for masks in revos_masks().values())


def test_unknown_choices_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="BuilderConfig 'mask' not found"):
        ReVOS("mask", data_dir=root)
    with pytest.raises(ValueError, match='`on_error` is \'ignore\'; "raise" or "skip" is needed'):
        ReVOS(data_dir=root, on_error="ignore")
