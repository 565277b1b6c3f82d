"""Queries of a session answered together: the same as each by itself, with everything computed once."""

import copy
import re

import numpy as np
import pytest
import torch

from tests.modeling.session_models import Calls
from visa_hf.modeling.frame_sampling_visa import frame_at_share, select_frames, stride_references
from visa_hf.modeling.prefix_cache_visa import make_prefix, pad_behind, positions_of, shared_length
from visa_hf.modeling.session_cache_visa import RecentItems
from visa_hf.modeling.video_answering_visa import Question, prompt_ids
from visa_hf.modeling.video_session_visa import VisaVideoSession

HEIGHT, WIDTH, NUM_FRAMES = 40, 56, 9
QUERIES = ["The  dog", "which car will be overtaken by the other one in the end?", "a", "the dog", "what wins?"]
TARGETS = [4, 4, 4, 7, 4]


@pytest.fixture(scope="module")
def video():
    noise = np.random.RandomState(0).randint(0, 256, (NUM_FRAMES, 5, 7, 3), dtype=np.uint8)
    return noise.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="module")
def model(tiny_model):
    """A model that knows eight words, one of them [SEG], so that its answers differ and some have masks."""
    model = copy.deepcopy(tiny_model)
    words = torch.tensor([5, 17, 99, 300, 411, 777, 1000, model.config.seg_token_id])
    with torch.no_grad():
        kept = model.lm_head.weight[words].clone()
        model.lm_head.weight.zero_()
        model.lm_head.weight[words] = kept
    return model


def questions_of(num_frames=NUM_FRAMES, answer=None):
    return [
        Question(query, select_frames(num_frames, target_frame=target, num_reference_frames=4), answer)
        for query, target in zip(QUERIES, TARGETS, strict=True)
    ]


def answered(model, processor, video, questions, *, alone=False, generate=None, **options):
    """Answers of one session, or of a session for each question."""
    groups = [[question] for question in questions] if alone else [questions]
    answers = []
    for group in groups:
        with VisaVideoSession(video, processor, **options) as session, torch.no_grad():
            answers += model._answer(session, group, generate or {"max_new_tokens": 8})
    return answers


def answered_plainly(model, processor, video, questions, generate=None):
    """Each question through the processor and the model, without a session."""
    answers = []
    for question in questions:
        selection = question.frame_selection
        inputs = processor(
            target_frame=video[selection.target_idx],
            reference_frames=[video[idx] for idx in selection.reference_idx],
            query=question.query,
            answer=question.answer,
            normalize_query=True,
        )
        with torch.no_grad():
            if question.answer is None:
                answers.append(model.generate_masks(**inputs, **(generate or {"max_new_tokens": 8})))
            else:
                del inputs["labels"]
                answers.append(model(**inputs))
    return answers


def assert_same(answers, expected):
    seen = 0
    for answer, other in zip(answers, expected, strict=True):
        torch.testing.assert_close(answer.mask_logits, other.mask_logits, atol=1e-4, rtol=0)
        assert torch.equal(answer.mask_logits > 0, other.mask_logits > 0)
        assert answer.text == other.text
        seen += len(answer.mask_logits)
    assert seen > 0, "no answer has a mask, and this test shows nothing"


@pytest.mark.parametrize("answer", [None, "It is [SEG]. And [SEG]."])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_queries_per_batch": 1},
        {"max_cached_prefixes": 0},
        {"max_queries_per_batch": 2, "max_cached_features": 0, "max_cached_targets": 0},
        {"cache_device": "cpu", "cache_dtype": torch.float64},
    ],
    ids=str,
)
def test_queries_together_are_the_same_as_the_model_asked_plainly(model, tiny_processor, video, options, answer):
    questions = questions_of(answer=answer)
    answers = answered(model, tiny_processor, video, questions, **options)
    plain = answered_plainly(model, tiny_processor, video, questions)
    for found, output in zip(answers, plain, strict=True):
        logits = output.mask_logits[0]
        torch.testing.assert_close(found.mask_logits, logits, atol=1e-4, rtol=0)
        assert torch.equal(found.mask_logits > 0, logits > 0)
        np.testing.assert_allclose(found.scores, output.iou_scores[0], atol=1e-5)
        if answer is None:
            assert found.text == tiny_processor.batch_decode(output.answer_ids)[0]
    assert sum(len(found.mask_logits) for found in answers) > 0
    assert_same(answers, answered(model, tiny_processor, video, questions, alone=True, **options))


def test_what_depends_on_frames_alone_is_computed_once(model, tiny_processor, video):
    modules = {
        "tower": model.model.vision_tower,
        "sam": model.model.sam.vision_encoder,
        "text": model.model.language_model,
    }
    session = VisaVideoSession(video, tiny_processor, max_queries_per_batch=3)
    with Calls(**modules) as counted:
        model.add_queries(session, QUERIES, target_frame=4, answer="It is [SEG].")
    # The prefix, then groups of three and two.
    assert counted.rows["tower"] == len({*session.queries[0].frame_selection.reference_idx, 4})
    assert (counted.calls["sam"], counted.calls["text"], counted.rows["text"]) == (1, 3, 6)
    with Calls(**modules) as counted:
        model.add_query(session, "asked later", target_frame=4, answer="It is [SEG].")
    assert (counted.rows["tower"], counted.calls["sam"], counted.calls["text"]) == (0, 0, 1)
    with Calls(**modules) as counted:
        model.add_query(session, "elsewhere", target_frame=5, answer="It is [SEG].")
    assert (counted.calls["sam"], counted.calls["text"]) == (1, 2)
    assert [query.query_id for query in session.queries] == list(range(7))


def test_references_are_read_once_for_several_targets(model, tiny_processor, video):
    """All frames are references: once for all; then two targets, and the queries on each."""
    asked = [{"query": query, "target_frame": target} for query, target in zip(QUERIES, (2, 6, 2, 6, 6), strict=True)]
    common = {"reference_strategy": "stride", "answer": "It is [SEG]."}
    session = VisaVideoSession(video, tiny_processor, want_probs=True)
    plain = VisaVideoSession(video, tiny_processor, want_probs=True, max_cached_prefixes=0)
    with session, plain:
        with Calls(text=model.model.language_model, tower=model.model.vision_tower) as counted:
            model.add_queries(session, asked, **common)
        model.add_queries(plain, asked, **common)
        assert (counted.calls["text"], counted.rows["text"], counted.rows["tower"]) == (5, 8, NUM_FRAMES)
        for query, other in zip(session.queries, plain.queries, strict=True):
            assert query.query == other.query and query.target_masks.any()
            assert torch.equal(query.target_masks, other.target_masks)
            torch.testing.assert_close(query.target_probs, other.target_probs, atol=2e-5, rtol=0)
        with Calls(text=model.model.language_model) as counted:
            model.add_query(session, "a third target", target_frame=3, **common)
        assert (counted.calls["text"], counted.rows["text"]) == (2, 2)  # the references are still there


def test_what_is_kept_is_bounded_and_freed(model, tiny_processor, video):
    session = VisaVideoSession(
        video, tiny_processor, max_cached_features=3, max_cached_targets=2, max_cached_prefixes=1
    )
    for target in range(5):
        model.add_query(session, "x", target_frame=target, answer="It is [SEG].")
    cache = session.cache
    assert (len(cache.frames), len(cache.targets), len(cache.prefixes)) == (3, 2, 1)
    # A frame of a batch does not keep the batch.
    assert cache.stored(torch.zeros(10, 4)[2]).untyped_storage().nbytes() == 16
    session.close()
    assert (len(cache.frames), len(cache.targets), len(cache.prefixes)) == (0, 0, 0)


def test_another_model_or_dtype_computes_anew(model, tiny_processor, video):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.mm_projector.weight.neg_()
    (question,) = questions_of()[:1]
    question = Question(question.query, question.frame_selection, "It is [SEG].")
    with VisaVideoSession(video, tiny_processor) as session, torch.no_grad():
        first = model._answer(session, [question], {})
        second = other._answer(session, [question], {})
        assert not torch.equal(first[0].mask_logits, second[0].mask_logits)
        (alone,) = answered(other, tiny_processor, video, [question])
        assert torch.equal(second[0].mask_logits, alone.mask_logits)
        third = other.double()._answer(session, [question], {})
        assert session.cache.frames.get(4).dtype == torch.float64
        torch.testing.assert_close(third[0].mask_logits, alone.mask_logits, atol=1e-3, rtol=0)


def test_sampling_answers_one_by_one_in_the_order_given(model, tiny_processor, video):
    sampling = {"do_sample": True, "max_new_tokens": 6, "temperature": 3.0}
    questions = questions_of()
    torch.manual_seed(3)
    together = answered(model, tiny_processor, video, questions, generate=sampling)
    torch.manual_seed(3)
    alone = answered(model, tiny_processor, video, questions, alone=True, generate=sampling)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({answer.text for answer in together}) > 1


def test_a_checkpoint_that_decodes_otherwise_is_asked_one_by_one(model, tiny_processor, video):
    careful = copy.deepcopy(model)
    careful.generation_config.repetition_penalty = 2.0
    assert model._is_plain({"max_new_tokens": 3}) and not model._is_plain({"num_beams": 2, "do_sample": True})
    assert not careful._is_plain({})
    questions = questions_of()[:2]
    assert_answers = answered(careful, tiny_processor, video, questions)
    alone = answered(careful, tiny_processor, video, questions, alone=True)
    assert [answer.text for answer in assert_answers] == [answer.text for answer in alone]


@pytest.mark.parametrize("options", [{}, {"max_queries_per_batch": 12}, {"max_cached_prefixes": 0}], ids=str)
def test_beams_give_the_same_answers_together_and_plainly(model, tiny_processor, video, options):
    # Of the words that it knows, one ends an answer: some are shorter than others.
    beams = {"num_beams": 3, "max_new_tokens": 8, "eos_token_id": 5, "length_penalty": 0.0}
    questions = questions_of()
    greedy = answered(model, tiny_processor, video, questions, generate={"max_new_tokens": 8, "eos_token_id": 5})
    plain = answered_plainly(model, tiny_processor, video, questions, beams)
    with VisaVideoSession(video, tiny_processor, **options) as session, torch.no_grad():
        with Calls(text=model.model.language_model) as counted:
            together = model._answer(session, questions, beams)
    for found, output in zip(together, plain, strict=True):
        assert found.text == tiny_processor.batch_decode(output.answer_ids)[0]
        torch.testing.assert_close(found.mask_logits, output.mask_logits[0], atol=1e-4, rtol=0)
    assert len({len(output.answer_ids[0]) for output in plain}) > 1
    assert [answer.text for answer in together] != [answer.text for answer in greedy]
    assert any(len(answer.mask_logits) for answer in together)
    if options == {"max_queries_per_batch": 12}:
        # Two targets: their references and their frames are read, both are answered and their answers read.
        assert counted.calls["text"] <= 3 + 2 * (8 + 1)
    # A checkpoint may say so itself.
    wide = copy.deepcopy(model)
    wide.generation_config.num_beams, wide.generation_config.length_penalty = 3, 0.0
    says = answered(wide, tiny_processor, video, questions, generate={"max_new_tokens": 8, "eos_token_id": 5})
    assert [answer.text for answer in says] == [answer.text for answer in together]


def test_a_query_that_leaves_no_room_for_others_is_asked_alone(model, tiny_processor, video):
    """Near the end of the context, a longer neighbour must not shorten an answer."""
    small = copy.deepcopy(model)
    questions = [Question(query, select_frames(NUM_FRAMES, num_reference_frames=2)) for query in QUERIES]
    longest = max(len(prompt_ids(tiny_processor, question.query, 2)) for question in questions)
    small.config.text_config.max_position_embeddings = longest + 3
    alone = answered(small, tiny_processor, video, questions, alone=True)
    assert_same(answered(small, tiny_processor, video, questions), alone)


@pytest.mark.parametrize("query", ["The  Dog\n runs", "What is it?"])
@pytest.mark.parametrize("answer", [None, "Sure, [SEG]."])
def test_prompts_are_those_of_the_processor(tiny_processor, video, query, answer):
    inputs = tiny_processor(
        target_frame=video[0], reference_frames=list(video[1:4]), query=query, answer=answer, normalize_query=True
    )
    assert torch.equal(prompt_ids(tiny_processor, query, 3, answer), inputs["input_ids"][0])


def test_published_is_the_engine_with_published_references_and_answer(model, tiny_processor, video):
    targets = [frame_at_share(NUM_FRAMES, share) for share in (0.5, 0.0, 1.0)]
    asked = [{"query": query, "target_frame": target} for query, target in zip(QUERIES, targets, strict=False)]
    published = VisaVideoSession(video, tiny_processor, mode="published")
    modules = {
        "tower": model.model.vision_tower,
        "sam": model.model.sam.vision_encoder,
        "text": model.model.language_model,
        "key": model.tracker.key_encoder,
    }
    with published, Calls(**modules) as counted:
        model.add_queries(published, asked)
        outputs = list(model.propagate_in_video_iterator(published))
    num_images = sum(len(stride_references(NUM_FRAMES, idx)) + 1 for idx in range(NUM_FRAMES))
    assert counted.rows["tower"] == 3 * num_images
    assert counted.calls["sam"] == counted.calls["text"] == 3 * NUM_FRAMES
    assert counted.calls["key"] == (NUM_FRAMES + 1) + NUM_FRAMES + NUM_FRAMES  # targets 4, 0 and 8

    shared = VisaVideoSession(video, tiny_processor)
    with shared:
        model.add_queries(shared, asked, reference_strategy="stride", answer="It is [SEG].")
        expected = list(model.propagate_in_video_iterator(shared))
    for one, other in zip(published.queries, shared.queries, strict=True):
        assert one.frame_selection.target_idx == other.frame_selection.target_idx
        assert one.frame_selection.reference_idx == other.frame_selection.reference_idx
        assert one.target_masks.any() and torch.equal(one.target_masks, other.target_masks)
    for output, other in zip(outputs, expected, strict=True):
        assert all(torch.equal(mask, same) for mask, same in zip(output.masks, other.masks, strict=True))


def test_published_references_are_every_sth_frame_with_the_target_among_them():
    assert stride_references(60, 30) == tuple(range(0, 60, 6))
    assert stride_references(60, 31) == tuple(range(1, 60, 6))
    assert stride_references(11, 3) == tuple(range(11))
    assert stride_references(12, 3) == (1, 3, 5, 7, 9, 11)
    assert stride_references(1, 0) == (0,)
    assert [frame_at_share(60, share) for share in (0, 0.5, 0.999, 1)] == [0, 30, 59, 59]
    with pytest.raises(ValueError, match="`share` is 1.5 but must be from 0"):
        frame_at_share(60, 1.5)


@pytest.mark.parametrize(
    ("queries", "error", "message"),
    [
        ("the dog", TypeError, "`queries` is 'the dog' but must be a list. For one query there is `add_query`."),
        (["x", 5], TypeError, "A query is a int but must be a string, or a dictionary"),
        (["x", {"target": 5}], ValueError, "A query has no argument 'target'. Did you mean `target_frame`?"),
        (["x", {"query": "y", "target_frame": 9}], ValueError, "`target_frame` is 9 but the video"),
        (["x", "a [SEG] b"], ValueError, "special token"),
        (
            ["x", {"first_mask": np.ones((HEIGHT, WIDTH)), "answer": "It is [SEG]."}],
            ValueError,
            "An `answer` and a `first_mask` are given",
        ),
        (
            [{"query": "x", "reference_frames": [1], "reference_strategy": "local"}],
            ValueError,
            "`reference_frames` and `reference_strategy` ('local') are both given",
        ),
        ([{"query": "x", "reference_strategy": "best"}], ValueError, "`strategy` is 'best' but must be one of"),
        (["x", "cat " * 5000], ValueError, "fit into the model's context"),
    ],
)
def test_one_bad_query_leaves_the_session_without_any(model, tiny_processor, video, queries, error, message):
    with VisaVideoSession(video, tiny_processor) as session:
        with pytest.raises(error, match=re.escape(message)):
            model.add_queries(session, queries, max_new_tokens=2)
        assert session.queries == []


def test_published_references_cannot_be_counted(model, tiny_processor, video):
    with VisaVideoSession(video, tiny_processor, mode="published") as session:
        with pytest.raises(ValueError, match="`num_reference_frames` is 3, but with `mode="):
            model.add_query(session, "x", num_reference_frames=3)


# Prefixes


def test_prompts_are_padded_behind_what_they_share():
    rows = [torch.tensor([1, 9, 9, 4, 5]), torch.tensor([1, 9, 9, 6])]
    assert shared_length(rows, image_token_id=9) == 3
    assert shared_length([*rows, torch.tensor([2, 9, 9, 6])], image_token_id=9) == 0
    assert shared_length([*rows, torch.tensor([1, 9, 6])], image_token_id=9) == 0
    assert shared_length([torch.tensor([1, 2])], image_token_id=9) == 0
    input_ids, attention_mask = pad_behind(rows, 3, pad_token_id=0)
    assert input_ids.tolist() == [[1, 9, 9, 4, 5], [1, 9, 9, 0, 6]]
    assert attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]]
    assert positions_of(attention_mask).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 2, 3]]
    input_ids, _ = pad_behind(rows, 0, pad_token_id=0)
    assert input_ids.tolist() == [[1, 9, 9, 4, 5], [0, 1, 9, 9, 6]]


def test_a_prefix_is_not_changed_by_those_who_continue_it(model):
    input_ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        past = model.model(input_ids=input_ids, use_cache=True).past_key_values
        prefix = make_prefix(input_ids[0], past, None, None)
        keys = prefix.past_key_values.layers[0].keys.clone()
        lent = prefix.for_prompts(3)
        lent.update(
            torch.ones(3, *keys.shape[1:2], 1, keys.shape[3]), torch.ones(3, *keys.shape[1:2], 1, keys.shape[3]), 0
        )
    assert lent.get_seq_length() == 11 and prefix.past_key_values.get_seq_length() == 10
    assert torch.equal(prefix.past_key_values.layers[0].keys, keys)


@pytest.mark.parametrize(
    ("num_cached", "image_at", "pad_at", "message"),
    [
        (5, 0, None, "`past_key_values` hold 5 tokens but the prompts have 5. Give those of their first tokens"),
        (3, 0, 1, "A prompt is padded within its first 3 tokens, which `past_key_values` hold."),
        (3, 3, None, "`past_key_values` leave out a frame"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(model, num_cached, image_at, pad_at, message):
    config = model.config
    tokens = [7] * 5
    if image_at:
        tokens[image_at : image_at + 1] = [config.image_token_id] * config.num_visual_tokens
    input_ids = torch.tensor([tokens])
    attention_mask = torch.ones_like(input_ids)
    if pad_at is not None:
        attention_mask[0, pad_at] = 0
    past = model.model(input_ids=torch.full((1, num_cached), 7), use_cache=True).past_key_values
    frames = {"image_features": torch.zeros(1, config.num_visual_tokens, 64), "num_frames": [1]} if image_at else {}
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate_masks(input_ids, attention_mask, past_key_values=past, **frames)


def test_the_item_not_asked_for_longest_goes():
    items = RecentItems(2)
    for key in "abc":
        items.put(key, key.upper())
        items.get("a")
    assert (items.get("a"), items.get("b"), items.get("c"), len(items)) == ("A", None, "C", 2)
    nothing = RecentItems(0)
    nothing.put("a", 1)
    assert nothing.get("a") is None


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}], ids=str)
def test_what_was_read_serves_several_answers_of_each_prompt(model, settings):
    input_ids = torch.tensor([[1, 5, 6, 7, 8], [1, 5, 6, 9, 4]])
    past = model.model(input_ids=input_ids[:, :3], use_cache=True).past_key_values
    sequences = []
    for given in ({}, {"past_key_values": past}):
        torch.manual_seed(0)
        sequences.append(model.generate_masks(input_ids, max_new_tokens=6, **given, **settings).sequences)
    assert len(sequences[0]) == 2 * settings.get("num_return_sequences", 1)
    assert torch.equal(*sequences)
    assert past.get_seq_length() == 3 and len(past.layers[0].keys) == 2


def test_speculative_decoding_behind_what_was_read_is_refused(model):
    input_ids = torch.tensor([[1, 5, 6, 7, 8]])
    past = model.model(input_ids=input_ids[:, :3], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="Leave out `assistant_model` and `prompt_lookup_num_tokens`, or let the"):
        model.generate_masks(input_ids, past_key_values=past, prompt_lookup_num_tokens=2)
