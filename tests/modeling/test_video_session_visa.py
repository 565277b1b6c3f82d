"""Video sessions: which frames are tracked from where, against the tracker called by hand."""

import re
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.modeling.session_models import StubModel
from visa_hf.modeling.configuration_visa import XMemConfig
from visa_hf.modeling.earlier_frames_visa import EarlierFrames, Found
from visa_hf.modeling.modeling_xmem import XMemModel
from visa_hf.modeling.outputs_visa import PackedMask
from visa_hf.modeling.video_asking_visa import masks_from_logits
from visa_hf.modeling.video_session_visa import VisaVideoSession, check_query, is_blank
from visa_hf.modeling.video_tracking_visa import (
    highest_plane,
    prepare_tracker_frame,
    tracking_size,
)

HEIGHT, WIDTH, NUM_FRAMES = 40, 56, 9
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def tracker():
    torch.manual_seed(0)
    # Other than a multiple of 16, so that sizes matter; memory small enough to be consolidated.
    return XMemModel(XMemConfig.tiny(input_size=36, memory_every=2, min_working_frames=2, max_working_frames=3)).eval()


@pytest.fixture(scope="module")
def video():
    noise = np.random.RandomState(0).randint(0, 256, (NUM_FRAMES, 5, 7, 3), dtype=np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def two_masks():
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, 4:20, 6:30] = True
    masks[1, 20:36, 24:50] = True
    return masks


def run(model, session):
    with session:
        return list(model.propagate_in_video_iterator(session))


def track_by_hand(tracker, video, masks, frame_indices, input_size=36):
    """XMem along `frame_indices`, whose first one has the masks: every step written out."""
    size = (int(HEIGHT / HEIGHT * input_size), int(WIDTH / HEIGHT * input_size))
    memory = tracker.init_memory()
    found = {}
    for frame_idx in frame_indices:
        pixels = torch.tensor((video[frame_idx] / 255 - MEAN) / STD).permute(2, 0, 1).float()
        frame = F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]
        given = None
        if frame_idx == frame_indices[0]:
            given = F.interpolate(masks[None].float(), size, mode="nearest")[0]
        probs = tracker.step(memory, frame, masks=given, is_last=frame_idx == frame_indices[-1])
        probs = F.interpolate(probs[None], (HEIGHT, WIDTH), mode="bilinear", align_corners=False)[0]
        found[frame_idx] = probs
    return found


def test_masks_are_carried_both_ways_as_by_hand(tracker, video, two_masks):
    target = 4
    session = VisaVideoSession(video, None, want_probs=True)
    model = StubModel(tracker)
    model.add_query(session, first_mask=two_masks, target_frame=target)
    outputs = run(model, session)

    by_hand = track_by_hand(tracker, video, two_masks, range(target, -1, -1))
    by_hand.update(track_by_hand(tracker, video, two_masks, range(target, NUM_FRAMES)))
    assert [output.frame_idx for output in outputs] == list(range(NUM_FRAMES))
    seen = 0
    for output in outputs:
        if output.frame_idx == target:
            torch.testing.assert_close(output.masks[0], two_masks)
            continue
        probs = by_hand[output.frame_idx]
        torch.testing.assert_close(output.mask_probs[0], probs[1:], atol=1e-5, rtol=0)
        masks = torch.stack([probs.argmax(dim=0) == 1, probs.argmax(dim=0) == 2])
        assert (output.masks[0] != masks).float().mean() < 1e-3
        seen += int(masks.any())
    assert seen > 0, "the tracker lost everything, and this test shows nothing"


@pytest.mark.parametrize("target", [0, NUM_FRAMES - 1])
def test_a_target_at_either_end_needs_one_sweep(tracker, video, two_masks, target):
    session = VisaVideoSession(video, None, want_probs=True)
    model = StubModel(tracker)
    model.add_query(session, first_mask=two_masks[:1], target_frame=target)
    steps = []
    assert session.num_steps == (NUM_FRAMES if target == 0 else 2 * NUM_FRAMES)
    with session:
        outputs = list(model.propagate_in_video_iterator(session, on_frame=steps.append))
    assert len(steps) == session.num_steps
    way = range(NUM_FRAMES) if target == 0 else range(NUM_FRAMES - 1, -1, -1)
    by_hand = track_by_hand(tracker, video, two_masks[:1], way)
    for output in outputs:
        if output.frame_idx != target:
            torch.testing.assert_close(output.mask_probs[0], by_hand[output.frame_idx][1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(outputs[target].masks[0], two_masks[:1])


def test_several_queries_are_the_same_as_one_at_a_time(tracker, video, two_masks):
    asked = [
        {"first_mask": two_masks, "target_frame": 2},
        {"first_mask": two_masks[1], "target_frame": 7},
        {"first_mask": torch.zeros(HEIGHT, WIDTH), "target_frame": 5},
    ]
    model = StubModel(tracker)
    together = VisaVideoSession(video, None, want_probs=True)
    assert [model.add_query(together, **query) for query in asked] == [0, 1, 2]
    together = run(model, together)
    for position, query in enumerate(asked):
        session = VisaVideoSession(video, None, want_probs=True)
        model.add_query(session, **query)
        for shared, alone in zip(together, run(model, session), strict=True):
            assert shared.query_ids == (0, 1, 2)
            assert torch.equal(shared.masks[position], alone.masks[0])
            assert torch.equal(shared.mask_probs[position], alone.mask_probs[0])


def test_propagation_can_be_repeated_and_repeats_itself(tracker, video, two_masks):
    session = VisaVideoSession(video, None)
    model = StubModel(tracker)
    model.add_query(session, first_mask=two_masks, target_frame=3)
    first = list(model.propagate_in_video_iterator(session))
    kept = [output.masks[0].clone() for output in first]
    for output in first:
        output.masks[0].zero_()  # what is handed out belongs to whoever gets it
    second = list(model.propagate_in_video_iterator(session))
    assert all(torch.equal(masks, output.masks[0]) for masks, output in zip(kept, second, strict=True))
    assert first[0].mask_probs is None


def test_every_third_frame_is_tracked_as_a_video_of_these_frames(tracker, video, two_masks):
    session = VisaVideoSession(video, None, every=3, want_probs=True)
    with pytest.raises(RuntimeError, match="depends on the target frame. Call `add_query` first"):
        _ = session.frame_indices
    model = StubModel(tracker)
    model.add_query(session, first_mask=two_masks, target_frame=5)
    assert list(session.frame_indices) == [2, 5, 8]
    thinned = VisaVideoSession(video[2::3], None, want_probs=True)
    model.add_query(thinned, first_mask=two_masks, target_frame=1)
    for output, expected in zip(run(model, session), run(model, thinned), strict=True):
        assert output.frame_idx == 2 + 3 * expected.frame_idx
        assert torch.equal(output.mask_probs[0], expected.mask_probs[0])


def test_another_target_must_be_among_every_third_frame(tracker, video, two_masks):
    session = VisaVideoSession(video, None, every=3)
    model = StubModel(tracker)
    model.add_query(session, first_mask=two_masks, target_frame=5)
    model.add_query(session, first_mask=two_masks, target_frame=8)
    with pytest.raises(
        ValueError, match="The target frame 4 is not among the tracked frames, which are every 3 frames"
    ):
        model.add_query(session, first_mask=two_masks, target_frame=4)
    assert len(session.queries) == 2


def test_a_part_of_the_video_is_tracked_as_a_video_of_its_own(tracker, video, two_masks):
    session = VisaVideoSession(video, None, start="2f", end="7f", want_probs=True)
    model = StubModel(tracker)
    model.add_query(session, first_mask=two_masks, target_frame=4)
    part = VisaVideoSession(video[2:7], None, want_probs=True)
    model.add_query(part, first_mask=two_masks, target_frame=2)
    outputs = run(model, session)
    assert [output.frame_idx for output in outputs] == [2, 3, 4, 5, 6]
    for output, expected in zip(outputs, run(model, part), strict=True):
        assert torch.equal(output.mask_probs[0], expected.mask_probs[0])


def test_seconds_choose_a_part_by_the_rate(tracker, video):
    with VisaVideoSession(video, None, fps=2, start=1, end=3.5) as session:
        assert (session.first_frame, session.stop_frame) == (2, 7)


def test_the_model_is_asked_about_the_selected_frames(tracker, video):
    logits = torch.full((1, HEIGHT, WIDTH), -2.0)
    logits[0, :10] = 3.0
    model = StubModel(tracker, logits)
    with VisaVideoSession(video, None) as session:
        model.add_query(session, "the thing", target_frame=6, reference_frames=[1, 8, 3])
        query = session.queries[0]
    assert [(question.query, question.frame_selection) for question in model.asked] == [
        ("the thing", query.frame_selection)
    ]
    assert query.frame_selection.target_idx == 6
    assert query.frame_selection.reference_idx == (1, 3, 8)
    assert (query.query, query.answer, query.scores) == ("the thing", "It is [SEG].", (0.25,))
    assert torch.equal(query.target_masks, logits > 0)


def test_no_seg_token_is_nothing_to_segment(tracker, video):
    model = StubModel(tracker, torch.zeros(0, HEIGHT, WIDTH))
    session = VisaVideoSession(video, None, want_probs=True)
    model.add_query(session, "nothing")
    for output in run(model, session):
        assert output.masks[0].shape == output.mask_probs[0].shape == (0, HEIGHT, WIDTH)


def test_an_empty_target_mask_means_empty_everywhere_and_nothing_is_read(tracker, video):
    session = VisaVideoSession(video, None)
    model = StubModel(tracker, torch.full((2, HEIGHT, WIDTH), -1.0))
    model.add_query(session, "not in this video")
    assert len(session.backward_indices) == 0
    session.close()  # so that reading a frame would raise
    outputs = list(model.propagate_in_video_iterator(session))
    assert len(outputs) == NUM_FRAMES
    assert not any(output.masks[0].any() for output in outputs)


def test_an_empty_object_among_others_stays_empty_and_changes_nothing(tracker, video, two_masks):
    model = StubModel(tracker)
    with_empty = VisaVideoSession(video, None, want_probs=True)
    masks = torch.stack([two_masks[0], torch.zeros_like(two_masks[0]), two_masks[1]])
    model.add_query(with_empty, first_mask=masks, target_frame=3)
    without = VisaVideoSession(video, None, want_probs=True)
    model.add_query(without, first_mask=two_masks, target_frame=3)
    for output, expected in zip(run(model, with_empty), run(model, without), strict=True):
        assert torch.equal(output.mask_probs[0][[0, 2]], expected.mask_probs[0])
        assert not output.masks[0][1].any() and not output.mask_probs[0][1].any()


def test_an_object_too_small_for_the_tracker_stays_on_its_target_frame(tracker, video):
    speck = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    speck[9, 13] = True  # nearest resizing from 40 to 36 rows leaves row 9 out
    session = VisaVideoSession(video, None)
    model = StubModel(tracker)
    model.add_query(session, first_mask=speck, target_frame=3)
    assert [int(output.masks[0].sum()) for output in run(model, session)] == [0, 0, 0, 1, 0, 0, 0, 0, 0]


def test_a_single_frame_needs_no_tracker(video, two_masks):
    session = VisaVideoSession(video[:1], None, want_probs=True)
    model = StubModel(None)
    model.add_query(session, first_mask=two_masks)
    (output,) = run(model, session)
    assert torch.equal(output.masks[0], two_masks)
    assert torch.equal(output.mask_probs[0], two_masks.float())


def test_masks_of_a_query_do_not_overlap():
    logits = torch.tensor([[[2.0, -1.0, 1.0, 1.0]], [[1.0, -2.0, 3.0, 1.0]]])
    masks = masks_from_logits(logits)
    assert masks.tolist() == [[[True, False, False, True]], [[False, False, True, False]]]
    # A probability of 0.8 is a logit of 1.386.
    assert masks_from_logits(logits, 0.8).tolist() == [[[True, False, False, False]], [[False, False, True, False]]]


def test_the_highest_plane_is_the_argmax_and_the_first_of_equals():
    planes = torch.randint(0, 4, (5, 20, 30), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(highest_plane(planes), torch.from_numpy(planes.numpy().argmax(axis=0)))
    assert torch.equal(highest_plane(planes[:1]), torch.zeros(20, 30, dtype=torch.int64))


def test_the_tracker_sees_frames_as_published(video):
    assert tracking_size(480, 854, 480) == (480, 854)
    assert tracking_size(1080, 1920, 480) == (480, 853)
    assert tracking_size(854, 300, 480) == (1366, 480)
    assert tracking_size(75, 84, None) == (75, 84)
    frame = prepare_tracker_frame(video[0], (HEIGHT, WIDTH), "cpu", torch.float32)
    expected = (video[0, 3, 5] / 255 - MEAN) / STD
    np.testing.assert_allclose(frame[:, 3, 5], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Neither `query` nor `first_mask` is given."),
        ({"query": "x", "target_frame": 9}, "`target_frame` is 9 but the video"),
        ({"first_mask": np.zeros((HEIGHT, WIDTH)), "target_frame": 9}, "`target_frame` is 9 but the video"),
        ({"query": "x", "reference_frames": [-1]}, "`reference_frames` is -1 but the video"),
        (
            {"first_mask": np.zeros((WIDTH, HEIGHT))},
            "`first_mask` has shape (56, 40) but the frames are 40 x 56 pixels (height x width). Give a mask of shape "
            "(40, 56), or (K, 40, 56) for K objects.",
        ),
        ({"first_mask": np.zeros((0, HEIGHT, WIDTH))}, "`first_mask` holds no mask."),
        ({"first_mask": np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)}, "has the values 1, 2, 3, 4 beside 0"),
        ({"first_mask": np.full((HEIGHT, WIDTH), np.nan)}, "has the values nan beside 0"),
        ({"first_mask": np.ones((2, HEIGHT, WIDTH))}, "The masks of `first_mask` overlap"),
        (
            {"first_mask": np.ones((HEIGHT, WIDTH)), "reference_frames": [1]},
            "Reference frames and a `first_mask` are given, but with a mask the model is not asked",
        ),
        (
            {"query": "x", "reference_frames": [1], "num_reference_frames": 3},
            "`reference_frames` and `num_reference_frames` (3) are both given",
        ),
        ({"query": "x", "num_reference_frames": -1}, "`num_reference_frames` is -1 but must be at least 0"),
        ({"query": " \u200b\x00\u00a0\u2060"}, "`query` is empty"),
    ],
)
def test_bad_queries_are_refused_and_leave_the_session_as_it_was(tracker, video, arguments, message):
    with VisaVideoSession(video, None) as session:
        for refuse in (StubModel(tracker).add_query, check_query):
            with pytest.raises(ValueError, match=re.escape(message)):
                refuse(session, **arguments)
        assert session.queries == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": 5}, "`query` is a int but must be a string."),
        ({"query": "x", "target_frame": 1.5}, "`target_frame` is 1.5 but must be a whole number."),
        ({"first_mask": np.ones((HEIGHT, WIDTH)), "target_frame": "1"}, "`target_frame` is '1' but must be a whole"),
        ({"query": "x", "reference_frames": 3}, "`reference_frames` is 3 but must be a list of frame numbers."),
        ({"query": "x", "reference_frames": [1, 2.0]}, "`reference_frames` is 2.0 but must be a whole number."),
        ({"query": "x", "num_reference_frames": 2.5}, "`num_reference_frames` is 2.5 but must be a whole number."),
    ],
)
def test_queries_of_a_wrong_type_are_refused(tracker, video, arguments, message):
    with VisaVideoSession(video, None) as session:
        for refuse in (StubModel(tracker).add_query, check_query):
            with pytest.raises(TypeError, match=re.escape(message)):
                refuse(session, **arguments)
        assert session.queries == []


def test_what_can_be_asked_passes_the_check(video):
    with VisaVideoSession(video, None) as session:
        check_query(session, "x", target_frame=np.int64(8), reference_frames=range(3))
        check_query(session, "x", num_reference_frames=0)
        check_query(session, "", first_mask=np.ones((HEIGHT, WIDTH)), target_frame=3)
        assert session.queries == []


def test_a_text_that_shows_nothing_is_blank():
    assert is_blank("") and is_blank(" \t\n\u2028") and is_blank("\u200b\u200d\ufeff")
    assert not is_blank("a\u200b") and not is_blank("\u732b") and not is_blank("?")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_taken_for_an_empty_mask(tracker, video, bad):
    logits = torch.full((1, HEIGHT, WIDTH), -2.0)
    logits[0, 3, 4] = bad
    with VisaVideoSession(video, None) as session:
        with pytest.raises(RuntimeError, match=r"The model gave NaN .* try float32 or bfloat16 \(`dtype`\)"):
            StubModel(tracker, logits).add_query(session, "x")
        model = StubModel(tracker, torch.zeros(1, HEIGHT, WIDTH))
        model.score = bad
        with pytest.raises(RuntimeError, match="The model gave NaN"):
            model.add_query(session, "x")
        assert session.queries == []


def test_tracking_without_a_tracker_is_refused(video):
    with VisaVideoSession(video, None) as session:
        with pytest.raises(ValueError, match="The model has no tracker, but the video has 9 frames to carry masks"):
            StubModel(None).add_query(session, "x")


def test_a_session_without_a_query_is_refused(tracker, video):
    with VisaVideoSession(video, None) as session:
        with pytest.raises(RuntimeError, match="The session has no query. Call `add_query` first."):
            StubModel(tracker).propagate_in_video_iterator(session)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "`threshold` is 0 but must be a probability between 0 and 1"),
        ({"threshold": 1.0}, "`threshold` is 1.0 but must be a probability"),
        ({"every": 0}, "`every` is 0 but must be at least 1"),
        ({"max_frames": 8}, "9 frames would be tracked but `max_frames` is 8. Track fewer with `every` (`--every`)"),
        ({"max_frames": 4, "every": 2}, "5 frames would be tracked but `max_frames` is 4"),
        ({"start": "9f"}, "No frame lies between `start` 9f and `end` None"),
        ({"end": 1.0}, "`end` is 1.0 seconds, but this video has no times"),
    ],
)
def test_bad_options_are_refused(video, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        VisaVideoSession(video, None, **options)


def test_packed_masks_come_out_as_they_went_in(two_masks):
    for mask in (*two_masks.numpy(), np.zeros((3, 5), dtype=bool), np.ones((3, 5), dtype=bool)):
        assert (PackedMask.pack(mask).unpack() == mask).all()


def test_frames_are_read_once_per_sweep_and_not_held(tracker, video, two_masks):
    """A list that counts how often each frame is looked at."""

    class Counting(list):
        looked_at = 0

        def __getitem__(self, index):
            Counting.looked_at += 1
            return super().__getitem__(index)

    session = VisaVideoSession(Counting(video), None)
    model = StubModel(tracker)
    for target in (4, 4, 6):
        model.add_query(session, first_mask=two_masks, target_frame=target)
    Counting.looked_at = 0
    run(model, session)
    assert Counting.looked_at == 7 + 5  # backward 6..0, forward 4..8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 1.5}, "`every` is 1.5 but must be a whole number."),
        ({"max_frames": "9"}, "`max_frames` is '9' but must be a whole number."),
        ({"threshold": "0.5"}, "`threshold` is '0.5' but must be a number between 0 and 1."),
        ({"start": [1]}, "`start` is [1] but must be seconds"),
        ({"end": (2, 3)}, "`end` is (2, 3) but must be seconds"),
    ],
)
def test_options_of_a_wrong_type_are_refused(video, options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        VisaVideoSession(video, None, **options)


def test_the_video_is_closed_whatever_goes_wrong_at_opening(video, monkeypatch):
    closed = []
    monkeypatch.setattr(VisaVideoSession, "close", lambda self: closed.append(self.source))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("visa_hf.modeling.video_session_visa.frames_between", interrupt)
    with pytest.raises(KeyboardInterrupt):
        VisaVideoSession(video, None)
    assert len(closed) == 1


def test_probabilities_wait_in_two_bytes_each(monkeypatch):
    probs = torch.rand(2, 30, 40, generator=torch.Generator().manual_seed(0))
    probs[0, 0, :2] = torch.tensor([0.0, 1.0])
    masks = probs > 0.5
    written = []
    monkeypatch.setattr(
        "visa_hf.modeling.earlier_frames_visa.zlib.compress", lambda data, _: written.append(data) or data
    )
    monkeypatch.setattr("visa_hf.modeling.earlier_frames_visa.zlib.decompress", lambda data: data)
    query = SimpleNamespace(query_id=0, target_masks=masks)
    with EarlierFrames(want_probs=True) as earlier:
        earlier.put(0, 3, Found(masks, torch.tensor([0.1, 0.7]), probs))
        kept_masks, kept_scores, kept_probs = earlier.pop(query, 3)
    assert len(written[-1]) == 2 * probs.numel()  # packed masks are compressed before
    assert torch.equal(kept_masks, masks) and kept_probs.dtype == torch.float32
    assert torch.equal(kept_scores, torch.tensor([0.1, 0.7]))
    assert kept_probs[0, 0, :2].tolist() == [0.0, 1.0]
    assert 0 < (kept_probs - probs).abs().max() < 1e-5


def test_a_temporary_folder_that_cannot_be_written_is_named(tracker, video, two_masks, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    model = StubModel(tracker)
    with VisaVideoSession(video, None, want_probs=True) as session:
        model.add_query(session, first_mask=two_masks, target_frame=4)
        message = f"`{tmp_path / 'gone'}`: No such file or directory. Free space there, or name another folder in the"
        with pytest.raises(OSError, match=re.escape(message) + " variable `TMPDIR`"):
            next(model.propagate_in_video_iterator(session))
