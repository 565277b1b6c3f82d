"""Tracking many queries of a session: the same as each by itself, added before or on the way, at once or in turns."""

import re

import numpy as np
import pytest
import torch

from tests.modeling.session_models import Calls, StubModel
from visa_hf.modeling.configuration_visa import XMemConfig
from visa_hf.modeling.memory_xmem import XMemMemory
from visa_hf.modeling.modeling_xmem import XMemModel
from visa_hf.modeling.video_session_visa import VisaVideoSession

HEIGHT, WIDTH, NUM_FRAMES = 36, 50, 14


@pytest.fixture(scope="module")
def tracker():
    torch.manual_seed(0)
    # Memory so small that it is consolidated, and elements are dropped, within the clip.
    config = XMemConfig.tiny(
        input_size=None,
        memory_every=2,
        min_working_frames=2,
        max_working_frames=3,
        num_prototypes=6,
        max_long_term_elements=14,
    )
    tracker = XMemModel(config).eval()
    with torch.no_grad():
        for module in tracker.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
    return tracker


@pytest.fixture(scope="module")
def model(tracker):
    return StubModel(tracker)


@pytest.fixture(scope="module")
def video():
    noise = np.random.RandomState(0).randint(0, 256, (9, 13, 3), dtype=np.uint8)
    picture = noise.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([picture[t : t + HEIGHT, 2 * t : 2 * t + WIDTH] for t in range(NUM_FRAMES)])


def boxes(*corners):
    masks = np.zeros((len(corners), HEIGHT, WIDTH), dtype=bool)
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + 12, left : left + 14] = True
    return masks


# One object, two, an empty one among two, none at all, and other targets.
ASKED = [
    {"first_mask": boxes((2, 3)), "target_frame": 5},
    {"first_mask": boxes((2, 5), (18, 20)), "target_frame": 5},
    {"first_mask": boxes((4, 8)), "target_frame": 9},
    {"first_mask": np.concatenate([boxes((3, 9)), boxes((0, 0)) & False, boxes((20, 30))]), "target_frame": 5},
    {"first_mask": boxes((0, 0)) & False, "target_frame": 5},
    {"first_mask": boxes((6, 2)), "target_frame": 0},
    {"first_mask": boxes((1, 30)), "target_frame": NUM_FRAMES - 1},
]


def propagated(model, video, asked, **options):
    with VisaVideoSession(video, None, want_probs=True, **options) as session:
        for query in asked:
            model.add_query(session, **query)
        return list(model.propagate_in_video_iterator(session))


@pytest.fixture(scope="module")
def alone(model, video):
    """What each query gives by itself: (masks, probs, scores) by query and frame, the tracker stepped as for one."""
    return [
        {
            output.frame_idx: (output.masks[0], output.mask_probs[0], output.scores[0])
            for output in propagated(model, video, [query])
        }
        for query in ASKED
    ]


def assert_as_alone(output, alone):
    parts = output.query_ids, output.masks, output.mask_probs, output.scores
    for query_id, masks, probs, scores in zip(*parts, strict=True):
        expected_masks, expected_probs, expected_scores = alone[query_id][output.frame_idx]
        assert torch.equal(masks, expected_masks), (query_id, output.frame_idx)
        torch.testing.assert_close(probs, expected_probs, atol=2e-5, rtol=0)
        torch.testing.assert_close(scores, expected_scores, atol=2e-5, rtol=0)


def test_scores_are_mean_probabilities_of_the_pixels_of_masks(alone):
    """Plainly, from the masks and probabilities of each frame; those before the target are rounded to 1/65535."""
    seen = set()
    for query_id, frames in enumerate(alone):
        for frame_idx, (masks, probs, scores) in frames.items():
            expected = [
                float(prob[mask].mean()) if mask.any() else 0.0 for mask, prob in zip(masks, probs, strict=True)
            ]
            assert scores.dtype == torch.float32 and scores.device.type == "cpu"
            np.testing.assert_allclose(scores, expected, atol=2e-5, rtol=0)
            seen |= {round(score, 2) for score in expected}
            if frame_idx == ASKED[query_id].get("target_frame"):
                assert scores.tolist() == [float(mask.any()) for mask in masks]
    assert len(seen) > 10, "all scores are alike, and this test shows nothing"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_queries_per_batch": 1},
        {"max_queries_per_batch": 2, "max_cached_tracker_frames": 100},
        {"max_tracked_queries": 3},
        {"max_tracked_queries": 1, "max_cached_tracker_frames": 0},
    ],
    ids=str,
)
def test_many_queries_are_the_same_as_each_alone(model, video, alone, options):
    outputs = propagated(model, video, ASKED, **options)
    assert [output.frame_idx for output in outputs] == list(range(NUM_FRAMES))
    for output in outputs:
        assert output.query_ids == tuple(range(len(ASKED)))
        assert_as_alone(output, alone)
    tracked = [masks.any() for output in outputs for masks, *_ in [alone[1][output.frame_idx]]]
    assert sum(tracked) > NUM_FRAMES // 2, "the tracker lost everything, and this test shows nothing"


def test_alone_is_the_tracker_stepped_with_a_memory_of_its_own(tracker, video, alone):
    """The plain result that the sharing is compared with: `step`, which knows nothing of several queries."""
    from visa_hf.modeling.video_tracking_visa import prepare_tracker_frame

    for query_id in (0, 1):
        masks = torch.from_numpy(ASKED[query_id]["first_mask"])
        for way in (range(5, NUM_FRAMES), range(5, -1, -1)):
            memory = tracker.init_memory()
            for idx in way:
                frame = prepare_tracker_frame(video[idx], (HEIGHT, WIDTH), "cpu", torch.float32)
                probs = tracker.step(memory, frame, masks if idx == 5 else None, is_last=idx == way[-1])
                if idx != 5:
                    found_masks, found_probs, _ = alone[query_id][idx]
                    torch.testing.assert_close(found_probs, probs[1:], atol=2e-5, rtol=0)
                    assert torch.equal(found_masks, torch.stack([probs.argmax(0) == k for k in range(1, len(probs))]))
            assert memory.num_long_term > 0, "nothing was consolidated"


def test_queries_with_one_target_read_memory_together(model, tracker, video, monkeypatch):
    reads = []
    read = XMemMemory.read
    monkeypatch.setattr(XMemMemory, "read", lambda self, *args: reads.append(1) or read(self, *args))
    asked = [{"first_mask": boxes((2, 3 + idx)), "target_frame": 5} for idx in range(6)]
    with Calls(key=tracker.key_encoder) as counted:
        propagated(model, video, asked)
    assert len(reads) == NUM_FRAMES - 1
    assert counted.calls["key"] == NUM_FRAMES  # the target's features are handed over


@pytest.mark.parametrize(("kept", "expected"), [(0, NUM_FRAMES + 5), (1, NUM_FRAMES + 4), (99, NUM_FRAMES)])
def test_frames_between_targets_are_encoded_once_if_there_is_room(model, tracker, video, kept, expected):
    with Calls(key=tracker.key_encoder) as counted:
        propagated(model, video, [ASKED[0], ASKED[2]], max_cached_tracker_frames=kept)
    assert counted.calls["key"] == expected


@pytest.mark.parametrize("when", [0, 3, 5, 8, NUM_FRAMES - 2])
@pytest.mark.parametrize("late", [0, 2, 4, 5, 6])
def test_a_query_added_on_the_way_has_the_masks_it_would_have_had(model, video, alone, when, late):
    first = 1 if late != 1 else 0
    with VisaVideoSession(video, None, want_probs=True) as session:
        model.add_query(session, **ASKED[first])
        for output in model.propagate_in_video_iterator(session):
            assert output.query_ids == ((0,) if output.frame_idx <= when else (0, 1))
            assert_as_alone(output, [alone[first], alone[late]])
            if output.frame_idx == when:
                model.add_query(session, **ASKED[late])


def test_a_query_added_on_the_way_counts_every_third_frame(model, video):
    first, second = ASKED[0], {**ASKED[2], "target_frame": 11}
    expected = {output.frame_idx: output for output in propagated(model, video, [first, second], every=3)}
    with VisaVideoSession(video, None, want_probs=True, every=3) as session:
        model.add_query(session, **first)
        for output in model.propagate_in_video_iterator(session):
            for masks, other in zip(output.masks, expected[output.frame_idx].masks, strict=False):
                assert torch.equal(masks, other)
            if output.frame_idx == 2:
                model.add_query(session, **second)
    assert len(output.query_ids) == 2


def test_scores_are_there_when_no_probabilities_are_asked_for(model, video, alone):
    with VisaVideoSession(video, None, max_tracked_queries=2) as session:
        for query in ASKED:
            model.add_query(session, **query)
        for output in model.propagate_in_video_iterator(session):
            assert output.mask_probs is None
            for query_id, scores in zip(output.query_ids, output.scores, strict=True):
                torch.testing.assert_close(scores, alone[query_id][output.frame_idx][2], atol=2e-5, rtol=0)


def test_a_removed_query_is_gone_and_the_others_stay_as_they_are(model, video, alone):
    with VisaVideoSession(video, None, want_probs=True) as session:
        for query in ASKED:
            model.add_query(session, **query)
        present = list(range(len(ASKED)))
        for output in model.propagate_in_video_iterator(session):
            assert output.query_ids == tuple(present)
            assert_as_alone(output, alone)
            for query_id in {2: [1], 6: [2, 3], 8: [0, 4]}.get(output.frame_idx, []):
                session.remove_query(query_id)
                present.remove(query_id)
        # Asked again, it gets a number of its own, and the same masks.
        assert model.add_query(session, **ASKED[1]) == len(ASKED)
        for output in model.propagate_in_video_iterator(session):
            assert output.query_ids == (5, 6, 7)
            assert torch.equal(output.masks[2], alone[1][output.frame_idx][0])
        with pytest.raises(ValueError, match="`query_id` is 1 but the session has the queries 5, 6, 7"):
            session.remove_query(1)


def test_all_queries_may_be_removed_on_the_way(model, video):
    with VisaVideoSession(video, None) as session:
        model.add_query(session, **ASKED[0])
        outputs = []
        for output in model.propagate_in_video_iterator(session):
            outputs.append(len(output.masks))
            if output.frame_idx == 6:
                session.remove_query(0)
    assert outputs == [1] * 7 + [0] * 7


def test_too_many_queries_on_the_way_are_refused(model, video):
    with VisaVideoSession(video, None, max_tracked_queries=2) as session:
        for query in ASKED[:2]:
            model.add_query(session, **query)
        iterator = model.propagate_in_video_iterator(session)
        next(iterator)
        model.add_query(session, **ASKED[2])
        with pytest.raises(RuntimeError, match="3 queries would be tracked at once, but `max_tracked_queries` is 2"):
            next(iterator)
        steps = []
        assert len(list(model.propagate_in_video_iterator(session, on_frame=steps.append))) == NUM_FRAMES
        assert len(steps) == session.num_steps


def test_the_tracker_takes_objects_out_of_a_memory(tracker, video):
    frames = torch.from_numpy(video).permute(0, 3, 1, 2).float() / 255
    masks = torch.from_numpy(boxes((2, 3), (2, 5), (18, 20), (4, 8)))
    memory, other = tracker.init_memory(), tracker.init_memory()
    tracker.step_queries(memory, frames[0], [1, 2, 1], masks)
    tracker.step_queries(other, frames[0], [2], masks[1:3])
    for idx in range(1, 9):
        if idx == 5:
            memory.keep_objects([1, 2])
            assert memory.object_ids == [2, 3]
        probs = tracker.step_queries(memory, frames[idx], [1, 2, 1] if idx < 5 else [2])
        (expected,) = tracker.step_queries(other, frames[idx], [2])
        torch.testing.assert_close(probs[1 if idx < 5 else 0], expected, atol=1e-5, rtol=0)
    late = tracker.init_memory()
    tracker.step(late, frames[0], masks[:1])
    tracker.step(late, frames[1], masks[1:2], [2])
    with pytest.raises(RuntimeError, match="The objects entered on 2 frames, but only one can be told apart"):
        late.keep_objects([0])


@pytest.mark.parametrize(
    ("sizes", "gives_masks", "message"),
    [
        ([2, 1], True, "`num_objects` is [2, 1] but there are 2 objects. Give the number of each query, at least 1."),
        ([2, 0], True, "`num_objects` is [2, 0] but there are 2 objects."),
        ([2], False, "`masks` are needed on the first frame, and on no other. Use `step` for later masks."),
    ],
)
def test_queries_that_do_not_fit_the_masks_are_refused(tracker, sizes, gives_masks, message):
    masks = torch.from_numpy(boxes((2, 3), (18, 20))) if gives_masks else None
    memory = tracker.init_memory()
    with pytest.raises(ValueError, match=re.escape(message)):
        tracker.step_queries(memory, torch.zeros(3, HEIGHT, WIDTH), sizes, masks)
    assert memory.object_ids == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_queries_per_batch": 0}, ValueError, "`max_queries_per_batch` is 0 but must be at least 1."),
        ({"max_tracked_queries": 1.5}, TypeError, "`max_tracked_queries` is 1.5 but must be a whole number."),
        ({"max_cached_prefixes": -1}, ValueError, "`max_cached_prefixes` is -1 but must be at least 0."),
        ({"mode": "fast"}, ValueError, '`mode` is \'fast\' but must be "shared" or "published".'),
        ({"cache_dtype": "float16"}, TypeError, "`cache_dtype` is 'float16' but must be a floating dtype"),
    ],
)
def test_bad_options_of_sharing_are_refused(video, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        VisaVideoSession(video, None, **options)
