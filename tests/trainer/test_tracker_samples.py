"""Clips to train a tracker on: what they show, that they depend on their number alone, and bad data."""

import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from visa_hf.datasets_scripts import OwnData, ReVOS
from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.mixture import TrainingSamples
from visa_hf.datasets_scripts.sampling import random_generator
from visa_hf.datasets_scripts.synthetic import ClipOptions as WorldOptions
from visa_hf.datasets_scripts.synthetic import write_dataset
from visa_hf.rle import encode_mask
from visa_hf.trainer.tracker_samples import ClipCollator, ClipOptions, ClipSource, clip_sources

NUM_DRAWS = 60
OPTIONS = ClipOptions(
    num_frames=4, first_num_frames=2, max_gap=3, first_max_gap=1, max_objects=2, num_memory_frames=3, size=32
)
SIZE = (24, 40)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "synthetic"
    options = WorldOptions(size=(48, 64), num_frames=(6, 9))
    write_dataset(folder, num_videos={"train": 6}, options=options, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def rows(world, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    made = []
    for config in ("expressions", "masks"):
        builder = ReVOS(config, data_dir=world, cache_dir=cache)
        builder.download_and_prepare()
        made.append(builder.as_dataset(split="train"))
    return made


@pytest.fixture(scope="module")
def source(rows, world):
    return ClipSource("synthetic", *rows, world, OPTIONS, NUM_DRAWS)


def draw(source, number, seed=0):
    return source.sample(random_generator(seed, number), number)


@pytest.fixture
def write(tmp_path):
    """Write a video of 6 frames with the given masks, (N, T, H, W), as rows of its own; give its source."""

    def write(masks, options=OPTIONS, **changes):
        rng = np.random.default_rng(0)
        names = [f"{idx}.png" for idx in range(masks.shape[1])]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(tmp_path / name)
        ids = [str(number) for number in range(len(masks))]
        expressions = {"video_id": ["v"], "expression_id": ["0"], "type_id": [0], "anno_ids": [ids], "frames": [names]}
        rles = [[encode_mask(mask > 0) if mask.any() else None for mask in of_object] for of_object in masks]
        table = {"video_id": ["v"] * len(ids), "anno_id": ids, "rle": rles}
        return ClipSource(
            "mine", Dataset.from_dict(expressions | changes), Dataset.from_dict(table), tmp_path, options, NUM_DRAWS
        )

    return write


def box(top, left, height, width):
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def test_a_clip_has_objects_of_its_first_frame_and_no_others(source):
    for number in range(NUM_DRAWS):
        clip = draw(source, number)
        assert 1 <= clip.num_objects <= 2
        present = set(np.unique(clip.labels[0])) - {0}
        assert present == set(range(1, clip.num_objects + 1))
        assert clip.labels.max() <= clip.num_objects
        assert clip.frames.shape == (*clip.labels.shape, 3) and clip.labels.shape[1:] == (32, 32)
        assert clip.frames.dtype == clip.labels.dtype == np.uint8
        assert clip.memory_frames[0] == 0 and len(clip.memory_frames) <= 3
        assert max(clip.memory_frames) < max(len(clip.frames) - 1, 1)


def test_objects_vanish_and_enter_later(write):
    """The first is to be seen at the beginning, the second at the end; each clip is about those of its first frame."""
    nothing = np.zeros(SIZE, dtype=np.uint8)
    first, second = box(2, 2, 12, 12), box(8, 22, 14, 14)
    source = write(
        np.stack([[first] * 3 + [nothing] * 3, [nothing] * 3 + [second] * 3]),
        ClipOptions(num_frames=4, max_gap=2, first_max_gap=2, size=32, min_scale=1.0, jitter=0.0),
    )
    counts = []
    for number in range(30):
        clip = draw(source, number)
        is_early = clip.frame_idx[0] < 3
        assert clip.num_objects == 1
        seen = [bool(labels.any()) for labels in clip.labels[1:]]
        assert seen[0] or clip.labels[0].any()
        expected = [(idx < 3) == is_early for idx in clip.frame_idx[1:]]
        # The square may have left the other object out; its own stays where it was.
        assert seen == expected
        counts.append(all(expected))
    assert any(counts) and not all(counts)


def test_a_clip_depends_on_seed_and_number_alone(source):
    again = pickle.loads(pickle.dumps(source))
    for number in (3, 17):
        one, other = draw(source, number), draw(again, number)
        assert one.frame_idx == other.frame_idx and one.memory_frames == other.memory_frames
        np.testing.assert_array_equal(one.frames, other.frames)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert not np.array_equal(draw(source, 3).frames, draw(source, 3, seed=1).frames)


def test_clips_grow_longer_and_their_frames_lie_further_apart(source):
    early, late = [draw(source, number) for number in range(10)], [draw(source, number) for number in range(40, 60)]
    assert {len(clip.frames) for clip in early[:4]} == {2} and {len(clip.frames) for clip in late} == {4}
    gaps = [{abs(int(gap)) for clip in clips for gap in np.diff(clip.frame_idx)} for clips in (early[:4], late)]
    assert gaps == [{1}, {1, 2, 3}]
    directions = {np.sign(clip.frame_idx[1] - clip.frame_idx[0]) for clip in late}
    assert directions == {-1, 1}


def test_labels_stay_on_their_pixels(write):
    """Pictures show the labels themselves, so that cutting, resizing and mirroring can be seen to go together."""
    mask = box(3, 5, 14, 20)
    options = ClipOptions(num_frames=2, size=32, min_scale=0.6, jitter=0.0)
    source = write(np.stack([[mask] * 6]), options)
    for name in sorted(source.store.root.glob("*.png")):
        Image.fromarray(np.repeat(mask[..., None] * 255, 3, axis=2)).save(name)
    for number in range(20):
        clip = draw(source, number)
        assert ((clip.frames[..., 0] > 127) == (clip.labels == 1)).mean() > 0.93


def test_where_masks_overlap_a_pixel_has_one_owner_and_covered_objects_are_left_out(write):
    twice = np.stack([[box(2, 2, 16, 16)] * 6, [box(2, 2, 16, 16)] * 6])
    source = write(twice, ClipOptions(num_frames=3, size=32))
    assert all(draw(source, number).num_objects == 1 for number in range(5))
    assert source.video(0).masks.shape == (1, 6, *SIZE)


def test_own_data_gives_frames_whose_masks_are_known(tmp_path):
    for idx in range(5):
        (tmp_path / "clip").mkdir(exist_ok=True)
        Image.fromarray(np.full((*SIZE, 3), 50 * idx, dtype=np.uint8)).save(tmp_path / "clip" / f"{idx}.png")
    square = "[[4, 4, 20, 4, 20, 20, 4, 20]]"
    (tmp_path / "train.jsonl").write_text(
        f'{{"video": "clip", "expression": "a", "masks": {{"0": {square}, "2": {square}, "4": null}}}}\n'
        f'{{"video": "clip", "expression": "b", "masks": {{"0": {square}, "2": {square}, "3": {square}}}}}\n'
    )
    made = []
    for config in ("expressions", "masks"):
        builder = OwnData(config, data_dir=tmp_path, cache_dir=tmp_path / "cache")
        builder.download_and_prepare()
        made.append(builder.as_dataset(split="train"))
    source = ClipSource("own_data", *made, tmp_path, OPTIONS, NUM_DRAWS)
    assert source.video(0).known == (0, 2)
    assert {idx for number in range(10) for idx in draw(source, number).frame_idx} == {0, 2}


def test_the_collator_cuts_to_the_shortest_clip_and_fills_up_objects(source):
    clips = [draw(source, number) for number in (50, 0, 51)]
    batch = ClipCollator()(clips)
    num_objects = [clip.num_objects for clip in clips]
    assert batch["frames"].shape == (3, 2, 3, 32, 32) and batch["frames"].dtype == torch.float32
    assert batch["labels"].shape == (3, 2, 32, 32) and batch["labels"].dtype == torch.int64
    assert batch["is_object"].sum(dim=1).tolist() == num_objects
    assert batch["memory_frames"] == [idx for idx in clips[0].memory_frames if idx < 2]
    pixel = clips[0].frames[1, 5, 7] / 255
    expected = (pixel - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch["frames"][0, 1, :, 5, 7], expected, rtol=1e-5, atol=1e-6)


def test_frames_that_cannot_be_read_are_drawn_again_if_asked(write):
    source = write(np.stack([[box(2, 2, 16, 16)] * 6]), ClipOptions(num_frames=2, size=32))
    (source.store.root / "2.png").write_bytes(b"no picture")
    samples = TrainingSamples({"mine": source}, {"mine": 1.0}, 0, NUM_DRAWS, on_error="skip")
    attempts = [samples[number].attempt for number in range(NUM_DRAWS)]
    assert max(attempts) > 0 and min(attempts) == 0


def test_masks_that_do_not_fit_are_named(write, tmp_path):
    source = write(np.stack([[box(2, 2, 16, 16)] * 6]))
    for name in tmp_path.glob("*.png"):
        Image.new("RGB", (20, 20)).save(name)
    with pytest.raises(AnnotationError, match=r"a mask has size \(24, 40\) \(H, W\), but the picture \(20, 20\)"):
        draw(source, 0)
    for idx, name in enumerate(sorted(tmp_path.glob("*.png"))):
        Image.new("RGB", (40, 24 + idx)).save(name)
    with pytest.raises(AnnotationError, match=r"has size \(\d+, 40\) \(H, W\), but another frame of the same video"):
        source.video(0)
    short = write(np.stack([[box(2, 2, 16, 16)] * 6]), frames=[["0.png", "1.png"]])
    with pytest.raises(AnnotationError, match="the mask '0' has 6 entries for 2 frames"):
        draw(short, 0)
    with pytest.raises(AnnotationError, match="no object is to be seen in any frame"):
        draw(write(np.zeros((1, 6, *SIZE), dtype=np.uint8)), 0)


def test_sources_without_movement_are_refused(write):
    with pytest.raises(ValueError, match="Source `mine` has no video of two frames or more whose masks are known"):
        write(np.stack([[box(2, 2, 16, 16)]]))
    with pytest.raises(ValueError, match="Source `words` has no masks to learn from"):
        clip_sources({"words": object()}, OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 1}, "`num_frames` is 1 but must be at least 2"),
        ({"size": 100}, "`size` is 100 but must be a multiple of 16"),
        ({"first_num_frames": 9}, "`first_num_frames` is 9, more than `num_frames`"),
        ({"growth": 1.5}, r"`growth` is 1.5 but must lie in \[0, 1\]"),
        ({"min_scale": 0.0}, r"`min_scale` is 0.0 but must lie in \(0, 1\]"),
        ({"jitter": 1.0}, r"`jitter` is 1.0 but must lie in \[0, 1\)"),
    ],
)
def test_options_that_make_no_clips_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClipOptions(**options)
