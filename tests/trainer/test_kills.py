"""`kill -9` while `visa train` writes, at moments that are chosen: the same command goes on, and nothing is different.

A process of its own trains, stops at the moment and says so; it is killed there by SIGKILL, with files as they are.
"""

import io
import json
import multiprocessing
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.trainer.training import visa_train
from visa_hf import cli
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset
from visa_hf.trainer import find_last_checkpoint
from visa_hf.trainer.checkpoints import COMPLETION_MARKER, find_fault

pytestmark = pytest.mark.slow

NUM_STEPS = 3
# The checkpoint that is being written.
KILLED = "checkpoint-2"
RECIPE = {
    # With dropout: resumed, the random numbers must go on as well.
    "trained": "{lora_dropout: 0.3}",
    "schedule__steps_per_epoch": NUM_STEPS,
    "schedule__global_batch_size": 2,
    "arguments__per_device_train_batch_size": 1,
    "arguments__save_steps": 1,
    "arguments__save_total_limit": 1,
}


# --- where it stops ---


def stop_in_the_middle_of_a_file(stop, checkpoint=KILLED):
    save = torch.save

    def half(content, path, *args, **kwargs):
        if Path(path).parts[-2:] != (checkpoint, "optimizer.pt"):
            return save(content, path, *args, **kwargs)
        buffer = io.BytesIO()
        save(content, buffer, *args, **kwargs)
        with open(path, "wb") as file:
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            stop()

    torch.save = half


def stop_before_the_marker_has_its_name(stop):
    replace = Path.replace
    Path.replace = lambda self, target: (
        stop() if Path(target).parts[-2:] == (KILLED, COMPLETION_MARKER) else replace(self, target)
    )


def stop_in_the_middle_of_rotation(stop):
    remove = shutil.rmtree

    def half(folder, *args, **kwargs):
        if Path(folder).name != "checkpoint-1":
            return remove(folder, *args, **kwargs)
        for path in sorted(Path(folder).iterdir())[::2]:
            path.unlink()
        stop()

    shutil.rmtree = half


def stop_before_a_folder_has_its_name(stop, name="final"):
    rename = Path.rename
    Path.rename = lambda self, target: stop() if Path(target).name == name else rename(self, target)


# --- the killed process ---


def train(out, world, cache):
    return cli.main(visa_train(out, world, cache, **RECIPE))


def train_until(prepare, reached, *folders):
    """Train in this process, up to the moment that `prepare` arranges for; there wait for the kill."""

    def stop():
        reached.send("reached")
        time.sleep(600)

    prepare(stop)
    reached.send(f"ended with {train(*folders)}")


def kill_at(prepare, *folders):
    """Start a training in a new process and kill it at the moment."""
    # Forked from a process that has imported everything and done nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "visa_hf.trainer.run"])
    reached, said = context.Pipe(duplex=False)
    process = context.Process(target=train_until, args=(prepare, said, *folders), daemon=True)
    process.start()
    said.close()
    try:
        # Long: on a busy machine, a training takes minutes.
        assert reached.poll(500) and reached.recv() == "reached"
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Where the clips are, and where prepared rows are kept."""
    root = tmp_path_factory.mktemp("places")
    options = ClipOptions(size=(48, 64), num_frames=(4, 5))
    write_dataset(root / "world", num_videos={"train": 3}, options=options, show_progress=False)
    return root / "world", root / "cache"


@pytest.fixture(scope="module")
def whole(places, tmp_path_factory):
    """Folder of the training that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(out, *places) == 0
    return out


def logged(folder):
    """All that was logged but the times."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [{name: value for name, value in row.items() if "time" not in name} for row in state["log_history"]]


def faults(out):
    return {path.name: find_fault(path) for path in sorted(out.glob("checkpoint-*"))}


NO_MARKER = f"it has no `{COMPLETION_MARKER}`: writing it was not finished"


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (stop_in_the_middle_of_a_file, {"checkpoint-1": None, KILLED: NO_MARKER}),
        (stop_before_the_marker_has_its_name, {"checkpoint-1": None, KILLED: NO_MARKER}),
        (stop_in_the_middle_of_rotation, {"checkpoint-1": NO_MARKER, KILLED: None}),
        (stop_before_a_folder_has_its_name, {"checkpoint-3": None}),
    ],
    ids=["file", "marker", "rotation", "result"],
)
def test_a_training_that_is_killed_while_it_writes_goes_on_exactly(prepare, expected, places, whole, tmp_path):
    out = tmp_path / "out"
    kill_at(prepare, out, *places)
    assert faults(out) == expected
    newest = max(name for name, fault in expected.items() if fault is None)
    assert Path(find_last_checkpoint(out)).name == newest
    assert not (out / "final").exists()
    # What is tested is there: files are as the kill left them.
    if prepare is stop_in_the_middle_of_a_file:
        sizes = [(folder / "optimizer.pt").stat().st_size for folder in (out / KILLED, out / "checkpoint-1")]
        assert 0 < sizes[0] < sizes[1]
    elif prepare is stop_before_the_marker_has_its_name:
        assert (out / KILLED / f"{COMPLETION_MARKER}.tmp").is_file()
    elif prepare is stop_in_the_middle_of_rotation:
        assert 0 < len(list((out / "checkpoint-1").iterdir())) < len(list((out / KILLED).iterdir())) - 1

    assert train(out, *places) == 0
    assert faults(out) == {"checkpoint-3": None}
    assert logged(out / "checkpoint-3") == logged(whole / "checkpoint-3")
    assert len([row for row in logged(out / "checkpoint-3") if "loss" in row]) == NUM_STEPS
    weights = [folder / "final" / "adapter_model.safetensors" for folder in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())


@pytest.mark.parametrize(
    ("prepare", "left"),
    [
        (partial(stop_in_the_middle_of_a_file, checkpoint="checkpoint-1"), {"checkpoint-1": NO_MARKER}),
        (partial(stop_before_a_folder_has_its_name, name="base"), {}),
    ],
    ids=["checkpoint", "base"],
)
def test_a_training_that_is_killed_in_its_very_first_save_begins_again(prepare, left, places, whole, tmp_path):
    out = tmp_path / "out"
    kill_at(prepare, out, *places)
    assert faults(out) == left and find_last_checkpoint(out) is None
    assert train(out, *places) == 0
    assert logged(out / "checkpoint-3") == logged(whole / "checkpoint-3")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
