"""The first training of a model from nothing: the visual tower learns the words of answers."""

import math

import pytest
import torch

from tests.trainer.training import TinySamples, logged, prepared_model, tiny_processor
from visa_hf.trainer import VisaDataCollator, VisaTrainingArguments, VisualWordsTrainer
from visa_hf.trainer.visual_words import bag_of_words_losses, patch_shares

OPTIONS = {
    "language_model": "frozen",
    "text_hidden_fcs": False,
    "mask_decoder": False,
    "unfreeze": ("vision_tower", "mm_projector"),
}


def make_words_trainer(
    folder, *, kinds=("masks", "one", "no_seg", "text"), num_samples=4, options=OPTIONS, **settings
):
    eval_dataset = settings.pop("eval_dataset", None)
    arguments = {
        "objective": "visual_words",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        **settings,
    }
    return VisualWordsTrainer(
        prepared_model(options),
        VisaTrainingArguments(output_dir=str(folder), **arguments),
        tiny_processor(),
        train_dataset=TinySamples(num_samples, kinds),
        eval_dataset=eval_dataset,
    )


# --- by hand ---


def test_the_loss_of_a_mask_is_the_mean_over_its_words_the_rare_ones_weighing_more():
    logits = torch.tensor([[0.0, math.log(3), 0.0, -50.0], [1.0, 1.0, 1.0, -50.0], [0.0] * 4, [5.0, 0.0, 0.0, 0.0]])
    words = [torch.tensor(said, dtype=torch.long) for said in ([0, 1, 3], [0, 2, 3], [0, 3], [])]
    # Of three rows with words all have 0 and 3, which therefore weigh nothing; the last row does not count.
    expected = [math.log(5 / 3), math.log(3), 0.0, 0.0]
    torch.testing.assert_close(bag_of_words_losses(logits, words), torch.tensor(expected))
    words[2] = torch.tensor([3])
    # Now 0 is in two of three.
    rare, common = math.log(3), math.log(1.5)
    first = (rare * math.log(5 / 3) + common * math.log(5)) / (rare + common)
    torch.testing.assert_close(bag_of_words_losses(logits, words)[0], torch.tensor(first))


def test_shares_of_patches_are_those_of_the_square_in_the_middle():
    processor = tiny_processor().image_processor  # resizes the shorter side to 64 and crops the middle
    mask = torch.zeros(1, 32, 64)
    mask[0, :16, 16:32] = 1  # of the square in the middle, the upper left quarter
    mask[0, :, 60:] = 1  # cropped away
    shares = patch_shares(mask, processor, 2)
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_shares_of_patches_follow_the_whole_frame_when_it_is_squashed():
    from visa_hf import VisaConfig, VisaProcessor

    config = VisaConfig.tiny(tracker_config=None)
    squashing = VisaProcessor.from_config(config, tiny_processor().tokenizer, clip_resize="squash")
    mask = torch.zeros(2, 16, 48)
    mask[0, :, 24:] = 1
    mask[1, :4] = 1
    shares = patch_shares(mask, squashing.image_processor, 2)
    torch.testing.assert_close(shares, torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.0, 0.0]]))


def test_a_batch_s_losses_are_those_of_its_masks_one_by_one(tmp_path):
    trainer = make_words_trainer(tmp_path)
    collator, samples = VisaDataCollator(tiny_processor()), TinySamples(4, ("masks", "one", "no_seg", "text"))
    losses = trainer._mask_losses(collator([samples[draw] for draw in range(4)]))
    assert losses.shape == (5,)  # 1 + 3 of the first, 1 of the second
    model, processor = trainer.model, trainer.processing_class
    features, words = [], []
    for draw in (0, 1):
        batch = collator([samples[draw]])
        target = batch["pixel_values"][-1:]
        patches = model.get_image_features(target).last_hidden_state[0]
        for labels, masks in zip(batch["labels"], batch["mask_labels"], strict=True):
            said = sorted(set(labels.tolist()) - {-100, *processor.tokenizer.all_special_ids})
            for mask in masks:
                share = patch_shares(mask[None], processor.image_processor, round(len(patches) ** 0.5))[0]
                features.append(sum(part * patch for part, patch in zip(share, patches, strict=True)) / share.sum())
                words.append(torch.tensor(said))
    expected = bag_of_words_losses(model.lm_head(model.model.mm_projector(torch.stack(features))), words)
    assert expected.min() > 0
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


# --- training ---


def test_only_tower_projector_and_head_move_and_the_loss_falls(tmp_path):
    trainer = make_words_trainer(tmp_path, kinds=("masks", "one"), num_samples=120, max_steps=30)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("model.vision_tower.", "model.mm_projector.", "lm_head.")) for name in moved)
    losses = [loss for (loss,) in logged(trainer, "loss")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("kinds", [("text",), ("no_seg",)], ids=str)
def test_steps_without_a_mask_move_nothing(tmp_path, kinds):
    trainer = make_words_trainer(tmp_path, kinds=kinds)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert logged(trainer, "loss") == [(0.0,)]
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


# --- refusals ---


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="makes no masks to evaluate. Leave the evaluation out"):
        make_words_trainer(tmp_path, eval_dataset=TinySamples(4, ("masks",)))
    with pytest.raises(ValueError, match="Name `vision_tower` in `unfreeze`"):
        make_words_trainer(tmp_path, options={**OPTIONS, "unfreeze": ("mm_projector",)})
    with pytest.raises(ValueError, match="`objective` is 'words' but must be one of answers, visual_words"):
        VisaTrainingArguments(output_dir=str(tmp_path), objective="words", use_cpu=True)
