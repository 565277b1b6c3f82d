"""examples/looks_lesson.py: a model that the package carries takes the lesson."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from visa_hf import VisaForVideoSegmentation
from visa_hf.bundled import BUNDLED_MODEL
from visa_hf.datasets_scripts.synthetic import ClipOptions
from visa_hf.datasets_scripts.synthetic_scene import ATTRIBUTES
from visa_hf.inference import load_model

SCRIPT = Path(__file__).parents[1] / "examples" / "looks_lesson.py"
OPTIONS = ClipOptions(size=(128, 128), num_frames=(1, 1), levels=(1,), num_expressions=1)


@pytest.fixture(scope="module")
def lesson():
    spec = importlib.util.spec_from_file_location("looks_lesson", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_masks_turn_with_their_picture_in_all_eight_ways(lesson):
    picture = lesson._picture(3, 0, OPTIONS)
    assert len(picture.looks) == len(picture.masks) and picture.looks.shape[1] == len(ATTRIBUTES)
    generator, seen = np.random.default_rng(0), set()
    inside = np.stack([picture.frame[mask.numpy()].mean(axis=0) for mask in picture.masks])
    for _ in range(60):
        turned = lesson._turned(picture, generator)
        found = np.stack([turned.frame[mask.numpy()].mean(axis=0) for mask in turned.masks])
        np.testing.assert_allclose(found, inside)
        seen.add(turned.frame.tobytes())
    assert len(seen) == 8
    assert lesson._turned(picture, None) is picture


def test_the_lesson_changes_tower_and_projector_alone(lesson, tmp_path, monkeypatch):
    model, processor = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = [str(tmp_path / "model"), str(tmp_path / "out"), "--pictures", "20", "--held-out", "4", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["looks_lesson.py", *arguments])
    lesson.main()
    after = VisaForVideoSegmentation.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(("model.vision_tower.", "model.mm_projector.")) for name in changed)


def test_what_is_taught_is_learnt(lesson):
    model, processor = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    pictures = [lesson._picture(5, index, OPTIONS) for index in range(24)]
    # Held out and taught are the same here: what is asked for is whether the steps go where they should.
    torch.manual_seed(0)
    for parameter in model.model.vision_tower.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    poor = lesson.teach(model, processor, pictures, 20, 1, 0.0)
    taught = lesson.teach(model, processor, [*pictures[:20], *pictures[:20]], 20, 40, 1e-3)
    assert sum(taught.values()) > sum(poor.values()) + 0.1
