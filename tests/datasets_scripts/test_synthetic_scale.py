"""The large data set for measuring readers, in small."""

import json
from pathlib import Path

import pytest

from visa_hf.datasets_scripts.synthetic_scale import write_scale_dataset
from visa_hf.rle import decode_mask


def test_it_is_as_large_as_asked_for_and_readable(tmp_path: Path) -> None:
    from visa_hf.datasets_scripts import ReVOS

    root = tmp_path / "large"
    write_scale_dataset(root, num_videos=6, num_expressions=50, num_frames=10, mask_bytes=300_000)
    assert (root / "mask_dict.json").stat().st_size == pytest.approx(300_000, rel=0.2)
    masks = json.loads((root / "mask_dict.json").read_text())
    num_expressions, used = 0, set()
    for split in ("train", "valid"):
        for name, video in json.loads((root / f"meta_expressions_{split}_.json").read_text())["videos"].items():
            num_expressions += len(video["expressions"])
            frames = [root / "JPEGImages" / name / f"{frame}.jpg" for frame in video["frames"]]
            assert len({frame.stat().st_ino for frame in frames}) == 1
            for expression in video["expressions"].values():
                for anno_id in expression["anno_id"]:
                    used.add(str(anno_id))
                    rles = masks[str(anno_id)]
                    assert len(rles) == len(frames)
                    first = next(rle for rle in rles if rle is not None)
                    assert decode_mask(first).shape == (video["height"], video["width"])
    assert num_expressions == 50
    builder = ReVOS("masks", data_dir=str(root), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert sum(len(split) for split in builder.as_dataset().values()) == len(used)


def test_frames_can_be_files_of_their_own(tmp_path: Path) -> None:
    write_scale_dataset(
        tmp_path / "large", num_videos=1, num_expressions=1, num_frames=3, mask_bytes=5000, shared_image=False
    )
    assert len({path.stat().st_ino for path in (tmp_path / "large").rglob("*.jpg")}) == 3


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_videos` is 0; at least 1"):
        write_scale_dataset(tmp_path / "large", num_videos=0)
    with pytest.raises(FileExistsError, match="Give another `output`"):
        write_scale_dataset(tmp_path)
