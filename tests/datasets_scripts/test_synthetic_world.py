"""The builder of the synthetic world."""

import json
from pathlib import Path

import pytest

from visa_hf.datasets_scripts import AnnotationError, ReVOS, Synthetic
from visa_hf.datasets_scripts.features import EXPRESSION_FEATURES
from visa_hf.datasets_scripts.synthetic import ClipOptions, make_clip, write_dataset

OPTIONS = ClipOptions(size=(48, 64), num_frames=(2, 3), levels=(1,), num_expressions=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "set"
    videos = {"train": 2, "valid": 1, "unseen": 2}
    write_dataset(folder, num_videos=videos, seed=5, options=OPTIONS, show_progress=False)
    return folder


def rows_of(builder: ReVOS, split: str) -> list[dict]:
    return list(builder.as_streaming_dataset(split))


def test_rows_hold_the_answers_and_ideas_of_the_clips(folder: Path, tmp_path: Path) -> None:
    builder = Synthetic(data_dir=str(folder), cache_dir=str(tmp_path))
    for split, number in (("train", 2), ("valid", 1), ("unseen", 2)):
        rows = rows_of(builder, split)
        clips = [make_clip(5, index, split=split, options=OPTIONS) for index in range(number)]
        expected = [(c.name, e.text, e.type_id, e.answer, e.idea) for c in clips for e in c.expressions]
        keys = ("video_id", "expression", "type_id", "answer", "idea")
        assert [tuple(row[key] for key in keys) for row in rows] == expected
        assert {row["dataset"] for row in rows} == {"synthetic"}


def test_masks_of_a_split_are_those_that_its_expressions_name(folder: Path, tmp_path: Path) -> None:
    masks = rows_of(Synthetic("masks", data_dir=str(folder), cache_dir=str(tmp_path)), "unseen")
    named = rows_of(Synthetic(data_dir=str(folder), cache_dir=str(tmp_path)), "unseen")
    assert {mask["anno_id"] for mask in masks} == {anno_id for row in named for anno_id in row["anno_ids"]}


def test_revos_reads_the_same_folder_without_what_it_does_not_know(folder: Path, tmp_path: Path) -> None:
    rows = rows_of(ReVOS(data_dir=str(folder), cache_dir=str(tmp_path)), "valid")
    assert set(rows[0]) == set(EXPRESSION_FEATURES)
    assert {row["video_id"] for row in rows} == {"valid_00000", "unseen_00000", "unseen_00001"}


def test_a_split_without_videos_is_not_there(folder: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    write_dataset(small, num_videos={"train": 1}, seed=5, options=OPTIONS, show_progress=False)
    builder = Synthetic(data_dir=str(small), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="unseen"):
        builder.as_streaming_dataset("unseen")


def test_a_folder_that_is_not_of_the_synthetic_world_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        if path.name != "synthetic.json":
            (other / path.name).symlink_to(path)
    builder = Synthetic(data_dir=str(other), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match=r"(?s)synthetic.json not found in .*`visa data synthesize DIR`"):
        builder.as_streaming_dataset("train")


@pytest.mark.parametrize("content", [[1], {"unseen_videos": "all"}, {"unseen_videos": [["unseen_00000"]]}])
def test_a_description_without_the_unseen_videos_is_refused(folder: Path, tmp_path: Path, content: object) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).symlink_to(path)
    (other / "synthetic.json").unlink()
    (other / "synthetic.json").write_text(json.dumps(content))
    builder = Synthetic(data_dir=str(other), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(AnnotationError, match=r"synthetic.json.*has no list `unseen_videos` of names"):
        builder.as_streaming_dataset("train")


def test_an_answer_that_is_no_text_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).symlink_to(path)
    meta = json.loads((folder / "meta_expressions_train_.json").read_text())
    meta["videos"]["train_00001"]["expressions"]["0"]["answer"] = 3
    (other / "meta_expressions_train_.json").unlink()
    (other / "meta_expressions_train_.json").write_text(json.dumps(meta))
    builder = Synthetic(data_dir=str(other), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(AnnotationError, match=r"train_00001.*`answer` is 3; text is needed"):
        list(builder.as_streaming_dataset("train"))
