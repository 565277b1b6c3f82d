"""Checkpoints: whole or not there, resumed as if never stopped, kept and deleted by the rules, merged exactly."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.trainer.training import TinySamples, make_trainer, tiny_model, tiny_processor
from visa_hf import VisaForVideoSegmentation, VisaProcessor
from visa_hf.trainer import VisaDataCollator, find_last_checkpoint, merge_adapter
from visa_hf.trainer.checkpoints import COMPLETION_MARKER, find_fault, mark_complete, rotate_checkpoints

# With dropout: resumed, the random numbers must go on as well.
TRAINING = {
    "num_samples": 12,
    "options": {"lora_dropout": 0.3},
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 1.0,
    "weight_decay": 0.01,
}


def folders(path):
    return sorted(one.name for one in path.iterdir() if one.name.startswith("checkpoint-"))


def curve(trainer):
    return [
        {name: value for name, value in row.items() if "runtime" not in name and "second" not in name}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def trained(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def fake_checkpoint(path, is_whole=True):
    path.mkdir(parents=True)
    (path / "weights.bin").write_bytes(b"12345")
    if is_whole:
        mark_complete(path)
    return path


class KilledError(Exception):
    """Stands for a kill."""


# --- resume ---


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_resumed_training_is_the_one_that_never_stopped(tmp_path, method):
    settings = {**TRAINING, "options": {"lora_dropout": 0.3, "language_model": method}}
    whole = make_trainer(tmp_path / "whole", **settings, save_strategy="steps", save_steps=2)
    whole.train()
    # As left by a kill after step 4: nothing of later ones.
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    torch.manual_seed(99)
    resumed = make_trainer(tmp_path / "killed", **settings, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert len(curve(whole)) == 6
    assert curve(resumed) == curve(whole)  # bit for bit
    ours, theirs = trained(resumed), trained(whole)
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What was learnt before is skipped by number, not read.
    assert resumed.train_dataset.asked == list(range(8, 12))


def test_logs_between_checkpoints_are_the_same_after_resuming(tmp_path):
    settings = {**TRAINING, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert [row["step"] for row in curve(whole)] == [2, 3, 4, 6]
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "killed" / f"checkpoint-{step}")
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(whole)


def test_a_training_that_is_killed_while_it_saves_resumes_from_the_checkpoint_before(tmp_path, monkeypatch):
    settings = {**TRAINING, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    killed = make_trainer(tmp_path / "killed", **settings)
    save = killed._save_rng_state

    def killed_in_the_fourth_step(folder):
        if folder.endswith("checkpoint-4"):
            raise KilledError
        save(folder)

    monkeypatch.setattr(killed, "_save_rng_state", killed_in_the_fourth_step)
    with pytest.raises(KilledError):
        killed.train()
    assert folders(tmp_path / "killed") == ["checkpoint-2", "checkpoint-4"]
    assert Path(find_last_checkpoint(tmp_path / "killed")).name == "checkpoint-2"
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(whole)
    assert find_fault(tmp_path / "killed" / "checkpoint-4") is None
    with pytest.raises(ValueError, match=r"checkpoint-8` cannot be used: there is no such folder\. Take an earlier"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-8"))


def test_the_marker_is_written_last(tmp_path):
    trainer = make_trainer(tmp_path, **TRAINING, save_strategy="steps", save_steps=6)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert max(written, key=written.__getitem__).name == COMPLETION_MARKER
    listed = json.loads((folder / COMPLETION_MARKER).read_text())["files"]
    assert set(listed) == {path.name for path in written} - {COMPLETION_MARKER}
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(listed)
    # The adapter, not the model.
    assert "model.safetensors" not in listed


def test_kill_9_at_any_moment_leaves_a_training_that_can_be_resumed(tmp_path):
    """A real process, killed in mid-training; its curve goes on exactly."""
    settings = {**TRAINING, "num_samples": 40, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**settings, "output_dir": str(tmp_path / "killed")}))
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("training.py")), str(file)],
        cwd=root,
        # As many threads as here: sums over several differ in their last digits.
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            "HF_HUB_OFFLINE": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        # Long: on a busy machine, starting a process takes minutes.
        deadline = time.monotonic() + 500
        while find_last_checkpoint(tmp_path / "killed") is None and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.1)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    step = int(find_last_checkpoint(tmp_path / "killed").rsplit("-", 1)[1])
    assert 1 <= step < 20
    resumed = make_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert curve(resumed) == curve(whole)


def test_what_is_trained_stays_the_same_after_resuming(tmp_path):
    first = make_trainer(tmp_path, **TRAINING, save_strategy="steps", save_steps=2)
    first.train()
    shutil.rmtree(tmp_path / "checkpoint-6")
    second = make_trainer(tmp_path, **TRAINING, save_strategy="no")
    expected = set(trained(second))
    second.train(resume_from_checkpoint=True)
    assert set(trained(second)) == expected


def test_an_earlier_run_is_not_overwritten(tmp_path):
    fake_checkpoint(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="holds `checkpoint-3` of an earlier run. Resume it"):
        make_trainer(tmp_path).train()


def test_there_must_be_something_to_resume(tmp_path):
    fake_checkpoint(tmp_path / "checkpoint-3", is_whole=False)
    with pytest.raises(ValueError, match="holds no checkpoint that was written to its end"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(
        ValueError, match="cannot be used: it has no `checkpoint_complete.json`: writing it was not fini"
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# --- whole or not ---


def test_a_checkpoint_counts_only_while_all_its_files_are_as_they_were(tmp_path):
    folder = fake_checkpoint(tmp_path / "checkpoint-1")
    assert find_fault(folder) is None
    (folder / "weights.bin").write_bytes(b"123")
    assert find_fault(folder) == "its file `weights.bin` has 3 bytes instead of 5"
    (folder / "weights.bin").unlink()
    assert find_fault(folder) == "its file `weights.bin` is missing"
    (folder / COMPLETION_MARKER).write_text('{"files"')
    assert find_fault(folder) == f"its `{COMPLETION_MARKER}` cannot be read"


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    assert find_last_checkpoint(tmp_path / "nowhere") is None
    for step in (2, 9, 10):
        fake_checkpoint(tmp_path / f"checkpoint-{step}")
    fake_checkpoint(tmp_path / "checkpoint-11", is_whole=False)
    fake_checkpoint(tmp_path / "checkpoint-12-old")
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert "Passing over the checkpoint" in caplog.text and "checkpoint-11" in caplog.text


def test_rotation_keeps_the_newest_whole_ones_and_the_best(tmp_path):
    for step in (1, 2, 3, 5, 6):
        fake_checkpoint(tmp_path / f"checkpoint-{step}")
    for step in (4, 7):
        fake_checkpoint(tmp_path / f"checkpoint-{step}", is_whole=False)
    rotate_checkpoints(tmp_path, None)
    assert len(folders(tmp_path)) == 7
    rotate_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-1"))
    assert folders(tmp_path) == [f"checkpoint-{step}" for step in (1, 5, 6, 7)]
    rotate_checkpoints(tmp_path, 1)
    assert folders(tmp_path) == ["checkpoint-6", "checkpoint-7"]


def test_rotation_never_removes_the_only_whole_one(tmp_path):
    fake_checkpoint(tmp_path / "checkpoint-1")
    for step in (2, 3):
        fake_checkpoint(tmp_path / f"checkpoint-{step}", is_whole=False)
    rotate_checkpoints(tmp_path, 1)
    assert "checkpoint-1" in folders(tmp_path)


def test_a_training_keeps_as_many_as_it_is_told(tmp_path):
    trainer = make_trainer(tmp_path, **TRAINING, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert folders(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    assert trainer.args.save_total_limit == 2


# --- merging ---


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base and a training on it: (base folder, folder of the adapter)."""
    root = tmp_path_factory.mktemp("adapted")
    tiny_model().save_pretrained(root / "base")
    tiny_processor().save_pretrained(root / "base")
    trainer = make_trainer(
        root / "run", base=root / "base", per_device_train_batch_size=2, save_strategy="epoch", learning_rate=1e-2
    )
    trainer.train()
    return root / "base", root / "run" / "checkpoint-2"


def test_merging_gives_the_same_answers_from_a_plain_folder(adapted, tmp_path):
    base, adapter = adapted
    merge_adapter(adapter, tmp_path / "merged")
    merged = VisaForVideoSegmentation.from_pretrained(tmp_path / "merged").eval()
    processor = VisaProcessor.from_pretrained(tmp_path / "merged")
    plain = VisaForVideoSegmentation.from_pretrained(base).eval()
    batch = VisaDataCollator(processor)([TinySamples(1, ("masks",))[0]])
    with torch.no_grad():
        before = plain(**batch)
        expected = PeftModel.from_pretrained(plain, adapter).eval()(**batch)
        ours = merged(**batch)
    torch.testing.assert_close(ours.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(ours.mask_logits, expected.mask_logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert (before.logits - ours.logits).abs().max() > 0.01
    assert not any("lora" in name or "base_layer" in name for name, _ in merged.named_parameters())
    assert sorted(one.name for one in tmp_path.iterdir()) == ["merged"]


def test_the_base_may_have_moved(adapted, tmp_path):
    base, adapter = adapted
    shutil.copytree(base, tmp_path / "elsewhere")
    shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        FileNotFoundError, match="The base model `.*gone` is not there. Give where it is now as `base`"
    ):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=tmp_path / "elsewhere", dtype=torch.bfloat16)
    assert VisaForVideoSegmentation.from_pretrained(tmp_path / "merged").lm_head.weight.dtype == torch.bfloat16


def test_what_cannot_be_merged_is_refused(adapted, tmp_path):
    base, adapter = adapted
    with pytest.raises(FileNotFoundError, match="holds no `adapter_config.json`"):
        merge_adapter(base, tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already and is not empty"):
        merge_adapter(adapter, tmp_path / "full")
    half = tmp_path / "checkpoint-3"
    shutil.copytree(adapter, half)
    (half / COMPLETION_MARKER).unlink()
    with pytest.raises(ValueError, match="writing it was not finished"):
        merge_adapter(half, tmp_path / "merged")
    nameless = tmp_path / "nameless"
    shutil.copytree(adapter, nameless)
    config = json.loads((nameless / "adapter_config.json").read_text())
    (nameless / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": ""}))
    with pytest.raises(ValueError, match="does not name the model that was trained. Give it as `base`"):
        merge_adapter(nameless, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
