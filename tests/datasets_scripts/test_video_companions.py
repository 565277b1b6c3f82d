"""MeViS, LV-VIS, Ref-YouTube-VOS and Ref-DAVIS17 on small trees in their published layouts."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.datasets_scripts.trees import (
    FRAMES,
    SIZE,
    box,
    object_masks,
    rles,
    separate_objects,
    write_lv_vis,
    write_mevis,
    write_ref_davis,
    write_ref_youtube_vos,
)
from visa_hf.datasets_scripts import LVVIS, AnnotationError, MeViS, RefDAVIS17, RefYoutubeVOS, VisaDatasetBuilder
from visa_hf.datasets_scripts.ref_davis import annotator_of

Prepare = Callable[..., Any]


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """Prepare a set and return its splits."""

    def run(builder: type[VisaDatasetBuilder], root: Path, config: str = "expressions", **kwargs: Any) -> Any:
        made = builder(config, data_dir=root, cache_dir=tmp_path / "cache", **kwargs)
        made.download_and_prepare()
        return made.as_dataset()

    return run


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    edit(content["videos"])
    path.write_text(json.dumps(content))


WRITERS: list[tuple[type[VisaDatasetBuilder], Callable[[Path], Path]]] = [
    (MeViS, write_mevis),
    (LVVIS, write_lv_vis),
    (RefYoutubeVOS, write_ref_youtube_vos),
    (RefYoutubeVOS, lambda root: write_ref_youtube_vos(root, with_pickle=True)),
    (RefDAVIS17, write_ref_davis),
    (RefDAVIS17, lambda root: write_ref_davis(root, with_pickle=True)),
]


@pytest.mark.parametrize(("builder", "write"), WRITERS)
def test_processes_and_streams_agree_and_every_named_mask_is_there(
    tmp_path: Path, builder: type[VisaDatasetBuilder], write: Callable[[Path], Path]
) -> None:
    root = write(tmp_path / "data")
    rows: dict[str, Any] = {}
    for config in ("expressions", "masks", "videos"):
        alone = builder(config, data_dir=root, cache_dir=tmp_path / "one")
        alone.download_and_prepare()
        rows[config] = {split: dataset.to_list() for split, dataset in alone.as_dataset().items()}
        shared = builder(config, data_dir=root, cache_dir=tmp_path / "two")
        shared.download_and_prepare(num_proc=2)
        assert {split: dataset.to_list() for split, dataset in shared.as_dataset().items()} == rows[config]
        assert {split: list(stream) for split, stream in alone.as_streaming_dataset().items()} == rows[config]
    for split, expressions in rows["expressions"].items():
        masks = {row["anno_id"]: row for row in rows["masks"].get(split, [])}
        assert (root / expressions[0]["frames"][0]).is_file()
        for row in expressions:
            assert row["dataset"] == builder.SHORT_NAME
            assert all(len(masks[anno_id]["rle"]) == len(row["frames"]) for anno_id in row["anno_ids"])
            assert all(masks[anno_id]["video_id"] == row["video_id"] for anno_id in row["anno_ids"])


def test_mevis_expressions_mean_several_objects(tmp_path: Path, prepare: Prepare) -> None:
    root = write_mevis(tmp_path / "mevis")
    expressions, masks = prepare(MeViS, root), prepare(MeViS, root, "masks")
    assert list(expressions) == ["train", "valid_u", "valid"]
    assert list(masks) == ["train", "valid_u"]
    assert expressions["train"][0]["anno_ids"] == ["0", "1"]
    assert expressions["valid_u"][2]["frames"] == ["valid_u/JPEGImages/single/00000.jpg"]
    assert masks["train"][1]["rle"] == rles(object_masks(1, 3, hidden=[0]))
    assert (expressions["train"][0]["height"], expressions["train"][0]["width"]) == SIZE


def test_mevis_valid_has_no_masks(tmp_path: Path, prepare: Prepare) -> None:
    rows = prepare(MeViS, write_mevis(tmp_path / "mevis"))["valid"]
    assert rows[0]["anno_ids"] == [] and rows[0]["type_id"] == 0


def test_a_training_split_without_its_masks_is_refused(tmp_path: Path, prepare: Prepare) -> None:
    root = write_mevis(tmp_path / "mevis")
    (root / "train" / "mask_dict.json").unlink()
    with pytest.raises(FileNotFoundError, match="MeViS: train/mask_dict.json not found"):
        prepare(MeViS, root)
    shutil.rmtree(root / "train")
    assert list(prepare(MeViS, root)) == ["valid_u", "valid"]
    shutil.rmtree(root / "valid_u")
    with pytest.raises(FileNotFoundError, match="has nothing for the configuration `masks`"):
        prepare(MeViS, root, "masks")


def test_lv_vis_names_get_their_spaces_back(tmp_path: Path, prepare: Prepare) -> None:
    assert prepare(LVVIS, write_lv_vis(tmp_path / "lvvis"))["train"]["expression"] == ["polar bear"]


@pytest.mark.parametrize("with_pickle", [False, True])
def test_ref_youtube_vos_objects_are_stored_once(tmp_path: Path, prepare: Prepare, with_pickle: bool) -> None:
    root = write_ref_youtube_vos(tmp_path / "rytvos", with_pickle)
    expressions, masks = prepare(RefYoutubeVOS, root)["train"], prepare(RefYoutubeVOS, root, "masks")["train"]
    assert len(expressions) == 12
    # ids as text, as number, and as a list
    assert [row["anno_ids"] for row in expressions][:4] == [["zebra/1"], ["zebra/2"], ["zebra/2"], ["zebra/1"]]
    found = {row["anno_id"]: row["rle"] for row in masks}
    assert found == {
        "zebra/1": rles(separate_objects(3)[1]),
        "zebra/2": rles(separate_objects(3, hidden=[2])[2]),
        "apple/1": rles(separate_objects(1)[1]),
    }
    assert found["zebra/2"][2] is None


def test_ref_youtube_vos_validation_is_what_is_not_in_test(tmp_path: Path, prepare: Prepare) -> None:
    root = write_ref_youtube_vos(tmp_path / "rytvos")
    rows = prepare(RefYoutubeVOS, root)["valid"]
    assert rows["video_id"] == ["v1", "v2"]
    assert rows["anno_ids"] == [[], []]
    assert list(prepare(RefYoutubeVOS, root, "masks")) == ["train"]
    (root / "meta_expressions/test/meta_expressions.json").unlink()
    with pytest.raises(FileNotFoundError, match="meta_expressions/test/meta_expressions.json not found"):
        prepare(RefYoutubeVOS, root)


@pytest.mark.parametrize("with_pickle", [False, True])
def test_ref_davis_numbers_tell_the_annotator(tmp_path: Path, prepare: Prepare, with_pickle: bool) -> None:
    rows = prepare(RefDAVIS17, write_ref_davis(tmp_path / "davis17", with_pickle))["valid"]
    assert rows["expression_id"] == [str(number) for number in range(8)]
    for row in rows:
        assert row["expression"].endswith(f"annotator {annotator_of(row['expression_id'])}")
    assert rows["anno_ids"] == [["goat-valid/1"]] * 4 + [["goat-valid/2"]] * 4


def test_ref_davis_without_its_four_annotators_is_refused(tmp_path: Path, prepare: Prepare) -> None:
    root = write_ref_davis(tmp_path / "davis17")
    path = root / "meta_expressions/valid/meta_expressions.json"
    change(path, lambda videos: videos["goat-valid"]["expressions"].pop("3"))
    with pytest.raises(AnnotationError, match="video 'goat-valid', expression '0': the video's 7 expressions are not"):
        prepare(RefDAVIS17, root)


def test_a_pickle_of_another_list_of_expressions_is_refused(tmp_path: Path, prepare: Prepare) -> None:
    root = write_ref_youtube_vos(tmp_path / "rytvos", with_pickle=True)
    path = root / "train/mask_dict.pkl"
    masks = pickle.loads(path.read_bytes())  # noqa: S301 - written above
    path.write_bytes(pickle.dumps({**masks, "1": masks["2"], "2": masks["1"], "3": masks["4"], "4": masks["3"]}))
    with pytest.raises(AnnotationError, match="video 'zebra', annotation '[0-9]+': two expressions about the object"):
        prepare(RefYoutubeVOS, root)
    path.write_bytes(pickle.dumps({key: value for key, value in masks.items() if key != "11"}))
    with pytest.raises(AnnotationError, match="mask_dict.pkl, video 'zebra', annotation '11': .* has no masks"):
        prepare(RefYoutubeVOS, root)


class _Harm:
    """A pickle of this makes a folder when it is loaded by the standard unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path, prepare: Prepare, on_error: str) -> None:
    root = write_ref_youtube_vos(tmp_path / "rytvos", with_pickle=True)
    harm = tmp_path / "harm"
    (root / "train/mask_dict.pkl").write_bytes(pickle.dumps({"0": _Harm(harm)}))
    for config in ("expressions", "masks"):
        with pytest.raises(AnnotationError, match="mask_dict.pkl: names .* it is refused"):
            prepare(RefYoutubeVOS, root, config, on_error=on_error)
    assert not harm.exists()


def test_objects_that_meta_json_does_not_know_are_refused(tmp_path: Path, prepare: Prepare) -> None:
    root = write_ref_youtube_vos(tmp_path / "rytvos")
    path = root / "meta_expressions/train/meta_expressions.json"
    change(path, lambda videos: videos["apple"]["expressions"]["0"].update(obj_id="7"))
    with pytest.raises(AnnotationError, match="video 'apple', expression '0': the object '7' of the video is not in"):
        prepare(RefYoutubeVOS, root)
    change(path, lambda videos: videos["apple"]["expressions"]["0"].update(obj_id="0"))
    with pytest.raises(AnnotationError, match="`obj_id` is '0'; a number from 1 to 255"):
        prepare(RefYoutubeVOS, root)
    change(path, lambda videos: videos["apple"]["expressions"]["0"].pop("obj_id"))
    with pytest.raises(AnnotationError, match="`obj_id` is missing"):
        prepare(RefYoutubeVOS, root)


def _not_palette(path: Path) -> None:
    Image.new("RGB", (SIZE[1], SIZE[0])).save(path)


def _other_size(path: Path) -> None:
    Image.new("P", (3, 3)).save(path)


BAD_PNGS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda path: path.unlink(), "the image of the masks is missing"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-30]), "the image of the masks cannot be read"),
    "mode": (_not_palette, 'the masks are an image of mode "RGB"; a palette PNG'),
    "size": (_other_size, r"the masks have size \[3, 3\] \(H, W\), but the frame has \[12, 16\]"),
}


@pytest.mark.parametrize("case", BAD_PNGS)
@pytest.mark.parametrize("config", ["expressions", "masks"])
def test_bad_palette_images_are_refused_with_their_place(
    tmp_path: Path, prepare: Prepare, config: str, case: str
) -> None:
    root = write_ref_davis(tmp_path / "davis17")
    harm, message = BAD_PNGS[case]
    harm(root / "valid/Annotations/goat-valid/00001.png")
    with pytest.raises(AnnotationError, match=rf"00001.png, video 'goat-valid', frame '00001': {message}"):
        prepare(RefDAVIS17, root, config)
    assert list(prepare(RefDAVIS17, root, config, on_error="skip")) == ["train"]
    shutil.rmtree(root / "train/Annotations/goat-train")
    with pytest.raises(AnnotationError, match=rf"there are no rows of `{config}`. [0-9]+ rows were left out"):
        prepare(RefDAVIS17, root, config, on_error="skip")


def test_an_edited_palette_image_is_read_again(tmp_path: Path, prepare: Prepare) -> None:
    root = write_ref_davis(tmp_path / "davis17")
    assert prepare(RefDAVIS17, root, "masks")["train"][0]["rle"][0] == rles([box(0, 0)])[0]
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[box(8, 0)] = 1
    Image.frombytes("P", (SIZE[1], SIZE[0]), labels.tobytes()).save(root / "train/Annotations/goat-train/00000.png")
    assert prepare(RefDAVIS17, root, "masks")["train"][0]["rle"][0] == rles([box(8, 0)])[0]


def test_a_pickle_that_comes_is_used(tmp_path: Path, prepare: Prepare) -> None:
    root = write_ref_davis(tmp_path / "davis17")
    prepare(RefDAVIS17, root, "masks")
    (root / "train/mask_dict.pkl").write_bytes(b"no pickle")
    with pytest.raises(AnnotationError, match="mask_dict.pkl: is not a pickle that can be read"):
        prepare(RefDAVIS17, root, "masks")


def test_one_cache_holds_all_sets_apart(tmp_path: Path, prepare: Prepare) -> None:
    """Two sets in one folder, for which `datasets` alone would take one name."""
    assert len({builder(data_dir=write(tmp_path / "all"), cache_dir=tmp_path / "cache").cache_dir
                for builder, write in (WRITERS[0], WRITERS[1], WRITERS[2], WRITERS[4])}) == 4  # fmt: skip
    assert FRAMES[0] == "00000"
