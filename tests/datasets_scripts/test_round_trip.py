"""Synthetic clips -> disk -> builder -> samples: the masks are the generator's, whatever the seed, size and length."""

from pathlib import Path

import numpy as np
import pytest

from tests.datasets_scripts.prepared import prepared
from visa_hf.datasets_scripts import ReVOS
from visa_hf.datasets_scripts.samples import ExpressionSource
from visa_hf.datasets_scripts.sampling import SamplingRecipe, random_generator
from visa_hf.datasets_scripts.synthetic import ClipOptions, SyntheticClip, make_clip, write_dataset
from visa_hf.rle import decode_masks


@pytest.mark.parametrize(
    ("seed", "size", "num_frames"),
    [(0, (33, 47), (1, 1)), (7, (61, 35), (2, 5)), (2**40 + 1, (40, 101), (13, 17)), (11, (127, 33), (8, 8))],
)
def test_masks_survive_the_way_from_the_generator_to_samples(
    tmp_path: Path, seed: int, size: tuple[int, int], num_frames: tuple[int, int]
) -> None:
    options = ClipOptions(size=size, num_frames=num_frames, num_objects=(2, 3), levels=(1, 2))
    write_dataset(tmp_path / "data", num_videos={"train": 3}, seed=seed, options=options, show_progress=False)
    clips = [make_clip(seed, index, options=options) for index in range(3)]
    by_name = {clip.name: clip for clip in clips}
    expressions = prepared(ReVOS, "expressions", tmp_path / "data", tmp_path / "cache")
    masks = prepared(ReVOS, "masks", tmp_path / "data", tmp_path / "cache")

    means = {(row["video_id"], row["expression_id"]): row["anno_ids"] for row in expressions}
    for clip in clips:
        objects = {
            anno_id: thing
            for number, said in enumerate(clip.expressions)
            for anno_id, thing in zip(means[clip.name, str(number)], said.objects, strict=True)
        }
        rows = {row["anno_id"]: row["rle"] for row in masks if row["video_id"] == clip.name}
        assert set(rows) == set(objects)
        for anno_id, rles in rows.items():
            np.testing.assert_array_equal(decode_masks(rles, size), clip.masks[objects[anno_id]])

    recipe = SamplingRecipe(foreign_probability=0.2)
    source = ExpressionSource("shapes", expressions, masks, tmp_path / "data", recipe)
    num_foreign = 0
    for draw in range(40):
        sample = source.sample(random_generator(seed, draw), draw)
        num_foreign += sample.is_foreign_target
        assert sample.target_frame is not None and sample.target_frame.shape == (*size, 3)
        for conversation in sample.conversations:
            assert conversation.masks is not None and conversation.masks.dtype == np.uint8
            expected = np.zeros(size, dtype=bool)
            if sample.target_idx is not None:
                expected = _mask_of(by_name[sample.video_id], conversation.query, sample.target_idx)
            np.testing.assert_array_equal(conversation.masks, expected[None])
    assert 0 < num_foreign < 40


def _mask_of(clip: SyntheticClip, query: str, frame: int) -> np.ndarray:
    """The pixels of what a sentence means; sentences of one clip are all different."""
    (said,) = [expression for expression in clip.expressions if expression.text == query]
    return np.any(clip.masks[list(said.objects), frame], axis=0)
