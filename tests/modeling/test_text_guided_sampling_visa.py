"""Which frame a language model says to look at: its answers, their probabilities, and the frame that they mean."""

import copy

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.modeling.chat_models import letter_tokenizer, tiny_llava, tiny_qwen
from visa_hf.modeling.frame_samplers_visa import VideoView
from visa_hf.modeling.frame_source_visa import open_frames
from visa_hf.modeling.prompts_visa import FRAME_QUESTION
from visa_hf.modeling.text_guided_sampling_visa import (
    PERCENTAGES,
    SHARES,
    ChatFrameSampler,
    VisaFrameSampler,
    _end_ids,
    answer_ids,
    answer_log_probs,
    parse_percentage,
    sample_answers,
)

QUERY = "the dog that runs?"


@pytest.fixture(scope="module")
def video():
    return np.random.RandomState(0).randint(0, 256, (9, 40, 56, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def llava():
    return tiny_llava()


def view_of(frames, **options):
    return VideoView(open_frames(frames), **options)


# --- Answers ---


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0%", 0.0),
        ("70%", 0.7),
        ("100%", 1.0),
        ("You should check the 70 % mark.", 0.7),
        ("Sure.70%", 0.7),
        ("70.5 percent", 0.705),
        ("12,5%", 0.125),
        ("75\N{FULLWIDTH PERCENT SIGN}", 0.75),
        ("Seventy per cent", 0.7),
        ("sixty-five percent", 0.65),
        ("sixty five percent", 0.65),
        ("one hundred percent", 1.0),
        ("the 60th percent", 0.6),
        ("the 70-percent mark", 0.7),
        ("the last 10% of the video", 0.9),
        ("In the LAST\n10%.", 0.9),
        ("the final ten percent", 0.9),
        ("last 100%", 0.0),
        ("last 70%", 0.3),
        ("80% or the last 10%", 0.9),
        ("between 20% and 30%", 0.2),
        ("0% or 40%", 0.4),
        ("70", 0.7),
        ("The answer is 70.", 0.7),
        ("the percentage mark of 40", 0.4),
        ("0.7", 0.7),
        ("1.0", 1.0),
        ("in the middle of the video", 0.5),
        ("Halfway through the video.", 0.5),
        ("at the beginning", 0.0),
        ("The end.", 1.0),
        ("", None),
        ("I do not know", None),
        ("3 dogs", None),
        ("150%", None),
        ("110%", None),
        ("200", None),
        ("at 0:12 and 0:15", None),
        ("a dog in the center of the picture", None),
    ],
)
def test_many_spellings_of_a_percentage_are_understood(text, share):
    assert parse_percentage(text) == share


def test_an_answer_follows_the_prompt_as_the_tokenizer_writes_it(tiny_tokenizer):
    (ids,) = answer_ids(tiny_tokenizer, "USER: where? ASSISTANT:", [" 70%"])
    assert tiny_tokenizer.decode(ids).strip() == "70%"
    whole = tiny_tokenizer("USER: where? ASSISTANT: 70%")["input_ids"]
    assert whole[-len(ids) :] == ids.tolist()
    letters = letter_tokenizer()
    assert [len(ids) for ids in answer_ids(letters, "a:\n", PERCENTAGES)] == [2] + [3] * 9 + [4]


def test_no_answer_begins_another_one(tiny_tokenizer):
    # So that the probabilities of the eleven answers are those of events of which one excludes the others.
    rows = [ids.tolist() for ids in answer_ids(tiny_tokenizer, "ASSISTANT:", [f" {text}" for text in PERCENTAGES])]
    assert not any(one != other and other[: len(one)] == one for one in rows for other in rows)


def test_probabilities_of_texts_are_products_of_those_of_their_tokens():
    table = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.25, 0.25, 0.5]])

    def read(tokens):
        before = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.int64), tokens], dim=1)
        return table[before].log() + 3.0  # whatever is added to all logits changes nothing

    found = answer_log_probs(read, [torch.tensor([1]), torch.tensor([1, 2]), torch.tensor([2, 2, 1])])
    expected = torch.tensor([0.25, 0.25 * 0.375, 0.25 * 0.5 * 0.25]).log()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def draw(probs, num_answers=200, **options):
    """Answers of one token and an end, drawn by given probabilities; word 0 is the end."""

    def read(tokens):
        logits = torch.tensor([0.0, *probs]).log().expand(len(tokens), tokens.shape[1] + 1, -1).clone()
        logits[:, 1:] = torch.tensor([1.0, *(0.0 for _ in probs)]).log()
        return logits

    usual = {"temperature": 1.0, "top_p": 1.0, "seed": 0, "end_ids": [0], "max_new_tokens": 5}
    return [word for answer in sample_answers(read, num_answers, **{**usual, **options}) for word in answer]


def test_sampling_keeps_the_most_probable_words_and_follows_their_probabilities():
    words = draw([0.6, 0.3, 0.1])
    assert len(words) == 200 and set(words) == {1, 2, 3}
    assert words.count(1) > words.count(2) > words.count(3)
    assert set(draw([0.6, 0.3, 0.1], top_p=0.85)) == {1, 2}
    assert set(draw([0.6, 0.3, 0.1], top_p=0.5)) == {1}
    # At temperature 0.5 probabilities are squared: 36 to 9 to 1.
    assert draw([0.6, 0.3, 0.1], 2000, temperature=0.5).count(3) / 2000 == pytest.approx(1 / 46, abs=0.01)
    assert draw([0.6, 0.3, 0.1]) == words != draw([0.6, 0.3, 0.1], seed=1)


def test_answers_that_do_not_end_are_cut():
    forever = {"temperature": 1.0, "top_p": 1.0, "seed": 0, "end_ids": [], "max_new_tokens": 3}
    assert sample_answers(lambda tokens: torch.zeros(2, tokens.shape[1] + 1, 1), 2, **forever) == [[0, 0, 0]] * 2


# --- A chat model ---


@torch.no_grad()
def scored_plainly(model, inputs, answers):
    """Log-probabilities of answers, each read with the whole prompt, token by token, without a cache."""
    totals = []
    for answer in answers:
        total = 0.0
        for position in range(len(answer)):
            ids = torch.cat([inputs["input_ids"][0], answer[:position]])[None]
            longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if "mm_token_type_ids" in inputs:
                kinds = torch.zeros_like(ids)
                kinds[:, : inputs["mm_token_type_ids"].shape[1]] = inputs["mm_token_type_ids"]
                longer["mm_token_type_ids"] = kinds
            logits = model(**longer, use_cache=False).logits[0, -1]
            total += float(logits.log_softmax(dim=-1)[answer[position]])
        totals.append(total)
    return torch.tensor(totals)


def llava_inputs(processor, video, question):
    text = "USER: " + "<image>" * len(video) + question + "\nASSISTANT:"
    return dict(processor(images=list(video), text=text, return_tensors="pt"))


def test_the_scored_mean_is_that_of_a_plain_loop_without_cache(llava, video):
    model, processor = llava
    selection = ChatFrameSampler(model, processor, num_frames=3)(view_of(video), QUERY)
    # The published question, without the final question mark; of 9 frames 1, 4 and 7 are the middles of three parts.
    question = FRAME_QUESTION.replace("{sent}", "the dog that runs")
    answers = [torch.tensor(processor.tokenizer(f" {text}")["input_ids"]) for text in PERCENTAGES]
    totals = scored_plainly(model, llava_inputs(processor, video[[1, 4, 7]], question), answers)
    probs = totals.double().softmax(dim=0)
    share = float(sum(prob * percent / 100 for prob, percent in zip(probs, range(0, 101, 10), strict=True)))
    assert probs.max() - probs.min() > 0.02  # or equality would show nothing
    assert selection.target_idx == min(int(9 * share), 8)
    torch.testing.assert_close(
        torch.tensor([score for _, score in selection.scores]), probs.float(), atol=1e-5, rtol=0
    )
    assert [idx for idx, _ in selection.scores] == [min(int(9 * tenth / 10), 8) for tenth in range(11)]
    nearest = float(probs[round(share * 10)])
    assert selection.reason == f"text-guided: {100 * share:.0f}% (p={nearest:.2f})"
    assert len(selection.reference_idx) == 9 and selection.num_frames == 9


def test_a_model_without_a_cache_to_lend_gives_the_same(llava, video, monkeypatch):
    model, processor = llava
    inputs = llava_inputs(processor, video[:2], "where?")
    sampler = ChatFrameSampler(model, processor)
    tokens = torch.randint(8, 100, (3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        lent = sampler._reader(inputs)(tokens)
        monkeypatch.setattr("visa_hf.modeling.text_guided_sampling_visa.can_be_shared", lambda cache: False)
        plain = sampler._reader(inputs)(tokens)
        assert sampler._reader(inputs)(tokens[:, :0]).shape == (3, 1, plain.shape[2])
    assert lent.shape == plain.shape == (3, 5, model.config.text_config.vocab_size)
    torch.testing.assert_close(lent, plain, atol=1e-4, rtol=0)


def test_positions_of_three_axes_go_on_behind_the_prompt():
    model, tokenizer = tiny_qwen(), letter_tokenizer()
    ids = torch.tensor([[*tokenizer("USER: ")["input_ids"], 6, 4, 4, 4, 4, 7, *tokenizer("where?")["input_ids"]]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 4).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    answers = answer_ids(tokenizer, "where?", [f" {text}" for text in PERCENTAGES])
    sampler = ChatFrameSampler(model, tiny_llava()[1])  # its processor is not asked here
    with torch.no_grad():
        found = answer_log_probs(sampler._reader(inputs), answers)
    torch.testing.assert_close(found, scored_plainly(model, inputs, answers), atol=1e-4, rtol=0)
    probs = found.softmax(dim=0)
    torch.testing.assert_close(
        probs @ torch.tensor(SHARES), scored_plainly(model, inputs, answers).softmax(dim=0) @ torch.tensor(SHARES),
        atol=1e-5, rtol=0,
    )  # fmt: skip


def test_answers_read_in_small_groups_are_the_same(llava, video):
    groups = [ChatFrameSampler(*llava, num_frames=2, batch_size=size)(view_of(video), QUERY) for size in (11, 4, 1)]
    for selection in groups[1:]:
        assert selection.target_idx == groups[0].target_idx
        for (_, score), (_, other) in zip(selection.scores, groups[0].scores, strict=True):
            assert score == pytest.approx(other, abs=1e-5)


def test_whatever_the_model_takes_for_an_end_ends_an_answer(llava):
    model, processor = copy.deepcopy(llava[0]), llava[1]
    for known, ends in ((None, {2}), (9, {2, 9}), ([9, 10], {2, 9, 10})):
        model.generation_config.eos_token_id = known
        assert set(_end_ids(model, processor.tokenizer)) == ends


def test_the_same_video_and_query_give_the_same_frame(llava, video):
    model, processor = llava
    for options in ({}, {"mode": "sampled", "seed": 3, "max_new_tokens": 4}):
        sampler = ChatFrameSampler(model, processor, num_frames=2, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("visa_hf.modeling.text_guided_sampling_visa.parse_percentage", lambda text: len(text) / 9)
            torch.manual_seed(0)
            first = sampler(view_of(video), QUERY)
            before = torch.get_rng_state()
            assert sampler(view_of(video), QUERY) == first
            assert torch.equal(torch.get_rng_state(), before)


def scripted(monkeypatch, texts):
    """Let the model say these texts."""
    tokenizer = letter_tokenizer()
    monkeypatch.setattr(
        "visa_hf.modeling.text_guided_sampling_visa.sample_answers",
        lambda *args, **options: [tokenizer(text)["input_ids"] for text in texts],
    )


def test_sampled_answers_are_averaged_as_published(llava, video, monkeypatch):
    model, processor = llava
    monkeypatch.setattr(processor.tokenizer, "decode", lambda ids, **_: "".join(map(chr, ids)))
    monkeypatch.setattr(
        "visa_hf.modeling.text_guided_sampling_visa.sample_answers",
        lambda *args, **options: [list(map(ord, text)) for text in ("20%", "I do not know", "the last 10%", "40%")],
    )
    selection = ChatFrameSampler(model, processor, mode="sampled")(view_of(video), QUERY)
    assert selection.target_idx == int(9 * 0.5)  # the mean of 0.2, 0.9 and 0.4
    assert selection.reason == "text-guided: 50% (mean of 3 of 4 answers)"
    assert selection.scores == ((1, 1 / 3), (3, 1 / 3), (8, 1 / 3))


def test_without_an_answer_that_names_a_percentage_the_middle_is_taken(llava, video, monkeypatch, caplog):
    model, processor = llava
    scripted(monkeypatch, ["what?", "no"])
    selection = ChatFrameSampler(model, processor, mode="sampled")(view_of(video), QUERY)
    assert "None of 2 answers about 'the dog that runs?' names a percentage, the first being" in caplog.text
    assert selection.target_idx == 4 and selection.scores == ()


def test_a_model_of_another_dtype_is_given_what_it_takes(llava, video):
    model = copy.deepcopy(llava[0]).to(torch.bfloat16)
    exact = ChatFrameSampler(*llava, num_frames=2)(view_of(video), QUERY)
    rough = ChatFrameSampler(model, llava[1], num_frames=2)(view_of(video), QUERY)
    for (_, score), (_, other) in zip(exact.scores, rough.scores, strict=True):
        assert score == pytest.approx(other, abs=0.1)


def test_a_video_of_one_frame_has_one_target(llava, video):
    model, processor = llava
    selection = ChatFrameSampler(model, processor)(view_of(video[:1]), QUERY)
    assert (selection.target_idx, selection.reference_idx) == (0, (0,))
    assert sum(score for _, score in selection.scores) == pytest.approx(1.0)


def test_only_the_part_that_is_used_is_shown_and_chosen_from(llava, video):
    model, processor = llava
    sampler = ChatFrameSampler(model, processor, num_frames=3)
    part = sampler(view_of(video, first_frame=2, stop_frame=8, num_reference_frames=4), QUERY)
    alone = sampler(view_of(video[2:8], num_reference_frames=4), QUERY)
    assert part.target_idx == alone.target_idx + 2 and part.num_frames == 9
    assert part.reference_idx == tuple(idx + 2 for idx in alone.reference_idx)
    assert part.reason == alone.reason


def test_frames_can_be_shown_as_a_video(llava, video):
    model, processor = llava
    seen = []

    class ShownError(Exception):
        pass

    class VideoProcessor:
        chat_template = "a template"

        def apply_chat_template(self, messages, **options):
            seen.append(messages[0]["content"])
            raise ShownError

    with pytest.raises(ShownError):
        ChatFrameSampler(model, VideoProcessor(), as_video=True, num_frames=3)(view_of(video), QUERY)
    assert [part["type"] for part in seen[0]] == ["video", "text"]
    assert np.array_equal(seen[0][0]["video"], video[[1, 4, 7]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, '`mode` is \'best\' but must be "scored" or "sampled"'),
        ({"num_frames": 0}, "`num_frames` is 0 but must be at least 1"),
        ({"num_answers": 0}, "`num_answers` is 0"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"temperature": 0.0}, "`temperature` is 0.0 but must be above 0"),
        ({"top_p": 1.5}, "`top_p` is 1.5 but must be above 0 and at most 1"),
    ],
)
def test_options_outside_their_range_are_refused(llava, options, message):
    with pytest.raises(ValueError, match=message):
        ChatFrameSampler(*llava, **options)
    with pytest.raises(ValueError, match=message):
        VisaFrameSampler(None, **options)


def test_a_processor_without_a_chat_template_is_refused(llava):
    processor = copy.deepcopy(llava[1])
    processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        ChatFrameSampler(llava[0], processor)


def test_a_model_that_computes_no_numbers_is_refused(llava, video):
    model = copy.deepcopy(llava[0])
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    for mode in ("scored", "sampled"):
        with pytest.raises(RuntimeError, match="NaN or infinite numbers for the answers"):
            ChatFrameSampler(model, llava[1], mode=mode)(view_of(video), QUERY)


# --- VISA's own language model ---


@torch.no_grad()
def visa_scored_plainly(model, processor, video, query):
    """Log-probabilities of the answers, each in a conversation made by the processor."""
    question = FRAME_QUESTION.replace("{sent}", query)
    totals = []
    for text in PERCENTAGES:
        inputs = processor(
            target_frame=None, reference_frames=list(video), query=question, answer=text, style="conversation"
        )
        labels = inputs.pop("labels")[0]
        logits = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            pixel_values=inputs["pixel_values"],
            num_frames=inputs["num_frames"],
        ).logits[0]
        places = (labels != -100).nonzero()[:-1, 0]  # but the token that ends the answer
        log_probs = logits[places - 1].log_softmax(dim=-1)
        totals.append(float(log_probs.gather(1, labels[places][:, None]).sum()))
    return torch.tensor(totals)


@pytest.mark.parametrize("max_cached_prefixes", [0, 2])
def test_visa_itself_answers_as_in_a_plain_conversation(tiny_model, tiny_processor, video, max_cached_prefixes):
    totals = visa_scored_plainly(tiny_model, tiny_processor, video[[1, 4, 7]], "the dog that runs")
    probs = totals.double().softmax(dim=0)
    share = float(probs @ torch.tensor(SHARES, dtype=torch.float64))
    assert probs.max() - probs.min() > 0.02
    with tiny_processor.init_video_session(video, max_cached_prefixes=max_cached_prefixes) as session:
        view = VideoView(session.source, session=session)
        for _ in range(2):  # the second time with what was kept
            selection = VisaFrameSampler(tiny_model, num_frames=3)(view, QUERY)
            found = torch.tensor([score for _, score in selection.scores])
            torch.testing.assert_close(found, probs.float(), atol=1e-5, rtol=0)
            assert selection.target_idx == min(int(9 * share), 8)


def test_visa_without_a_cache_to_lend_answers_the_same(tiny_model, tiny_processor, video, monkeypatch):
    with tiny_processor.init_video_session(video) as session:
        lent = VisaFrameSampler(tiny_model, num_frames=3)(VideoView(session.source, session=session), QUERY)
    for module in ("text_guided_sampling_visa", "video_answering_visa"):
        monkeypatch.setattr(f"visa_hf.modeling.{module}.can_be_shared", lambda cache: False)
    with tiny_processor.init_video_session(video) as session:
        plain = VisaFrameSampler(tiny_model, num_frames=3)(VideoView(session.source, session=session), QUERY)
    for (idx, score), (other_idx, other) in zip(lent.scores, plain.scores, strict=True):
        assert idx == other_idx and score == pytest.approx(other, abs=1e-5)


def test_visa_samples_answers_and_never_says_a_frame(tiny_model, tiny_processor, video, caplog):
    with tiny_processor.init_video_session(video) as session:
        view = VideoView(session.source, session=session)
        options = {"mode": "sampled", "num_answers": 3, "max_new_tokens": 4, "num_frames": 2}
        selection = VisaFrameSampler(tiny_model, **options)(view, QUERY)
    assert selection.target_idx == 4 and "None of 3 answers" in caplog.text
    read = VisaFrameSampler(tiny_model)
    logits = read._logits(torch.zeros(1, 1, tiny_model.config.text_config.hidden_size))
    image_token_id = tiny_model.config.image_token_id
    if image_token_id < logits.shape[-1]:
        assert logits[0, 0, image_token_id] == -torch.inf


def test_visa_shares_the_frames_of_a_session_among_queries(tiny_model, tiny_processor, video, monkeypatch):
    sizes = []
    run = VisaFrameSampler._run

    def counting(self, input_ids, start, past_key_values, features):
        sizes.append((tuple(input_ids.shape), start))
        assert past_key_values is None or isinstance(past_key_values, DynamicCache)
        return run(self, input_ids, start, past_key_values, features)

    monkeypatch.setattr(VisaFrameSampler, "_run", counting)
    with tiny_processor.init_video_session(video) as session:
        view = VideoView(session.source, session=session)
        for query in ("a dog", "a car"):
            VisaFrameSampler(tiny_model, num_frames=3)(view, query)
        assert len(session.cache.prefixes) == 1 and len(session.cache.frames) == 3
    # For each query: its question behind the frames, and all answers behind that.
    assert [rows for (rows, _), _ in sizes] == [1, 11, 1, 11]
    assert sizes[0][1] > 3 * tiny_processor.num_visual_tokens


def test_visa_refuses_a_query_that_its_context_cannot_hold(tiny_model, tiny_processor, video):
    with tiny_processor.init_video_session(video) as session:
        view = VideoView(session.source, session=session)
        with pytest.raises(ValueError, match="tokens"):
            VisaFrameSampler(tiny_model)(view, "dog " * 5000)
        with pytest.raises(ValueError, match="holds `<image>`"):
            VisaFrameSampler(tiny_model)(view, "the <image>")


def test_visa_needs_a_session(tiny_model, video):
    with pytest.raises(RuntimeError, match="needs a session"):
        VisaFrameSampler(tiny_model)(view_of(video), QUERY)
