"""The processor on what training adds: several rounds, frames without a target, targets of another size."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.modeling.test_processing_visa import BUNDLED_TOKENIZER, EOS, IMAGE, SEG, frame, frames, same
from visa_hf import VisaConfig, VisaProcessor
from visa_hf.modeling.processing_visa import IGNORED_LABEL
from visa_hf.modeling.prompts_visa import SYSTEM_PROMPT


@pytest.fixture(scope="module")
def processor():
    return VisaProcessor.from_config(VisaConfig.tiny(), AutoTokenizer.from_pretrained(BUNDLED_TOKENIZER))


def learnt_texts(processor, output, row=0):
    """The runs of learnt tokens of one conversation, as text."""
    labels = output["labels"][row].tolist()
    runs, run = [], []
    for label in [*labels, IGNORED_LABEL]:
        if label != IGNORED_LABEL:
            run.append(label)
        elif run:
            runs.append(run)
            run = []
    return [processor.tokenizer.decode(ids) for ids in runs]


# --- free conversation about frames ---


def test_a_conversation_begins_with_its_frames_and_one_line_break(processor):
    prompt = processor.build_prompt("What happens?", style="conversation", num_reference_frames=3)
    assert prompt == f"{SYSTEM_PROMPT} USER: <image><image><image>\nWhat happens? ASSISTANT:"


def test_a_conversation_shows_all_its_frames_and_has_no_target(processor):
    output = processor(None, frames(3), "What happens?", "A dog runs.", style="conversation")
    assert (output["input_ids"] == IMAGE).sum() == 3 * 28
    assert output["num_frames"].tolist() == [3] and output["pixel_values"].shape == (3, 3, 64, 64)
    assert output["original_sizes"].tolist() == output["reshaped_input_sizes"].tolist() == [[0, 0]]
    assert output["sam_pixel_values"].shape == (1, 3, 128, 128) and not output["sam_pixel_values"].any()
    assert learnt_texts(processor, output) == ["A dog runs.</s>"]
    # The frames are those of a video that has a target.
    with_target = processor(frames(3)[2], frames(3)[:2], "a dog")
    assert torch.equal(output["pixel_values"], with_target["pixel_values"])


def test_a_conversation_may_be_about_a_video_with_a_target(processor):
    output = processor(frame(), frames(2), "What happens?", "Nothing.", style="conversation")
    assert (output["input_ids"] == IMAGE).sum() == 3 * 28
    assert output["original_sizes"].tolist() == [[30, 50]]


def test_videos_with_and_without_a_target_mix(processor):
    masks = [None, np.ones((1, 40, 20), np.uint8), None]
    output = processor(
        [None, frame(40, 20)],
        [frames(2), frames(1, 40, 20)],
        ["What happens?", "a dog", "Hello"],
        ["A dog runs.", "It is [SEG].", "Hi."],
        masks,
        conversation_to_video=[0, 1, -1],
        style=["conversation", None, None],
        template=[7, 2, 0],  # a free conversation has no templates
    )
    assert output["num_frames"].tolist() == [2, 2]
    assert output["original_sizes"].tolist() == [[0, 0], [40, 20]]
    assert [tuple(mask.shape) for mask in output["mask_labels"]] == [(0, 0, 0), (1, 40, 20), (0, 0, 0)]
    alone = processor(frame(40, 20), frames(1, 40, 20), "a dog", "It is [SEG].", masks[1], template=2)
    assert torch.equal(output["sam_pixel_values"][1], alone["sam_pixel_values"][0])
    assert not output["sam_pixel_values"][0].any()


def test_free_text_is_not_normalised(processor):
    asked = processor(None, frames(1), "What Happens  HERE?", style="conversation")
    assert "What Happens  HERE?" in processor.decode(asked["input_ids"][0])


def test_what_needs_a_target_is_refused_without_one(processor):
    for style in (None, "short", "long", "explanatory"):
        with pytest.raises(ValueError, match="given without `target_frame` for conversation 0. Say which frame to"):
            processor([None], [frames(2)], ["a dog"], style=style)
    with pytest.raises(ValueError, match=r"Conversation 0 has 1 `\[SEG\]` but its video has no `target_frame`"):
        processor(None, frames(2), "Where?", "It is [SEG].", style="conversation")
    with pytest.raises(ValueError, match="`reference_frames` is empty and there is no `target_frame`"):
        processor(None, [], "Where?", style="conversation")
    with pytest.raises(TypeError, match="`reference_frames` of video 0 is a NoneType but must be a list"):
        processor([None], None, ["Where?"], style="conversation")


# --- rounds ---


def test_rounds_are_those_of_the_chat_template(processor):
    history = [("Who is there?", "A dog."), ("Which one?", "The big one, [SEG].")]
    prompt = processor.build_prompt("Why?", style="text", history=history, answer="It barks.")
    messages = [
        {"role": role, "content": text}
        for pair in [*history, ("Why?", "It barks.")]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    assert prompt == processor.apply_chat_template(messages)
    assert prompt == (
        f"{SYSTEM_PROMPT} USER: Who is there? ASSISTANT: A dog.</s>USER: Which one? ASSISTANT: The big one, [SEG]."
        "</s>USER: Why? ASSISTANT: It barks.</s>"
    )


def test_every_answer_of_a_history_is_learnt(processor):
    output = processor(
        None,
        frames(2),
        "Why?",
        "It barks.",
        style="conversation",
        history=[("Who is there?", "A dog."), ("Which one?", "The big one.")],
    )
    assert learnt_texts(processor, output) == ["A dog.</s>", "The big one.</s>", "It barks.</s>"]
    text = processor.tokenizer.decode(output["input_ids"][0][output["input_ids"][0] != IMAGE])
    assert text.index("Who is there?") < text.index("Which one?") < text.index("Why?")
    # Learnt or not, each token stands where it stands in the text.
    learnt = output["labels"] != IGNORED_LABEL
    assert torch.equal(output["labels"][learnt], output["input_ids"][learnt])
    assert (output["labels"][learnt] == EOS).sum() == 3


def test_labels_of_rounds_as_counted_by_hand(processor):
    output = processor(query="Why?", answer="It is.", history=[("Who?", "Me.")])
    ids, labels = output["input_ids"][0], output["labels"][0]
    ends = (ids == EOS).nonzero().flatten().tolist()
    assert len(ends) == 2 and ends[-1] == len(ids) - 1
    tokens = processor.tokenizer.convert_ids_to_tokens(ids.tolist())
    # The second round begins after the first end token, with a blank piece of its own, as it did in training.
    assert tokens[ends[0] + 1].startswith("\u2581")
    learnt = [number for number, label in enumerate(labels.tolist()) if label != IGNORED_LABEL]
    first = len(processor(query="Who?")["input_ids"][0])
    second = len(processor(query="Why?", history=[("Who?", "Me.")])["input_ids"][0])
    assert learnt == [*range(first, ends[0] + 1), *range(second, len(ids))]


def test_the_frames_come_before_the_first_question(processor):
    prompt = processor.build_prompt("the dog", num_reference_frames=1, history=[("Hi.", "Hello.")])
    assert prompt == (
        f"{SYSTEM_PROMPT} USER: Reference Video: (0)<image> \nTarget Image: <image> \nHi. ASSISTANT: Hello.</s>"
        "USER: What is the dog in the Reference Video? Please respond with segmentation mask in the Target Image. "
        "ASSISTANT:"
    )


def test_masks_of_all_rounds_are_given_in_order(processor):
    masks = np.stack([np.zeros((30, 50)), np.ones((30, 50)), np.zeros((30, 50))])
    output = processor(frame(), frames(1), "the dog", "It is [SEG].", masks, history=[("both", "[SEG] and [SEG].")])
    assert (output["labels"] == SEG).sum() == 3
    assert torch.equal(output["mask_labels"][0], torch.from_numpy(masks).float())


def test_no_history_is_what_it_was(processor):
    plain = processor(frame(), frames(1), ["the dog", "a cat"], answer_template=0)
    assert same(plain, processor(frame(), frames(1), ["the dog", "a cat"], answer_template=0, history=[[], None]))
    with_history = processor(frame(), frames(1), ["the dog", "a cat"], answer_template=0, history=[None, [("a", "b")]])
    length = plain["input_ids"].shape[1]
    kept = plain["attention_mask"][0].bool()
    assert torch.equal(with_history["input_ids"][0, :length][kept], plain["input_ids"][0][kept])


def test_a_history_that_is_none_is_refused(processor):
    with pytest.raises(ValueError, match="`history` has 1 entries for 2 conversations. Give a list of rounds for"):
        processor(query=["a", "b"], history=[[("a", "b")]])
    with pytest.raises(TypeError, match="`history` of conversation 0 holds 'ab' but each round must be a pair"):
        processor(query="a", history=["ab"])
    with pytest.raises(TypeError, match="`history` is a int but must be a string"):
        processor(query="a", history=[("a", 3)])
    with pytest.raises(TypeError, match="`history` is a NoneType but must be a string"):
        processor(query="a", history=[("a", None)])
    with pytest.raises(ValueError, match=r"`history` 'a \[SEG\]' holds `\[SEG\]`, which the model reads as a special"):
        processor(query="a", history=[("a [SEG]", "b")])
    with pytest.raises(ValueError, match="`history` 'b<image>' holds `<image>`"):
        processor(query="a", history=[("a", "b<image>")])
    with pytest.raises(ValueError, match="`history` is empty"):
        processor(query="a", history=[("", "b")])


# --- targets of another size ---


def test_a_target_of_another_size_must_be_asked_for(processor):
    with pytest.raises(
        ValueError, match=r"Reference frame 0 has shape \(30, 50, 3\) but the target frame \(9, 12, 3\)"
    ):
        processor(frame(9, 12), frames(2), "a dog")
    output = processor(
        frame(9, 12), frames(2), "a dog", "It is [SEG].", np.zeros((1, 9, 12), np.uint8), mixed_sizes=True
    )
    assert output["original_sizes"].tolist() == [[9, 12]]
    assert output["mask_labels"][0].shape == (1, 9, 12)
    assert torch.equal(output["pixel_values"][:2], processor(frame(), frames(2), "a dog")["pixel_values"][:2])
    assert torch.equal(output["pixel_values"][2], processor(frame(9, 12), [], "a dog")["pixel_values"][0])


def test_references_keep_one_size_among_themselves(processor):
    for target, style in ((frame(9, 12), None), (None, "conversation")):
        with pytest.raises(ValueError, match=r"Reference frame 1 has shape \(31, 50, 3\) but Reference frame 0 \(30,"):
            processor(target, [frame(), frame(31, 50)], "a dog", style=style, mixed_sizes=True)
