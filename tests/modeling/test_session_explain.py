"""Queries that ask for a reason, or in a form of their own: the prompt token by token, and masks as if asked alone."""

import re

import numpy as np
import pytest
import torch

from tests.modeling.session_models import Calls
from tests.modeling.test_session_asking import (  # noqa: F401
    HEIGHT,
    NUM_FRAMES,
    WIDTH,
    answered,
    assert_same,
    model,
    video,
)
from visa_hf.modeling.frame_sampling_visa import select_frames
from visa_hf.modeling.prefix_cache_visa import shared_length
from visa_hf.modeling.session_requests_visa import as_request, asked_style
from visa_hf.modeling.video_answering_visa import Question, prompt_ids
from visa_hf.modeling.video_session_visa import VisaVideoSession, check_query

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
FRAMES = "Reference Video: (0)<image>, (1)<image> \nTarget Image: <image> \n"
# The published words; in the explanatory form there is no blank behind the query.
PROMPTS = {
    ("the dog", None): "What is the dog in the Reference Video? Please respond with segmentation mask in the Target "
    "Image.",
    ("the dog", "explanatory"): "the dogPlease output segmentation mask in the Target Image and explain why.",
    ("which one wins?", None): "which one wins? Please find it in the Reference Video and respond with segmentation "
    "mask in the Target Image.",
    (
        "which one wins?",
        "explanatory",
    ): "which one wins?Please output segmentation mask in the Target Image and explain why.",
    ("the dog", "long"): "the dog Please find it in the Reference Video and respond with segmentation mask in the "
    "Target Image.",
    ("which one wins?", "short"): "What is which one wins? in the Reference Video? Please respond with segmentation "
    "mask in the Target Image.",
}


def ids_by_hand(processor, instruction, answer=""):
    """Tokens of the whole conversation, each frame 28 of them, without anything of ours but the tokenizer."""
    text = f"{SYSTEM} USER: {FRAMES}{instruction} ASSISTANT:{answer}"
    ids = []
    for number in processor.tokenizer(text)["input_ids"]:
        ids += [number] * (processor.num_visual_tokens if number == processor.image_token_id else 1)
    return ids


@pytest.mark.parametrize(("query", "style"), PROMPTS, ids=str)
def test_the_prompt_is_the_published_one_token_by_token(tiny_processor, query, style):
    assert tiny_processor.num_visual_tokens > 1
    ids = prompt_ids(tiny_processor, query, 2, style=style).tolist()
    assert ids == ids_by_hand(tiny_processor, PROMPTS[query, style])
    answer = "It is [SEG]. It runs."
    ids = prompt_ids(tiny_processor, query, 2, answer, style).tolist()
    assert ids == ids_by_hand(tiny_processor, PROMPTS[query, style], f" {answer}</s>")


@pytest.mark.parametrize(
    ("asked", "style"),
    [
        ({}, None),
        ({"explain": True}, "explanatory"),
        ({"style": "explanatory"}, "explanatory"),
        ({"style": "long"}, "long"),
        ({"explain": False, "style": None}, None),
    ],
    ids=str,
)
def test_that_prompt_is_what_the_model_reads(model, tiny_processor, video, monkeypatch, asked, style):  # noqa: F811
    seen = []
    generate = model.generate_masks

    def watched(input_ids, *args, **kwargs):
        seen.extend(input_ids.tolist())
        return generate(input_ids, *args, **kwargs)

    monkeypatch.setattr(model, "generate_masks", watched)
    with VisaVideoSession(video, tiny_processor) as session:
        model.add_query(session, "The  Dog", reference_frames=[1, 7], max_new_tokens=1, **asked)
        common = {"reference_frames": [1, 7], "max_new_tokens": 1}
        model.add_queries(session, ["the dog", {"query": "which one wins?", "style": "short"}], **asked, **common)
    expected = [("the dog", style), ("the dog", style), ("which one wins?", "short")]
    padding = tiny_processor.tokenizer.pad_token_id
    for row, key in zip(seen, expected, strict=True):
        assert [number for number in row if number != padding] == ids_by_hand(tiny_processor, PROMPTS[key])


def mixed_questions(answer=None):
    """Of two targets, plain and explanatory ones in turns."""
    asked = [("the dog", 4, None), ("the dog", 4, "explanatory"), ("what wins?", 4, "explanatory"), ("a", 4, "long")]
    asked += [("the dog", 7, "explanatory"), ("which car is overtaken by the other one?", 7, None)]
    return [
        Question(query, select_frames(NUM_FRAMES, target_frame=target, num_reference_frames=4), answer, style)
        for query, target, style in asked
    ]


@pytest.mark.parametrize("answer", [None, "It is [SEG]. And [SEG]. They are the only ones that run."])
@pytest.mark.parametrize("options", [{}, {"max_cached_prefixes": 0}, {"max_queries_per_batch": 2}], ids=str)
def test_explaining_and_plain_queries_share_a_batch(model, tiny_processor, video, options, answer):  # noqa: F811
    """As each by itself, and as the processor and the model without a session."""
    questions = mixed_questions(answer)
    answers = answered(model, tiny_processor, video, questions, **options)
    assert_same(answers, answered(model, tiny_processor, video, questions, alone=True, **options))
    for question, found in zip(questions, answers, strict=True):
        selection = question.frame_selection
        inputs = tiny_processor(
            target_frame=video[selection.target_idx],
            reference_frames=[video[idx] for idx in selection.reference_idx],
            query=question.query,
            answer=answer,
            style=question.style,
            normalize_query=True,
        )
        inputs.pop("labels", None)
        with torch.no_grad():
            output = model.generate_masks(**inputs, max_new_tokens=8) if answer is None else model(**inputs)
        torch.testing.assert_close(found.mask_logits, output.mask_logits[0], atol=1e-4, rtol=0)
        text = tiny_processor.batch_decode(output.answer_ids)[0] if answer is None else answer
        assert found.text == text


def test_the_form_of_a_question_leaves_its_frames_shared(model, tiny_processor, video):  # noqa: F811
    questions = mixed_questions("It is [SEG].")[:4]
    rows = [prompt_ids(tiny_processor, each.query, 4, each.answer, each.style) for each in questions]
    last_frame = int((rows[0] == tiny_processor.image_token_id).nonzero()[-1])
    assert shared_length(rows, tiny_processor.image_token_id) == last_frame + 1
    with Calls(text=model.model.language_model) as counted:
        answered(model, tiny_processor, video, questions)
    assert counted.calls["text"] == 2  # the frames once, and all questions together


def test_a_reason_stands_beside_several_masks_one_and_none(tiny_model, tiny_processor, video):  # noqa: F811
    answers = {
        "It is [SEG] and [SEG]. Both of them run.": 2,
        "It is [SEG]. It is the only one.": 1,
        "There is none. Nothing runs in this video.": 0,
    }
    with VisaVideoSession(video, tiny_processor) as session:
        asked = [{"query": "what runs?", "explain": True, "answer": answer} for answer in answers]
        tiny_model.add_queries(session, asked, target_frame=3)
        for query, (answer, number) in zip(session.queries, answers.items(), strict=True):
            assert query.answer == answer
            assert query.target_masks.shape == (number, HEIGHT, WIDTH)
            assert len(query.scores) == len(query.target_frame_scores) == number
        assert session.queries[1].target_masks.any()
        for output in tiny_model.propagate_in_video_iterator(session):
            assert [len(masks) for masks in output.masks] == [len(scores) for scores in output.scores] == [2, 1, 0]


@pytest.mark.parametrize("threshold", [0.5, 0.3])
def test_the_score_on_the_target_frame_is_the_mean_of_sam_s_probabilities(
    tiny_model,
    tiny_processor,
    video,  # noqa: F811
    threshold,
):
    with VisaVideoSession(video, tiny_processor, threshold=threshold, want_probs=True) as session:
        tiny_model.add_query(session, "the dog", target_frame=3, answer="It is [SEG]. And [SEG].")
        output = list(tiny_model.propagate_in_video_iterator(session))[3]
        (query,) = session.queries
    (answer,) = answered(
        tiny_model,
        tiny_processor,
        video,
        [Question("the dog", query.frame_selection, "It is [SEG]. And [SEG].")],
    )
    probs = 1 / (1 + np.exp(-answer.mask_logits.double().numpy()))
    for row in range(2):
        mask = output.masks[0][row].numpy()
        expected = probs[row][mask].mean() if mask.any() else 0.0
        assert float(output.scores[0][row]) == pytest.approx(expected, abs=2e-5)
    assert output.masks[0].any() and float(output.scores[0].max()) > threshold
    assert torch.equal(output.scores[0], query.target_frame_scores)


def test_the_released_procedure_is_asked_in_the_form_that_is_named(
    tiny_model,
    tiny_processor,
    video,  # noqa: F811
):
    """As the same answer taught in the plain session, with the stride's references."""
    asked = {"query": "the dog", "style": "long", "target_frame": 1}
    found = []
    for options, more in (
        ({"mode": "published"}, {}),
        ({}, {"answer": "It is [SEG].", "reference_strategy": "stride"}),
    ):
        with VisaVideoSession(video[:3], tiny_processor, **options) as session:
            tiny_model.add_queries(session, [{**asked, **more}])
            found.append(session.queries[0])
    assert torch.equal(found[0].target_masks, found[1].target_masks) and found[0].target_masks.any()
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-5, rtol=0)


def test_what_one_query_says_of_its_form_counts_more():
    common = {"style": "explanatory"}
    assert as_request("a", common).style == "explanatory"
    assert as_request({"query": "a"}, common).style == "explanatory"
    assert as_request({"query": "a", "explain": False}, common).style is None
    assert as_request({"query": "a", "style": "short"}, common).style == "short"
    assert as_request({"query": "a", "explain": True}, {"style": "short"}).style == "explanatory"
    assert asked_style("explanatory", True) == "explanatory"


def test_forms_that_do_not_exist_or_contradict_each_other_are_refused(
    tiny_model,
    tiny_processor,
    video,  # noqa: F811
):
    mask = np.ones((HEIGHT, WIDTH), dtype=bool)
    with VisaVideoSession(video, tiny_processor) as session:

        def both_ways(error, message, **asked):
            with pytest.raises(error, match=re.escape(message)):
                tiny_model.add_query(session, **asked)
            with pytest.raises(error, match=re.escape(message)):
                tiny_model.add_queries(session, [asked])

        both_ways(TypeError, "`explain` is 'yes' but must be `True` or `False`.", query="a", explain="yes")
        both_ways(
            ValueError,
            "`style` is 'text' but must be one of 'short', 'long', 'explanatory'.",
            query="a",
            style="text",
        )
        both_ways(
            ValueError,
            "`style` is 'long' and `explain` is `True`, which asks in a style of its own. Leave one of them out.",
            query="a",
            style="long",
            explain=True,
        )
        both_ways(
            ValueError,
            "`explain` and a `first_mask` are given, but with a mask the model is not asked. Leave one of the two",
            first_mask=mask,
            explain=True,
        )
        both_ways(ValueError, "A `style` and a `first_mask` are given, but with a mask", first_mask=mask, style="long")
        with pytest.raises(ValueError, match="A query has no argument 'explains'. Did you mean `explain`?"):
            tiny_model.add_queries(session, [{"query": "a", "explains": True}])
        with pytest.raises(ValueError, match="`explain` and a `first_mask` are given"):
            check_query(session, first_mask=mask, explain=True)
        assert session.queries == []
    with VisaVideoSession(video, tiny_processor, mode="published") as session:
        message = (
            '`explain` is given, but with `mode="published"` the model is given its answer, which explains nothing. '
            "Leave one of the two out."
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            tiny_model.add_query(session, "a", explain=True)
