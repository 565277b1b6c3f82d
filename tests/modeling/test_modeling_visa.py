"""The model itself: against the published system's numbers, by hand, and at its borders."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.modeling.batches import conversation, make_batch, pad, prompts, without
from visa_hf import VisaConfig, VisaForVideoSegmentation
from visa_hf.convert import convert_visa_state_dict
from visa_hf.modeling import modeling_visa
from visa_hf.modeling.inputs_visa import sam_feature_shape

REFERENCE = Path(__file__).parents[1] / "reference" / "visa_tiny"
IMAGE, SEG = 128, 127
LOSSES = {"loss": "loss", "text_loss": "ce_loss", "bce_loss": "mask_bce_loss", "dice_loss": "mask_dice_loss"}


# --- The published system's numbers (tests/reference/README.md) ---


def published_config() -> VisaConfig:
    published = json.loads((REFERENCE / "config.json").read_text())
    text, clip, sam = published["chatunivi_config"], published["clip_vision_config"], published["sam"]
    text_names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text_names += ("num_key_value_heads", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    rates = text["config"]
    return VisaConfig(
        vision_config=clip,
        text_config={name: text[name] for name in (*text_names, "rms_norm_eps")},
        sam_config={
            "vision_config": {
                "hidden_size": sam["embed_dim"],
                "output_channels": sam["out_dim"],
                "num_hidden_layers": sam["depth"],
                "num_attention_heads": sam["num_heads"],
                "image_size": sam["image_size"],
                "window_size": sam["window_size"],
                "global_attn_indexes": sam["global_attn_indexes"],
                "num_pos_feats": sam["out_dim"] // 2,
                "mlp_dim": 4 * sam["embed_dim"],
            },
            "prompt_encoder_config": {
                "hidden_size": sam["out_dim"],
                "image_size": sam["image_size"],
                "mask_input_channels": 16,
            },
            "mask_decoder_config": {
                "hidden_size": sam["out_dim"],
                "mlp_dim": sam["mlp_dim"],
                "num_attention_heads": sam["dec_heads"],
                "num_hidden_layers": 2,
                "iou_head_hidden_dim": sam["out_dim"],
            },
        },
        vision_feature_layer=text["mm_vision_select_layer"],
        merge_cluster_counts=tuple(rates[f"spatial_cluster_rate{i}"] for i in range(3)),
        seg_token_id=SEG,
        image_token_id=IMAGE,
    )


@pytest.fixture(scope="module")
def published_model() -> VisaForVideoSegmentation:
    weights = convert_visa_state_dict(load_file(REFERENCE / "original_state_dict.safetensors"))
    model, info = VisaForVideoSegmentation.from_pretrained(
        None, config=published_config(), state_dict=weights, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.fixture(scope="module")
def published_batch() -> dict[str, Any]:
    inputs = load_file(REFERENCE / "inputs.safetensors")

    def expand(row: Tensor, kept: Tensor, ids: Tensor, stand_in: int) -> list[int]:
        """Replace each <image> (-200) of a conversation by 112 stand-ins."""
        expanded: list[int] = []
        for value, token in zip(row[kept].tolist(), ids[kept].tolist(), strict=True):
            expanded += [stand_in] * 112 if token == -200 else [value]
        return expanded

    ids, kept = inputs["input_ids"], inputs["attention_mask"].bool()
    rows = [expand(*row, IMAGE) for row in zip(ids, kept, ids, strict=True)]
    labels = [expand(*row, -100) for row in zip(inputs["labels"], kept, ids, strict=True)]
    offset = inputs["offset"].tolist()
    frames = [inputs["images_clip.0"], inputs["images_clip.1"]]
    return {
        "input_ids": pad(rows, 0, "right"),
        "attention_mask": pad([[1] * len(row) for row in rows], 0, "right"),
        "labels": pad(labels, -100, "right"),
        "pixel_values": torch.cat(frames).float(),
        "num_frames": torch.tensor([len(video) for video in frames]),
        "conversation_to_video": torch.tensor(
            [video for video in range(2) for _ in range(offset[video], offset[video + 1])]
        ),
        "sam_pixel_values": torch.cat([inputs["images.0"], inputs["images.1"]]).float(),
        "original_sizes": inputs["original"],
        "reshaped_input_sizes": inputs["resize"],
        "mask_labels": [*inputs["masks.0"], *inputs["masks.1"]],
    }


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(REFERENCE / "expected.safetensors")


@pytest.fixture(scope="module")
def published_output(published_model, published_batch) -> Any:
    published_model.zero_grad()
    output = published_model(**published_batch)
    output.loss.backward()
    return output


def test_text_is_that_of_the_published_system(published_output, published_batch, expected) -> None:
    kept = published_batch["attention_mask"].bool()
    torch.testing.assert_close(published_output.logits[kept], expected["train.logits"][kept], atol=1e-4, rtol=0)


def test_visual_tokens_are_those_of_the_published_system(published_model, published_batch, expected) -> None:
    names = ("pixel_values", "num_frames", "conversation_to_video")
    tokens = published_model.get_image_features(*(published_batch[name] for name in names)).pooler_output
    torch.testing.assert_close(tokens, expected["train.visual_tokens"], atol=1e-4, rtol=0)
    patches = published_model.get_image_features(published_batch["pixel_values"]).last_hidden_state
    in_order = [0, 1, 2, 0, 1, 2, 3, 4]
    torch.testing.assert_close(patches[in_order], expected["train.clip_patch_features"], atol=1e-4, rtol=0)


def test_prompts_and_frames_of_sam_are_those_of_the_published_system(
    published_model, published_batch, published_output, expected
) -> None:
    torch.testing.assert_close(published_output.seg_embeddings, expected["train.seg_embeddings"], atol=1e-4, rtol=0)
    features = published_model.get_sam_features(published_batch["sam_pixel_values"])
    torch.testing.assert_close(features, expected["train.sam_image_embeddings"], atol=1e-4, rtol=0)


def test_masks_are_those_of_the_published_system(published_model, published_batch, published_output, expected) -> None:
    first, second, third = (masks[:, None] for masks in published_output.low_res_mask_logits)
    assert_relative(torch.cat([first, second]), expected["train.low_res_masks.0"])
    assert_relative(third, expected["train.low_res_masks.1"])
    scores = torch.cat(published_output.iou_scores)[:, None]
    torch.testing.assert_close(
        scores, torch.cat([expected["train.iou.0"], expected["train.iou.1"]]), atol=1e-3, rtol=0
    )
    with torch.no_grad():
        output = published_model(**without(published_batch, "labels", "mask_labels"))
    assert_relative(torch.cat(output.mask_logits[:2]), expected["infer.pred_masks.0"])
    assert output.loss is None


def test_losses_are_those_of_the_published_system(published_model, published_output, expected) -> None:
    config = published_model.config
    weights = {"bce_loss": config.bce_loss_weight, "dice_loss": config.dice_loss_weight}
    for ours, theirs in LOSSES.items():
        weighted = published_output[ours] * weights.get(ours, 1.0)  # theirs are weighted
        torch.testing.assert_close(weighted.reshape(1), expected[f"train.{theirs}"], atol=1e-4, rtol=0)


def test_gradients_are_those_of_the_published_system(published_model, published_output, expected) -> None:
    old = load_file(REFERENCE / "original_state_dict.safetensors")
    wanted = {name.removeprefix("train.grad."): grad for name, grad in expected.items() if ".grad." in name}
    assert len(wanted) == 7
    # Names are learnt from the converter: it hands on the very tensors that it is given.
    ours = {tensor.data_ptr(): name for name, tensor in convert_visa_state_dict(old).items()}
    parameters = dict(published_model.named_parameters())
    for name, gradient in wanted.items():
        assert_relative(parameters[ours[old[name].data_ptr()]].grad, gradient)


def assert_relative(ours: Tensor, theirs: Tensor, bar: float = 5e-4) -> None:
    """Differences of at most `bar` of the largest value that is expected."""
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, atol=bar * theirs.abs().max().item(), rtol=0)


# --- What belongs to what ---


def assert_same_answer(one: Any, one_idx: int, other: Any, other_idx: int, atol: float = 1e-5) -> None:
    """Masks of a conversation are equal, however it was batched."""
    for name in ("low_res_mask_logits", "mask_logits", "iou_scores"):
        torch.testing.assert_close(one[name][one_idx], other[name][other_idx], atol=atol, rtol=1e-4)


@torch.no_grad()
def test_a_conversation_is_the_same_alone_and_in_a_batch(tiny_config, tiny_model) -> None:
    batch = make_batch(
        tiny_config, [(0, 1), (1, 2), (-1, 0), (0, 0), (2, 1)], [2, 3, 1], [(40, 64), (50, 30), (64, 64)]
    )
    together = tiny_model(**batch)
    for index in range(5):
        single = conversation(batch, index)
        alone = tiny_model(**single)
        length = single["input_ids"].shape[1]
        torch.testing.assert_close(together.logits[index, :length], alone.logits[0], atol=1e-5, rtol=1e-4)
        assert_same_answer(together, index, alone, 0)


@torch.no_grad()
def test_padding_may_be_on_either_side(tiny_config, tiny_model) -> None:
    right, left = (make_batch(tiny_config, padding=side) for side in ("right", "left"))
    on_right, on_left = tiny_model(**right), tiny_model(**left)
    torch.testing.assert_close(
        on_left.logits[left["attention_mask"].bool()],
        on_right.logits[right["attention_mask"].bool()],
        atol=1e-5,
        rtol=1e-4,
    )
    for index in range(4):
        assert_same_answer(on_left, index, on_right, index)
    for name in LOSSES:
        torch.testing.assert_close(on_left[name], on_right[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_state_before_seg_makes_the_prompt(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config, [(0, 2)], [1], [(32, 32)])
    output = tiny_model(**batch, output_hidden_states=True)
    (at,) = (batch["labels"][0] == tiny_config.seg_token_id).nonzero(as_tuple=True)
    states = output.hidden_states[-1][0, at - 1]
    torch.testing.assert_close(output.seg_embeddings, tiny_model.model.text_hidden_fcs(states))


@torch.no_grad()
def test_segs_are_counted_in_the_labels_if_there_are_any(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config, [(0, 1)], [1], [(32, 32)])
    batch["input_ids"][0, 2] = tiny_config.seg_token_id  # in the prompt, not learnt
    assert [len(masks) for masks in tiny_model(**batch).mask_logits] == [1]
    assert [len(masks) for masks in tiny_model(**without(batch, "labels", "mask_labels")).mask_logits] == [2]


@torch.no_grad()
def test_masks_have_the_size_of_their_frame_and_their_number_of_segs(tiny_config, tiny_model) -> None:
    output = tiny_model(**make_batch(tiny_config, [(0, 2), (1, 0), (-1, 0)], [1, 2], [(37, 90), (120, 41)]))
    assert [tuple(masks.shape) for masks in output.mask_logits] == [(2, 37, 90), (0, 120, 41), (0, 0, 0)]
    assert [tuple(masks.shape) for masks in output.low_res_mask_logits] == [(2, 32, 32), (0, 32, 32), (0, 32, 32)]
    assert [tuple(scores.shape) for scores in output.iou_scores] == [(2,), (0,), (0,)]
    assert output.seg_embeddings.shape == (2, 32)


def count_calls(module: torch.nn.Module) -> list[int]:
    """List that gains the batch size of each call of `module`."""
    calls: list[int] = []
    module.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    return calls


@torch.no_grad()
def test_frames_are_encoded_once_for_all_conversations(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    tower, sam = count_calls(model.model.vision_tower), count_calls(model.model.sam.vision_encoder)
    model(**make_batch(tiny_config, [(0, 1), (0, 2), (1, 0), (0, 1)], [2, 1]))
    assert tower == [3]
    assert sam == [1]  # nothing is to be segmented in the second video


def test_the_encoder_of_sam_learns_unless_it_is_frozen(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    frames = torch.randn(2, 3, 128, 128)
    assert model.get_sam_features(frames).requires_grad
    model.model.sam.vision_encoder.requires_grad_(False)
    assert not model.get_sam_features(frames).requires_grad


@torch.no_grad()
def test_a_prompt_is_decoded_the_same_with_any_number_of_others(tiny_model) -> None:
    """None, one, and more than are decoded together; about one frame and about others beside it."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, *sam_feature_shape(tiny_model.config), generator=generator)
    prompts = torch.randn(67, tiny_model.config.sam_config.mask_decoder_config.hidden_size, generator=generator)
    frame_of = [0] * 64 + [1, 0, 1]
    with torch.no_grad():
        masks, scores = tiny_model._decode_prompts(features, frame_of, prompts)
        for row in (0, 63, 64, 65, 66):
            mask, score = tiny_model.decode_masks(features[frame_of[row]], prompts[row : row + 1])
            torch.testing.assert_close(masks[row], mask[0], rtol=0, atol=1e-4)
            torch.testing.assert_close(scores[row], score[0], rtol=0, atol=1e-5)
        together, _ = tiny_model.decode_masks(features[0], prompts[:65])
        torch.testing.assert_close(together[:64], masks[:64], rtol=0, atol=1e-4)
        none, no_scores = tiny_model.decode_masks(features[0], prompts[:0])
    assert none.shape == (0, *masks.shape[1:]) and no_scores.shape == (0,)


def test_large_frames_go_through_sam_one_by_one(tiny_config, tiny_model, monkeypatch) -> None:
    frames = make_batch(tiny_config, conversations=[(0, 1), (1, 1), (2, 1)], frames=(1, 1, 1), sizes=[(8, 8)] * 3)
    frames = frames["sam_pixel_values"]
    seen = []
    hook = tiny_model.model.sam.vision_encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    vision = tiny_config.sam_config.vision_config
    together = tiny_model.get_sam_features(frames)
    monkeypatch.setattr(modeling_visa, "_SAM_PATCHES_AT_ONCE", (vision.image_size // vision.patch_size) ** 2)
    alone = tiny_model.get_sam_features(frames)
    hook.remove()
    assert seen == [3, 1, 1, 1]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_features_of_sam_can_be_given(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config)
    features = tiny_model.get_sam_features(batch["sam_pixel_values"])
    given = tiny_model(**without(batch, "sam_pixel_values"), sam_features=features)
    computed = tiny_model(**batch)
    for index in range(4):
        assert_same_answer(given, index, computed, index, atol=0)


@torch.no_grad()
def test_text_alone_needs_no_video(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config, [(-1, 0), (-1, 0)], [], [])
    output = tiny_model(**batch)
    assert output.loss == output.text_loss > 0
    assert [tuple(masks.shape) for masks in output.mask_logits] == [(0, 0, 0)] * 2
    text = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    torch.testing.assert_close(tiny_model(**text).loss, output.loss)


@torch.no_grad()
def test_a_video_without_target_makes_no_mask(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config, [(0, 0), (1, 1)], [2, 1], [(0, 0), (30, 40)])
    output = tiny_model(**batch)
    assert [tuple(masks.shape) for masks in output.mask_logits] == [(0, 0, 0), (1, 30, 40)]
    batch["sam_pixel_values"][0] = torch.nan  # not looked at
    torch.testing.assert_close(tiny_model(**batch).loss, output.loss)


@torch.no_grad()
@pytest.mark.parametrize("image_token_id", [5, 1201, 40_000])
def test_the_image_token_needs_no_embedding(tiny_model, image_token_id: int) -> None:
    model = copy.deepcopy(tiny_model)
    usual = model(**make_batch(model.config, [(0, 1)], [1]) | {"labels": None})
    model.config.image_token_id = image_token_id
    other = model(**make_batch(model.config, [(0, 1)], [1]) | {"labels": None})
    torch.testing.assert_close(other.logits, usual.logits)


@torch.no_grad()
def test_every_patch_is_a_token_without_merging() -> None:
    config = VisaConfig.tiny(use_token_merging=False, tracker_config=None)
    model = VisaForVideoSegmentation(config).eval()
    assert config.num_visual_tokens == 64
    frames = torch.randn(2, 3, 64, 64)
    features = model.get_image_features(frames)
    torch.testing.assert_close(features.pooler_output, model.model.mm_projector(features.last_hidden_state))
    model(**make_batch(config, [(0, 1)], [2]))


# --- Losses ---


def test_the_loss_is_the_weighted_sum(tiny_config, tiny_model) -> None:
    with torch.no_grad():
        output = tiny_model(**make_batch(tiny_config))
    assert torch.allclose(output.loss, output.text_loss + 2.0 * output.bce_loss + 0.5 * output.dice_loss)


@torch.no_grad()
def test_text_and_masks_may_be_learnt_apart(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config)
    both = tiny_model(**batch)
    text = tiny_model(**without(batch, "mask_labels"))
    assert text.bce_loss is None and torch.equal(text.loss, both.text_loss)
    masks = tiny_model(**without(batch, "labels"))
    assert masks.text_loss is None
    torch.testing.assert_close(masks.loss, both.loss - both.text_loss)


def micro_batches(config: VisaConfig) -> tuple[dict[str, Any], list[dict[str, Any]], int, int]:
    """A batch of unequal conversations, the same in two parts, and its numbers of learnt tokens and of masks."""
    batch = make_batch(config, [(0, 3), (1, 1), (1, 0)])
    parts = [conversation(batch, 0), make_part(batch, [1, 2])]
    return batch, parts, int((batch["labels"] != -100).sum()), 4


def make_part(batch: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    return {
        **batch,
        **{name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels", "conversation_to_video")},
        "mask_labels": [batch["mask_labels"][row] for row in rows],
    }


def gradients(model: VisaForVideoSegmentation, losses: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    parameters = (model.lm_head.weight, model.model.text_hidden_fcs[0].weight, model.model.mm_projector.weight)
    return [parameter.grad.clone() for parameter in parameters]


def test_micro_batches_of_a_step_add_up_to_one_batch(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    assert model.config.loss_reduction == "step"
    batch, parts, num_items, num_masks = micro_batches(tiny_config)
    whole = model(**batch)
    numbers = {"num_items_in_batch": torch.tensor(num_items), "num_masks_in_batch": num_masks}
    outputs = [model(**part, **numbers) for part in parts]
    for name in LOSSES:
        torch.testing.assert_close(sum(output[name] for output in outputs), whole[name], atol=1e-5, rtol=1e-4)
    ours, theirs = gradients(model, [output.loss for output in outputs]), gradients(model, [whole.loss])
    for one, other in zip(ours, theirs, strict=True):
        assert_relative(one, other, 1e-4)


@torch.no_grad()
def test_micro_batches_as_published_stand_alone(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    model.config.loss_reduction = "microbatch"
    _, parts, num_items, num_masks = micro_batches(tiny_config)
    for part in parts:
        alone = model(**part)
        assert torch.equal(model(**part, num_items_in_batch=num_items, num_masks_in_batch=num_masks).loss, alone.loss)


def test_a_batch_without_masks_reaches_the_mask_path_with_zeros(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    batch = make_batch(tiny_config, [(-1, 0)], [], [])
    with torch.no_grad():
        at_rest = model(**batch).loss
    model.train()
    model.model.sam.vision_encoder.requires_grad_(False)
    output = model(**batch)
    assert torch.equal(output.loss, at_rest)
    output.loss.backward()
    reached = {*model.model.text_hidden_fcs.parameters(), *model.model.sam.mask_decoder.parameters()}
    # As with masks: nothing is learnt from the IoU estimates.
    reached -= set(model.model.sam.mask_decoder.iou_prediction_head.parameters())
    assert all(torch.count_nonzero(parameter.grad) == 0 for parameter in reached)


# --- Answers ---


class Say(LogitsProcessor):
    """Makes each row say given tokens."""

    def __init__(self, answers: list[list[int]], prompt_length: int) -> None:
        self.answers, self.prompt_length = answers, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        forced = torch.full_like(scores, -1e9)
        for row, answer in enumerate(self.answers * (len(input_ids) // len(self.answers))):
            forced[row, answer[min(step, len(answer) - 1)]] = 0.0
        return forced


def say(answers: list[list[int]], batch: dict[str, Any]) -> LogitsProcessorList:
    return LogitsProcessorList([Say(answers, batch["input_ids"].shape[1])])


SAID = [[7, 1200, 8, 1200, 2], [9, 1200, 2], [1200, 4, 5, 2], [3, 2]]


@pytest.fixture
def spoken(tiny_config, tiny_model) -> tuple[dict[str, Any], Any]:
    """Four prompts, and what is generated when the answers are `SAID`."""
    batch = prompts(make_batch(tiny_config, [(0, 0), (1, 0), (0, 0), (-1, 0)]))
    return batch, tiny_model.generate_masks(**batch, max_new_tokens=8, logits_processor=say(SAID, batch))


@torch.no_grad()
def test_generated_masks_are_those_of_the_answer_given_to_forward(tiny_model, spoken) -> None:
    batch, generated = spoken
    assert [ids.tolist() for ids in generated.answer_ids] == SAID
    assert [len(masks) for masks in generated.mask_logits] == [2, 1, 1, 0]
    full = [
        row[mask.bool()].tolist() + answer
        for row, mask, answer in zip(batch["input_ids"], batch["attention_mask"], SAID, strict=True)
    ]
    forced = batch | {
        "input_ids": pad(full, 0, "right"),
        "attention_mask": pad([[1] * len(row) for row in full], 0, "right"),
    }
    output = tiny_model(**forced)
    for index in range(4):
        assert_same_answer(generated, index, output, index)
    torch.testing.assert_close(generated.seg_embeddings, output.seg_embeddings, atol=1e-5, rtol=1e-4)


def test_generated_masks_are_the_same_alone_and_in_a_batch(tiny_config, tiny_model, spoken) -> None:
    _, together = spoken
    batch = make_batch(tiny_config, [(0, 0), (1, 0), (0, 0), (-1, 0)])
    for index in range(4):
        single = prompts(conversation(batch, index))
        alone = tiny_model.generate_masks(**single, max_new_tokens=8, logits_processor=say([SAID[index]], single))
        assert_same_answer(together, index, alone, 0)


def test_greedy_answers_are_the_same_alone_and_in_a_batch(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config)
    together = tiny_model.generate_masks(**prompts(batch), max_new_tokens=6)
    assert len({tuple(ids.tolist()) for ids in together.answer_ids}) > 1
    for index in range(4):
        alone = tiny_model.generate_masks(**prompts(conversation(batch, index)), max_new_tokens=6)
        assert torch.equal(together.answer_ids[index], alone.answer_ids[0])


def test_beams_and_several_answers_have_masks_too(tiny_config, tiny_model, spoken) -> None:
    batch, single = spoken
    for settings in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        times = settings.get("num_return_sequences", 1)
        answers = [answer for answer in SAID for _ in range(2)]  # one for each beam, or for each sample
        several = tiny_model.generate_masks(
            **batch, max_new_tokens=8, logits_processor=say(answers, batch), **settings
        )
        assert len(several.mask_logits) == 4 * times
        for row in range(4 * times):
            assert several.answer_ids[row].tolist() == SAID[row // times]
            assert_same_answer(several, row, single, row // times)


def test_speculative_decoding_has_the_same_masks(tiny_config, tiny_model) -> None:
    batch = prompts(make_batch(tiny_config, [(0, 0)], [2]))
    answer = [[7, 1200, 7, 1200, 7, 1200, 2]]
    outputs = [
        tiny_model.generate_masks(**batch, max_new_tokens=8, logits_processor=say(answer, batch), **settings)
        for settings in ({}, {"prompt_lookup_num_tokens": 3})
    ]
    assert [output.answer_ids[0].tolist() for output in outputs] == answer * 2
    assert len(outputs[0].mask_logits[0]) == 3
    assert_same_answer(outputs[0], 0, outputs[1], 0)


def test_text_alone_is_answered_too(tiny_config, tiny_model) -> None:
    batch = prompts(make_batch(tiny_config, [(-1, 0), (-1, 0)], [], []))
    for settings in ({}, {"num_beams": 2}):
        output = tiny_model.generate_masks(**batch, max_new_tokens=4, **settings)
        text = tiny_model.generate(**batch, max_new_tokens=4, do_sample=False, **settings)
        assert torch.equal(output.sequences, text)


def test_sampling_is_repeated_by_its_seed(tiny_config, tiny_model) -> None:
    batch = prompts(make_batch(tiny_config))
    answers = []
    for _ in range(2):
        torch.manual_seed(3)
        answers.append(tiny_model.generate_masks(**batch, max_new_tokens=8, do_sample=True).sequences)
    assert torch.equal(*answers)


def test_a_seg_about_nothing_makes_no_mask(tiny_config, tiny_model) -> None:
    batch = prompts(make_batch(tiny_config, [(0, 0), (-1, 0)], [1], [(0, 0)]))
    output = tiny_model.generate_masks(**batch, max_new_tokens=4, logits_processor=say([[1200, 2]] * 2, batch))
    assert [ids.tolist() for ids in output.answer_ids] == [[1200, 2]] * 2
    assert [tuple(masks.shape) for masks in output.mask_logits] == [(0, 0, 0)] * 2


def test_an_answer_never_holds_an_image(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    batch = prompts(make_batch(tiny_config, [(-1, 0)], [], []))
    favourite = int(model.generate_masks(**batch, max_new_tokens=1).answer_ids[0][0])
    model.config.image_token_id = favourite
    assert int(model.generate_masks(**batch, max_new_tokens=1).answer_ids[0][0]) != favourite


@torch.no_grad()
def test_generation_encodes_frames_once_and_takes_what_the_processor_makes(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    tower, sam = count_calls(model.model.vision_tower), count_calls(model.model.sam.vision_encoder)
    batch = prompts(make_batch(tiny_config))
    text = model.generate(**batch, max_new_tokens=5, do_sample=False)
    assert (tower, sam) == ([3], [])
    assert torch.equal(text, model.generate_masks(**batch, max_new_tokens=5).sequences)
    assert (tower, sam) == ([3, 3], [])


def test_an_answer_ends_where_the_context_ends(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    batch = prompts(make_batch(tiny_config, [(0, 0)], [1]))
    length = batch["input_ids"].shape[1]
    model.config.text_config.max_position_embeddings = length + 3
    output = model.generate_masks(**batch, max_new_tokens=50, logits_processor=say([[7]], batch))
    assert output.sequences.shape[1] == length + 3
    model.config.text_config.max_position_embeddings = length
    with pytest.raises(ValueError, match=f"The prompts take {length} tokens, all that the language model was made"):
        model.generate_masks(**batch)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("sam_pixel_values", lambda frames: None, "There are 0 target frames in `sam_pixel_values` but 2 videos"),
        ("sam_pixel_values", lambda frames: frames[:1], "There are 1 target frames in `sam_pixel_values`"),
        ("sam_pixel_values", lambda frames: frames[..., :9], "but .videos, 3, 128, 128. is needed"),
        ("reshaped_input_sizes", lambda sizes: sizes + 99, "frame of 1 to 128 pixels a side inside SAM's square"),
        ("pixel_values", lambda frames: frames[..., :9], "but .frames, 3, 64, 64. is needed"),
    ],
)
def test_bad_frames_are_refused_before_anything_is_generated(name, spoil, message, tiny_config, tiny_model) -> None:
    """Whether the answer has a [SEG] or not."""
    batch = prompts(make_batch(tiny_config))
    batch[name] = spoil(batch[name])
    with pytest.raises(ValueError, match=message):
        tiny_model.generate_masks(**batch, max_new_tokens=2, logits_processor=say([[2]], batch))


def test_prompts_are_padded_on_the_left(tiny_config, tiny_model) -> None:
    batch = without(make_batch(tiny_config), "labels", "mask_labels")
    with pytest.raises(ValueError, match="padded on the right, where its answer should go"):
        tiny_model.generate_masks(**batch)


def test_generation_refuses_frames_that_belong_to_another_conversation(tiny_config, tiny_model) -> None:
    batch = prompts(make_batch(tiny_config, [(0, 0), (1, 0)], [2, 1]))
    batch["conversation_to_video"] = torch.tensor([1, 0])  # as many in all, but not for each
    for generate in (tiny_model.generate, tiny_model.generate_masks):
        with pytest.raises(ValueError, match="Conversation 0 holds 56 image tokens but its video has 1 frames"):
            generate(**batch)


# --- Borders ---


def change(name: str, value: Any) -> Any:
    return lambda batch: batch.__setitem__(name, value(batch[name]))


BAD_BATCHES: dict[str, tuple[Any, str]] = {
    "too few image tokens": (
        lambda batch: batch["input_ids"].masked_fill_(batch["input_ids"] == 1201, 9),
        "Conversation 0 holds 0 image tokens but its video has 2 frames of 28 visual tokens, 56 in all",
    ),
    "image tokens without frames": (
        lambda batch: [batch.pop(name) for name in list(batch) if name not in ("input_ids", "attention_mask")],
        "`input_ids` hold 168 image tokens but there are no frames. Give `pixel_values`",
    ),
    "frames of a wrong size": (
        change("pixel_values", lambda value: value[..., :32]),
        r"`pixel_values` has shape \(3, 3, 64, 32\) but \(frames, 3, 64, 64\) is needed",
    ),
    "target frames of a wrong size": (
        change("sam_pixel_values", lambda value: value[..., :64]),
        r"`sam_pixel_values` has shape \(2, 3, 128, 64\) but \(videos, 3, 128, 128\) is needed",
    ),
    "target frames of a wrong number": (
        change("sam_pixel_values", lambda value: value[:1]),
        "There are 1 target frames in `sam_pixel_values` but 2 videos in `num_frames`",
    ),
    "frames that do not add up": (
        change("num_frames", lambda value: value + 1),
        r"`num_frames` is \[3, 2\], 5 in all, but `pixel_values` holds 3 frames",
    ),
    "no number of frames": (
        lambda batch: batch.pop("num_frames"),
        "`pixel_values` holds 3 frames for 4 conversations without `num_frames`",
    ),
    "no video of the conversations": (
        lambda batch: batch.pop("conversation_to_video"),
        "There are 4 conversations about 2 videos. Say with `conversation_to_video`",
    ),
    "a video that is not there": (
        change("conversation_to_video", lambda value: value + 1),
        "`conversation_to_video` names video 2 for conversation 2 but there are 2 videos",
    ),
    "a video below -1": (
        change("conversation_to_video", lambda value: value - 2),
        "names video -2 for conversation 0",
    ),
    "videos of other conversations": (
        change("conversation_to_video", lambda value: value[:3]),
        "`conversation_to_video` has 3 entries but there are 4 conversations",
    ),
    "sizes of other videos": (
        change("original_sizes", lambda value: value[:1]),
        "`original_sizes` has 1 rows but there are 2 videos",
    ),
    "a seg without a target": (
        change("original_sizes", lambda value: value * torch.tensor([[0], [1]])),
        r"Conversation 0 has 1 \[SEG\] but its video has no target frame",
    ),
    "a resized frame larger than its square": (
        change("reshaped_input_sizes", lambda value: value + 100),
        r"Video 0 has `original_sizes` \(40, 64\) and `reshaped_input_sizes` \(180, 228\), but a frame of 1 to 128",
    ),
    "no resized sizes": (
        lambda batch: batch.pop("reshaped_input_sizes"),
        r"Video 0 has `original_sizes` \(40, 64\) and `reshaped_input_sizes` \(0, 0\)",
    ),
    "too few masks": (
        change("mask_labels", lambda value: [value[0], value[1][:1], *value[2:]]),
        r"`mask_labels` of conversation 1 has 1 masks but its answer has 2 \[SEG\]",
    ),
    "masks of a wrong size": (
        change("mask_labels", lambda value: [mask.transpose(1, 2) for mask in value]),
        r"`mask_labels` of conversation 0 are of size \(64, 40\) but the target frame is \(40, 64\)",
    ),
    "masks of other conversations": (
        change("mask_labels", lambda value: value[:2]),
        "`mask_labels` has 2 entries but there are 4 conversations",
    ),
    "masks without a target frame": (
        lambda batch: batch.pop("sam_pixel_values"),
        "There are 0 target frames in `sam_pixel_values` but 2 videos",
    ),
    "labels of another shape": (
        change("labels", lambda value: value[:, :-1]),
        "`labels` has shape .* but `input_ids`",
    ),
    "a label beyond the vocabulary": (
        lambda batch: batch["labels"].__setitem__((0, 3), 1201),
        "`labels` hold 1201, which is not in the vocabulary of 1201 tokens",
    ),
    "a token beyond the vocabulary": (
        lambda batch: batch["input_ids"].__setitem__((0, 2), 1300),
        "`input_ids` hold 1300, which is neither in the vocabulary of 1201 tokens nor the image token 1201",
    ),
    "a negative token": (
        lambda batch: batch["input_ids"].__setitem__((0, 2), -200),
        "`input_ids` hold -200",
    ),
    "seg at the beginning": (
        lambda batch: batch["labels"].__setitem__((0, 0), 1200),
        r"begins with \[SEG\], which nothing predicted",
    ),
    "no text": (lambda batch: batch.pop("input_ids"), "Give either `input_ids` or `inputs_embeds`"),
    "embeddings with frames": (
        lambda batch: batch.__setitem__("inputs_embeds", torch.zeros(*batch.pop("input_ids").shape, 64)),
        "`inputs_embeds` hold their visual tokens already",
    ),
    "logits left out": (
        lambda batch: batch.__setitem__("logits_to_keep", 1),
        "`logits_to_keep` leaves out logits that `labels` need",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_what_does_not_fit_together_is_refused(name: str, tiny_config, tiny_model) -> None:
    spoil, message = BAD_BATCHES[name]
    batch = make_batch(tiny_config)
    spoil(batch)
    with pytest.raises(ValueError, match=message), torch.no_grad():
        tiny_model(**batch)


def test_a_conversation_longer_than_the_context_is_refused(tiny_config, tiny_model) -> None:
    model = copy.deepcopy(tiny_model)
    model.config.text_config.max_position_embeddings = 60
    with pytest.raises(ValueError, match="has 69 tokens but the language model was made for 60"):
        model(**make_batch(tiny_config, [(0, 1)], [2]))


def test_features_of_other_frames_are_refused(tiny_config, tiny_model) -> None:
    batch = make_batch(tiny_config, [(0, 1)], [2])
    features = tiny_model.get_image_features(batch["pixel_values"][:1])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match=r"hold 56 image tokens but the frames make 28 \(1 frames of 28\)"):
        tiny_model(**text, mm_encoder_outputs={"image": features})
