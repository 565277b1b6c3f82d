"""A published folder: what plain `load_dataset` makes of it, byte for byte; and a failure leaves nothing behind."""

import io
import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import yaml
from huggingface_hub import HfApi
from PIL import Image

from tests.datasets_scripts.prepared import prepared
from tests.media import test_frame, write_folder, write_video
from visa_hf.datasets_scripts import publish, publish_hub
from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.llava_instruct import LLaVAInstruct
from visa_hf.datasets_scripts.own_data import OwnData
from visa_hf.datasets_scripts.publish import export_dataset, publish_configs
from visa_hf.datasets_scripts.publish_card import ORIGINS
from visa_hf.datasets_scripts.publish_hub import check_login, push_folder
from visa_hf.rle import encode_mask

SIZE = (64, 96)
BOX = np.zeros(SIZE, dtype=np.bool_)
BOX[10:20, 30:60] = True


@pytest.fixture
def data(tmp_path):
    """Own data with a video file, a folder of PNGs and a JPEG; the split "valid" has no masks."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_video(folder / "clip.mp4", 4, size=SIZE)
    write_folder(folder / "walk", 5, size=SIZE)
    Image.fromarray(test_frame(3, *SIZE)).save(folder / "still.jpg", quality=35)
    rle = encode_mask(BOX)
    lines = [
        {"video": "clip.mp4", "expression": "the box", "masks": {"0": rle, "2": None}},
        {"video": "walk", "expression": "the “box”", "masks": {"4": rle}, "explanation": "It is one."},
        {"video": "still.jpg", "expression": "none", "type_id": 2},
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "valid.jsonl").write_text(json.dumps({"video": "walk", "expression": "what?"}))
    return folder


def load(folder, config, split, tmp_path, **options):
    return datasets.load_dataset(str(folder), config, split=split, cache_dir=str(tmp_path / "loaded"), **options)


def export(data, output, tmp_path, name="own_data", **options):
    return export_dataset(name, data, output, cache_dir=tmp_path / "cache", **options)


def test_a_published_folder_loads_as_the_builder_has_it(data, tmp_path):
    out = export(data, tmp_path / "new" / "out", tmp_path)
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == [
        "README.md",
        "expressions/train-00000-of-00001.parquet",
        "expressions/valid-00000-of-00001.parquet",
        "masks/train-00000-of-00001.parquet",
        "videos/train-00000-of-00001.parquet",
        "videos/valid-00000-of-00001.parquet",
    ]
    for config, splits in {"expressions": 2, "masks": 1, "videos": 2}.items():
        for split in ["train", "valid"][:splits]:
            expected = prepared(OwnData, config, data, tmp_path / "cache", split)
            rows = load(out, config, split, tmp_path)
            assert rows.features == expected.features and list(rows) == list(expected), (config, split)
            assert list(load(out, config, split, tmp_path, streaming=True)) == list(expected), (config, split)
    assert datasets.get_dataset_config_names(str(out)) == ["expressions", "masks", "videos"]
    assert list(datasets.load_dataset(str(out), cache_dir=str(tmp_path / "loaded"))) == ["train", "valid"]


def test_pictures_and_videos_go_in_byte_for_byte(data, tmp_path):
    out = export(data, tmp_path / "out", tmp_path, with_frames=True)
    frames = load(out, "frames", "train", tmp_path)
    names = ["still.jpg", *(f"walk/frame{number}.png" for number in range(1, 6))]
    assert frames["path"] == names
    raw = frames.cast_column("image", datasets.Image(decode=False))
    assert [row["bytes"] for row in raw["image"]] == [(data / name).read_bytes() for name in names]
    streamed = next(iter(load(out, "frames", "train", tmp_path, streaming=True)))
    np.testing.assert_array_equal(np.asarray(streamed["image"]), np.asarray(Image.open(data / "still.jpg")))
    clips = load(out, "clips", "train", tmp_path)
    assert clips["path"] == ["clip.mp4"] and clips[0]["video"] == (data / "clip.mp4").read_bytes()
    assert load(out, "frames", "valid", tmp_path)["path"] == names[1:]
    assert not list((out / "clips").glob("valid*"))
    # Every frame that a row names is found in them.
    named = {frame for row in load(out, "expressions", "train", tmp_path) for frame in row["frames"]}
    assert {name.split("#")[0] for name in named} == {*names, "clip.mp4"}


def test_large_data_goes_into_several_shards_in_order(data, tmp_path, monkeypatch):
    whole = export(data, tmp_path / "whole", tmp_path, with_frames=True)
    monkeypatch.setattr(publish, "_SHARD_BYTES", 2000)
    monkeypatch.setattr(publish, "_GROUP_BYTES", 100)
    out = export(data, tmp_path / "out", tmp_path, with_frames=True)
    assert len(list((out / "frames").glob("train-*-of-0000?.parquet"))) > 1
    assert len(list((out / "frames").iterdir())) == len(list((out / "frames").glob("*-of-*.parquet")))
    for config in ("expressions", "masks", "videos", "frames", "clips"):
        assert list(load(out, config, "train", tmp_path)) == list(load(whole, config, "train", tmp_path))
    monkeypatch.setattr(publish, "_SHARD_BYTES", 1)
    split = export(data, tmp_path / "split", tmp_path)
    assert len(list((split / "expressions").glob("train-*-of-00003.parquet"))) == 3
    assert list(load(split, "expressions", "train", tmp_path)) == list(load(out, "expressions", "train", tmp_path))


def test_the_card_names_source_licence_and_what_is_in_it(data, tmp_path):
    out = export(data, tmp_path / "out", tmp_path, licence="cc-by-4.0", source="Our lab, camera 3")
    text = (out / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(text.split("---")[1])
    assert header["license"] == "cc-by-4.0"
    assert [config["config_name"] for config in header["configs"]] == ["expressions", "masks", "videos"]
    assert header["configs"][1]["data_files"] == [{"split": "train", "path": "masks/train-*"}]
    assert "Source: Our lab, camera 3" in text and "Licence: cc-by-4.0." in text
    assert "| `expressions` | train 3, valid 1 |" in text
    assert "pictures are not in here" in text
    plain = (export(data, tmp_path / "plain", tmp_path, with_frames=True) / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(plain.split("---")[1])["license"] == "unknown"
    assert "Read the licence at the source" in plain and "pictures are not in here" not in plain
    assert "| `frames` | train 6, valid 5 |" in plain


def test_conversations_are_published_too(tmp_path):
    data = tmp_path / "lisa"
    (data / "coco" / "train2017").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(data / "coco" / "train2017" / "1.jpg")
    (data / "llava_dataset").mkdir()
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    items = [{"id": "1", "image": "1.jpg", "conversations": talk}]
    (data / "llava_dataset" / "llava_instruct_150k.json").write_text(json.dumps(items))
    out = export(data, tmp_path / "out", tmp_path, "llava_instruct", with_frames=True)
    expected = prepared(LLaVAInstruct, None, data, tmp_path / "cache")
    assert list(load(out, "conversations", "train", tmp_path)) == list(expected)
    row = load(out, "frames", "train", tmp_path).cast_column("image", datasets.Image(decode=False))[0]
    assert row["path"] == "coco/train2017/1.jpg"
    assert row["image"]["bytes"] == (data / "coco" / "train2017" / "1.jpg").read_bytes()
    assert "CC BY 4.0, and OpenAI's terms" in (out / "README.md").read_text(encoding="utf-8")


def test_every_known_data_set_has_its_configs_and_its_origin():
    for name in KNOWN_DATASETS:
        configs = publish_configs(name)
        assert list(configs)[0] in ("expressions", "conversations"), name
        assert name in ORIGINS or name == "own_data"
    assert publish_configs("refcoco+") == {"expressions": "refcoco+_expressions", "masks": "refcoco+_masks"}
    with pytest.raises(ValueError, match="There is no data set 'nope'. Known are mevis, "):
        publish_configs("nope")


def test_a_failure_leaves_nothing_behind(data, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(FileExistsError, match="full` is not empty. Give another one"):
        export(data, tmp_path / "full", tmp_path)
    with pytest.raises(FileExistsError, match="is a file or a link"):
        export(data, tmp_path / "full" / "x", tmp_path)
    before = sorted(tmp_path.iterdir())
    real = publish._write_files

    def missing(names, *others):
        return real(["gone.png", *names], *others)

    monkeypatch.setattr(publish, "_write_files", missing)
    with pytest.raises(FileNotFoundError, match="`gone.png`, which the annotations name, is not in"):
        export(data, tmp_path / "out", tmp_path, with_frames=True)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "cache"])
    monkeypatch.setattr(publish, "_write_files", real)
    monkeypatch.setattr(publish, "_MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="is larger than 2 GB, which Parquet cannot hold. Leave the frames out"):
        export(data, tmp_path / "out", tmp_path, with_frames=True)
    (data / "train.jsonl").write_text("{}")
    with pytest.raises(AnnotationError, match="train.jsonl, line 1: `expression` is missing"):
        export(data, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_may_be_the_output(data, tmp_path):
    (tmp_path / "out").mkdir()
    assert (export(data, tmp_path / "out", tmp_path) / "README.md").is_file()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


# The Hub


class FakeHub:
    """Records what is asked of it."""

    def __init__(self, *, is_private=True):
        self.is_private, self.uploads = is_private, []

    def create_repo(self, repo_id, **options):
        self.created = (repo_id, options)
        return f"https://hub/datasets/{repo_id}"

    def repo_info(self, repo_id, **options):
        return SimpleNamespace(private=self.is_private)

    def upload_folder(self, **options):
        self.uploads.append(options)


def test_a_folder_is_pushed_in_one_commit_that_removes_old_tables(tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(publish_hub, "HfApi", lambda: hub)
    assert push_folder(tmp_path, "me/data", private=True) == "https://hub/datasets/me/data"
    assert hub.created == ("me/data", {"repo_type": "dataset", "private": True, "exist_ok": True})
    (upload,) = hub.uploads
    assert (upload["repo_id"], upload["folder_path"], upload["repo_type"]) == ("me/data", str(tmp_path), "dataset")
    assert "masks/*.parquet" in upload["delete_patterns"]


def test_private_data_never_goes_to_a_public_repository(tmp_path, monkeypatch):
    hub = FakeHub(is_private=False)
    monkeypatch.setattr(publish_hub, "HfApi", lambda: hub)
    with pytest.raises(ValueError, match="'me/data' exists and is public"):
        push_folder(tmp_path, "me/data", private=True)
    assert hub.uploads == []


def test_without_a_network_or_a_login_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(publish_hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="hf_none"))
    with pytest.raises(ConnectionError, match="The Hub cannot be reached .* to a folder with --output, and push"):
        check_login("me/data")
    monkeypatch.setattr(publish_hub, "HfApi", HfApi)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    with pytest.raises(PermissionError, match="Nobody is logged in to the Hub. Run `hf auth login`"):
        check_login("me/data")
    for wrong in ("data", "me/data/x", "me/da ta"):
        with pytest.raises(ValueError, match="repository|[Rr]epo id"):
            check_login(wrong)


def test_published_pictures_open_without_this_package(data, tmp_path):
    import pyarrow.parquet as pq

    out = export(data, tmp_path / "out", tmp_path, with_frames=True)
    (row,) = pq.read_table(out / "frames" / "train-00000-of-00001.parquet").slice(0, 1).to_pylist()
    picture = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
    np.testing.assert_array_equal(picture, np.asarray(Image.open(data / "still.jpg")))
