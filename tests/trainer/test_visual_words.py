"""The first training of a model from nothing: the visual tower learns the words of answers."""

import math

import pytest
import torch

from tests.trainer.training import TinySamples, logged, prepared_model, tiny_model, tiny_processor
from visa_hf.modeling.visual_tokens_visa import merge_visual_tokens
from visa_hf.trainer import VisaDataCollator, VisaTrainer, VisaTrainingArguments, VisualWordsTrainer
from visa_hf.trainer.visual_words import (
    frame_masks,
    grouping_loss,
    layout_loss,
    patch_groups,
    patch_shares,
    surprises,
    target_patches,
    token_losses,
    token_shares,
    tower_losses,
    visual_token_states,
    word_losses,
)

OPTIONS = {
    "language_model": "frozen",
    "text_hidden_fcs": False,
    "mask_decoder": False,
    "unfreeze": ("vision_tower", "mm_projector"),
}
KINDS = ("masks", "one", "no_seg", "text")


def make_words_trainer(
    folder, *, kinds=("masks", "one", "no_seg", "text"), num_samples=4, options=OPTIONS, **settings
):
    eval_dataset = settings.pop("eval_dataset", None)
    arguments = {
        "objective": "visual_words",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 1e-3,
        **settings,
    }
    return VisualWordsTrainer(
        prepared_model(options),
        VisaTrainingArguments(output_dir=str(folder), **arguments),
        tiny_processor(),
        train_dataset=TinySamples(num_samples, kinds),
        eval_dataset=eval_dataset,
    )


# --- by hand ---


def test_the_loss_of_a_mask_is_the_mean_over_its_words_the_rare_ones_weighing_more():
    logits = torch.tensor([[0.0, math.log(3), 0.0, -50.0], [1.0, 1.0, 1.0, -50.0], [0.0] * 4, [5.0, 0.0, 0.0, 0.0]])
    words = [torch.tensor(said, dtype=torch.long) for said in ([0, 1, 3], [0, 2, 3], [0, 3], [])]
    # Of three rows with words all have 0 and 3, which therefore weigh nothing; the last row does not count.
    expected = [math.log(5 / 3), math.log(3), 0.0, 0.0]
    torch.testing.assert_close(word_losses(surprises(logits), words), torch.tensor(expected))
    words[2] = torch.tensor([3])
    # Now 0 is in two of three.
    rare, common = math.log(3), math.log(1.5)
    first = (rare * math.log(5 / 3) + common * math.log(5)) / (rare + common)
    torch.testing.assert_close(word_losses(surprises(logits), words)[0], torch.tensor(first))


def test_shares_of_patches_are_those_of_the_square_in_the_middle():
    processor = tiny_processor().image_processor  # resizes the shorter side to 64 and crops the middle
    mask = torch.zeros(1, 32, 64)
    mask[0, :16, 16:32] = 1  # of the square in the middle, the upper left quarter
    mask[0, :, 60:] = 1  # cropped away
    shares = patch_shares(mask, processor, 2)
    torch.testing.assert_close(shares, torch.tensor([[1.0, 0.0, 0.0, 0.0]]))


def test_shares_of_patches_follow_the_whole_frame_when_it_is_squashed():
    from visa_hf import VisaConfig, VisaProcessor

    config = VisaConfig.tiny(tracker_config=None)
    squashing = VisaProcessor.from_config(config, tiny_processor().tokenizer, clip_resize="squash")
    mask = torch.zeros(2, 16, 48)
    mask[0, :, 24:] = 1
    mask[1, :4] = 1
    shares = patch_shares(mask, squashing.image_processor, 2)
    torch.testing.assert_close(shares, torch.tensor([[0.0, 1.0, 0.0, 1.0], [0.5, 0.5, 0.0, 0.0]]))


def test_patches_of_the_same_masks_that_touch_are_one_group():
    picture = """
        a a . . b
        a . . b b
        . . . . .
        c . c c .
        c . . c d
    """
    drawn = [letter for line in picture.split() for letter in line]
    # "all" covers a, b and both parts of c; d is covered by less than half.
    masks = {"a": "a", "b": "b", "all": "abc"}
    shares = torch.tensor([[0.6 if letter in letters else 0.0 for letter in drawn] for letters in masks.values()])
    shares[2][drawn.index("d")] = 0.4
    groups = patch_groups(shares, 5)
    parts = [[0, 1, 5], [4, 8, 9], [15, 20], [17, 18, 23]]
    expected = torch.zeros(25, dtype=torch.int64)
    for part in parts:
        expected[part] = min(part) + 1
    assert torch.equal(groups, expected)


def test_without_a_mask_all_patches_are_of_one_group():
    assert patch_groups(torch.zeros(0, 9), 3).tolist() == [0] * 9


def test_patches_on_opposite_sides_do_not_touch():
    shares = torch.tensor([[0.0, 1.0, 1.0, 0.0]])  # the end of the first row, and the beginning of the second
    assert patch_groups(shares, 2).tolist() == [0, 2, 3, 0]


def test_the_grouping_loss_is_the_contrast_of_each_patch_with_all_others():
    patches = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [9.0, 9.0]])
    groups = torch.tensor([1, 1, 0, 0])

    def surprise(patch, other):
        distances = {n: float((patches[patch] - patches[n]).square().sum()) / 2 for n in range(4) if n != patch}
        total = sum(math.exp(-distance) for distance in distances.values())
        return distances[other] + math.log(total)

    # Each group counts the same.
    expected = (surprise(0, 1) + surprise(1, 0)) / 4 + (surprise(2, 3) + surprise(3, 2)) / 4
    torch.testing.assert_close(grouping_loss(patches, groups), torch.tensor(expected))
    # A patch alone has nothing to be near to; the others count on.
    expected = (surprise(0, 1) + surprise(1, 0)) / 2
    torch.testing.assert_close(grouping_loss(patches, torch.tensor([1, 1, 0, 5])), torch.tensor(expected))
    assert grouping_loss(patches, torch.arange(4)) == 0


def test_gradients_of_the_grouping_loss_pull_a_group_together():
    torch.manual_seed(0)
    patches, groups = torch.randn(16, 8, requires_grad=True), torch.arange(16) % 3
    for _ in range(50):
        (gradient,) = torch.autograd.grad(grouping_loss(patches, groups), patches)
        assert gradient.isfinite().all()
        patches = (patches - gradient).detach().requires_grad_()
    distances = torch.cdist(patches, patches)
    same = groups[:, None] == groups[None]
    assert distances[same].max() < distances[~same].min()


def test_the_place_and_size_of_a_group_are_in_the_first_three_channels():
    # The right column of 2 x 2 patches: x = 2.5, y = 0; the side of a square of two patches is 0.707 of the frame's.
    patches, groups = torch.zeros(4, 4), torch.tensor([0, 2, 0, 2])
    size = 40 * 0.5**0.5 - 7
    torch.testing.assert_close(layout_loss(patches, groups, 2), torch.tensor(2.5**2 + size**2))
    patches[groups == 2] = torch.tensor([2.5, 0.0, size, 9.0])
    assert layout_loss(patches, groups, 2) < 1e-9
    assert layout_loss(patches, torch.zeros(4, dtype=torch.int64), 2) == 0


def test_a_batch_s_losses_are_those_of_its_masks_one_by_one(tmp_path):
    trainer = make_words_trainer(tmp_path)
    collator, samples = VisaDataCollator(tiny_processor()), TinySamples(4, ("masks", "one", "no_seg", "text"))
    batch = collator([samples[draw] for draw in range(4)])
    features = trainer.model.get_image_features(batch["pixel_values"]).last_hidden_state
    patches = target_patches(features, batch["num_frames"])
    masks = frame_masks(trainer.processing_class, batch, patches.shape[1])
    losses, groupings = tower_losses(trainer.model, patches, masks)
    assert losses.shape == groupings.shape == (5,)  # 1 + 3 of the first, 1 of the second
    model, processor = trainer.model, trainer.processing_class
    features, words, expected_groupings = [], [], []
    for draw in (0, 1):
        batch = collator([samples[draw]])
        target = batch["pixel_values"][-1:]
        patches = model.get_image_features(target).last_hidden_state[0]
        side = round(len(patches) ** 0.5)
        shares = [patch_shares(masks, processor.image_processor, side) for masks in batch["mask_labels"] if len(masks)]
        groups = patch_groups(torch.cat(shares), side)
        grouping = grouping_loss(patches, groups) + layout_loss(patches, groups, side)
        expected_groupings += [grouping] * sum(map(len, shares))
        for labels, masks in zip(batch["labels"], batch["mask_labels"], strict=True):
            said = sorted(set(labels.tolist()) - {-100, *processor.tokenizer.all_special_ids})
            for mask in masks:
                share = patch_shares(mask[None], processor.image_processor, round(len(patches) ** 0.5))[0]
                features.append(sum(part * patch for part, patch in zip(share, patches, strict=True)) / share.sum())
                words.append(torch.tensor(said))
    expected = word_losses(surprises(model.lm_head(model.model.mm_projector(torch.stack(features)))), words)
    assert expected.min() > 0
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(groupings, torch.stack(expected_groupings), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("answer", "telling"),
    [
        ("it is red [SEG].", "it is red [SEG]."),
        ("the blue shape. it is red [SEG].", "it is red [SEG]."),
        ("what stands. still. it is red [SEG]. a hat.", "it is red [SEG]. a hat."),
    ],
)
def test_only_sentences_from_the_one_with_seg_on_tell_of_the_masks(answer, telling):
    processor = tiny_processor()
    samples = TinySamples(1, ("one",))
    batch = VisaDataCollator(processor)([samples[0]])
    tokens = torch.tensor(processor.tokenizer(answer, add_special_tokens=False).input_ids)
    batch["labels"] = torch.cat([torch.full((1, 5), -100), tokens[None]], dim=1)
    batch["mask_labels"][0][:] = 1
    (words,) = frame_masks(processor, batch, 16).words
    expected = set(processor.tokenizer(telling, add_special_tokens=False).input_ids)
    assert set(words.tolist()) == expected - set(processor.tokenizer.all_special_ids)


# --- visual tokens in the language model ---


def _read(model, batch, **options):
    outputs = model(**batch, use_cache=False, output_visual_states=True, **options)
    states = visual_token_states(model, outputs.middle_hidden_state, batch)
    return target_patches(outputs.patch_features, batch["num_frames"]), states


def test_states_of_visual_tokens_are_those_of_the_target_packed_or_not():
    model, samples = tiny_model().eval(), TinySamples(5, ("masks", "one", "frames", "no_seg", "text"))
    batch = VisaDataCollator(tiny_processor())([samples[draw] for draw in range(5)])
    with torch.no_grad():
        patches, states = _read(model, batch)
        packed_patches, packed_states = _read(model, batch, packs_conversations=True)
    length, middle = model.config.num_visual_tokens, (model.config.text_config.num_hidden_layers + 1) // 2
    assert states.shape == (len(batch["num_frames"]), length, model.config.text_config.hidden_size)
    torch.testing.assert_close(packed_patches, patches)
    torch.testing.assert_close(packed_states, states, rtol=1e-4, atol=1e-4)
    # By hand: the language model over what the first conversation of each video begins with.
    for video, frames in enumerate(batch["pixel_values"].split(batch["num_frames"].tolist())):
        row = batch["input_ids"][batch["conversation_to_video"].tolist().index(video)]
        last = int((row == model.config.image_token_id).nonzero().max()) + 1
        with torch.no_grad():
            states_by_layer = model.model(
                input_ids=row[None, :last],
                pixel_values=frames,
                num_frames=[len(frames)],
                conversation_to_video=[0],
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states
            alone = states_by_layer[middle]
            features = model.get_image_features(frames[-1:]).last_hidden_state[0]
        torch.testing.assert_close(states[video], alone[0, -length:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(patches[video], features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", [True, [0], (-1,), []])
def test_other_states_may_be_asked_for_beside_the_visual_ones(asked):
    model = tiny_model().eval()
    batch = VisaDataCollator(tiny_processor())([TinySamples(1, ("one",))[0]])
    with torch.no_grad():
        alone = model(**batch, use_cache=False, output_visual_states=True)
        both = model(**batch, use_cache=False, output_visual_states=True, output_hidden_states=asked)
        every = model(**batch, use_cache=False, output_hidden_states=True).hidden_states
    assert alone.hidden_states is None
    torch.testing.assert_close(both.middle_hidden_state, alone.middle_hidden_state)
    for layer in range(len(every)) if asked is True else asked:
        torch.testing.assert_close(both.hidden_states[layer], every[layer])


def test_before_a_single_layer_there_are_the_embeddings():
    text = {**tiny_model().config.text_config.to_dict(), "num_hidden_layers": 1}
    model = tiny_model(text_config=text).eval()
    batch = VisaDataCollator(tiny_processor())([TinySamples(1, ("one",))[0]])
    with torch.no_grad():
        outputs = model(**batch, use_cache=False, output_visual_states=True)
        read = model.model.language_model.layers[0](
            outputs.middle_hidden_state,
            position_embeddings=model.model.language_model.rotary_emb(
                outputs.middle_hidden_state, torch.arange(batch["input_ids"].shape[1])[None]
            ),
        )
        logits = model.lm_head(model.model.language_model.norm(read))
    torch.testing.assert_close(logits, outputs.logits)


def test_states_are_returned_only_when_they_are_asked_for():
    model = tiny_model().eval()
    batch = VisaDataCollator(tiny_processor())([TinySamples(1, ("one",))[0]])
    with torch.no_grad():
        outputs = model(**batch, use_cache=False)
    assert outputs.middle_hidden_state is None and outputs.patch_features is None


@pytest.mark.parametrize("use_token_merging", [True, False])
def test_shares_of_visual_tokens_are_averaged_as_features_are(use_token_merging):
    config = tiny_model(use_token_merging=use_token_merging).config
    torch.manual_seed(0)
    patches, shares = torch.randn(2, 16, 8), torch.rand(3, 16)
    patches[:, :, -1] = 0
    owners = [0, 1, 1]
    found = token_shares(config, patches, shares, owners)
    for row, share, owner in zip(found, shares, owners, strict=True):
        expected = share
        if use_token_merging:
            # What is averaged for the share is averaged for a channel that holds it, too weak to change the clusters.
            marked = torch.cat([patches[owner, :, :-1], 1e-4 * share[:, None]], dim=1)[None]
            merged = merge_visual_tokens(marked, config.merge_sizes, config.merge_neighbors)
            expected = merged[0, :, -1] * 1e4
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)


def test_the_loss_of_a_mask_s_tokens_is_that_of_its_words_weighted_by_its_share_of_them():
    model, processor = tiny_model().eval(), tiny_processor()
    samples = TinySamples(4, ("one",))
    batch = VisaDataCollator(processor)([samples[draw] for draw in range(4)])
    batch["mask_labels"] = [torch.zeros_like(masks) for masks in batch["mask_labels"]]
    batch["mask_labels"][0][:, :, 8:20] = 1
    batch["mask_labels"][1][:, :12] = 1
    batch["mask_labels"][2][:, :, 6:10] = 1  # two things
    batch["mask_labels"][2][:, :, 22:26] = 1
    with torch.no_grad():
        patches, states = _read(model, batch)
        masks = frame_masks(processor, batch, patches.shape[1])
        every_share = token_shares(model.config, patches, masks.shares, masks.videos)
        losses = token_losses(model, every_share, states, masks)
        told, words = [], []
        for video in (0, 1):
            shares = token_shares(model.config, patches, masks.shares[[video]], [video])[0]
            scores = surprises(model.lm_head(model.model.language_model.norm(states[video])))
            told.append(sum(share**2 * row for share, row in zip(shares, scores, strict=True)) / shares.square().sum())
            words.append(masks.words[video])
        expected = word_losses(torch.stack(told), words)
    # The third mask is of two things, the fourth of nothing.
    assert losses.shape == (2,) and losses.min() > 0
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_visual_words_count_beside_answers_and_masks(tmp_path):
    def trainer(**settings):
        arguments = VisaTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=0.0,
            **{"per_device_train_batch_size": 4, **settings},
        )
        model = prepared_model({**OPTIONS, "language_model": "full", "mask_decoder": True}, loss_reduction="step")
        return VisaTrainer(model, arguments, tiny_processor(), train_dataset=TinySamples(8, KINDS))

    def first_loss(**settings):
        made = trainer(**settings)
        made.train()
        return made, logged(made, "loss")[0][0]

    made, plain = first_loss()
    _, weighted = first_loss(visual_words_weight=0.5)
    _, cut = first_loss(visual_words_weight=0.5, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    batch = VisaDataCollator(tiny_processor())([TinySamples(8, KINDS)[draw] for draw in range(4)])
    model = made.model.eval()
    with torch.no_grad():
        patches, states = _read(model, batch)
        masks = frame_masks(tiny_processor(), batch, patches.shape[1])
        shares = token_shares(model.config, patches, masks.shares, masks.videos)
        losses = torch.cat([*tower_losses(model, patches, masks), token_losses(model, shares, states, masks)])
    expected = plain + 0.5 * float(losses.sum()) / len(masks.videos)
    assert weighted == pytest.approx(expected, rel=1e-3) and weighted > plain + 0.1
    # Words weigh by how rare they are in a micro-batch, which is another one here.
    assert cut == pytest.approx(weighted, rel=0.3)


def test_evaluation_knows_no_visual_words(tmp_path):
    arguments = VisaTrainingArguments(
        output_dir=str(tmp_path),
        visual_words_weight=0.5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        num_overlays=0,
    )
    found = []
    for weight in (0.0, 0.5):
        arguments.visual_words_weight = weight
        trainer = VisaTrainer(
            prepared_model(OPTIONS), arguments, tiny_processor(), eval_dataset=TinySamples(2, ("one",))
        )
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == found[1]


# --- training ---


def test_only_tower_projector_and_head_move_and_the_loss_falls(tmp_path):
    trainer = make_words_trainer(tmp_path, kinds=("masks", "one"), num_samples=240, max_steps=60)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("model.vision_tower.", "model.mm_projector.", "lm_head.")) for name in moved)
    # Masks are noise: what is nowhere in particular cannot be learnt, what is said about it can.
    losses = [loss for (loss,) in logged(trainer, "text_loss")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("kinds", [("text",), ("no_seg",)], ids=str)
def test_steps_without_a_mask_move_nothing(tmp_path, kinds):
    trainer = make_words_trainer(tmp_path, kinds=kinds)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert logged(trainer, "loss") == [(0.0,)]
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


# --- refusals ---


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="makes no masks to evaluate. Leave the evaluation out"):
        make_words_trainer(tmp_path, eval_dataset=TinySamples(4, ("masks",)))
    with pytest.raises(ValueError, match="Name `vision_tower` in `unfreeze`"):
        make_words_trainer(tmp_path, options={**OPTIONS, "unfreeze": ("mm_projector",)})
    with pytest.raises(ValueError, match="`objective` is 'words' but must be one of answers, visual_words"):
        VisaTrainingArguments(output_dir=str(tmp_path), objective="words", use_cpu=True)
    with pytest.raises(ValueError, match="`visual_words_weight` is -1 but must be at least 0"):
        VisaTrainingArguments(output_dir=str(tmp_path), visual_words_weight=-1, use_cpu=True)
    with pytest.raises(ValueError, match="`visual_words_weight` is 0.5 and `objective` 'visual_words', but then"):
        VisaTrainingArguments(
            output_dir=str(tmp_path), visual_words_weight=0.5, objective="visual_words", use_cpu=True
        )


def test_several_processes_are_refused_beside_visual_words(tmp_path, monkeypatch):
    monkeypatch.setattr(VisaTrainingArguments, "world_size", property(lambda self: 2))
    VisaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="`visual_words_weight` is 0.5, with which one process alone trains"):
        VisaTrainingArguments(output_dir=str(tmp_path), visual_words_weight=0.5, use_cpu=True)
