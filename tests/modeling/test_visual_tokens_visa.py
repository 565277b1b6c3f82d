"""Token merging against the published numbers, a plain version in loops, and cases computed by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.modeling.merging_reference import cluster_frame, merge_frame
from visa_hf.modeling.visual_tokens_visa import assign_clusters, average_clusters, merge_visual_tokens

VISA_TINY = Path(__file__).parents[1] / "reference" / "visa_tiny"
COUNTS, NEIGHBORS = (64, 32, 16), (5, 3, 3)


def random_features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_visual_tokens_are_those_of_the_published_model():
    expected = load_file(VISA_TINY / "expected.safetensors")
    weights = load_file(VISA_TINY / "original_state_dict.safetensors")
    tokens = merge_visual_tokens(expected["train.clip_patch_features"], COUNTS, NEIGHBORS)
    projected = torch.nn.functional.linear(
        tokens, weights["model.mm_projector.weight"], weights["model.mm_projector.bias"]
    )
    torch.testing.assert_close(projected, expected["train.visual_tokens"], rtol=0, atol=1e-4)


def test_five_points_on_a_line_merge_as_computed_by_hand():
    # Densities exp(-1/30), exp(-1/60), exp(-13/300), exp(-65/300), exp(-137/300): the second is the densest.
    # delta: 0.1, 1.4 (largest distance), 0.2, 0.7, 0.4. Scores: 0.097, 1.377, 0.192, 0.564, 0.253.
    # Centres in order: 0.1 (joined by 0 and 0.3), 1.0, 1.4.
    features = torch.tensor([0.0, 0.1, 0.3, 1.0, 1.4]).reshape(1, 5, 1)
    assert assign_clusters(features, 3, 3).tolist() == [[0, 0, 0, 1, 2]]
    tokens = merge_visual_tokens(features, (3,), (3,))
    torch.testing.assert_close(tokens.flatten(), torch.tensor([0.4 / 3, 1.0, 1.4]), rtol=0, atol=1e-5)


def test_equally_good_centres_are_taken_in_the_order_of_their_position():
    # Two pairs of mutual neighbours: every density is exp(-1/2), no point has a denser one, all scores are equal.
    features = torch.tensor([0.0, 1.0, 10.0, 11.0]).reshape(1, 4, 1)
    assert assign_clusters(features, 2, 2).tolist() == [[0, 1, 1, 1]]


def test_a_token_equally_near_to_two_centres_joins_the_better_one():
    features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [-1.0, 0.2], [-1.0, -0.2], [0.0, 0.0]])
    clusters = assign_clusters(features[None], 2, 3)[0].tolist()
    assert clusters == cluster_frame(features, 2, 3)
    assert clusters == [0, 1, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("shape", "counts", "neighbors"),
    [
        ((2, 256, 32), COUNTS, NEIGHBORS),
        ((2, 100, 7), (20, 9), (4, 3)),
        ((2, 65, 16), (16, 8, 4), NEIGHBORS),
        ((3, 30, 5), (30, 10, 10), (5, 5, 2)),
        ((2, 20, 9), (6, 2, 1), (7, 3, 3)),
        ((1, 17, 3), (4,), (1,)),
        ((1, 1, 4), (1, 1), (5, 3)),
    ],
)
def test_merging_equals_the_plain_version_in_loops(shape, counts, neighbors):
    features = random_features(*shape)
    tokens = merge_visual_tokens(features, counts, neighbors)
    expected = torch.stack([merge_frame(frame.double(), counts, neighbors) for frame in features])
    assert tokens.shape == (shape[0], sum(counts), shape[2])
    torch.testing.assert_close(tokens.double(), expected, rtol=0, atol=1e-5)


def test_repeated_tokens_merge_as_in_the_plain_version():
    features = random_features(1, 40, 8).repeat(1, 3, 1)
    tokens = merge_visual_tokens(features, (50, 20), (5, 3))
    expected = merge_frame(features[0].double(), (50, 20), (5, 3))
    torch.testing.assert_close(tokens[0].double(), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_the_averages():
    features = random_features(2, 60, 6).requires_grad_()
    weights = random_features(2, 25, 6, seed=1)
    (merge_visual_tokens(features, (16, 9), (5, 3)) * weights).sum().backward()
    doubled = features.detach().double().requires_grad_()
    expected = torch.stack([merge_frame(frame, (16, 9), (5, 3)) for frame in doubled])
    (expected * weights).sum().backward()
    torch.testing.assert_close(features.grad.double(), doubled.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 256, 64), (5, 256, 1024), (6, 100, 33)])
def test_a_frame_gives_the_same_bits_alone_and_in_any_batch(shape):
    features = random_features(*shape)
    tokens = merge_visual_tokens(features, COUNTS, NEIGHBORS)
    alone = torch.cat([merge_visual_tokens(frame[None], COUNTS, NEIGHBORS) for frame in features])
    shuffled = merge_visual_tokens(features.flip(0)[1:], COUNTS, NEIGHBORS)
    assert torch.equal(tokens, alone)
    assert torch.equal(tokens[:-1], shuffled.flip(0))


def test_identical_tokens_keep_one_centre_each_and_merge_into_themselves():
    features = random_features(1, 1, 8).expand(3, 50, 8)
    clusters = assign_clusters(features, 4, 3)
    assert clusters.tolist() == [[0, 1, 2, 3] + [0] * 46] * 3
    tokens = merge_visual_tokens(features, (4, 2), (3, 1))
    torch.testing.assert_close(tokens, features[:, :6], rtol=1e-5, atol=1e-5)


def test_as_many_clusters_as_tokens_only_reorders_them():
    features = random_features(2, 24, 5)
    tokens = merge_visual_tokens(features, (24,), (5,))
    for frame, merged in zip(features, tokens, strict=True):
        nearest = torch.cdist(merged, frame).min(dim=1)
        assert sorted(nearest.indices.tolist()) == list(range(24))
        assert nearest.values.max() < 1e-5


def test_one_cluster_is_the_mean_of_all_tokens():
    features = random_features(2, 24, 5)
    tokens = merge_visual_tokens(features, (1,), (5,))
    torch.testing.assert_close(tokens[:, 0], features.mean(dim=1), rtol=0, atol=1e-5)


def test_no_frames_give_no_tokens():
    assert merge_visual_tokens(torch.zeros(0, 256, 8), COUNTS, NEIGHBORS).shape == (0, 112, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32_and_rounded_once(dtype):
    features = random_features(2, 256, 64).to(dtype)
    tokens = merge_visual_tokens(features, COUNTS, NEIGHBORS)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, merge_visual_tokens(features.float(), COUNTS, NEIGHBORS).to(dtype))


def test_autocast_changes_nothing():
    features = random_features(2, 256, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = merge_visual_tokens(features, COUNTS, NEIGHBORS)
    assert torch.equal(tokens, merge_visual_tokens(features, COUNTS, NEIGHBORS))


def test_the_features_are_not_written_to():
    features = random_features(2, 64, 8)
    before = features.clone()
    merge_visual_tokens(features, (16, 8), (5, 3))
    assert torch.equal(features, before)


def test_average_counts_members_as_published():
    tokens = torch.tensor([[[1.0], [2.0], [6.0]]])
    averages = average_clusters(tokens.double(), torch.tensor([[1, 0, 1]]), 2)
    expected = torch.tensor([[[2 / (1 + 1e-6)], [7 / (2 + 1e-6)]]], dtype=torch.float64)
    torch.testing.assert_close(averages, expected, rtol=0, atol=1e-7)
