"""Who chooses the target frame: by hand, by the truth, by a file; and what cannot choose is refused beforehand."""

import json

import numpy as np
import pytest

from tests.evaluation.worlds import SIZE, expression_row, masks_row, revos_set, square, write_frames
from tests.random_model import build_demo_checkpoint
from visa_hf.commands import evaluate as command
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet
from visa_hf.evaluation.predict import PredictionOptions, predict
from visa_hf.evaluation.targets import NAMES, OracleFrameSampler, TargetChoice
from visa_hf.inference import load_model
from visa_hf.modeling.frame_samplers_visa import VideoView
from visa_hf.modeling.frame_source_visa import open_frames


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    build_demo_checkpoint(folder)
    return str(folder)


@pytest.fixture(scope="module")
def load(checkpoint):
    loaded = load_model(checkpoint, device="cpu")
    return lambda model, **_: loaded


@pytest.fixture
def world(tmp_path):
    """One video of five frames: a square that grows till frame 3, another one that is seen in frames 1 and 2 alone."""
    frames = write_frames(tmp_path, "v", 5)
    sides = (4, 5, 6, 9, 7)
    grows = [square(2, 2, side) for side in sides]
    shortly = [None, square(14, 20, 5), square(14, 20, 5), None, None]
    masks = [masks_row("v", "1", grows), masks_row("v", "2", shortly)]
    rows = [
        expression_row("v", "0", "the square that grows", 0, ["1"], frames),
        expression_row("v", "1", "who hides?", 1, ["2"], frames),
        expression_row("v", "2", "the dog", 2, [], frames),
        expression_row("v", "3", "both of them", 0, ["1", "2"], frames),
    ]
    return EvaluationSet(BENCHMARKS["revos"], "valid", tmp_path, rows, masks)


def view_of(evaluation_set):
    names = evaluation_set.expressions[0].frames
    return VideoView(open_frames([evaluation_set.root / name for name in names]), num_reference_frames=2)


def chosen(evaluation_set, *options):
    """Target of each expression, chosen without a model."""
    choice, view = TargetChoice(evaluation_set, *options), view_of(evaluation_set)
    return [choice.sampler_of(each)(view, each.text).target_idx for each in evaluation_set.expressions]


def test_the_oracle_knows_where_most_is_seen(world):
    # 81 pixels in frame 3; the first of two frames alike; nothing: the middle; together 25 + 25, 36 + 25, 81.
    assert chosen(world, "oracle") == [3, 1, 2, 3]
    selection = OracleFrameSampler((0, 9, 4, 0, 0))(view_of(world), "any")
    assert (selection.reason, selection.num_frames) == ("oracle: 9 pixels are to be seen", 5)
    nothing = OracleFrameSampler((0,) * 5)(view_of(world), "any")
    assert nothing.reason == "oracle: nothing is to be seen, so the middle frame"


def test_objects_that_overlap_count_once_for_the_oracle(tmp_path):
    frames = write_frames(tmp_path, "v", 2)
    masks = [
        masks_row("v", "1", [square(0, 0, 6), square(0, 0, 5)]),
        masks_row("v", "2", [square(0, 0, 6), square(9, 9, 5)]),
    ]
    rows = [expression_row("v", "0", "both", 0, ["1", "2"], frames)]
    assert chosen(EvaluationSet(BENCHMARKS["revos"], "valid", tmp_path, rows, masks), "oracle") == [1]  # 36 and 50


def test_first_and_last_are_the_ends(world):
    assert chosen(world, "first") == [0] * 4
    assert chosen(world, "last") == [4] * 4
    assert TargetChoice(world).sampler_of(world.expressions[0]) is None
    assert TargetChoice(world, "visa").sampler_of(world.expressions[0]) == "visa"


def test_the_command_offers_all_names():
    assert command.SAMPLERS == NAMES


@pytest.mark.parametrize("layout", ["published", "ids", "words"])
def test_a_file_tells_shares_by_id_or_by_words(world, tmp_path, layout):
    shares = (0.0, 0.4, 0.7, 1.0)
    if layout == "published":
        # The same words twice in a video, with two numbers: the id decides.
        entries = {str(n): {"exp": "the same words", "tp": share} for n, share in enumerate(shares)}
        data = {"videos": {"v": {"expressions": entries}}}
    elif layout == "ids":
        data = {"v": {str(n): 100 * share for n, share in enumerate(shares)}}
    else:
        data = {"v": {each.text.upper(): share for each, share in zip(world.expressions, shares, strict=True)}}
    path = tmp_path / "tp.json"
    path.write_text(json.dumps(data))
    assert chosen(world, "middle", path) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"w": {"0": 10}}, "has no video 'v'"),
        ({"v": {"0": 10, "1": 20, "2": 30}}, "video `v`, expression `3` is not known. .* has no query 'both of them'"),
    ],
)
def test_a_file_that_lacks_something_is_refused_before_anything_is_computed(world, tmp_path, data, message):
    path = tmp_path / "tp.json"
    path.write_text(json.dumps(data))

    def refuse(*_, **__):
        raise AssertionError("no model is needed to see that")

    with pytest.raises(ValueError, match=f"The target frame of .*{message}"):
        predict(world, tmp_path / "out", "demo", options=PredictionOptions(percentages=str(path)), load=refuse)
    assert not (tmp_path / "out").exists()


def test_what_cannot_choose_is_refused(world, tmp_path):
    with pytest.raises(ValueError, match="`sampler` is 'best' but must be one of middle, first, last, visa, oracle."):
        TargetChoice(world, "best")
    with pytest.raises(ValueError, match="`sampler` is 'oracle' and `percentages` are given, but only one"):
        TargetChoice(world, "oracle", "tp.json")
    with pytest.raises(FileNotFoundError, match="There is no percentages file `gone.json`"):
        TargetChoice(world, percentages="gone.json")
    rows = [expression_row("v", "0", "it", 0, [], list(world.expressions[0].frames))]
    server = EvaluationSet(BENCHMARKS["mevis"], "valid", world.root, rows)
    with pytest.raises(ValueError, match="split `valid` of `mevis` has none that are public. Take another"):
        TargetChoice(server, "oracle")


@pytest.mark.parametrize("mode", ["shared", "published"])
def test_predictions_are_made_on_the_frames_that_are_chosen(world, load, tmp_path, mode):
    for sampler, expected in (("first", [0] * 4), ("oracle", [3, 1, 2, 3]), ("middle", [2] * 4)):
        out = tmp_path / sampler
        predict(world, out, "demo", options=PredictionOptions(sampler=sampler, mode=mode), load=load)
        rows = [json.loads(line) for line in (out / "predictions.jsonl").open()]
        assert [row["target_frame"] for row in rows] == expected
        assert json.loads((out / "run.json").read_text())["sampler"] == sampler


def test_the_model_itself_chooses_and_references_can_be_left_out(world, load, tmp_path):
    options = PredictionOptions(sampler="visa", num_reference_frames=0)
    predict(world, tmp_path / "out", "demo", options=options, load=load)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").open()]
    assert [row["reference_frames"] for row in rows] == [[]] * 4


def test_another_choice_is_another_run(checkpoint, load, tmp_path):
    evaluation_set = revos_set(tmp_path / "data")
    path, out = tmp_path / "tp.json", tmp_path / "out"
    shares = {each.expression_id: 0.5 for each in evaluation_set.expressions}
    path.write_text(json.dumps({"a": shares, "b": shares}))
    options = PredictionOptions(percentages=str(path))
    predict(evaluation_set, out, checkpoint, options=options, load=load)
    with pytest.raises(ValueError, match="`sampler` was 'middle' and is 'first'; `percentages` was"):
        predict(evaluation_set, out, checkpoint, options=PredictionOptions(sampler="first"), load=load)
    path.write_text(json.dumps({"a": shares | {"0": 0.6}, "b": shares}))
    with pytest.raises(ValueError, match="run with other settings: `percentages_fingerprint` was"):
        predict(evaluation_set, out, checkpoint, options=options, load=load)


def test_the_area_is_that_of_the_mask(world):
    sampler = TargetChoice(world, "oracle").sampler_of(world.expressions[3])
    union = np.zeros((5, *SIZE), dtype=bool)
    for clip in world.objects_of(world.expressions[3]):
        for frame, rle in enumerate(clip):
            if rle is not None:
                from visa_hf.rle import decode_mask

                union[frame] |= decode_mask(rle)
    assert sampler.areas == tuple(union.sum(axis=(1, 2)).tolist())
