"""The published rates hold, draws depend on nothing but their number, and a wrong file is told with its line."""

import json
import logging
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.datasets_scripts.training_rows import (
    conversation_row,
    conversations_of,
    small_world,
    write_video,
)
from tests.datasets_scripts.trees import box, write_revos
from tests.media import read_code, write_constant_rate
from visa_hf import datasets_scripts
from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.frame_store import FrameError
from visa_hf.datasets_scripts.known_datasets import KNOWN_DATASETS
from visa_hf.datasets_scripts.mixture import (
    MAX_ATTEMPTS,
    GroupConfig,
    MixtureConfig,
    SourceConfig,
    TrainingSamples,
)
from visa_hf.datasets_scripts.samples import ConversationSource, ExpressionSource, Sample, Source
from visa_hf.datasets_scripts.sampling import SamplingRecipe
from visa_hf.datasets_scripts.training_sources import load_sources
from visa_hf.rle import encode_mask

RATES = {"sem_seg": 9, "refer_seg": 3, "vqa": 3, "reason_seg": 1, "chatunivi": 4, "rvos": 12}
INSIDE_RVOS = {"mevis": 4000, "ref_youtube_vos": 15000, "ref_davis17": 400, "revos": 3000, "lv_vis": 3000}


class NamedSource:
    """A source whose samples hold nothing but a number drawn."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __len__(self) -> int:
        return 1

    def sample(self, rng: np.random.Generator, draw: int) -> Sample:
        return Sample(draw, self.name, str(rng.integers(2**40)), None, (), None, (), ())


def named_sources(names: list[str]) -> dict[str, Source]:
    return {name: NamedSource(name) for name in names}  # type: ignore[misc]


def identity(batch: list[Sample]) -> list[Sample]:
    return batch


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    root = tmp_path_factory.mktemp("mixture")
    rows = [conversation_row(9, write_video(root, 9, 1), [("What?", "That.")])]
    return {
        "clips": ExpressionSource("clips", *small_world(root), root),
        "talk": ConversationSource("talk", conversations_of(rows), root),
    }


def is_within(count: int, total: int, probability: float) -> bool:
    return abs(count - total * probability) < 4 * (total * probability * (1 - probability)) ** 0.5


def described(sample: Sample) -> tuple:
    """All of a sample, comparable."""
    frames = [sample.target_frame, *sample.reference_frames]
    masks = [conversation.masks for conversation in sample.conversations]
    arrays = [None if array is None else (array.shape, array.tobytes()) for array in (*frames, *masks)]
    said = [replace(conversation, masks=None) for conversation in sample.conversations]
    named = (sample.draw, sample.source, sample.video_id, sample.target_idx, sample.reference_idx)
    return (*named, sample.is_foreign_target, sample.attempt, said, arrays)


# rates


def test_the_published_probabilities() -> None:
    probabilities = MixtureConfig.published().probabilities()
    assert sum(probabilities.values()) == pytest.approx(1)
    for name, weight in INSIDE_RVOS.items():
        assert probabilities[name] == pytest.approx(12 / 32 * weight / 25400)
    for name in ("ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary"):
        assert probabilities[name] == pytest.approx(9 / 32 / 5)
    for name in ("refclef", "refcoco", "refcoco+", "refcocog"):
        assert probabilities[name] == pytest.approx(3 / 32 / 4)
    assert probabilities["llava_instruct"] == pytest.approx(3 / 32)
    assert probabilities["reason_seg"] == pytest.approx(1 / 32)
    assert probabilities["chat_univi_instruct"] == pytest.approx(4 / 32)
    assert len(probabilities) == 17


def test_the_published_recipes() -> None:
    recipes = {source.name: source.recipe for source in MixtureConfig.published().sources}
    assert {name for name, recipe in recipes.items() if recipe.min_video_frames == 2} == {"mevis", "revos", "lv_vis"}
    lowered = {name for name, recipe in recipes.items() if recipe.lower_case}
    assert lowered == {
        "ade20k", "cocostuff", "pascal_part", "paco_lvis", "mapillary", "refclef", "refcoco", "refcoco+", "refcocog",
    }  # fmt: skip
    padded = {name for name, recipe in recipes.items() if recipe.pad_to_square}
    assert padded == {"chat_univi_instruct"} == {name for name, recipe in recipes.items() if recipe.last_turn_only}
    foreign = {name for name, recipe in recipes.items() if recipe.foreign_probability == 0.05}
    assert set(INSIDE_RVOS) <= foreign and not foreign & lowered and "reason_seg" not in foreign


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_draws_follow_the_rates(seed: int) -> None:
    mixture = MixtureConfig.published()
    probabilities = mixture.probabilities()
    samples = TrainingSamples(named_sources(list(probabilities)), mixture, seed, 40_000)
    counts = Counter(samples.source_of(draw) for draw in range(len(samples)))
    for name, probability in probabilities.items():
        assert is_within(counts[name], len(samples), probability), name
    of_group = {group.name: sum(counts[source.name] for source in group.sources) for group in mixture.groups}
    chi_square = sum((of_group[name] - 1250 * rate) ** 2 / (1250 * rate) for name, rate in RATES.items())
    assert chi_square < 20.5  # 5 degrees of freedom, 0.1%


def test_expected_counts_are_the_rates_of_the_draws() -> None:
    counts = MixtureConfig.published().counts(32_000)
    assert sum(counts.values()) == pytest.approx(32_000)
    assert counts["reason_seg"] == pytest.approx(1000) and counts["ade20k"] == pytest.approx(1800)


def test_source_of_tells_what_the_sample_will_be(sources: dict[str, Source]) -> None:
    samples = TrainingSamples(sources, {"clips": 1, "talk": 1}, 3, 40)
    assert [samples.source_of(draw) for draw in range(40)] == [samples[draw].source for draw in range(40)]
    assert {sample.source for sample in samples} == {"clips", "talk"}


def test_missing_sources_are_named_or_their_rate_is_shared() -> None:
    mixture = MixtureConfig.published()
    available = [name for name in mixture.probabilities() if name not in ("revos", "ade20k", "reason_seg")]
    with pytest.raises(ValueError, match="draws from `ade20k`, `reason_seg`, `revos`, which is not at hand"):
        mixture.probabilities(available)
    with pytest.raises(ValueError, match="`renormalise=True` to share its rate"):
        TrainingSamples(named_sources(available), mixture, 0, 1)
    shared = mixture.probabilities(available, renormalise=True)
    assert sum(shared.values()) == pytest.approx(1) and list(shared) == available
    assert shared["cocostuff"] == pytest.approx(9 / 31 / 4)  # its group keeps its rate; ReasonSeg's goes to all
    assert shared["mevis"] == pytest.approx(12 / 31 * 4000 / 22400)
    assert len(TrainingSamples(named_sources(available), mixture, 0, 1, renormalise=True).probabilities) == 14
    with pytest.raises(ValueError, match="None of the mixture's sources is at hand"):
        mixture.probabilities([], renormalise=True)
    with pytest.raises(ValueError, match="The mixture has no source `rev0s`"):
        mixture.probabilities([*available, "rev0s"], renormalise=True)


def test_a_weight_of_zero_needs_no_source() -> None:
    group = GroupConfig("rvos", 1, (SourceConfig("revos", 2, "revos"), SourceConfig("mevis", 0, "mevis")))
    mixture = MixtureConfig((group, GroupConfig("vqa", 0, (SourceConfig("llava_instruct", 1, "llava_instruct"),))))
    assert mixture.probabilities(["revos"]) == {"revos": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SourceConfig("a", -1, "revos"), "The weight of `a` is -1 but must be at least 0"),
        (lambda: SourceConfig("a", float("inf"), "revos"), "must be at least 0, and finite"),
        (lambda: SourceConfig("a", 1, "revoz"), "Source `a` is of data set 'revoz', but known are mevis"),
        (lambda: GroupConfig("g", 1, ()), "Group `g` has no sources"),
        (lambda: GroupConfig("g", 1, (SourceConfig("a", 0, "revos"),)), "weights of its sources are all 0"),
        (lambda: MixtureConfig(()), "No group has a weight above 0"),
        (
            lambda: MixtureConfig(tuple(GroupConfig(g, 1, (SourceConfig("a", 1, "revos"),)) for g in "xy")),
            "Source `a` is there twice",
        ),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# draws


def test_a_sample_depends_on_seed_and_draw_alone(sources: dict[str, Source]) -> None:
    weights = {"clips": 3, "talk": 1}
    samples = TrainingSamples(sources, weights, 11, 30)
    forward = [described(samples[draw]) for draw in range(30)]
    backward = [described(samples[draw]) for draw in reversed(range(30))][::-1]
    assert forward == backward
    longer = TrainingSamples(sources, weights, 11, 1000)
    assert [described(longer[draw]) for draw in range(10, 30)] == forward[10:], "resuming goes on where it stopped"
    other = TrainingSamples(sources, weights, 12, 30)
    assert [described(other[draw]) for draw in range(30)] != forward


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (2, "fork"), (1, "spawn")])
def test_workers_change_nothing(sources: dict[str, Source], workers: int, method: str | None) -> None:
    samples = TrainingSamples(sources, {"clips": 3, "talk": 1}, 5, 16)
    expected = {draw: described(samples[draw]) for draw in range(16)}
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    loader = DataLoader(
        samples,
        batch_size=3,
        sampler=order,
        num_workers=workers,
        collate_fn=identity,
        multiprocessing_context=method,
        timeout=300 if workers else 0,
    )
    loaded = [sample for batch in loader for sample in batch]
    assert [sample.draw for sample in loaded] == order
    assert all(described(sample) == expected[sample.draw] for sample in loaded)


def test_draws_outside_the_run_and_odd_numbers_are_refused(sources: dict[str, Source]) -> None:
    weights = {"clips": 1, "talk": 1}
    samples = TrainingSamples(sources, weights, 0, 5)
    assert len(samples) == 5
    for draw in (5, -1):
        with pytest.raises(IndexError, match=f"Draw {draw} is outside the run, which has 5"):
            samples[draw]
    with pytest.raises(ValueError, match="`num_draws` is -1"):
        TrainingSamples(sources, weights, 0, -1)
    with pytest.raises(ValueError, match="`seed` is -3"):
        TrainingSamples(sources, weights, -3, 5)
    with pytest.raises(ValueError, match="`on_error` is \"?'?ignore"):
        TrainingSamples(sources, weights, 0, 5, on_error="ignore")
    with pytest.raises(ValueError, match="Weights are given for clips, but the sources are clips, talk"):
        TrainingSamples(sources, {"clips": 1}, 0, 5)
    with pytest.raises(ValueError, match="No source has a weight above 0"):
        TrainingSamples(sources, {"clips": 0, "talk": 0}, 0, 5)


def broken_world(root: Path) -> dict[str, Source]:
    """Four videos, of which one has lost its frames and another has a mask of a wrong size."""
    expressions, masks = small_world(root, (6, 6, 6, 6))
    for file in (root / "JPEGImages" / "video1").iterdir():
        file.unlink()
    wrong = encode_mask(np.ones((3, 3), dtype=bool))
    rows = [row | {"rle": [wrong] * 6} if row["anno_id"] == "2_0" else row for row in masks]
    source = ExpressionSource("clips", expressions, type(masks).from_list(rows, features=masks.features), root)
    return {"clips": source}


def test_what_cannot_be_read_stops_the_run_or_is_drawn_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = broken_world(tmp_path)
    strict = TrainingSamples(sources, {"clips": 1}, 0, 60)
    failed, whole = {}, {}
    for draw in range(60):
        try:
            whole[draw] = described(strict[draw])
        except (FrameError, AnnotationError) as error:
            failed[draw] = str(error)
    assert any("is missing" in text for text in failed.values()) and any(
        "has size" in text for text in failed.values()
    )
    lenient = TrainingSamples(sources, {"clips": 1}, 0, 60, on_error="skip")
    with caplog.at_level(logging.WARNING, logger="visa_hf"):
        samples = [lenient[draw] for draw in range(60)]
    assert [sample.draw for sample in samples] == list(range(60))
    assert {sample.draw for sample in samples if sample.attempt} == set(failed)
    assert all(described(samples[draw]) == expected for draw, expected in whole.items()), "the others stay as they are"
    assert lenient.num_skipped == sum(sample.attempt for sample in samples) == len(caplog.records)
    draw = min(failed)
    assert f"Draw {draw} from `clips` is drawn again (1 so far in this process): {failed[draw]}" in caplog.text
    again = TrainingSamples(sources, {"clips": 1}, 0, 60, on_error="skip")
    assert [described(again[draw]) for draw in reversed(range(60))] == [described(s) for s in reversed(samples)]


def test_data_that_is_all_broken_ends_the_run_even_when_skipping(tmp_path: Path) -> None:
    expressions, masks = small_world(tmp_path, (3,))
    for file in (tmp_path / "JPEGImages" / "video0").iterdir():
        file.unlink()
    sources = {"clips": ExpressionSource("clips", expressions, masks, tmp_path)}
    samples = TrainingSamples(sources, {"clips": 1}, 0, 3, on_error="skip")
    with pytest.raises(RuntimeError, match=f"Draw 1 from `clips` failed {MAX_ATTEMPTS} times.*is missing"):
        samples[1]


# files


def test_a_mixture_comes_back_from_its_file(tmp_path: Path) -> None:
    mixture = MixtureConfig.published()
    mixture.save(tmp_path / "published.yaml")
    assert MixtureConfig.load(tmp_path / "published.yaml") == mixture
    recipe = SamplingRecipe(max_reference_frames=9, foreign_probability=0.0)
    own = SourceConfig("mine", 0.5, "own_data", "other", str(tmp_path), recipe)
    changed = MixtureConfig((*mixture.groups, GroupConfig("mine", 2.5, (own,))))
    changed.save(tmp_path / "changed.yaml")
    assert MixtureConfig.load(tmp_path / "changed.yaml") == changed
    assert "max_reference_frames: 9" in (tmp_path / "changed.yaml").read_text()


def test_a_file_is_read_as_documented(tmp_path: Path) -> None:
    (tmp_path / "mixture.yaml").write_text(
        """
groups:
  rvos:
    weight: 12
    sources:
      mevis: 4000
      my_clips:
        weight: 100.5
        dataset: own_data
        split: all
        data_dir: ../clips
        sampling: {max_reference_frames: 7, min_reference_frames: 7}
"""
    )
    (group,) = MixtureConfig.load(tmp_path / "mixture.yaml").groups
    assert (group.name, group.weight) == ("rvos", 12)
    assert group.sources[0] == SourceConfig("mevis", 4000, "mevis", recipe=SamplingRecipe(min_video_frames=2))
    recipe = SamplingRecipe(min_reference_frames=7, max_reference_frames=7)
    folder = str(tmp_path.parent / "clips")
    assert group.sources[1] == SourceConfig("my_clips", 100.5, "own_data", "all", folder, recipe)


HEAD = "groups:\n  rvos:\n    weight: 12\n    sources:\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "      revoz: 3\n", "line 5: source `revoz` is of the unknown data set `revoz`. Did you mean `revos`"),
        (HEAD + "      mevis: 1\n      revos: -3\n", "line 6: The weight of `revos` is -3 but must be at least 0"),
        (HEAD + "      revos: many\n", "line 5: The weight of `revos` is 'many' but must be a number"),
        (HEAD + "      revos: .nan\n", "line 5: The weight of `revos` is nan"),
        (HEAD + "      revos: true\n", "line 5: The weight of `revos` is True but must be a number"),
        (HEAD + "      revos: [1]\n", "line 5: source `revos` must be a mapping"),
        (HEAD + "      revos: 1\n      revos: 2\n", "line 6: `sources` of group `rvos` has the key `revos` twice"),
        (HEAD + "      revos:\n        weihgt: 1\n", "line 6: source `revos` has the unknown key `weihgt`. Did"),
        (HEAD + "      revos:\n        split: train\n", "line 6: source `revos` has no `weight`"),
        (HEAD + "      a:\n        weight: 1\n        dataset: z\n", "line 7: source `a` is of the unknown data set"),
        (HEAD + "      revos:\n        weight: 1\n        split: 3\n", "line 7: `split` is 3 but must be text"),
        (
            HEAD + "      revos:\n        weight: 1\n        sampling:\n          lower_case: 1\n",
            "line 8: `lower_case` is 1 but must be true or false",
        ),
        (
            HEAD + "      revos:\n        weight: 1\n        sampling:\n          lowercase: true\n",
            "line 8: `sampling` of source `revos` has the unknown key `lowercase`. Did you mean `lower_case`?",
        ),
        (
            HEAD + "      revos:\n        weight: 1\n        sampling:\n          min_reference_frames: 20\n",
            "line 8: `max_reference_frames` is 12, less than `min_reference_frames`, 20",
        ),
        ("groups:\n  rvos:\n    weight: 12\n", "line 3: group `rvos` has no `sources`"),
        ("groups:\n  rvos:\n    weight: 12\n    sources: {}\n", "line 3: Group `rvos` has no sources"),
        ("groups:\n  rvos:\n    weight: x\n    sources: {revos: 1}\n", "line 3: The weight of `rvos` is 'x'"),
        ("group:\n  rvos: 1\n", "line 1: the mixture has the unknown key `group`. Did you mean `groups`?"),
        ("- groups\n", "mixture.yaml: a mapping of names to values is needed"),
        ("{}\n", "line 1: `groups` is missing"),
        ("groups: {}\n", "line 1: No group has a weight above 0"),
        ("groups:\n  rvos: [1\n", "line 3: this is not YAML"),
        ("", "mixture.yaml: a mapping of names to values is needed"),
        ("groups: \0\n", "mixture.yaml: this is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError) as caught:
        MixtureConfig.load(tmp_path / "mixture.yaml")
    assert message in str(caught.value) and str(tmp_path / "mixture.yaml") in str(caught.value)


def test_values_that_are_not_plain_are_refused(tmp_path: Path) -> None:
    for value in ("!!python/object/apply:os.getcwd []", "!!python/name:os.getcwd ''", "2001-99-99"):
        (tmp_path / "m.yaml").write_text(HEAD + f"      revos: {value}\n")
        with pytest.raises(ValueError, match="m.yaml, line 5"):
            MixtureConfig.load(tmp_path / "m.yaml")


# folders


def test_every_known_data_set_has_a_builder_with_its_configs() -> None:
    for name, known in KNOWN_DATASETS.items():
        builder = getattr(datasets_scripts, known.builder)
        assert set(known.configs) <= set(builder.builder_configs), name


REVOS = MixtureConfig((GroupConfig("rvos", 1, (SourceConfig("revos", 1, "revos"),)),))


def test_revos_is_loaded_from_its_folder_and_its_masks_are_those_of_the_target(tmp_path: Path) -> None:
    write_revos(tmp_path / "ReVOS")
    sources = load_sources(REVOS, {"rvos": tmp_path / "ReVOS"}, cache_dir=tmp_path / "cache")
    assert list(sources) == ["revos"] and len(sources["revos"]) == 1, "the video of one frame is left out"
    seen = set()
    for sample in TrainingSamples(sources, REVOS, 0, 30):
        t = sample.target_idx
        turtle, other = box(0, 2 * t) if t != 1 else np.zeros_like(box(0, 0)), box(2, 2 * t)
        expected = {"the left turtle": turtle, "what swims?": turtle | other, "the submarine": turtle & False}
        assert sample.video_id == "sea/turtles" and sample.reference_idx == (0, 1, 2)
        for conversation in sample.conversations:
            np.testing.assert_array_equal(conversation.masks[0], expected[conversation.query])
        seen.add(t)
    assert seen == {0, 1, 2}


def test_foregrounds_of_revos_are_loaded_where_they_are_published(tmp_path: Path) -> None:
    folder, cache = write_revos(tmp_path / "ReVOS"), tmp_path / "cache"
    recipe = SamplingRecipe(foreign_probability=0.0)
    source = SourceConfig("revos", 1, "revos", "valid", str(folder), recipe)
    mixture = MixtureConfig((GroupConfig("rvos", 1, (source,)),))
    expected = [box(0, 0), box(2, 2) | box(2, 9), box(4, 4)]
    samples = TrainingSamples(load_sources(mixture, cache_dir=cache, with_foregrounds=True), mixture, 0, 5)
    for sample in samples:
        np.testing.assert_array_equal(sample.foreground, expected[sample.target_idx])
    (folder / "mask_dict_foreground.json").unlink()
    samples = TrainingSamples(load_sources(mixture, cache_dir=cache, with_foregrounds=True), mixture, 0, 2)
    assert [sample.foreground for sample in samples] == [None, None]


def test_your_own_video_file_is_sampled_at_the_frames_that_you_annotated(tmp_path: Path) -> None:
    write_constant_rate(tmp_path / "clip.mp4", 30)
    mask = np.zeros((64, 96), dtype=bool)
    mask[10:30, 20:40] = True
    line = {"video": "clip.mp4", "expression": "The block", "masks": {"3": encode_mask(mask), "17": None}}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    source = SourceConfig("mine", 1, "own_data", data_dir=str(tmp_path))
    mixture = MixtureConfig((GroupConfig("mine", 1, (source,)),))
    with tempfile.TemporaryDirectory() as cache:  # not inside the data, whose files are all looked at
        sources = load_sources(mixture, cache_dir=cache)
        samples = [sample for sample in TrainingSamples(sources, mixture, 0, 8)]
    assert {sample.target_idx for sample in samples} == {3, 17}
    for sample in samples:
        assert read_code(sample.target_frame) == sample.target_idx
        assert [read_code(frame) for frame in sample.reference_frames] == list(sample.reference_idx)
        assert 8 <= len(sample.reference_idx) <= 12 and sample.target_idx in sample.reference_idx
        (conversation,) = sample.conversations
        np.testing.assert_array_equal(conversation.masks[0], mask if sample.target_idx == 3 else mask & False)


def test_a_folder_given_goes_before_that_of_the_mixture_and_a_source_before_its_group(tmp_path: Path) -> None:
    folder = write_revos(tmp_path / "ReVOS")
    (tmp_path / "empty").mkdir()
    source = SourceConfig("revos", 1, "revos", "valid", str(tmp_path / "empty"))
    mixture = MixtureConfig((GroupConfig("rvos", 1, (source,)),))
    roots = {"rvos": tmp_path / "empty", "revos": folder}
    (loaded,) = load_sources(mixture, roots, cache_dir=tmp_path / "cache").values()
    assert TrainingSamples({"revos": loaded}, mixture, 0, 1)[0].video_id == "birds"
    with pytest.raises(FileNotFoundError, match="mask_dict.json"):
        load_sources(mixture, cache_dir=tmp_path / "cache")


def test_sources_without_a_folder_are_left_out_only_when_asked(tmp_path: Path) -> None:
    mixture = MixtureConfig.published()
    roots = {"revos": write_revos(tmp_path / "ReVOS")}
    with pytest.raises(ValueError, match="`ade20k`, .*which is not at hand"):
        load_sources(mixture, roots, cache_dir=tmp_path / "cache")
    sources = load_sources(mixture, roots, cache_dir=tmp_path / "cache", renormalise=True)
    assert TrainingSamples(sources, mixture, 0, 5, renormalise=True).probabilities == {"revos": 1.0}


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    mixture = MixtureConfig((GroupConfig("rvos", 1, (SourceConfig("revos", 1, "revos", "test"),)),))
    with pytest.raises(
        ValueError, match="Source `revos` is to have the split 'test', but .*ReVOS` has 'train', 'valid'"
    ):
        load_sources(mixture, {"revos": write_revos(tmp_path / "ReVOS")}, cache_dir=tmp_path / "cache")


def test_sources_without_a_folder_are_named(tmp_path: Path) -> None:
    group = GroupConfig("rvos", 1, (SourceConfig("revos", 1, "revos"), SourceConfig("mevis", 1, "mevis")))
    mixture = MixtureConfig((group,))
    with pytest.raises(ValueError, match="draws from `revos`, `mevis`, which is not at hand"):
        load_sources(mixture)
    with pytest.raises(ValueError, match="draws from `mevis`, which is not at hand"):
        load_sources(mixture, {"revos": tmp_path})
    with pytest.raises(ValueError, match="Folders are given for revoz, which the mixture does not name"):
        load_sources(mixture, {"revoz": tmp_path})
    with pytest.raises(FileNotFoundError, match=r"There is no folder `.*nowhere` \(source `revos`\)"):
        load_sources(mixture, {"rvos": tmp_path / "nowhere"})
