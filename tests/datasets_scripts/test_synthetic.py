"""Synthetic clips and data sets: exact masks, the same bytes everywhere, ReVOS's format, splits apart."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visa_hf.datasets_scripts import synthetic
from visa_hf.datasets_scripts.synthetic import ClipOptions, SyntheticClip, make_clip, write_dataset
from visa_hf.datasets_scripts.synthetic_drawing import outline_shapes
from visa_hf.datasets_scripts.synthetic_expressions import IDEAS
from visa_hf.datasets_scripts.synthetic_scene import (
    COLORS,
    FORMS,
    LEVELS,
    PILLAR,
    TEXTURES,
    Look,
    allowed_looks,
    is_held_out,
)
from visa_hf.rle import decode_masks

SMALL = ClipOptions(size=(48, 64), num_frames=(8, 10), num_expressions=6)
NUM_VIDEOS = {"train": 3, "valid": 2, "unseen": 2}
# Of the pixels, masks and sentences of two clips of version 2; with other pixels, VERSION must change, with
# other answers alone ANSWERS_VERSION.
GOLDEN = {
    (7, 0, "train", 3): ("253d42b6d9a5b9be", "04c76f15c33be9f8"),
    (7, 1, "unseen", 2): ("3c92f92016329644", "32ef7bbccfa80517"),
}


def digest(clip: SyntheticClip) -> str:
    return _digest(clip, [expression.answer for expression in clip.expressions])


def _digest(clip: SyntheticClip, answers: list[str]) -> str:
    rows = zip(clip.expressions, answers, strict=True)
    text = json.dumps([[e.text, e.type_id, e.objects, e.idea, e.meaning, answer] for e, answer in rows])
    return hashlib.sha256(clip.frames.tobytes() + clip.masks.tobytes() + text.encode()).hexdigest()[:16]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    write_dataset(folder, num_videos=NUM_VIDEOS, seed=3, options=SMALL, show_progress=False)
    return folder


# Clips


@pytest.mark.parametrize("level", LEVELS)
def test_masks_are_the_visible_pixels_and_do_not_overlap(level: int) -> None:
    clip = make_clip(0, 5, options=ClipOptions(size=(61, 97), levels=(level,)))
    num_frames = len(clip.frames)
    assert 16 <= num_frames <= 24
    assert clip.frames.shape == (num_frames, 61, 97, 3) and clip.frames.dtype == np.uint8
    assert clip.masks.shape == (len(clip.objects), num_frames, 61, 97) and clip.masks.dtype == np.bool_
    assert clip.masks.sum(axis=0).max() == 1
    assert clip.masks.any(axis=(1, 2, 3)).all()
    labels, _ = outline_shapes(clip.scene)
    assert np.array_equal(labels != 0, clip.masks.any(axis=0))


def test_a_plain_disc_has_the_area_and_colour_of_a_disc() -> None:
    options = ClipOptions(size=(128, 128), num_frames=(1, 1), levels=(1,), antialias=False)
    checked = 0
    for index in range(40):
        clip = make_clip(1, index, options=options)
        for mask, shape in zip(clip.masks[:, 0], clip.scene.shapes, strict=True):
            if shape.look.form == "circle" and shape.look.texture == "plain":
                radius = 0.92 * shape.path.radii[0]
                center = np.argwhere(mask).mean(axis=0) + 0.5
                if mask.sum() > 0.97 * np.pi * radius**2:  # nothing lies in front of it
                    assert mask.sum() == pytest.approx(np.pi * radius**2, rel=0.03)
                    assert center == pytest.approx(shape.path.centers[0][::-1], abs=0.5)
                    row, col = np.rint(center - 0.5).astype(int)
                    assert clip.frames[0, row, col] == pytest.approx(np.array(shape.rgb), abs=1)
                    checked += 1
    assert checked >= 5


def test_smooth_edges_change_the_picture_but_not_the_masks() -> None:
    smooth, hard = (make_clip(2, 4, options=ClipOptions(antialias=antialias)) for antialias in (True, False))
    assert np.array_equal(smooth.masks, hard.masks)
    assert not np.array_equal(smooth.frames, hard.frames)
    assert smooth.expressions == hard.expressions


def test_what_is_no_object_looks_the_same_without_objects() -> None:
    """Away from the masks and their smooth edges, frames hold the background only: it does not depend on shapes."""
    clip = make_clip(4, 2, options=ClipOptions(levels=(1,), num_frames=(12, 12)))
    covered = clip.masks.any(axis=0)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(covered, ((0, 0), (2, 2), (2, 2))), (5, 5), axis=(1, 2))
    far = ~near.any(axis=(3, 4))
    always = far.all(axis=0)
    assert always.any()
    assert np.ptp(clip.frames[:, always].astype(int), axis=0).max() == 0


@pytest.mark.parametrize(("key", "expected"), GOLDEN.items())
def test_pixels_and_sentences_of_this_version_stay_what_they_are(
    key: tuple[int, int, str, int], expected: tuple[str, str]
) -> None:
    """Made with this generator; equal on any machine. The second is of answers of version 1: their last sentences."""
    seed, index, split, level = key
    clip = make_clip(seed, index, split=split, options=ClipOptions(levels=(level,)))
    told = [expression.told for expression in clip.expressions]
    assert (digest(clip), _digest(clip, told)) == expected


def test_a_clip_depends_on_its_arguments_alone() -> None:
    np.random.seed(0)
    clip = make_clip(3, 1, options=SMALL)
    np.random.seed(1)
    make_clip(3, 0, options=SMALL)
    assert digest(make_clip(3, 1, options=SMALL)) == digest(clip)
    others = (
        make_clip(3, 2, options=SMALL),
        make_clip(4, 1, options=SMALL),
        make_clip(3, 1, split="valid", options=SMALL),
    )
    assert len({digest(other) for other in (clip, *others)}) == 4


def test_another_process_makes_the_same_clip() -> None:
    program = (
        "from tests.datasets_scripts.test_synthetic import SMALL, digest, make_clip\n"
        "print(digest(make_clip(5, 9, split='unseen', options=SMALL)))"
    )
    environment = {"PYTHONHASHSEED": "77", "PATH": ""}
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == digest(make_clip(5, 9, split="unseen", options=SMALL))


def test_a_still_says_nothing_about_movement() -> None:
    for index in range(12):
        clip = make_clip(6, index, options=ClipOptions(num_frames=(1, 1)))
        assert clip.frames.shape[0] == 1
        ideas = {expression.idea for expression in clip.expressions}
        assert not ideas & {"motion", "metaphor", "border", "order", "memory", "speed", "overtaking"}
        assert not any("at some point" in e.text or "moving" in e.text + e.answer for e in clip.expressions)


@pytest.mark.parametrize("size", [(64, 64), (33, 51), (480, 854)])
@pytest.mark.parametrize("num_frames", [1, 3])
def test_sizes_and_short_clips(size: tuple[int, int], num_frames: int) -> None:
    clip = make_clip(0, 0, options=ClipOptions(size=size, num_frames=(num_frames, num_frames)))
    assert clip.frames.shape == (num_frames, *size, 3)
    assert len(clip.expressions) >= 3


def test_the_number_of_shapes_can_be_chosen() -> None:
    for index in range(6):
        clip = make_clip(0, index, options=ClipOptions(size=(96, 160), levels=(1,), num_objects=(6, 6)))
        assert len(clip.objects) == 6


# Splits


def test_unseen_clips_hold_unseen_compositions_only_and_others_none() -> None:
    for index in range(15):
        for split in synthetic.SPLITS:
            clip = make_clip(8, index, split=split, options=SMALL)
            shapes = [look for look in clip.objects if look.form != PILLAR]
            assert {is_held_out(look) for look in shapes} == {split == "unseen"}


def test_every_property_and_every_pair_of_properties_is_seen_in_training() -> None:
    seen = allowed_looks(3, is_unseen=False)
    assert len(seen) + len(allowed_looks(3, is_unseen=True)) == len(COLORS) * len(FORMS) * len(TEXTURES)
    assert len({(look.color, look.form) for look in seen}) == len(COLORS) * len(FORMS)
    assert len({(look.color, look.texture) for look in seen}) == len(COLORS) * len(TEXTURES)
    assert len({(look.form, look.texture) for look in seen}) == len(FORMS) * len(TEXTURES)
    for level in LEVELS:
        unseen = allowed_looks(level, is_unseen=True)
        assert len(unseen) >= 8
        assert {look.texture for look in unseen} == {look.texture for look in allowed_looks(level, is_unseen=False)}


def test_held_out_is_said_of_a_composition() -> None:
    assert not is_held_out(Look("red", "circle", "plain"))
    assert is_held_out(Look("red", "star", "plain"))
    assert is_held_out(Look("red", "star", "striped"))
    assert not is_held_out(Look("red", "star", "dotted"))


# On disk


def test_masks_on_disk_are_those_of_the_clips(dataset: Path) -> None:
    masks = json.loads((dataset / "mask_dict.json").read_text())
    foregrounds = json.loads((dataset / "mask_dict_foreground.json").read_text())
    metas = {
        split: json.loads((dataset / f"meta_expressions_{split}_.json").read_text())["videos"]
        for split in ("train", "valid")
    }
    assert list(metas["train"]) == ["train_00000", "train_00001", "train_00002"]
    assert list(metas["valid"]) == ["valid_00000", "valid_00001", "unseen_00000", "unseen_00001"]
    used = []
    for name, meta in {**metas["train"], **metas["valid"]}.items():
        split, index = name.split("_")
        clip = make_clip(3, int(index), split=split, options=SMALL)
        size = (meta["height"], meta["width"])
        assert size == (48, 64) and len(meta["frames"]) == len(clip.frames)
        assert np.array_equal(decode_masks(foregrounds[name]["masks_rle"], size), clip.masks.any(axis=0))
        assert foregrounds[name]["foreground_ratio"] == pytest.approx(list(clip.masks.any(axis=0).mean(axis=(1, 2))))
        assert len(meta["expressions"]) == len(clip.expressions)
        for row, expression in zip(meta["expressions"].values(), clip.expressions, strict=True):
            assert (row["exp"], row["type_id"], row["idea"]) == (expression.text, expression.type_id, expression.idea)
            assert row["answer"].count("[SEG]") == (1 if expression.objects else 0)
            union = np.zeros_like(clip.masks[0])
            for anno_id in row["anno_id"]:
                union |= decode_masks(masks[str(anno_id)], size)
            assert np.array_equal(union, clip.masks[list(expression.objects)].any(axis=0))
            used += row["anno_id"]
    assert {str(anno_id) for anno_id in used} <= set(masks)


def test_a_frame_without_the_object_is_null(dataset: Path) -> None:
    masks = json.loads((dataset / "mask_dict.json").read_text())
    for rles in masks.values():
        assert any(rle is not None for rle in rles)
        assert all(decode_masks([rle]).any() for rle in rles if rle is not None)


def test_pictures_on_disk_show_the_frames(dataset: Path) -> None:
    clip = make_clip(3, 1, split="train", options=SMALL)
    for number, frame in enumerate(clip.frames):
        with Image.open(dataset / "JPEGImages" / "train_00001" / f"{number:05d}.jpg") as image:
            assert np.abs(np.asarray(image).astype(int) - frame).mean() < 3


def test_revos_builder_reads_it(dataset: Path, tmp_path: Path) -> None:
    from visa_hf.datasets_scripts import ReVOS

    builder = ReVOS("expressions", data_dir=str(dataset), cache_dir=str(tmp_path))
    builder.download_and_prepare()
    splits = builder.as_dataset()
    rows = json.loads((dataset / "meta_expressions_valid_.json").read_text())["videos"]
    assert len(splits["valid"]) == sum(len(video["expressions"]) for video in rows.values())
    assert set(splits["train"]["type_id"]) <= {0, 1, 2}
    first = splits["train"][0]
    assert first["frames"][0] == "JPEGImages/train_00000/00000.jpg"
    assert (dataset / first["frames"][0]).is_file()


def test_files_do_not_depend_on_the_number_of_processes(dataset: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", num_videos=NUM_VIDEOS, seed=3, options=SMALL, num_proc=2, show_progress=False)
    assert files_of(tmp_path / "set") == files_of(dataset)


def test_an_interrupted_data_set_is_finished(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"num_videos": NUM_VIDEOS, "seed": 3, "options": SMALL, "show_progress": False}
    made = []

    def interrupted(seed: int, index: int, **options: object) -> SyntheticClip:
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(index)
        return make_clip(seed, index, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "make_clip", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "set", **arguments)
        assert not (tmp_path / "set").exists()
        with pytest.raises(FileExistsError, match="holds another synthetic data set"):
            write_dataset(tmp_path / "set", **{**arguments, "seed": 4})
        made[:] = [0]  # only three are left to make
        write_dataset(tmp_path / "set", **arguments)
        assert len(made) == 4
    assert files_of(tmp_path / "set") == files_of(dataset)
    assert not (tmp_path / "set.partial").exists()


def test_a_complete_data_set_is_left_alone_and_another_one_is_not_overwritten(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "make_clip", None)  # nothing may be made
    write_dataset(dataset, num_videos=NUM_VIDEOS, seed=3, options=SMALL, show_progress=False)
    with pytest.raises(FileExistsError, match="Give another `output`, or remove it"):
        write_dataset(dataset, num_videos=NUM_VIDEOS, seed=4, options=SMALL)
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileExistsError, match="is no synthetic data set"):
        write_dataset(tmp_path / "mine", num_videos=NUM_VIDEOS)


def test_a_split_without_videos_has_no_file(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", num_videos={"valid": 1}, options=SMALL, show_progress=False)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "JPEGImages",
        "mask_dict.json",
        "mask_dict_foreground.json",
        "meta_expressions_valid_.json",
        "synthetic.json",
    ]


def test_a_set_that_was_written_before_sentences_had_weights_is_the_same_as_one_without_them(
    dataset: Path, tmp_path: Path
) -> None:
    assert not {"idea_weights", "look_weight"} & set(json.loads((dataset / "synthetic.json").read_text())["options"])
    options = ClipOptions(size=(48, 64), num_frames=(4, 4), idea_weights={"place": 3.0}, look_weight=0.5)
    write_dataset(tmp_path / "set", num_videos={"valid": 1}, options=options, show_progress=False)
    written = json.loads((tmp_path / "set" / "synthetic.json").read_text())["options"]
    assert (written["idea_weights"], written["look_weight"]) == ({"place": 3.0}, 0.5)


# Bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (16, 64)}, r"`size` is \(16, 64\); \(H, W\) is needed, each from 32 to 4096"),
        ({"num_frames": (0, 4)}, r"`num_frames` is \(0, 4\)"),
        ({"num_frames": (9, 4)}, r"`num_frames` is \(9, 4\)"),
        ({"levels": ()}, r"`levels` is \(\); one or more of \(1, 2, 3\)"),
        ({"levels": (4,)}, r"`levels` is \(4,\)"),
        ({"num_objects": (1, 3)}, "with one shape alone there is nothing to tell apart"),
        ({"num_objects": (5, 3)}, r"`num_objects` is \(5, 3\)"),
        ({"num_expressions": 0}, "`num_expressions` is 0; at least 1"),
        ({"idea_weights": {"look": 1, "colour": 2}}, "`idea_weights` has colour; ideas are border, except, group, "),
        ({"idea_weights": {"place": -1.0}}, "`idea_weights` has -1.0 for place; a number from 0 on"),
        ({"idea_weights": {"place": float("nan")}}, "`idea_weights` has nan for place"),
        ({"look_weight": 0.0}, "`look_weight` is 0.0; it must be above 0 and at most 1"),
        ({"look_weight": 1.5}, "`look_weight` is 1.5"),
    ],
)
def test_bad_options_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipOptions(**arguments)  # type: ignore[arg-type]


def test_ideas_that_leave_no_sentences_are_named() -> None:
    still = ClipOptions(size=(48, 64), num_frames=(1, 1), levels=(1,), idea_weights=dict.fromkeys(IDEAS, 0.0))
    with pytest.raises(ValueError, match="sentences enough after 100 tries.*other `idea_weights` than {'border': 0.0"):
        make_clip(0, 0, options=still)


def test_bad_seeds_and_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="`split` is 'test'; it must be one of"):
        make_clip(0, 0, split="test")
    with pytest.raises(ValueError, match="`seed` is -1 and `index` 0"):
        make_clip(-1, 0)
    with pytest.raises(ValueError, match="`seed` is 0 and `index` -2"):
        make_clip(0, -2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_videos": {}}, "it may have train, valid, unseen"),
        ({"num_videos": {"test": 1}}, r"splits \['test'\]"),
        ({"num_videos": {"train": 0}}, "one must be positive"),
        ({"num_videos": {"train": 2, "valid": -1}}, "no number may be negative"),
        ({"num_videos": {"train": 1}, "num_proc": 0}, "`num_proc` is 0"),
        ({"num_videos": {"train": 1}, "seed": -1}, "`seed` is -1"),
    ],
)
def test_bad_data_sets_are_refused_and_nothing_is_written(
    arguments: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "set", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
