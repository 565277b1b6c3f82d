"""Live frames: the same as an offline sweep forward, with a bounded number of frames held."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.modeling.session_models import StubModel
from tests.modeling.test_session_tracking import ASKED, HEIGHT, NUM_FRAMES, WIDTH, model, tracker, video  # noqa: F401
from visa_hf.modeling.stream_frames_visa import StreamFrames
from visa_hf.modeling.video_session_visa import VisaVideoSession


def opened(**options):
    return VisaVideoSession(None, None, streaming=True, **options)


@pytest.mark.parametrize("held", [4, 64])
def test_a_stream_is_an_offline_sweep_forward(model, video, held):  # noqa: F811
    """Queries at frames 2 (two of them), 6 and 9; one is removed after frame 10."""
    added = {2: [0, 1], 6: [2], 9: [3]}
    offline = VisaVideoSession(video, None, want_probs=True)
    stream = opened(want_probs=True, max_cached_frames=held)
    with offline, stream:
        for frame_idx, positions in added.items():
            for position in positions:
                model.add_query(offline, first_mask=ASKED[position]["first_mask"], target_frame=frame_idx)
        expected = list(model.propagate_in_video_iterator(offline))
        present = []
        for frame_idx in range(NUM_FRAMES):
            output = model.step(stream, video[frame_idx], is_last=frame_idx == NUM_FRAMES - 1)
            assert (output.frame_idx, output.query_ids) == (frame_idx, tuple(present))
            parts = output.query_ids, output.masks, output.mask_probs, output.scores
            for query_id, masks, probs, scores in zip(*parts, strict=True):
                assert torch.equal(masks, expected[frame_idx].masks[query_id])
                torch.testing.assert_close(probs, expected[frame_idx].mask_probs[query_id], atol=1e-5, rtol=0)
                torch.testing.assert_close(scores, expected[frame_idx].scores[query_id], atol=1e-5, rtol=0)
            for position in added.get(frame_idx, []):
                present.append(model.add_query(stream, first_mask=ASKED[position]["first_mask"]))
                assert stream.queries[-1].frame_selection.target_idx == frame_idx
                expected_scores = [float(mask.any()) for mask in ASKED[position]["first_mask"]]
                assert stream.queries[-1].target_frame_scores.tolist() == expected_scores
            if frame_idx == 10:
                stream.remove_query(present.pop(1))
    assert present == [0, 2, 3]


def test_the_model_is_asked_about_the_current_frame_and_the_past(tiny_model, tiny_processor, video):  # noqa: F811
    """The answer is that of an offline session with the same frames."""
    with VisaVideoSession(None, tiny_processor, streaming=True, want_probs=True) as stream:
        for frame in video[:6]:
            tiny_model.step(stream, frame)
        tiny_model.add_query(stream, "the dog", num_reference_frames=4, answer="It is [SEG].")
        following = tiny_model.step(stream, Image.fromarray(video[6]))
        (query,) = stream.queries
    with VisaVideoSession(video[:7], tiny_processor, want_probs=True) as offline:
        selection = query.frame_selection
        assert selection.target_idx == 5 and max(selection.reference_idx) <= 5 and selection.num_frames == 6
        tiny_model.add_query(
            offline,
            "the dog",
            target_frame=5,
            reference_frames=selection.reference_idx,
            answer="It is [SEG].",
        )
        *_, last = tiny_model.propagate_in_video_iterator(offline)
        assert torch.equal(query.target_masks, offline.queries[0].target_masks) and query.target_masks.any()
    assert torch.equal(following.masks[0], last.masks[0])


def test_a_stream_without_a_query_reads_and_yields_nothing(video):  # noqa: F811
    with opened() as stream:
        output = StubModel(None).step(stream, video[0])
    assert (output.frame_idx, output.query_ids, output.masks, output.scores, output.mask_probs) == (
        0,
        (),
        [],
        [],
        None,
    )


def test_held_frames_are_the_latest_and_some_of_all_before():
    frames = StreamFrames(max_held_frames=8)
    for number in range(1000):
        frames.append(np.full((4, 6, 3), number % 256, dtype=np.uint8))
        assert len(frames.held_frames) <= 8
        if number == 7:
            assert frames.held_frames == tuple(range(8))
    held = frames.held_frames
    assert held[-4:] == (996, 997, 998, 999) and held[0] == 0
    assert len({after - before for before, after in zip(held[:-5], held[1:-4], strict=True)}) == 1
    assert (frames[held[1]] == held[1] % 256).all()
    with pytest.raises(ValueError, match="Frame 3 of the stream is not held any more; "):
        _ = frames[3]
    frames.close()
    with pytest.raises(ValueError, match="is closed"):
        frames.append(np.zeros((4, 6, 3), dtype=np.uint8))


def test_references_that_are_gone_are_replaced_by_the_nearest_or_refused(tracker, video):  # noqa: F811
    asked = StubModel(tracker, torch.zeros(1, HEIGHT, WIDTH))
    with opened(max_cached_frames=4) as stream:
        for frame in video[:12]:
            asked.step(stream, frame)
        held = stream.source.held_frames
        asked.add_query(stream, "the dog")
        references = stream.queries[0].frame_selection.reference_idx
        assert set(references) <= set(held) and 11 in references
        with pytest.raises(ValueError, match="`reference_frames` names frame 5, which the stream does not hold any"):
            asked.add_query(stream, "the dog", reference_frames=[5, 11])


def test_what_a_stream_cannot_do_is_refused(tracker, model, video):  # noqa: F811
    with opened(max_tracked_queries=1) as stream:
        with pytest.raises(RuntimeError, match=re.escape("The stream has no frame yet. Give `model.step` the first")):
            model.add_query(stream, "x")
        model.step(stream, video[0])
        with pytest.raises(RuntimeError, match="A stream has no end to propagate to. Give its frames to `model.step`"):
            model.propagate_in_video_iterator(stream)
        with pytest.raises(ValueError, match="Frame 1 of the stream is 30 x 50 pixels .* began as 36 x 50. Resize it"):
            model.step(stream, video[0, :30])
        with pytest.raises(TypeError, match="uint8"):
            model.step(stream, video[0].astype(np.float32))
        with pytest.raises(ValueError, match="`target_frame` is 3 but in a stream a query is about the current frame"):
            model.add_query(stream, "x", target_frame=3)
        with pytest.raises(ValueError, match="The model has no tracker, but the video comes as a stream"):
            StubModel(None).add_query(stream, "x")
        for position in (0, 1):
            model.add_query(stream, first_mask=ASKED[position]["first_mask"])
        with pytest.raises(
            RuntimeError, match="2 queries would be tracked at once, .* is 1. Remove some, or raise it"
        ):
            model.step(stream, video[1])
        stream.remove_query(1)
        assert model.step(stream, video[1], is_last=True).frame_idx == 1  # nothing before was counted as a frame
        with pytest.raises(
            RuntimeError, match="The stream was finished after 2 frames: there is nothing left to track"
        ):
            model.add_query(stream, "x")
        with pytest.raises(RuntimeError, match="The stream was finished after 2 frames. Open another session"):
            model.step(stream, video[2])
    with VisaVideoSession(video, None) as session:
        with pytest.raises(
            RuntimeError, match="The session has a video of its own: use `propagate_in_video_iterator`"
        ):
            model.step(session, video[0])
        with pytest.raises(RuntimeError, match="Only a stream is finished. Use `close`"):
            session.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 2}, "`every` is given with `streaming`."),
        ({"start": 1}, "`start` is given with `streaming`."),
        ({"max_frames": 5}, "`max_frames` is given with `streaming`."),
        ({"mode": "published"}, "`mode` is 'published', which needs a whole video."),
        ({"max_cached_frames": 3}, "`max_cached_frames` is 3 but must be at least 4."),
    ],
)
def test_options_without_sense_in_a_stream_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(**options)
    with pytest.raises(ValueError, match="A `video` is given with `streaming`. Leave it out"):
        VisaVideoSession(np.zeros((2, 4, 4, 3), dtype=np.uint8), None, streaming=True)
