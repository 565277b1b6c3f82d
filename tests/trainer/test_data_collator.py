"""Samples become one batch; each conversation finds its own frames."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.trainer.training import TinySamples, tiny_model, tiny_processor
from visa_hf.trainer import VisaDataCollator

KINDS = ("text", "masks", "frames", "foreign", "one")


@pytest.fixture(scope="module")
def collator():
    return VisaDataCollator(tiny_processor())


@pytest.fixture(scope="module")
def samples():
    given = TinySamples(5, KINDS)
    return [given[draw] for draw in range(5)]


def test_conversations_point_to_the_frames_of_their_sample(collator, samples):
    batch = collator(samples)
    assert batch["conversation_to_video"].tolist() == [-1, 0, 0, 1, 2, 3]
    assert batch["num_frames"].tolist() == [2 + 1, 1, 2 + 1, 1 + 1]
    assert batch["original_sizes"].tolist() == [[24, 32], [0, 0], [32, 32], [24, 32]]
    assert [tuple(masks.shape) for masks in batch["mask_labels"]] == [
        (0, 0, 0),
        (1, 24, 32),
        (3, 24, 32),
        (0, 0, 0),
        (1, 32, 32),
        (1, 24, 32),
    ]


def test_a_batch_holds_what_each_sample_gives_alone(collator, samples):
    batch, position, video, frame = collator(samples), 0, 0, 0
    for sample in samples:
        alone = collator([sample])
        length = alone["input_ids"].shape[1]
        for row in range(len(sample.conversations)):
            assert torch.equal(batch["labels"][position, :length], alone["labels"][row])
            assert torch.equal(batch["input_ids"][position, :length], alone["input_ids"][row])
            assert torch.equal(batch["mask_labels"][position], alone["mask_labels"][row])
            position += 1
        num_videos, num_frames = len(alone["num_frames"]), len(alone["pixel_values"])
        assert torch.equal(batch["sam_pixel_values"][video : video + num_videos], alone["sam_pixel_values"])
        assert torch.equal(batch["pixel_values"][frame : frame + num_frames], alone["pixel_values"])
        video, frame = video + num_videos, frame + num_frames


def test_the_model_takes_every_kind_of_batch(collator, samples):
    model = tiny_model()
    for given in (samples, samples[:1], samples[2:3], [samples[0], samples[2]]):
        outputs = model(**collator(given))
        assert torch.isfinite(outputs.loss)
        assert len(outputs.mask_logits) == sum(len(sample.conversations) for sample in given)


def test_answers_may_come_from_templates(collator, samples):
    conversation = dataclasses.replace(samples[4].conversations[0], answer=None, answer_template=0)
    sample = dataclasses.replace(samples[4], conversations=(conversation,))
    batch = collator([sample, samples[4]])
    learnt = batch["labels"][0][batch["labels"][0] != -100]
    assert collator.processor.decode(learnt) == "It is [SEG]."


def test_it_travels_to_worker_processes(collator, samples):
    there = pickle.loads(pickle.dumps(collator))
    assert torch.equal(there(samples)["input_ids"], collator(samples)["input_ids"])


def test_a_sample_that_does_not_fit_together_is_named(collator, samples):
    wrong = dataclasses.replace(samples[4].conversations[0], masks=np.zeros((2, 24, 32), np.uint8))
    with pytest.raises(
        ValueError, match=r"A batch of draw 4 of `one` \(v4\) cannot be made: Conversation 0 has 2 `ma"
    ):
        collator([dataclasses.replace(samples[4], conversations=(wrong,))])
    other_size = dataclasses.replace(samples[3], is_foreign_target=False)
    with pytest.raises(ValueError, match=r"draw 3 of `foreign` .* Reference frame 0 of video 0 has shape"):
        collator([other_size])
    with pytest.raises(ValueError, match="A batch of draw 1 .* tokens .* but 50 fit"):
        dataclasses.replace(collator, max_length=50)([samples[1]])
    with pytest.raises(ValueError, match="There is no sample"):
        collator([])


def test_importing_the_trainer_loads_nothing_until_it_is_used():
    script = (
        "import sys, visa_hf.trainer; dir(visa_hf.trainer);"
        "assert not {'peft', 'deepspeed', 'datasets', 'tensorboard'} & set(sys.modules);"
        "assert 'visa_hf.trainer.visa_trainer' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
