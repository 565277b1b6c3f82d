"""examples/looks_lesson.py: a model that the package carries takes the lesson."""

import numpy as np
import pytest
import torch

from tests.example_scripts import load_example, refusal_of, weights_changed_by
from visa_hf.bundled import BUNDLED_MODEL
from visa_hf.datasets_scripts.synthetic import ClipOptions
from visa_hf.datasets_scripts.synthetic_scene import ATTRIBUTES
from visa_hf.inference import load_model

OPTIONS = ClipOptions(size=(128, 128), num_frames=(1, 1), levels=(1,), num_expressions=1)


@pytest.fixture(scope="module")
def lesson():
    return load_example("looks_lesson")


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
    changed = weights_changed_by(lesson, monkeypatch, tmp_path, "--pictures", 20, "--held-out", 4, "--steps", 2)
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


@pytest.mark.parametrize("held_out", [0, 20])
def test_pictures_are_left_to_learn_from_and_to_ask_for(lesson, tmp_path, monkeypatch, capsys, held_out):
    arguments = (BUNDLED_MODEL, tmp_path / "out", "--pictures", 20, "--held-out", held_out)
    error = refusal_of(lesson, monkeypatch, capsys, *arguments)
    assert f"--held-out is {held_out}; it must be positive and leave some of the 20 pictures." in error
