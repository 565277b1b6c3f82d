"""examples/motion_lesson.py: a model that the package carries takes the lesson."""

import pytest
import torch

from tests.example_scripts import load_example, refusal_of, weights_changed_by
from visa_hf.bundled import BUNDLED_MODEL
from visa_hf.inference import load_model


@pytest.fixture(scope="module")
def lesson():
    return load_example("motion_lesson")


def test_words_of_motion_differ_by_what_the_head_tells_apart_and_no_others_change(lesson):
    model, processor = load_model(BUNDLED_MODEL, device="cpu", dtype="float32")
    before = model.lm_head.weight.detach().clone()
    torch.manual_seed(0)
    head = torch.nn.Linear(before.shape[1], len(lesson.MOTIONS))
    lesson.keep_head(model, processor, head)
    after, told = model.lm_head.weight.detach(), head.weight.detach()
    words = [*lesson.MOTIONS[:-1], "moving", "standing"]
    tokens = [processor.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in words]
    directions, (moving, standing) = tokens[:4], tokens[4:]
    torch.testing.assert_close(after[directions[0]] - after[directions[1]], told[0] - told[1])
    torch.testing.assert_close(after[directions].mean(dim=0), before[directions].mean(dim=0))
    torch.testing.assert_close(after[moving] - after[standing], told[:4].mean(dim=0) - told[4])
    torch.testing.assert_close(after[[moving, standing]].mean(dim=0), before[[moving, standing]].mean(dim=0))
    is_other = torch.ones(len(before), dtype=torch.bool)
    is_other[tokens] = False
    assert torch.equal(after[is_other], before[is_other])


def test_the_lesson_changes_language_model_and_projector_alone(lesson, tmp_path, monkeypatch):
    changed = weights_changed_by(lesson, monkeypatch, tmp_path, "--clips", 6, "--held-out", 2, "--steps", 2)
    assert changed
    assert all(
        name.startswith(("model.language_model.layers.", "model.language_model.norm.", "model.mm_projector."))
        for name in changed
    )


@pytest.mark.parametrize("held_out", [0, 6])
def test_clips_are_left_to_learn_from_and_to_ask_for(lesson, tmp_path, monkeypatch, capsys, held_out):
    arguments = (BUNDLED_MODEL, tmp_path / "out", "--clips", 6, "--held-out", held_out)
    error = refusal_of(lesson, monkeypatch, capsys, *arguments)
    assert f"--held-out is {held_out}; it must be positive and leave some of the 6 clips." in error
