"""Samplers of frames behind one interface: what they are shown, what they may choose, and how a session asks them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.modeling.chat_models import tiny_clip, tiny_siglip
from visa_hf.modeling.frame_samplers_visa import (
    PercentagesFrameSampler,
    ShareFrameSampler,
    SimilarityFrameSampler,
    VideoView,
    sample_frames,
)
from visa_hf.modeling.frame_sampling_visa import select_frames, stride_references
from visa_hf.modeling.frame_source_visa import open_frames
from visa_hf.modeling.outputs_visa import FrameSelection
from visa_hf.modeling.video_answering_visa import Answer

QUERY = "the dog"


@pytest.fixture(scope="module")
def video():
    return np.random.RandomState(0).randint(0, 256, (9, 40, 56, 3), dtype=np.uint8)


@pytest.fixture
def view(video):
    return VideoView(open_frames(video))


def at(target_idx, **changes):
    """A sampler that always chooses one frame."""
    return lambda view, query: view.select(target_idx, "a test", **changes)


# --- The interface ---


def test_a_view_counts_frames_of_its_part_from_the_beginning_of_the_video(video):
    view = VideoView(open_frames(video, fps=2), first_frame=2, stop_frame=8)
    assert view.frame_indices == range(2, 8)
    assert view.timestamps == [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert view.spread(3) == (3, 5, 7)
    assert [view.at_share(share) for share in (0.0, 0.5, 0.99, 1.0)] == [2, 5, 7, 7]
    assert np.array_equal(view.frames([5])[0], video[5])
    assert VideoView(open_frames(video)).timestamps is None


def test_a_view_chooses_references_around_a_target(video):
    source = open_frames(video)
    chosen = VideoView(source, num_reference_frames=4).select(6, "why", [(6, 1.0)])
    expected = select_frames(9, target_frame=6, num_reference_frames=4)
    assert (chosen.target_idx, chosen.reference_idx) == (6, expected.reference_idx)
    assert (chosen.reason, chosen.scores) == ("why", ((6, 1.0),))
    stride = VideoView(source, strategy="stride").select(3, "why")
    assert stride.reference_idx == stride_references(9, 3)


def test_a_target_that_is_not_tracked_is_replaced_by_the_nearest_one(video):
    view = VideoView(open_frames(video), targets=range(1, 9, 3))
    assert [view.select(idx, "why").target_idx for idx in (0, 1, 2, 3, 8)] == [1, 1, 1, 4, 7]
    assert view.select(3, "why").reason == "why, frame 4 is the nearest one that is tracked"


def test_what_is_no_selection_of_this_video_is_refused(video):
    view = VideoView(open_frames(video), first_frame=2, stop_frame=8)
    with pytest.raises(TypeError, match="returned 5 but must return a `FrameSelection`"):
        sample_frames(lambda view, query: 5, view, QUERY)
    with pytest.raises(ValueError, match="a video of 6 frames but this one has 9"):
        sample_frames(lambda view, query: FrameSelection(3, (), 6), view, QUERY)
    with pytest.raises(ValueError, match="chose frame 8 as a target but .* has frames 2 to 7"):
        sample_frames(lambda view, query: FrameSelection(8, (), 9), view, QUERY)
    with pytest.raises(ValueError, match="chose frame 1 as a reference"):
        sample_frames(lambda view, query: FrameSelection(3, (1, 4), 9), view, QUERY)


def test_a_fixed_share_is_counted_as_visa_counts(view):
    found = [ShareFrameSampler(share)(view, QUERY).target_idx for share in (0.0, 0.35, 0.5, 1.0)]
    assert found == [0, 3, 4, 8]
    assert ShareFrameSampler(0.35)(view, QUERY).reason == "at 35% of the video"
    with pytest.raises(ValueError, match="`share` is 1.5"):
        ShareFrameSampler(1.5)


# --- Images and texts ---


@pytest.mark.parametrize("make", [tiny_clip, tiny_siglip])
def test_the_most_similar_frame_is_the_target(make, view, video):
    model, processor = make()
    selection = SimilarityFrameSampler(model, processor, batch_size=4)(view, f" {QUERY} ")
    inputs = processor(
        text=[QUERY], images=[Image.fromarray(frame) for frame in video], padding="max_length", max_length=24,
        truncation=True, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        probs = model(**inputs).logits_per_image[:, 0].softmax(dim=0)
    assert probs.max() - probs.min() > 0.01
    assert selection.target_idx == int(probs.argmax())
    torch.testing.assert_close(torch.tensor([score for _, score in selection.scores]), probs, atol=1e-5, rtol=0)
    assert [idx for idx, _ in selection.scores] == list(range(9))
    assert selection.reason == f"most similar of 9 frames (p={float(probs.max()):.2f})"


def test_few_frames_are_read_at_a_time_and_a_long_query_is_cut(view, monkeypatch):
    model, processor = tiny_clip()
    asked = []
    read = type(view.source).get_many
    monkeypatch.setattr(type(view.source), "get_many", lambda self, idx: asked.append(list(idx)) or read(self, idx))
    selection = SimilarityFrameSampler(model, processor, max_frames=5, batch_size=2)(view, "a long query " * 20)
    assert asked == [[0, 2], [4, 6], [8]]
    assert selection.target_idx in (0, 2, 4, 6, 8)


def test_one_frame_is_the_most_similar_one(video):
    selection = SimilarityFrameSampler(*tiny_clip())(VideoView(open_frames(video[:1])), QUERY)
    assert (selection.target_idx, selection.reference_idx, selection.scores) == (0, (0,), ((0, 1.0),))


def test_a_similarity_that_is_no_number_is_refused(view):
    model, processor = tiny_clip()
    with torch.no_grad():
        model.logit_scale.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="similarity model gave NaN or infinite numbers"):
        SimilarityFrameSampler(model, processor)(view, QUERY)
    with pytest.raises(ValueError, match="`batch_size` is 0 but must be at least 1"):
        SimilarityFrameSampler(model, processor, batch_size=0)


# --- Precomputed percentages ---


def stored(tmp_path, content):
    path = tmp_path / "percentages.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "target"),
    [
        ({"clip": {"the dog": 70, "a cat": 1}}, 6),
        ({"clip": {"The  Dog": 70.0, "a cat": 0}}, 6),
        ({"clip": {"the dog": 0.7}}, 6),
        ({"clip": {"the dog": 1}}, 8),
        ({"clip": {"the dog": 0}}, 0),
        ({"videos": {"clip": {"expressions": {"0": {"exp": "The dog", "tp": 0.7, "obj_id": 3}}, "frames": []}}}, 6),
        ({"videos": {"the dog": 90}, "clip": {"the dog": 20}}, 1),
    ],
)
def test_stored_numbers_of_both_layouts_are_read(view, tmp_path, content, target):
    selection = PercentagesFrameSampler(stored(tmp_path, content), video="clip")(view, QUERY)
    assert selection.target_idx == target
    assert selection.scores == ((target, 1.0),)
    assert selection.reason.startswith("precomputed: ")


def test_the_video_is_found_by_its_name_and_an_expression_by_its_number(tmp_path, tiny_clip):
    path = stored(tmp_path, {"tiny": {"0": 10, "1": 50}})
    with open_frames(tiny_clip) as source:
        selection = PercentagesFrameSampler(path, expression_id="1")(VideoView(source), QUERY)
    assert (selection.target_idx, selection.reason) == (6, "precomputed: 50%")


def test_a_file_that_lacks_the_video_or_the_query_is_refused_by_name(view, tmp_path):
    path = stored(tmp_path, {"clip_1": {"the dogs": 70}})
    with pytest.raises(ValueError, match=r"percentages\.json` has no video 'clip_2' \(the nearest is 'clip_1'\)"):
        PercentagesFrameSampler(path, video="clip_2")(view, QUERY)
    with pytest.raises(ValueError, match="has no video 'video'. Add it"):
        PercentagesFrameSampler(path)(view, QUERY)
    with pytest.raises(ValueError, match=r"no query 'the dog' for the video 'clip_1' \(the nearest is 'the dogs'\)"):
        PercentagesFrameSampler(path, video="clip_1")(view, QUERY)
    with pytest.raises(ValueError, match="no expression '7' for the video 'clip_1'"):
        PercentagesFrameSampler(path, video="clip_1", expression_id="7")(view, QUERY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not a JSON file in UTF-8"),
        ([1], "holds a list but must hold an object"),
        ({"clip": 70}, "Video 'clip' of .* holds 70 but must hold an object"),
        ({"clip": {"a": 101}}, "'a' of video 'clip' in .* is 101 but must be a share from 0 to 1, or a percentage"),
        ({"clip": {"a": -1}}, "is -1 but"),
        ({"clip": {"a": True}}, "is True but"),
        ({"clip": {"a": "70%"}}, "is '70%' but"),
        ('{"clip": {"a": NaN}}', "is nan but"),
        ({"clip": {"a": 70, "b": 0.5}}, "holds percentages .up to 70., and 0.5 for 'b', which looks like a share"),
        ({"videos": {"clip": {"expressions": {"0": {"exp": "a"}}}}}, 'Expression \'0\' .* needs "exp" and "tp"'),
        ({"videos": {"clip": {"expressions": {"0": {"exp": "a", "tp": 7}}}}}, 'A "tp" in .* is 7 but'),
    ],
)
def test_a_file_that_cannot_be_right_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        PercentagesFrameSampler(stored(tmp_path, content))


def test_expressions_that_differ_in_case_only_are_told_apart(view, tmp_path):
    expressions = {"0": {"exp": "The dog", "tp": 0.2}, "1": {"exp": "the dog", "tp": 0.7}}
    path = stored(tmp_path, {"videos": {"clip": {"expressions": expressions}}})
    assert PercentagesFrameSampler(path, video="clip")(view, "The dog").target_idx == 1
    assert PercentagesFrameSampler(path, video="clip")(view, "the dog").target_idx == 6
    assert PercentagesFrameSampler(path, video="clip", expression_id="0")(view, "THE dog").target_idx == 1
    with pytest.raises(ValueError, match="has 2 numbers for the query 'THE dog' of the video 'clip': 0.2, 0.7"):
        PercentagesFrameSampler(path, video="clip")(view, "THE dog")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no percentages file `.*nowhere.json`"):
        PercentagesFrameSampler(tmp_path / "nowhere.json")


# --- Sessions ---


@pytest.fixture
def asked(tiny_model, monkeypatch):
    """The model, which answers nothing, and what it was asked."""
    questions = []

    def answer(self, session, given, generate_kwargs):
        questions.extend(given)
        return [Answer("It is nothing.", torch.zeros(0, session.height, session.width), ()) for _ in given]

    monkeypatch.setattr(type(tiny_model), "_answer", answer)
    return tiny_model, questions


def test_a_query_is_asked_about_the_frame_that_its_sampler_chose(asked, tiny_processor, video):
    model, questions = asked
    seen = []

    def sampler(view, query):
        seen.append((view.frame_indices, view.session, query))
        return view.select(7, "a test", [(7, 0.5)])

    with tiny_processor.init_video_session(video, start="2f") as session:
        model.add_query(session, QUERY, sampler=sampler, num_reference_frames=3)
        model.add_queries(session, [{"query": "a cat", "sampler": at(3)}, "a car"])
        assert seen == [(range(2, 9), session, QUERY)]
        selections = [query.frame_selection for query in session.queries]
    assert [question.frame_selection for question in questions] == selections
    assert [selection.target_idx for selection in selections] == [7, 3, 5]
    assert (selections[0].reason, selections[0].scores) == ("a test", ((7, 0.5),))
    expected = select_frames(9, target_frame=7, num_reference_frames=3, start=2)
    assert selections[0].reference_idx == expected.reference_idx


def test_references_that_are_named_stay(asked, tiny_processor, video):
    model, questions = asked
    with tiny_processor.init_video_session(video) as session:
        model.add_query(session, QUERY, sampler=at(7), reference_frames=[6, 1])
    assert questions[0].frame_selection.reference_idx == (1, 6)


def test_the_sampler_of_a_session_is_for_queries_without_a_target(asked, tiny_processor, video):
    model, _ = asked
    with tiny_processor.init_video_session(video, sampler=at(7)) as session:
        model.add_queries(session, ["a", {"query": "b", "target_frame": 2}, {"query": "c", "sampler": at(1)}])
        model.add_query(session, "d", first_mask=np.ones((40, 56), dtype=bool))
        assert [query.frame_selection.target_idx for query in session.queries] == [7, 2, 1, 0]


def test_a_sampler_chooses_among_the_tracked_frames(asked, tiny_processor, video):
    model, _ = asked
    with tiny_processor.init_video_session(video, every=3) as session:
        model.add_queries(session, ["a", "b"], sampler=lambda view, query: view.select(4 if query == "a" else 8, ""))
        assert [query.frame_selection.target_idx for query in session.queries] == [4, 7]


def test_published_references_surround_a_sampled_target(asked, tiny_processor):
    model, questions = asked
    long = np.zeros((25, 8, 8, 3), dtype=np.uint8)
    with tiny_processor.init_video_session(long, mode="published", sampler=ShareFrameSampler(0.3)) as session:
        model.add_query(session, QUERY)
    selection = questions[0].frame_selection
    assert (selection.target_idx, selection.reference_idx) == (7, stride_references(25, 7))


def test_the_model_itself_can_be_the_sampler(asked, tiny_processor, video):
    model, questions = asked
    with tiny_processor.init_video_session(video, sampler="visa") as session:
        model.add_queries(session, [QUERY, "a cat"])
        model.add_query(session, QUERY, sampler="visa")
    first, _, again = [question.frame_selection for question in questions]
    assert first.reason.startswith("text-guided: ") and len(first.scores) == 11
    assert again.target_idx == first.target_idx
    for (_, score), (_, other) in zip(first.scores, again.scores, strict=True):
        assert score == pytest.approx(other, abs=1e-6)


def test_the_same_masks_come_from_a_sampled_and_a_named_target(tiny_model, tiny_processor, video):
    masks = []
    for given in ({"sampler": at(6)}, {"target_frame": 6}):
        with tiny_processor.init_video_session(video[:7]) as session:
            tiny_model.add_query(session, QUERY, answer="It is [SEG].", **given)
            masks.append(session.queries[0].target_masks)
    assert torch.equal(*masks)


def test_samplers_that_fit_nothing_are_refused_and_nothing_is_added(asked, tiny_processor, video):
    model, _ = asked
    with pytest.raises(TypeError, match="`sampler` is 'clip' but must be \"visa\", or a callable"):
        tiny_processor.init_video_session(video, sampler="clip")
    with pytest.raises(ValueError, match="`sampler` is given with `streaming`"):
        tiny_processor.init_video_session(None, streaming=True, sampler=at(0))
    with tiny_processor.init_video_session(video) as session:
        with pytest.raises(TypeError, match="`sampler` is 7"):
            model.add_query(session, QUERY, sampler=7)
        with pytest.raises(ValueError, match="`sampler` and a `target_frame` are both given"):
            model.add_query(session, QUERY, sampler=at(0), target_frame=2)
        with pytest.raises(ValueError, match="`sampler` and a `first_mask` are both given"):
            model.add_query(session, QUERY, sampler=at(0), first_mask=np.ones((40, 56), dtype=bool))
        with pytest.raises(ValueError, match="`query` is empty"):
            model.add_queries(session, [QUERY, " "], sampler=at(0))
        with pytest.raises(TypeError, match="must return a `FrameSelection`"):
            model.add_queries(session, ["a", {"query": "b", "sampler": lambda view, query: None}])
        assert not session.queries
    with tiny_processor.init_video_session(None, streaming=True) as stream:
        model.step(stream, video[0])
        with pytest.raises(ValueError, match="in a stream a query is about the current frame. Leave the sampler out"):
            model.add_query(stream, QUERY, sampler=at(0))
