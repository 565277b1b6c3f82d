"""A second training that begins with the result of a first one, on other data: stills, then clips."""

import json

import pytest
import torch

from tests.trainer.training import visa_train
from visa_hf import VisaForVideoSegmentation, VisaProcessor, cli
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Folder that holds `stills` and `clips`."""
    root = tmp_path_factory.mktemp("worlds")
    for name, num_frames in (("stills", (1, 1)), ("clips", (4, 5))):
        options = ClipOptions(size=(48, 64), num_frames=num_frames)
        write_dataset(root / name, num_videos={"train": 2}, options=options, show_progress=False)
    return root


def test_a_second_training_begins_with_the_result_of_the_first(worlds, tmp_path):
    first, second, still = (tmp_path / name for name in ("first", "second", "still"))
    # What is short of the whole model would be lost: weights, and options of the configuration.
    options = {"model__options": "{tracker_config: null, bce_loss_weight: 5.0}"}
    settings = {"schedule__steps_per_epoch": 3, "arguments__save_steps": 3}
    assert cli.main(visa_train(first, worlds / "stills", tmp_path / "cache", **options, **settings)) == 0
    settings |= {"model__weights": first / "final", "model__options": "{}"}
    clips = worlds / "clips", tmp_path / "cache"
    assert cli.main(visa_train(second, *clips, **settings)) == 0
    assert cli.main(visa_train(still, *clips, arguments__learning_rate=0.0, **settings)) == 0
    models = [VisaForVideoSegmentation.from_pretrained(out / "final") for out in (first, second, still)]
    assert all(model.config.bce_loss_weight == 5.0 and model.config.tracker_config is None for model in models)
    weights = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())
    changed = {name for name, value in weights[0].items() if not torch.equal(value, weights[1][name])}
    assert all(any(part in name for name in changed) for part in ("language_model", "mask_decoder", "vision_encoder"))
    # The first step is the same with any rate: it is measured on what the first training left.
    states = [json.loads((out / "checkpoint-3" / "trainer_state.json").read_text()) for out in (second, still)]
    losses = [[row["loss"] for row in state["log_history"]] for state in states]
    assert len(losses[0]) == 3 and losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    assert not (second / "base").exists()


def test_a_second_training_may_merge_frames_into_another_number_of_tokens(worlds, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    folders = worlds / "stills", tmp_path / "cache"
    assert cli.main(visa_train(first, *folders, schedule__steps_per_epoch=1)) == 0
    before = VisaForVideoSegmentation.from_pretrained(first / "final").config
    counts = [count + 1 for count in before.merge_cluster_counts]
    settings = {"model__weights": first / "final", "model__options": f"{{merge_cluster_counts: {counts}}}"}
    assert cli.main(visa_train(second, *folders, schedule__steps_per_epoch=1, **settings)) == 0
    after = VisaForVideoSegmentation.from_pretrained(second / "final").config
    assert after.num_visual_tokens == before.num_visual_tokens + len(counts)
    # The processor of the first training would ask for fewer.
    assert VisaProcessor.from_pretrained(second / "final").num_visual_tokens == after.num_visual_tokens


def test_an_adapter_is_not_taken_for_a_model(worlds, tmp_path, capsys):
    out = tmp_path / "first"
    words = visa_train(out, worlds / "clips", tmp_path / "cache", trained="{}", schedule__steps_per_epoch=1)
    assert cli.main(words) == 0
    words = visa_train(tmp_path / "second", worlds / "clips", tmp_path / "cache", model__weights=out / "final")
    assert cli.main(words) == 2
    expected = f"`weights` is `{out / 'final'}`, which holds an adapter only. Fold it into its model first"
    assert expected in capsys.readouterr().err
