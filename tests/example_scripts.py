"""The scripts in examples/, loaded and run as a user would."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from visa_hf import VisaForVideoSegmentation
from visa_hf.bundled import BUNDLED_MODEL
from visa_hf.inference import load_model


def load_example(name):
    """Import examples/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(script, monkeypatch, *arguments):
    """Run a script's `main` with these words after its name."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
    script.main()


def refusal_of(script, monkeypatch, capsys, *arguments):
    """Run a script's `main` with words that it refuses; return what it says."""
    with pytest.raises(SystemExit):
        run_example(script, monkeypatch, *arguments)
    return capsys.readouterr().err


def weights_changed_by(lesson, monkeypatch, folder, *options):
    """Give the bundled model a lesson, from one folder to another; return the names of the weights that changed."""
    model, processor = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    run_example(lesson, monkeypatch, folder / "model", folder / "out", *options)
    before = model.state_dict()
    after = VisaForVideoSegmentation.from_pretrained(folder / "out").state_dict()
    return {name for name, value in after.items() if not torch.equal(value, before[name])}
