"""Where the language model looks while it describes a thing: weights, positions, loss and refusals."""

import pytest
import torch

from tests.trainer.training import TinySamples, logged, prepared_model, tiny_model, tiny_processor
from visa_hf.trainer import VisaDataCollator, VisaTrainer, VisaTrainingArguments
from visa_hf.trainer.pointing import attention_weights, describing_spans, pointing_losses
from visa_hf.trainer.visual_words import frame_masks, target_patches, token_shares

SEG, STOP = 90, 80
OPTIONS = {"language_model": "full", "text_hidden_fcs": True, "mask_decoder": True}
KINDS = ("masks", "one", "no_seg", "text")


def read(model, kinds, **options):
    processor = tiny_processor()
    samples = TinySamples(len(kinds), kinds)
    batch = VisaDataCollator(processor)([samples[draw] for draw in range(len(kinds))])
    outputs = model(**batch, use_cache=False, output_visual_states=True, **options)
    patches = target_patches(outputs.patch_features, batch["num_frames"])
    masks = frame_masks(processor, batch, patches.shape[1])
    return batch, outputs, token_shares(model.config, patches, masks.shares, masks.videos)


def text_config(model_type, **others):
    known = tiny_model().config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")
    return {
        "model_type": model_type,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        **{name: getattr(known, name) for name in names},
        **others,
    }


def stop_id():
    return tiny_processor().tokenizer.convert_tokens_to_ids(".")


@pytest.mark.parametrize(
    ("labels", "spans"),
    [
        # The position before predicts a token: one earlier at both ends.
        ([-100, -100, 1, 2, SEG, STOP], [(1, 4)]),
        ([-100, 1, 2, STOP, 3, 4, SEG, STOP], [(3, 6)]),
        ([-100, 1, STOP, 2, SEG, 3, SEG, STOP], [(2, 4), (4, 6)]),
        ([-100, 1, SEG, SEG], [(0, 2), (2, 3)]),
        ([-100, 1, SEG, STOP, -100, -100, 2, SEG], [(0, 2), (5, 7)]),
        ([-100, 1, 2, -100, SEG], [(3, 4)]),
        ([-100, 1, STOP], []),
    ],
)
def test_positions_that_describe_a_mask(labels, spans):
    assert describing_spans(torch.tensor(labels), SEG, STOP) == spans


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_key_heads", [2, 4])
def test_weights_are_those_of_the_model_s_own_attention(model_type, num_key_heads):
    text = text_config(model_type, num_key_value_heads=num_key_heads)
    model = tiny_model(text_config=text if model_type == "qwen2" else {**text, "head_dim": 16}).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        batch, outputs, _ = read(model, ("masks", "one"), output_attentions=True)
        rows, places = [0, 0, 2], [5, 19, 30]
        found = attention_weights(model, outputs.middle_hidden_state, rows, places)
    assert found.shape == (3, 2, batch["input_ids"].shape[1])
    every = outputs.attentions[model.middle_layer]
    torch.testing.assert_close(found, every[rows, :2, places], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(dim=2), torch.ones(3, 2))


def test_the_loss_is_that_of_weights_on_what_the_mask_covers():
    model = tiny_model().eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        batch, outputs, shares = read(model, ("masks", "one"), output_attentions=True)
        shares[1] = 0
        losses = pointing_losses(model, outputs.middle_hidden_state, batch, shares, stop_id())
    weights = outputs.attentions[model.middle_layer]
    heads = weights.shape[1] // 2
    expected, row = [], 0
    for number, labels in enumerate(batch["labels"]):
        columns = (batch["input_ids"][number] == model.config.image_token_id).nonzero()[-shares.shape[1] :, 0]
        for first, end in describing_spans(labels, model.config.seg_token_id, stop_id()):
            logarithms = []
            for place in range(first, end):
                for head in range(heads):
                    on_it = sum(
                        float(weights[number, head, place, column]) * float(share)
                        for column, share in zip(columns, shares[row], strict=True)
                    )
                    logarithms.append(-torch.tensor(on_it + 1e-6).log())
            expected.append(torch.stack(logarithms).mean() if row != 1 else torch.tensor(0.0))
            row += 1
    assert len(expected) == len(shares) == 5 and losses[1] == 0 and losses[2] > 0
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_packed_conversations_look_alike():
    model = tiny_model().eval()
    losses = []
    with torch.no_grad():
        for packs in (False, True):
            batch, outputs, shares = read(model, KINDS, packs_conversations=packs)
            losses.append(pointing_losses(model, outputs.middle_hidden_state, batch, shares, stop_id()))
    assert (losses[0] > 0).any()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-4)


def test_nothing_to_look_at_costs_nothing():
    model = tiny_model().eval()
    with torch.no_grad():
        batch, outputs, shares = read(model, ("no_seg", "one"))
        assert pointing_losses(model, outputs.middle_hidden_state, batch, shares * 0, stop_id()).tolist() == [0.0]
        batch, outputs, _ = read(model, ("no_seg",))
        nothing = shares[:0]
        assert pointing_losses(model, outputs.middle_hidden_state, batch, nothing, stop_id()).shape == (0,)


# --- training ---


def make_trainer(folder, model=None, **settings):
    arguments = VisaTrainingArguments(
        output_dir=str(folder),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **{"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4, **settings},
    )
    model = model or prepared_model(OPTIONS, loss_reduction="step")
    return VisaTrainer(model, arguments, tiny_processor(), train_dataset=TinySamples(8, KINDS))


def test_pointing_counts_beside_answers_and_masks_however_a_batch_is_cut(tmp_path):
    def first_loss(**settings):
        trainer = make_trainer(tmp_path, **settings)
        trainer.train()
        return trainer.model, logged(trainer, "loss")[0][0]

    model, plain = first_loss()
    _, weighted = first_loss(pointing_weight=0.5)
    _, cut = first_loss(pointing_weight=0.5, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    with torch.no_grad():
        batch, outputs, shares = read(model.eval(), KINDS)
        losses = pointing_losses(model, outputs.middle_hidden_state, batch, shares, stop_id())
    expected = plain + 0.5 * float(losses.sum()) / len(shares)
    assert weighted == pytest.approx(expected, rel=1e-3) and weighted > plain + 0.1
    assert cut == pytest.approx(weighted, rel=1e-3)


def test_the_model_learns_to_look_there(tmp_path):
    trainer = make_trainer(tmp_path, pointing_weight=5.0, max_steps=12, learning_rate=3e-3)

    def loss():
        with torch.no_grad():
            batch, outputs, shares = read(trainer.model.eval(), KINDS)
            return float(pointing_losses(trainer.model, outputs.middle_hidden_state, batch, shares, stop_id()).mean())

    before = loss()
    trainer.train()
    assert loss() < before - 0.5


def test_refusals(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`pointing_weight` is -1 but must be at least 0"):
        VisaTrainingArguments(output_dir=str(tmp_path), pointing_weight=-1, use_cpu=True)
    with pytest.raises(ValueError, match="`pointing_weight` is 0.5 and `objective` 'visual_words', but then"):
        VisaTrainingArguments(output_dir=str(tmp_path), pointing_weight=0.5, objective="visual_words", use_cpu=True)
    sliding = text_config("qwen2", use_sliding_window=True, max_window_layers=1, sliding_window=64)
    for text, said in ((text_config("mistral"), "'mistral'"), (sliding, "sliding_attention")):
        model = prepared_model(OPTIONS, text_config=text)
        with pytest.raises(ValueError, match=f"`pointing_weight` is 0.5, .*llama, qwen2, qwen3.*{said}"):
            make_trainer(tmp_path, model, pointing_weight=0.5)
    monkeypatch.setattr(VisaTrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match="`pointing_weight` is 0.5, with which one process alone trains"):
        VisaTrainingArguments(output_dir=str(tmp_path), pointing_weight=0.5, use_cpu=True)
