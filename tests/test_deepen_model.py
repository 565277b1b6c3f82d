"""examples/deepen_model.py: more layers, the same answers."""

import pytest
import torch

from tests.example_scripts import load_example, run_example
from tests.trainer.training import TinySamples, tiny_model, tiny_processor
from visa_hf import VisaForVideoSegmentation, VisaProcessor
from visa_hf.trainer import VisaDataCollator


@pytest.fixture
def script():
    return load_example("deepen_model")


def test_a_deeper_model_says_the_same_and_can_learn(script, monkeypatch, tmp_path):
    model, processor = tiny_model().eval(), tiny_processor()
    model.save_pretrained(tmp_path / "old")
    processor.save_pretrained(tmp_path / "old")
    num_layers = model.config.text_config.num_hidden_layers
    run_example(script, monkeypatch, tmp_path / "old", tmp_path / "new", "--layers", num_layers)
    deeper = VisaForVideoSegmentation.from_pretrained(tmp_path / "new")
    assert deeper.config.text_config.num_hidden_layers == 2 * num_layers
    batch = VisaDataCollator(VisaProcessor.from_pretrained(tmp_path / "new"))([TinySamples(1, ("one",))[0]])
    with torch.no_grad():
        old = model(**batch, use_cache=False)
    new = deeper(**batch, use_cache=False)
    torch.testing.assert_close(new.logits, old.logits)
    torch.testing.assert_close(new.mask_logits, old.mask_logits)
    new.loss.backward()
    layers = deeper.model.language_model.layers
    for layer, copied in zip(layers[num_layers:], layers[:num_layers], strict=True):
        torch.testing.assert_close(layer.self_attn.q_proj.weight, copied.self_attn.q_proj.weight)
        assert not layer.self_attn.o_proj.weight.any() and layer.self_attn.o_proj.weight.grad.abs().max() > 0
        assert not layer.mlp.down_proj.weight.any() and layer.mlp.down_proj.weight.grad.abs().max() > 0


def test_more_layers_than_can_be_copied_are_refused(script, monkeypatch, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "old")
    with pytest.raises(SystemExit):
        run_example(script, monkeypatch, tmp_path / "old", tmp_path / "new", "--layers", 9)
    assert "--layers is 9; give 1 to 2, as many as the model has to be copied." in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
