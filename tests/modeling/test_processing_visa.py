"""The processor: published prompts, ids, labels and pixels, batches, the way back to masks, and every refusal."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, SamImageProcessorPil

import visa_hf
from visa_hf.modeling.configuration_visa import VisaConfig
from visa_hf.modeling.processing_visa import IGNORED_LABEL, VisaProcessor
from visa_hf.modeling.prompts_visa import SYSTEM_PROMPT, frame_question

REFERENCE = Path(__file__).parents[1] / "reference"
BUNDLED_TOKENIZER = Path(visa_hf.__file__).parent / "assets" / "tokenizer"
PUBLISHED = json.loads((REFERENCE / "tokenizer" / "prompts.json").read_text(encoding="utf-8"))
TEMPLATES = json.loads((REFERENCE / "tokenizer" / "templates.json").read_text(encoding="utf-8"))
CASES = PUBLISHED["cases"]
SEG, IMAGE, EOS = 1200, 1201, 2
TENSORS = [
    "input_ids",
    "attention_mask",
    "pixel_values",
    "num_frames",
    "sam_pixel_values",
    "original_sizes",
    "reshaped_input_sizes",
    "conversation_to_video",
]
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def new_tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED_TOKENIZER)


@pytest.fixture(scope="module")
def processor():
    """The processor of the tiny model: 28 visual tokens, 64 pixels for the tower, 128 for SAM."""
    return VisaProcessor.from_config(VisaConfig.tiny(), new_tokenizer())


def frame(height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def frames(count, height=30, width=50, seed=0):
    return [frame(height, width, seed + idx) for idx in range(count)]


def template_of(case):
    """Which published templates a case was made with: (question, answer)."""
    questions = TEMPLATES["long_questions" if case["expression"].strip().endswith("?") else "short_questions"]
    tail = case["question"].split("Target Image: <image> \n")[1]
    tails = [text.split("Target Image: <image> \n")[1] for text in questions]
    question = [text.replace("{sent}", case["expression"].strip()) for text in tails].index(tail)
    return question, TEMPLATES["answers"].index(case["answer"])


def same(left, right):
    """Whether two outputs have the same tensors."""
    assert list(left) == list(right)
    for name, values in left.items():
        pairs = zip(values, right[name], strict=True) if isinstance(values, list) else [(values, right[name])]
        assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in pairs), name
    return True


# --- prompts ---


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_prompts_are_the_published_ones(processor, case):
    template, answer = template_of(case)
    count = case["num_reference_frames"]
    from_answer = processor.build_prompt(
        case["expression"], template, num_reference_frames=count, answer=case["answer"]
    )
    from_number = processor.build_prompt(
        case["expression"], template, num_reference_frames=count, answer_template=answer
    )
    assert from_answer == from_number == case["prompt"]
    without_answer = processor.build_prompt(case["expression"], template, num_reference_frames=count)
    assert case["prompt"] == f"{without_answer} {case['answer']}</s>"


@pytest.mark.parametrize("style", ["short", "long", "explanatory"])
def test_every_published_question_can_be_built(processor, style):
    published = TEMPLATES[f"{style}_questions"]
    for number, template in enumerate(published):
        video = "(0)<image>, (1)<image>"
        expected = template.replace("<video>", video).replace("{sent}", "the dog")
        prompt = processor.build_prompt("the dog", number, num_reference_frames=2, style=style)
        assert prompt == f"{TEMPLATES['system']} USER: {expected} ASSISTANT:"
    with pytest.raises(ValueError, match=rf"`template` is {len(published)} but there are {len(published)} templates"):
        processor.build_prompt("the dog", len(published), style=style)
    with pytest.raises(ValueError, match="`template` is -1 but there are"):
        processor.build_prompt("the dog", -1, style=style)


def test_every_published_answer_can_be_built(processor):
    for number, answer in enumerate(TEMPLATES["answers"]):
        assert processor.build_prompt("a", answer_template=number).endswith(f" ASSISTANT: {answer}</s>")
    with pytest.raises(ValueError, match="`answer_template` is 4 but there are 4 templates for answers: give 0 to 3"):
        processor.build_prompt("a", answer_template=4)


def test_the_sampler_s_question_is_the_published_one():
    assert frame_question("the {sent} dog") == TEMPLATES["frame_question"].replace("{exp}", "the {sent} dog")


def test_a_query_that_ends_in_a_question_mark_takes_the_long_form(processor):
    assert "\nwho is it? Please find it in" in processor.build_prompt(" who is it? ")
    assert "\nWhat is who is it? no in" in processor.build_prompt("who is it? no")
    assert "\nWhat is who is it? in" in processor.build_prompt("who is it?", style="short")


def test_twelve_reference_frames_are_the_default(processor):
    assert processor.build_prompt("a").count("<image>") == 13
    assert "(11)<image> \nTarget Image: <image> \n" in processor.build_prompt("a")


def test_without_reference_frames_their_place_stays_empty(processor):
    prompt = processor.build_prompt("a dog", num_reference_frames=0)
    assert f"{SYSTEM_PROMPT} USER: Reference Video:  \nTarget Image: <image> \nWhat is a dog in" in prompt


def test_blanks_and_capitals_are_kept_unless_normalised(processor):
    query = "  The\t big \n DOG  "
    assert "What is The\t big \n DOG in the" in processor.build_prompt(query)
    assert "What is the big dog in the" in processor.build_prompt(query, normalize_query=True)


def test_braces_in_a_query_are_text(processor):
    assert "What is {sent} {0} in the" in processor.build_prompt("{sent} {0}")


def test_the_chat_template_gives_the_published_conversation(processor):
    for case in CASES:
        parts = re.split("(<image>)", case["question"])
        content = [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": case["answer"]}]
        assert processor.apply_chat_template(messages) == case["prompt"]
        asked = processor.apply_chat_template(messages[:1], add_generation_prompt=True)
        assert case["prompt"] == f"{asked} {case['answer']}</s>"
    rounds = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    assert processor.apply_chat_template(rounds) == (
        f"{SYSTEM_PROMPT} USER: a ASSISTANT: b</s>USER: c ASSISTANT: d</s>"
    )


# --- ids and labels ---


def collapsed(row, num_visual_tokens):
    """Undo the expansion of a row: each run of visual tokens becomes one published image id per frame."""
    ids, seen = [], 0
    for token in row.tolist():
        seen = seen + 1 if token == IMAGE else 0
        if token != IMAGE:
            ids.append(token)
        elif seen % num_visual_tokens == 1:
            ids.append(PUBLISHED["image_token_id"])
    return ids


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_and_labels_are_the_published_ones(processor, case):
    template, answer = template_of(case)
    references = frames(case["num_reference_frames"])
    output = processor(frame(), references, case["expression"], template=template, answer_template=answer)
    row, labels = output["input_ids"][0], output["labels"][0]
    assert collapsed(row, 28) == case["input_ids"]
    assert (row == IMAGE).sum() == 28 * (len(references) + 1)
    assert output["attention_mask"].all()
    # Expanding lengthens only what is ignored.
    published = case["labels"]
    assert labels.tolist() == [IGNORED_LABEL] * (len(row) - len(published)) + published
    # Without the answer: the same prompt, and nothing learnt.
    asked = processor(frame(), references, case["expression"], template=template, normalize_query=False)
    learnt = sum(label != IGNORED_LABEL for label in published)
    assert torch.equal(asked["input_ids"][0], row[:-learnt])
    assert "labels" not in asked


def test_one_visual_token_per_frame_gives_the_published_batch(processor):
    narrow = VisaProcessor(
        processor.image_processor, processor.tokenizer, processor.sam_image_processor, num_visual_tokens=1
    )
    numbers = [template_of(case) for case in CASES]
    output = narrow(
        [frame()] * len(CASES),
        [[frame()] * case["num_reference_frames"] for case in CASES],
        [case["expression"] for case in CASES],
        [case["answer"] for case in CASES],
        template=[question for question, _ in numbers],
    )
    ids = output["input_ids"].masked_fill(output["input_ids"] == IMAGE, PUBLISHED["image_token_id"])
    assert ids.tolist() == PUBLISHED["batch"]["input_ids"]
    assert output["labels"].tolist() == PUBLISHED["batch"]["labels"]
    assert output["attention_mask"].long().tolist() == np.asarray(PUBLISHED["batch"]["attention_mask"]).tolist()


def test_labels_cover_the_answer_and_its_end_as_counted_by_hand(processor):
    output = processor(frame(), frames(2), "the dog", "It is [SEG].")
    labels = output["labels"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(labels[labels != IGNORED_LABEL].tolist())
    assert tokens == ["\u2581It", "\u2581is", "[SEG]", "\u2581", ".", "</s>"]
    assert (labels[:-6] == IGNORED_LABEL).all()
    assert torch.equal(labels[-6:], output["input_ids"][0, -6:])


@pytest.mark.parametrize("answer", ["[SEG]", "[SEG] and [SEG].", "No [SEG] [SEG][SEG] here", "中文 [SEG]", "none"])
def test_every_answer_is_learnt_whole(processor, answer):
    output = processor(frame(), frames(1), "the dog", answer)
    learnt = output["labels"][0][output["labels"][0] != IGNORED_LABEL]
    assert learnt[-1] == EOS
    assert (learnt == SEG).sum() == answer.count("[SEG]") == (output["input_ids"] == SEG).sum()
    assert processor.decode(learnt).replace(" ", "") == answer.replace(" ", "")


def test_the_default_at_inference_is_the_published_normalisation(processor):
    asked = processor(frame(), frames(1), "  The  DOG ")
    assert torch.equal(asked["input_ids"], processor(frame(), frames(1), "the dog")["input_ids"])
    as_given = processor(frame(), frames(1), "The DOG", normalize_query=False)
    assert not torch.equal(asked["input_ids"][0], as_given["input_ids"][0])
    trained = processor(frame(), frames(1), "The DOG", "It is [SEG].")
    assert torch.equal(trained["input_ids"][0, : as_given["input_ids"].shape[1]], as_given["input_ids"][0])


# --- batches ---


def test_a_batch_holds_what_each_conversation_gives_alone(processor):
    targets = [frame(30, 50), frame(64, 20, seed=7), frame(41, 41, seed=8)]
    references = [frames(2), frames(4, 64, 20), []]
    queries = ["The dog", "which of the animals will win?", "a bird"]
    answers = ["It is [SEG].", "[SEG] and [SEG].", "There is none."]
    masks = [np.ones((1, 30, 50), bool), np.zeros((2, 64, 20), np.uint8), None]
    together = processor(targets, references, queries, answers, masks)
    assert together["num_frames"].tolist() == [3, 5, 1]
    assert together["conversation_to_video"].tolist() == [0, 1, 2]
    position = 0
    for idx, count in enumerate(together["num_frames"].tolist()):
        mask = np.zeros((0, 41, 41)) if masks[idx] is None else masks[idx]
        alone = processor(targets[idx], references[idx], queries[idx], answers[idx], mask)
        length = alone["input_ids"].shape[1]
        for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED_LABEL)):
            assert torch.equal(together[name][idx, :length], alone[name][0])
            assert (together[name][idx, length:] == padding).all()
        assert torch.equal(together["pixel_values"][position : position + count], alone["pixel_values"])
        for name in ("sam_pixel_values", "original_sizes", "reshaped_input_sizes"):
            assert torch.equal(together[name][idx], alone[name][0])
        assert torch.equal(together["mask_labels"][idx], alone["mask_labels"][0])
        position += count
    assert position == len(together["pixel_values"])


def test_padding_is_left_for_generation_and_right_for_training(processor):
    queries = ["a dog", "the very long name of the other dog"]
    asked = processor(frame(), frames(1), queries)
    assert asked["attention_mask"][0, 0] == 0 and asked["attention_mask"][:, -1].all()
    right = processor(frame(), frames(1), queries, padding_side="right")
    assert right["attention_mask"][:, 0].all() and right["attention_mask"][0, -1] == 0
    pad = (asked["attention_mask"][0] == 0).sum()
    assert torch.equal(asked["input_ids"][0, pad:], right["input_ids"][0, :-pad])
    assert (asked["input_ids"][0, :pad] == 0).all()
    taught = processor(frame(), frames(1), queries, answer_template=0)
    assert taught["attention_mask"][:, 0].all() and taught["attention_mask"][0, -1] == 0
    left = processor(frame(), frames(1), queries, answer_template=0, padding_side="left")
    assert (left["labels"][0, :pad] == IGNORED_LABEL).all() and (left["labels"][:, -1] == EOS).all()


def test_without_padding_lengths_must_be_equal(processor):
    assert processor(frame(), [], ["a dog", "a dog"], padding=False)["attention_mask"].all()
    with pytest.raises(ValueError, match=r"have \[\d+, \d+\] tokens: `padding=False` needs equal lengths"):
        processor(frame(), [], ["a dog", "the other dog"], padding=False)


def test_several_conversations_share_one_video(processor):
    output = processor(frame(), frames(2), ["a dog", "a bird", "who?"])
    assert output["conversation_to_video"].tolist() == [0, 0, 0]
    assert output["pixel_values"].shape[0] == 3 and output["sam_pixel_values"].shape[0] == 1


def test_conversations_are_matched_to_videos_as_told(processor):
    output = processor(
        [frame(), frame(9, 9)], [frames(2), frames(5, 9, 9)], ["a", "b", "c"], conversation_to_video=[1, 0, 1]
    )
    assert output["conversation_to_video"].tolist() == [1, 0, 1]
    assert ((output["input_ids"] == IMAGE).sum(dim=1) // 28).tolist() == [6, 3, 6]
    with pytest.raises(ValueError, match="There are 3 conversations and 2 videos. Say in `conversation_to_video`"):
        processor([frame(), frame()], None, ["a", "b", "c"])
    with pytest.raises(ValueError, match="`conversation_to_video` names video 2 but there are 2, counted from 0"):
        processor([frame(), frame()], None, ["a", "b", "c"], conversation_to_video=[0, 1, 2])
    with pytest.raises(ValueError, match="`conversation_to_video` has 1 values for 3 conversations"):
        processor([frame(), frame()], None, ["a", "b", "c"], conversation_to_video=[0])


def test_an_image_is_a_one_frame_video(processor):
    image = frame()
    assert same(processor(image, query="a dog"), processor(image, [image], "a dog"))
    assert same(
        processor([image, frame(9, 9)], [None, []], ["a", "b"]),
        processor([image, frame(9, 9)], [[image], []], ["a", "b"]),
    )


def test_no_reference_frame_leaves_the_target_alone(processor):
    output = processor(frame(), [], "a dog")
    assert output["num_frames"].tolist() == [1] and (output["input_ids"] == IMAGE).sum() == 28


def test_a_conversation_without_a_video_is_text_alone(processor):
    output = processor(query="Hello, who are You?", answer="I am a model.")
    assert list(output) == [*TENSORS[:2], "labels", *TENSORS[2:]]
    assert processor.decode(output["input_ids"][0]) == (
        f"{SYSTEM_PROMPT} USER: Hello, who are You? ASSISTANT: I am a model."
    )
    assert output["conversation_to_video"].tolist() == [-1]
    assert output["pixel_values"].shape == (0, 3, 64, 64) and output["sam_pixel_values"].shape == (0, 3, 128, 128)
    assert output["num_frames"].shape == (0,)
    assert output["original_sizes"].shape == output["reshaped_input_sizes"].shape == (0, 2)
    assert "who are You?" in processor.decode(processor(query="Hello, who are You?")["input_ids"][0])


def test_text_and_video_conversations_mix(processor):
    output = processor(
        frame(),
        frames(2),
        ["Hello", "a dog"],
        ["Hi.", "It is [SEG]."],
        [None, np.ones((1, 30, 50))],
        conversation_to_video=[-1, 0],
        template=2,
    )
    assert ((output["input_ids"] == IMAGE).sum(dim=1) // 28).tolist() == [0, 3]
    assert [tuple(mask.shape) for mask in output["mask_labels"]] == [(0, 0, 0), (1, 30, 50)]


def test_tensors_have_the_contract_s_types(processor):
    output = processor(frame(), frames(2), "a dog", "It is [SEG].", np.ones((1, 30, 50), bool))
    assert list(output) == [*TENSORS[:2], "labels", *TENSORS[2:], "mask_labels"]
    assert set(output) <= set(processor.model_input_names)
    for name in ("pixel_values", "sam_pixel_values"):
        assert output[name].dtype == torch.float32
    for name in set(output) - {"pixel_values", "sam_pixel_values", "mask_labels"}:
        assert output[name].dtype == torch.int64, name
    assert output["mask_labels"][0].dtype == torch.float32


# --- pixels ---


def published_size_processor(processor):
    sam = SamImageProcessorPil(size={"longest_edge": 256}, pad_size={"height": 256, "width": 256})
    return VisaProcessor(CLIPImageProcessorPil(), processor.tokenizer, sam)


@pytest.mark.parametrize("number", range(3))
def test_pixels_are_the_published_ones(processor, number):
    golden = load_file(REFERENCE / "preprocess" / "golden.safetensors")
    image = golden[f"image.{number}"].numpy()
    full = published_size_processor(processor)
    output = full(image, [], "a dog")
    for kind, name, tool in (
        ("clip", "pixel_values", full.image_processor),
        ("sam", "sam_pixel_values", full.sam_image_processor),
    ):
        difference = output[name][0] - golden[f"{kind}.{number}"].float()
        grey_levels = difference * torch.tensor(tool.image_std)[:, None, None]
        assert (grey_levels.abs() * 255).max() <= 1
    assert torch.equal(output["reshaped_input_sizes"][0], golden[f"sam_size.{number}"])
    assert output["original_sizes"][0].tolist() == list(image.shape[:2])
    height, width = golden[f"sam_size.{number}"].tolist()
    assert (output["sam_pixel_values"][0, :, height:] == 0).all()
    assert (output["sam_pixel_values"][0, :, :, width:] == 0).all()


def test_one_grey_frame_has_the_pixels_computed_by_hand(processor):
    output = processor(np.full((64, 32, 3), 51, np.uint8), [], "a dog")
    expected = (51 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(output["sam_pixel_values"][0, :, 5, 5], expected, rtol=0, atol=1e-5)
    assert (output["sam_pixel_values"][0, :, :, 64:] == 0).all()
    expected = (0.2 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(output["pixel_values"][0, :, 60, 3], expected, rtol=0, atol=1e-5)


def test_sizes_for_sam_are_rounded_half_up(processor):
    # 128 / 100 * 55 = 70.4 -> 70; 128 / 3 * 2 = 85.33 -> 85; 128 / 256 * 5 = 2.5 -> 3.
    sizes = [(100, 55), (2, 3), (256, 5), (1, 1), (1, 200)]
    output = processor([frame(*size) for size in sizes], [[]] * 5, ["a"] * 5)
    assert output["reshaped_input_sizes"].tolist() == [[128, 70], [85, 128], [128, 3], [128, 128], [1, 128]]
    assert output["original_sizes"].tolist() == [list(size) for size in sizes]


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 50), (4, 50), (50, 1), (50, 3), (3, 3)])
def test_a_few_pixels_are_not_mistaken_for_channels(processor, size):
    as_array = frame(*size)
    as_image = Image.fromarray(as_array)
    output = processor(as_array, [as_array], "a dog")
    assert output["original_sizes"].tolist() == [list(size)]
    side = 64
    tall = as_image.resize(
        (int(side * max(size[1] / size[0], 1)), int(side * max(size[0] / size[1], 1))), Image.Resampling.BICUBIC
    )
    left, top = (tall.width - side) // 2, (tall.height - side) // 2
    middle = np.asarray(tall.crop((left, top, left + side, top + side))) / 255
    expected = (middle - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(output["pixel_values"][0].permute(1, 2, 0), expected, atol=1e-5)
    assert same(output, processor(as_image, [as_image], "a dog"))


def test_squashing_shows_the_tower_the_whole_frame(processor):
    squashing = VisaProcessor.from_config(VisaConfig.tiny(), new_tokenizer(), clip_resize="squash")
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, 100:] = 255
    assert processor(wide, [], "a")["pixel_values"].amax() < 0  # the crop does not see the right end
    seen = squashing(wide, [], "a")["pixel_values"]
    assert seen.shape == (1, 3, 64, 64) and seen.amax() > 1.9
    assert squashing(query="a")["pixel_values"].shape == (0, 3, 64, 64)
    with pytest.raises(ValueError, match="`clip_resize` is \"?'?pad"):
        VisaProcessor.from_config(VisaConfig.tiny(), new_tokenizer(), clip_resize="pad")


def test_frames_as_array_list_or_images_are_the_same(processor):
    clip = frames(3)
    from_list = processor(frame(), clip, "a")
    assert same(from_list, processor(frame(), np.stack(clip), "a"))
    assert same(from_list, processor(frame(), tuple(Image.fromarray(one) for one in clip), "a"))
    grey = Image.fromarray(frame()[..., 0])
    assert same(processor(grey, [], "a"), processor(np.repeat(frame()[..., :1], 3, axis=2), [], "a"))


def test_frames_are_not_changed(processor):
    target = frame()
    target.flags.writeable = False
    processor(target, [target], "a")


# --- the way back ---


def test_low_resolution_logits_become_masks_of_the_frame(processor):
    output = processor([frame(30, 50), frame(80, 40)], [[], []], ["a", "b"])
    # Left half of SAM's square: the frame fills its whole width, then half of it.
    low_res = torch.full((2, 32, 32), -1.0)
    low_res[:, :, :16] = 1.0
    wide, tall = processor.post_process_masks(
        [low_res, low_res[:1]], output["original_sizes"], output["reshaped_input_sizes"]
    )
    assert wide.dtype == tall.dtype == torch.bool
    assert wide.shape == (2, 30, 50) and wide[:, :, :24].all() and not wide[:, :, 26:].any()
    assert tall.shape == (1, 80, 40) and tall[..., :39].all()


def test_logits_at_frame_size_are_only_compared(processor):
    logits = torch.tensor([[[-1.0, 0.0, 0.1, 2.0]]])
    for threshold, expected in ((0.5, [False, False, True, True]), (0.2, [True, True, True, True])):
        masks = processor.post_process_masks([logits], [(1, 4)], threshold=threshold)
        # sigmoid(-1) = 0.269
        assert [mask.tolist() for mask in masks] == [[[expected]]]
    assert torch.equal(processor.post_process_masks(logits, [(1, 4)])[0], masks[0] & (logits > 0))


def test_masks_go_back_to_the_video_of_their_conversation(processor):
    logits = [torch.zeros(0, 4, 4), torch.ones(1, 2, 2), torch.zeros(0, 1, 1)]
    masks = processor.post_process_masks(logits, torch.tensor([[2, 2], [4, 4]]), conversation_to_video=[1, 0, -1])
    assert [tuple(mask.shape) for mask in masks] == [(0, 4, 4), (1, 2, 2), (0, 0, 0)]


def test_masks_that_do_not_fit_are_refused(processor):
    with pytest.raises(
        ValueError, match=r"shape \(1, 4, 4\) but the frame has 5 x 4 pixels. Give `reshaped_input_siz"
    ):
        processor.post_process_masks([torch.zeros(1, 4, 4)], [(5, 4)])
    for threshold in (0, 1, 1.5, -0.1):
        with pytest.raises(ValueError, match="must be a probability between 0 and 1"):
            processor.post_process_masks([torch.zeros(1, 4, 4)], [(4, 4)], threshold=threshold)


@pytest.mark.parametrize("answer", [*TEMPLATES["answers"], "[SEG]", "Both [SEG] and [SEG], by the way: [SEG] wins!"])
def test_answers_are_read_as_they_were_written(processor, answer):
    ids = processor.tokenizer(f"{answer}</s>", add_special_tokens=False)["input_ids"]
    assert processor.decode(ids) == answer
    assert processor.batch_decode([torch.tensor([*ids, 0, 0]), torch.tensor(ids)]) == [answer, answer]
    assert processor.batch_decode(torch.tensor([ids])) == [answer]


def test_frames_and_padding_are_not_read(processor):
    output = processor(frame(), frames(1), ["a dog", "a much longer dog"])
    texts = processor.batch_decode(output["input_ids"])
    assert texts[0].startswith("A chat between") and texts[0].endswith("ASSISTANT:")
    assert "<image>" not in texts[0] and "<unk>" not in texts[0]


# --- saving ---


def test_everything_is_the_same_after_saving_and_loading(processor, tmp_path):
    squashing = VisaProcessor.from_config(VisaConfig.tiny(), new_tokenizer(), clip_resize="squash")
    for number, original in enumerate((processor, squashing)):
        folder = tmp_path / str(number)
        original.save_pretrained(folder)
        VisaConfig.tiny().save_pretrained(folder)
        for loaded in (VisaProcessor.from_pretrained(folder), AutoProcessor.from_pretrained(folder)):
            assert type(loaded) is VisaProcessor
            saved, expected = loaded.to_dict(), original.to_dict()
            assert {**saved, "auto_map": 0} == {**expected, "auto_map": 0}
            assert loaded.chat_template == original.chat_template
            assert loaded.tokenizer.model_max_length == 4096
            assert (loaded.seg_token_id, loaded.image_token_id) == (SEG, IMAGE)
            arguments = (
                frame(97, 41),
                frames(2, 97, 41),
                CASES[4]["expression"],
                "Sure, [SEG].",
                np.ones((1, 97, 41)),
            )
            assert same(loaded(*arguments), original(*arguments))
            for case in CASES:
                row = torch.tensor(loaded.tokenizer(case["prompt"])["input_ids"])
                assert row.masked_fill(row == IMAGE, PUBLISHED["image_token_id"]).tolist() == case["input_ids"]


def test_settings_are_saved(processor, tmp_path):
    changed = VisaProcessor(
        processor.image_processor, new_tokenizer(), processor.sam_image_processor, 7, chat_template="{{ 'x' }}"
    )
    changed.save_pretrained(tmp_path)
    loaded = VisaProcessor.from_pretrained(tmp_path)
    assert loaded.num_visual_tokens == 7
    assert loaded.apply_chat_template([{"role": "user", "content": "y"}]) == "x"


def test_it_loads_silently_from_its_folder_where_the_package_is_missing(processor, tmp_path):
    folder = tmp_path / "model"
    processor.save_pretrained(folder)
    script = f"""
import sys
import numpy as np
from transformers import AutoProcessor
processor = AutoProcessor.from_pretrained({str(folder)!r}, trust_remote_code=True)
output = processor(np.zeros((30, 50, 3), np.uint8), [], "a dog")
assert "visa_hf" not in sys.modules
print(output["input_ids"].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")
    ours = processor(np.zeros((30, 50, 3), np.uint8), [], "a dog")["input_ids"].tolist()
    assert json.loads(done.stdout) == ours


def test_pixels_do_not_depend_on_torchvision(processor):
    class OnTorchvision(CLIPImageProcessorPil):
        """Stands for the processor that transformers loads where torchvision is installed."""

        @property
        def backend(self):
            return "torchvision"

    given = OnTorchvision(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    remade = VisaProcessor(given, processor.tokenizer, processor.sam_image_processor, 28)
    assert type(remade.image_processor) is CLIPImageProcessorPil
    assert same(remade(frame(), [], "a"), processor(frame(), [], "a"))


# --- refusals ---


@pytest.mark.parametrize("query", ["", "  ", "\n\t"])
def test_an_empty_query_is_refused(processor, query):
    with pytest.raises(ValueError, match=r"`query` is empty \(.*\)\. Say in words what is meant\."):
        processor(frame(), [], query)


@pytest.mark.parametrize("query", [None, []])
def test_a_missing_query_is_refused(processor, query):
    with pytest.raises(ValueError, match="`query` is missing"):
        processor(frame(), [], query)


def test_a_query_that_is_no_text_is_refused(processor):
    for query in (3, [3], [None]):
        with pytest.raises(TypeError, match=r"`query` is a (int|NoneType) but must be a string"):
            processor(frame(), [], query)


@pytest.mark.parametrize("token", ["[SEG]", "<image>", "</s>", "<s>", "<unk>"])
def test_a_query_that_holds_a_special_token_is_refused(processor, token):
    with pytest.raises(ValueError, match=rf"holds `{re.escape(token)}`, which the model reads as a special token"):
        processor(frame(), [], f"the dog{token}")
    if token != "[SEG]":
        with pytest.raises(ValueError, match=rf"`answer` .* holds `{re.escape(token)}`"):
            processor(frame(), [], "the dog", f"It is [SEG]{token}.")


def test_a_special_token_that_lower_casing_makes_is_refused(processor):
    with pytest.raises(ValueError, match="holds `</s>`"):
        processor(frame(), [], "the dog </S>")
    assert "the dog </S>" in processor.build_prompt("the dog </S>")


def test_half_a_character_is_refused(processor):
    with pytest.raises(ValueError, match="is not valid Unicode: it holds half a character"):
        processor(frame(), [], "the dog \ud83e")


def test_a_conversation_beyond_the_context_is_refused(processor):
    with pytest.raises(ValueError, match=r"has \d+ tokens \(2 frames of 28 visual tokens, \d+ of text\) but 4096 fit"):
        processor(frame(), None, "dog " * 5000)
    ids = processor(frame(), frames(3), "a dog")["input_ids"]
    fits = ids.shape[1]
    assert processor(frame(), frames(3), "a dog", max_length=fits)["input_ids"].shape[1] == fits
    with pytest.raises(ValueError, match="Conversation 0 .* Shorten the text, or use at most 3 frames with it."):
        processor(frame(), frames(3), "a dog", max_length=fits - 1)
    with pytest.raises(ValueError, match="Conversation 1 .* Shorten the text by at least 1 tokens."):
        length = processor(query="a much longer dog")["input_ids"].shape[1]
        processor(query=["a dog", "a much longer dog"], max_length=length - 1)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), ValueError, "has dtype float32 but must be uint8, 0 to 255. Convert it"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "has dtype int64 but must be uint8"),
        (np.zeros((4, 4), np.uint8), ValueError, r"has shape \(4, 4\) but must be \(H, W, 3\), RGB"),
        (np.zeros((3, 4, 4), np.uint8), ValueError, r"has shape \(3, 4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), ValueError, r"has shape \(4, 4, 4\)"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"has shape \(0, 4, 3\) .* of at least one pixel"),
        (Image.new("RGBA", (4, 4)), ValueError, r'is a PIL image of mode "RGBA" but "RGB" or "L" is needed'),
        (Image.new("I;16", (4, 4)), ValueError, r'is a PIL image of mode "I;16" but'),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), TypeError, "is a Tensor but must be a PIL image or an array"),
        ("clip.mp4", TypeError, "is a str but must be a PIL image or an array"),
    ],
)
def test_what_is_no_frame_is_refused(processor, bad, error, message):
    with pytest.raises(error, match=f"The target frame {message}"):
        processor(bad, [], "a dog")
    with pytest.raises(error, match=f"Reference frame 1 of video 1 {message}"):
        processor([frame(4, 4)] * 2, [[], [frame(4, 4), bad]], ["a dog", "a bird"])


def test_frames_that_do_not_go_together_are_refused(processor):
    with pytest.raises(
        ValueError, match=r"Reference frame 1 has shape \(9, 9, 3\) but the target frame \(30, 50, 3\)"
    ):
        processor(frame(), [frame(), frame(9, 9)], "a dog")
    with pytest.raises(ValueError, match="`target_frame` is a list of 2 but `reference_frames` of 3"):
        processor([frame(), frame()], [[], [], []], ["a", "b"])
    with pytest.raises(ValueError, match="`reference_frames` is given without `target_frame`"):
        processor(reference_frames=frames(2), query="a")
    for single in (frame(), Image.fromarray(frame())):
        with pytest.raises(TypeError, match="`reference_frames` is a .* but must be a list of frames or an array"):
            processor(frame(), single, "a")


def test_a_frame_of_which_nothing_is_left_is_refused(processor):
    assert processor(frame(1, 256), [], "a")["reshaped_input_sizes"].tolist() == [[1, 128]]
    with pytest.raises(
        ValueError, match="has 1 x 257 pixels; resized to 128 on its longest side it is less than half"
    ):
        processor(frame(1, 257), [], "a")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, 30, 50)), r"Conversation 0 has 2 `masks` but 1 `\[SEG\]` in its answer. Give one mask per"),
        (np.ones((30, 50)), r"Conversation 0 has 30 `masks` but 1 `\[SEG\]`"),
        ([], r"Conversation 0 has 0 `masks` but 1 `\[SEG\]`"),
        (np.ones((1, 50, 30)), r"has shape \(50, 30\) but the target frame \(30, 50\)"),
        (np.full((1, 30, 50), 255, np.uint8), "holds values from 255 to 255 but only 0 and 1"),
        (np.full((1, 30, 50), 0.5), "holds values from 0.5 to 0.5 but only 0 and 1"),
        (np.full((1, 30, 50), np.nan), "only 0 and 1 are allowed"),
    ],
    ids=range(7),
)
def test_masks_that_do_not_belong_are_refused(processor, masks, message):
    with pytest.raises(ValueError, match=message):
        processor(frame(), [], "a dog", "It is [SEG].", masks)


def test_masks_are_taken_in_every_usual_form(processor):
    mask = np.random.default_rng(0).random((1, 30, 50)) > 0.5
    expected = torch.from_numpy(mask.astype(np.float32))
    for masks in (mask, mask.astype(np.uint8), mask.astype(np.float64), torch.from_numpy(mask), [mask[0]], list(mask)):
        output = processor(frame(), [], "a dog", "It is [SEG].", masks)
        assert len(output["mask_labels"]) == 1 and torch.equal(output["mask_labels"][0], expected)
    assert "mask_labels" not in processor(frame(), [], "a dog", "It is [SEG].")


def test_lists_of_unequal_length_are_refused(processor):
    with pytest.raises(ValueError, match="`masks` are given without `answer`"):
        processor(frame(), [], "a dog", masks=np.ones((1, 30, 50)))
    with pytest.raises(ValueError, match="`masks` has 1 entries for 2 conversations"):
        processor(frame(), [], ["a", "b"], "It is [SEG].", [np.ones((1, 30, 50))])
    with pytest.raises(ValueError, match="`answer` has 1 values for 2 conversations"):
        processor(frame(), [], ["a", "b"], ["It is [SEG]."])
    with pytest.raises(ValueError, match="`template` has 3 values for 2 conversations"):
        processor(frame(), [], ["a", "b"], template=[0, 1, 0])
    with pytest.raises(ValueError, match="Conversation 1 has no `answer` but others have"):
        processor(frame(), [], ["a", "b"], ["It is [SEG].", None])
    with pytest.raises(ValueError, match="`answer` and `answer_template` are both given"):
        processor(frame(), [], "a", "It is [SEG].", answer_template=0)
    with pytest.raises(ValueError, match="`answer` is empty"):
        processor(frame(), [], "a", " ")


def test_options_that_do_not_exist_are_refused(processor):
    with pytest.raises(
        ValueError, match="`style` is 'tall' but must be one of 'short', 'long', 'explanatory', 'text'"
    ):
        processor(frame(), [], "a", style="tall")
    with pytest.raises(ValueError, match='has `style` "text" but is about a video'):
        processor(frame(), [], "a", style="text")
    with pytest.raises(ValueError, match='has `style` "long" but is about no video'):
        processor(query="a", style="long")
    with pytest.raises(ValueError, match='`padding_side` is \'top\' but must be "left" or "right"'):
        processor(frame(), [], "a", padding_side="top")
    with pytest.raises(ValueError, match="`return_tensors` is 'np' but only \"pt\" exists"):
        processor(frame(), [], "a", return_tensors="np")
    with pytest.raises(ValueError, match="`num_reference_frames` is -1 but must be at least 0"):
        processor.build_prompt("a", num_reference_frames=-1)


def test_a_tokenizer_that_does_not_know_seg_is_refused(processor, tmp_path):
    plain = json.loads((BUNDLED_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    for token, argument in (("[SEG]", "seg_token"), ("<image>", "image_token")):
        changed = {**plain, "added_tokens": [one for one in plain["added_tokens"] if one["content"] != token]}
        folder = tmp_path / argument
        processor.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(ValueError, match=rf"`{argument}` '{re.escape(token)}' is not one known token"):
            AutoProcessor.from_pretrained(folder)


def test_a_tokenizer_without_padding_is_refused(processor):
    tokenizer = new_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="The tokenizer has no `pad_token`. Set one"):
        VisaProcessor(processor.image_processor, tokenizer, processor.sam_image_processor)


def test_a_tokenizer_that_ends_every_text_is_refused(processor):
    tokenizer = new_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ending = VisaProcessor(processor.image_processor, tokenizer, processor.sam_image_processor)
    for answer in (None, "It is [SEG]."):
        with pytest.raises(ValueError, match="The tokenizer ends the prompt of conversation 0 with its own end token"):
            ending(frame(), [], "a dog", answer)


def test_a_tokenizer_of_another_model_is_refused():
    config = VisaConfig.tiny(image_token_id=1300)
    with pytest.raises(ValueError, match="`image_token_id` is 1201 in the tokenizer but 1300 in the configuration"):
        VisaProcessor.from_config(config, new_tokenizer())


def test_impossible_sizes_are_refused(processor):
    sam = SamImageProcessorPil(size={"longest_edge": 128}, pad_size={"height": 128, "width": 64})
    with pytest.raises(
        ValueError, match="resizes the longest side to 128 and pads to 128 x 64. All three must be equ"
    ):
        VisaProcessor(processor.image_processor, processor.tokenizer, sam)
    with pytest.raises(ValueError, match="`num_visual_tokens` is 0 but must be at least 1"):
        VisaProcessor(processor.image_processor, processor.tokenizer, processor.sam_image_processor, 0)


# --- videos ---


def test_a_video_is_opened_for_questions(processor):
    session = processor.init_video_session(np.stack(frames(4)), every=2)
    assert session.processor is processor and session.every == 2
    assert (session.height, session.width) == (30, 50)
    session.close()
