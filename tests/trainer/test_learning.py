"""That the parts learn together: two clips by heart, through `visa train`. Takes about half a minute."""

import json

import pytest

from visa_hf import cli
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset

NUM_STEPS = 220


@pytest.mark.slow
def test_two_clips_are_learnt_by_heart(tmp_path):
    options = ClipOptions(size=(64, 64), num_frames=(1, 1), levels=(1,), num_objects=(2, 2), num_expressions=3)
    write_dataset(tmp_path / "clips", num_videos={"train": 2}, options=options, show_progress=False)
    values = {
        "data.folders.revos": tmp_path / "clips",
        "data.cache_dir": tmp_path / "cache",
        "evaluation.folder": tmp_path / "clips",
        "evaluation.num_samples": 8,
        "schedule.epochs": 1,
        "schedule.steps_per_epoch": NUM_STEPS,
        "schedule.global_batch_size": 2,
        "arguments.per_device_train_batch_size": 2,
        "arguments.learning_rate": 2e-3,
        "arguments.eval_steps": NUM_STEPS,
        "arguments.save_steps": NUM_STEPS,
        "arguments.use_cpu": "true",
        "arguments.disable_tqdm": "true",
    }
    overrides = [word for name, value in values.items() for word in ("--override", f"{name}={value}")]
    assert cli.main(["train", "overfit_synthetic", "-o", str(tmp_path / "out"), *overrides]) == 0
    state = json.loads((tmp_path / "out" / f"checkpoint-{NUM_STEPS}" / "trainer_state.json").read_text())
    (measured,) = [entry for entry in state["log_history"] if "eval_J" in entry]
    assert measured["eval_num_masks"] == 8 * 3
    assert measured["eval_J"] >= 0.9
