"""The trainer in one process: losses however a batch is cut, logs, learning rates, evaluation, refusals."""

import json

import numpy as np
import pytest
import torch
from accelerate import ParallelismConfig
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from tests.trainer.training import (
    GradientsOfFirstStep,
    TinySamples,
    logged,
    make_trainer,
    prepared_model,
    tiny_model,
    tiny_processor,
)
from visa_hf.evaluation.metrics import boundary_f, region_similarity
from visa_hf.trainer import VisaDataCollator, VisaTrainer, VisaTrainingArguments
from visa_hf.trainer.lockstep import LockstepForward, targets_of

PARTS = ("loss", "text_loss", "bce_loss", "dice_loss")
# Learnt tokens and masks differ in every sample: 4 masks, none, 1, none.
KINDS = ("masks", "text", "one", "no_seg")


def first_step(tmp_path, batch_size, accumulation, kinds=KINDS, num_samples=4, **settings):
    found = GradientsOfFirstStep()
    trainer = make_trainer(
        tmp_path / f"{batch_size}-{accumulation}-{len(list(tmp_path.iterdir()))}",
        kinds=kinds,
        num_samples=num_samples,
        callbacks=[found],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        **settings,
    )
    trainer.train()
    return logged(trainer, *PARTS)[0], found.gradients


# --- losses ---


def test_samples_differ_in_tokens_and_masks():
    batches = [VisaDataCollator(tiny_processor())([TinySamples(4, KINDS)[draw]]) for draw in range(4)]
    assert len({int((batch["labels"] != -100).sum()) for batch in batches}) == 4
    assert [sum(map(len, batch["mask_labels"])) for batch in batches] == [4, 0, 1, 0]


@pytest.mark.parametrize("cut", [(1, 4), (2, 2)], ids=str)
def test_a_step_is_the_same_however_it_is_cut(tmp_path, cut):
    whole, gradients = first_step(tmp_path, 4, 1)
    parts, others = first_step(tmp_path, *cut)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert set(others) == set(gradients)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6 * largest)


def test_a_step_with_towers_is_the_same_however_it_is_cut(tmp_path):
    options = {"lora_dropout": 0.0, "unfreeze": ["vision_tower", "mm_projector", "sam"]}
    whole, gradients = first_step(tmp_path, 4, 1, options=options)
    parts, others = first_step(tmp_path, 1, 4, options=options)
    assert parts == pytest.approx(whole, rel=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=2e-6 * largest)


def test_towers_that_a_step_does_not_reach_move_as_with_several_processes(tmp_path, monkeypatch):
    """Their gradient is 0 in steps of text alone: momentum moves them on, and later losses show it."""
    settings = {
        "num_samples": 8,
        "kinds": ("masks", "one", "text", "text"),
        "options": {"lora_dropout": 0.0, "unfreeze": ["vision_tower", "mm_projector", "sam"]},
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
    }
    alone = make_trainer(tmp_path / "alone", **settings)
    alone.train()
    filled_up = make_trainer(tmp_path / "filled_up", **settings)
    base = filled_up.model.base_model.model
    # What several processes do.
    base.forward = LockstepForward(base.forward, filled_up.processing_class, tuple(filled_up._loss_weights))
    monkeypatch.setattr(filled_up, "_is_in_lockstep", True)
    filled_up.train()
    expected = logged(filled_up, *PARTS)
    assert len(expected) == 4
    torch.testing.assert_close(torch.tensor(logged(alone, *PARTS)), torch.tensor(expected), rtol=0, atol=1e-5)


def test_by_step_every_token_and_mask_counts_the_same(tmp_path):
    """The plain sums over all samples, divided once."""
    parts, _ = first_step(tmp_path, 1, 4)
    model = prepared_model({"lora_dropout": 0.0}).eval()
    collator = VisaDataCollator(tiny_processor())
    sums, counts = np.zeros(3), np.zeros(3)
    for draw in range(4):
        batch = collator([TinySamples(4, KINDS)[draw]])
        outputs = model(**batch)
        num_masks = sum(map(len, batch["mask_labels"]))
        count = np.array([int((batch["labels"] != -100).sum()), num_masks, num_masks])
        sums += count * [outputs.text_loss.item(), outputs.bce_loss.item(), outputs.dice_loss.item()]
        counts += count
    text, bce, dice = sums / counts
    assert parts == pytest.approx((text + 2.0 * bce + 0.5 * dice, text, bce, dice), rel=1e-5)


def test_by_microbatch_the_published_means_are_averaged(tmp_path):
    parts, gradients = first_step(tmp_path, 1, 4, config={"loss_reduction": "microbatch"})
    model = prepared_model({"lora_dropout": 0.0}, loss_reduction="microbatch").train()
    collator = VisaDataCollator(tiny_processor())
    means = []
    for draw in range(4):
        outputs = model(**collator([TinySamples(4, KINDS)[draw]]))
        (outputs.loss / 4).backward()
        means.append([float(getattr(outputs, name).detach()) for name in PARTS])
    assert parts == pytest.approx(np.mean(means, axis=0), rel=1e-5)
    expected = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    for name, gradient in zip(gradients, expected.values(), strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    by_step, _ = first_step(tmp_path, 1, 4)
    assert abs(by_step[1] - parts[1]) > 1e-3  # the two really differ here


def test_logged_parts_are_means_over_the_steps_since_the_last_log(tmp_path):
    settings = {"num_samples": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    each = make_trainer(tmp_path / "1", **settings)
    each.train()
    every_second = make_trainer(tmp_path / "2", **settings, logging_steps=2)
    every_second.train()
    one, two = np.array(logged(each, *PARTS)), np.array(logged(every_second, *PARTS))
    assert one.shape == (4, 4) and two.shape == (2, 4)
    np.testing.assert_allclose(two, one.reshape(2, 2, 4).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(one[:, 0], one[:, 1:] @ [1.0, 2.0, 0.5], rtol=1e-5)


def test_a_training_lowers_all_its_losses(tmp_path):
    trainer = make_trainer(tmp_path, num_samples=120, kinds=("one",), per_device_train_batch_size=4)
    trainer.train_dataset.kinds = ("one",)
    same = [trainer.train_dataset[0]] * 120
    trainer.train_dataset = same
    trainer.train()
    losses = np.array(logged(trainer, *PARTS))
    assert (losses[-3:].mean(axis=0) < 0.9 * losses[:3].mean(axis=0))[[0, 1]].all()
    assert losses[-3:, 2].mean() < losses[:3, 2].mean()


def test_blank_targets_change_no_loss():
    """What ZeRO-3 needs, against the model as it is."""
    processor = tiny_processor()
    for kinds in (("masks", "one"), ("text", "no_seg"), ("one", "text"), ("frames", "text")):
        batch = VisaDataCollator(processor)([TinySamples(2, kinds)[draw] for draw in range(2)])
        model = tiny_model().train()
        expected = model(**batch, num_items_in_batch=17, num_masks_in_batch=5)
        expected.loss.backward()
        gradients = {name: value.grad for name, value in model.named_parameters()}
        other = tiny_model().train()
        num_targets = targets_of(batch, processor.seg_token_id)
        padded = LockstepForward(other.forward, processor, (1.0, 2.0, 0.5))(
            **batch, num_targets=num_targets + 2, num_items_in_batch=17, num_masks_in_batch=5
        )
        padded.loss.backward()
        for name in PARTS:
            assert padded[name].item() == pytest.approx(expected[name].item(), rel=1e-5)
        assert len(padded.mask_logits) == len(batch["input_ids"])
        # Only the loss has a gradient.
        assert not any(value.requires_grad for value in (padded.text_loss, padded.logits, *padded.mask_logits))
        for name, value in other.named_parameters():
            ours, wanted = value.grad, gradients[name]
            assert ours is not None or wanted is None
            if ours is not None:
                wanted = torch.zeros_like(ours) if wanted is None else wanted
                torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


# --- learning rates ---


def test_parameters_take_the_learning_rate_of_the_first_pattern_that_is_found(tmp_path):
    rates = {"mask_decoder|text_hidden_fcs": 1e-2, r"lora_[AB]": 1e-3}
    trainer = make_trainer(tmp_path, learning_rates=rates, learning_rate=1e-4, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    for group in groups:
        for value in group["params"]:
            name = names[id(value)]
            is_part = "mask_decoder" in name or "text_hidden_fcs" in name
            assert group["lr"] == (1e-2 if is_part else 1e-3 if "lora_" in name else 1e-4)
            assert group["weight_decay"] == (0.0 if "bias" in name or "norm" in name else 0.1)
    grouped = [id(value) for group in groups for value in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(value.requires_grad for value in trainer.model.parameters())


def test_a_pattern_that_counts_for_nothing_is_refused(tmp_path):
    for rates, message in (
        ({"mask_decodr": 1e-2}, "`learning_rates` has 'mask_decodr', which no trained parameter takes. Trained are"),
        ({"vision_tower": 1e-2}, "which no trained parameter takes"),
        ({"lora": 1e-2, "q_proj.lora_A": 1e-3}, "'q_proj.lora_A', which no trained .* move it up"),
        ({"(": 1e-2}, r"has '\(', which is no regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, learning_rates=rates).create_optimizer()


def test_a_learning_rate_of_zero_leaves_a_part_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path, learning_rates={"mask_decoder": 0.0}, per_device_train_batch_size=4)
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}
    trainer.train()
    moved = {
        name for name, value in trainer.model.named_parameters() if name in before and (value != before[name]).any()
    }
    assert moved and not any("mask_decoder" in name for name in moved)


# --- evaluation ---


def test_evaluation_is_that_of_one_sample_after_the_other(tmp_path):
    trainer = make_trainer(tmp_path, eval_samples=6, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    model = prepared_model({"lora_dropout": 0.0}).eval()
    collator = VisaDataCollator(tiny_processor())
    sums, tokens, scores = np.zeros(3), 0, []
    for draw in range(6):
        batch = collator([trainer.eval_dataset[draw]])
        with torch.no_grad():
            outputs = model(**batch)
        num_tokens, num_masks = int((batch["labels"] != -100).sum()), sum(map(len, batch["mask_labels"]))
        parts = [float(getattr(outputs, name)) for name in PARTS[1:]]
        sums += np.array(parts) * [num_tokens, num_masks, num_masks]
        tokens += num_tokens
        for logits, labels in zip(outputs.mask_logits, batch["mask_labels"], strict=True):
            for mask, true in zip((logits > 0).numpy(), labels.bool().numpy(), strict=True):
                scores.append((region_similarity(mask, true), boundary_f(mask, true)))
    (j, f), num = np.mean(scores, axis=0), len(scores)
    text, bce, dice = sums / [tokens, num, num]
    expected = {"loss": text + 2 * bce + 0.5 * dice, "text_loss": text, "bce_loss": bce, "dice_loss": dice}
    expected |= {"J": j, "F": f, "JF": (j + f) / 2, "num_masks": num}
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert not trainer.model.training
    again = trainer.evaluate()
    assert all(again[name] == metrics[name] for name in metrics if "runtime" not in name and "second" not in name)


def test_evaluation_keeps_no_masks(tmp_path):
    trainer = make_trainer(tmp_path, eval_samples=3)
    output = trainer.predict(trainer.eval_dataset)
    assert output.predictions is None and output.label_ids is None
    assert output.metrics["test_num_masks"] == 5


def test_a_mask_found_exactly_scores_one(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_samples=4)
    forward = trainer._forward

    def perfect(model, inputs, *counts):
        outputs = forward(model, inputs, *counts)
        outputs.mask_logits = [labels * 2 - 1 for labels in inputs["mask_labels"]]
        return outputs

    monkeypatch.setattr(trainer, "_forward", perfect)
    metrics = trainer.evaluate()
    assert (metrics["eval_J"], metrics["eval_F"], metrics["eval_JF"]) == (1.0, 1.0, 1.0)


def test_without_a_mask_there_is_no_score(tmp_path):
    trainer = make_trainer(tmp_path)
    metrics = trainer.evaluate(TinySamples(2, ("text", "no_seg")))
    assert metrics["eval_num_masks"] == 0 and metrics["eval_bce_loss"] == 0 and metrics["eval_text_loss"] > 0
    assert not {"eval_J", "eval_F", "eval_JF"} & set(metrics)


def test_several_sets_are_evaluated_by_name(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = {"a": TinySamples(1, ("one",)), "b": TinySamples(2, ("masks",))}
    metrics = trainer.evaluate()
    assert metrics["eval_a_num_masks"] == 1 and metrics["eval_b_num_masks"] == 8


def test_evaluation_does_not_change_the_training(tmp_path):
    plain = make_trainer(tmp_path / "plain", num_samples=8, options={}, per_device_train_batch_size=2)
    plain.train()
    other = make_trainer(
        tmp_path / "other",
        num_samples=8,
        options={},
        per_device_train_batch_size=2,
        eval_samples=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
    )
    other.train()
    assert logged(plain, *PARTS) == logged(other, *PARTS)
    assert sum("eval_J" in row for row in other.state.log_history) == 4


def test_pictures_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(
        tmp_path,
        eval_samples=4,
        eval_strategy="epoch",
        report_to=["tensorboard"],
        num_overlays=3,
        per_device_train_batch_size=4,
    )
    trainer.train()
    events = next(tmp_path.rglob("events.out.tfevents*"))
    recorded = EventAccumulator(str(events.parent), size_guidance={"images": 0})
    recorded.Reload()
    assert recorded.Tags()["images"] == [f"eval/overlay_{number}" for number in range(3)]
    picture = recorded.Images("eval/overlay_0")[0]
    assert (picture.step, picture.height, picture.width) == (1, 24, 64)
    assert {"train/text_loss", "train/bce_loss", "train/dice_loss", "eval/J"} <= set(recorded.Tags()["scalars"])
    assert not (tmp_path / "overlays").exists()


def test_without_a_tracker_pictures_are_files(tmp_path):
    trainer = make_trainer(tmp_path, eval_samples=4, num_overlays=1)
    trainer.evaluate()
    (path,) = (tmp_path / "overlays" / "step-0").iterdir()
    assert path.name == "eval_overlay_0.png" and Image.open(path).size == (64, 24)
    # The frame is seen through its masks: about the original, on both sides.
    sample = trainer.eval_dataset[0]
    masks = sample.conversations[0].masks[0]
    picture = np.asarray(Image.open(path))[:, :32].astype(int)
    assert np.abs(picture - sample.target_frame)[masks == 0].mean() < 45  # noise would be off by 85


# --- order of the samples ---


def test_samples_are_taken_in_the_order_of_their_numbers(tmp_path):
    trainer = make_trainer(tmp_path, num_samples=8, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    assert trainer.train_dataset.asked == list(range(8))


# --- refusals ---


def test_batches_must_not_be_cut_apart(tmp_path, monkeypatch):
    for name in ("dispatch_batches", "split_batches"):
        with pytest.raises(ValueError, match=f"`accelerator_config` has `{name}` .* `torchrun --nproc_per_node"):
            VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config={name: True})
    assert VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True).accelerator_config.dispatch_batches is False
    monkeypatch.setattr(VisaTrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="sees 2 GPUs and would split each batch .*torchrun .*CUDA_VISIBLE_DEVICES=0"):
        VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"remove_unused_columns": True}, "`remove_unused_columns` is true but samples are no columns"),
        ({"train_sampling_strategy": "random"}, "is 'random' but must be 'sequential'"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is 0.1 but VISA's text loss has none"),
        ({"save_total_limit": 1, "metric_for_best_model": "J"}, "Set it to at least 2"),
        ({"bf16_full_eval": True}, "would round the weights that are trained"),
        ({"num_overlays": -1}, "`num_overlays` is -1"),
        ({"learning_rates": "{"}, "`learning_rates` is '{' but must be a JSON object"),
        ({"learning_rates": {"lora": "much"}}, "`learning_rates` gives 'lora' 'much'"),
        ({"learning_rates": {"lora": float("nan")}}, "`learning_rates` gives 'lora' nan"),
    ],
)
def test_arguments_that_would_do_harm_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ({"fsdp": "full_shard auto_wrap"}, "`fsdp` is 'full_shard auto_wrap'"),
        ({"fsdp": True}, "`fsdp` is True"),
        ({"fsdp_config": {"min_num_params": 10}}, "`fsdp_config` is {'min_num_params': 10}"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "`parallelism_config` is ParallelismConfig"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_other_ways_to_split_the_model_than_deepspeeds_are_refused(tmp_path, arguments, given):
    with pytest.raises(ValueError, match="FSDP, .* not supported: .* take ZeRO-3: `deepspeed` with a") as error:
        VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **arguments)
    assert str(error.value).startswith(given)


@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_accelerate_launch_asks_for_is_refused_as_well(tmp_path, monkeypatch, name):
    """`accelerate launch --use_fsdp` and its configuration file speak through the environment."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=f"^the environment variable `ACCELERATE_USE_{name}` is 'true', but FSDP"):
        VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "false")
    VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def test_learning_rates_may_be_json(tmp_path):
    given = VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rates=json.dumps({"lora": 1}))
    assert given.learning_rates == {"lora": 1.0}


def test_defaults_are_the_papers(tmp_path):
    args = VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2, args.weight_decay) == (2e-5, 0.9, 0.95, 0.0)
    assert (args.max_grad_norm, args.lr_scheduler_type) == (1.0, "cosine")


@pytest.mark.parametrize("name", ["eval_JF", "loss", "overall_R"])
def test_the_best_checkpoint_may_be_told_by_what_is_measured(tmp_path, name):
    make_trainer(tmp_path, eval_samples=1, eval_strategy="steps", eval_steps=1, metric_for_best_model=name)


@pytest.mark.parametrize("name", ["eval_jf", "clip_overall_JF", "target_overall_JF"])
def test_a_best_metric_that_nothing_measures_is_refused_before_the_training(tmp_path, name):
    message = f"`metric_for_best_model` is '{name}', but evaluations .* Take `loss`, `JF`, `overall_JF`."
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, eval_samples=1, eval_strategy="steps", eval_steps=1, metric_for_best_model=name)


def test_data_sets_must_have_numbers(tmp_path):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    args = VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match="A data set is iterable but items by number are needed"):
            VisaTrainer(tiny_model(), args, tiny_processor(), **{name: Endless()})
    with pytest.raises(TypeError, match="`args` is a TrainingArguments but must be `VisaTrainingArguments`"):
        VisaTrainer(tiny_model(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True), tiny_processor())
    with pytest.raises(ValueError, match="There is nothing to evaluate"):
        make_trainer(tmp_path).evaluate()
