"""`pipeline("reasoning-video-segmentation")`: the masks of `segment`, for one video or many, and plain refusals."""

import json
import pickle
import re
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from tests.media import test_frame
from tests.random_model import ANSWER, build_demo_checkpoint, make_demo_model
from visa_hf import VisaForVideoSegmentation, segment
from visa_hf.modeling.pipeline_visa import CUSTOM_PIPELINES, LazyMasks, VisaPipeline

TASK = "reasoning-video-segmentation"
KEYS = [
    "query",
    "answer",
    "masks",
    "object_masks",
    "scores",
    "frame_scores",
    "frame_indices",
    "target_frame",
    "reference_frames",
]
SEVERAL = "It is [SEG] and [SEG]. They are white."


@pytest.fixture(scope="module")
def demo():
    return make_demo_model()


@pytest.fixture(scope="module")
def pipe(demo):
    model, processor = demo
    return pipeline(TASK, model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    build_demo_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def frames():
    return np.stack([test_frame(number) for number in range(5)])


def assert_same(found, expected):
    """A dictionary of the pipeline against a `VideoSegmentation`."""
    assert list(found) == KEYS
    assert (found["query"], found["answer"]) == (expected.query, expected.answer)
    assert np.array_equal(found["masks"], expected.masks)
    for position in range(len(expected)):
        assert np.array_equal(found["object_masks"][position], expected.object_masks_of(position))
    np.testing.assert_allclose(found["scores"], expected.scores, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found["frame_scores"], expected.frame_scores, atol=2e-5, rtol=0)
    assert tuple(found["frame_indices"]) == expected.frame_indices
    assert found["target_frame"] == expected.frame_selection.target_idx
    assert tuple(found["reference_frames"]) == expected.frame_selection.reference_idx


def test_one_query_gives_a_dictionary_and_several_a_list(pipe, demo, tiny_clip):
    model, processor = demo
    queries = ["the white block", "what is left of it?"]
    one = segment(tiny_clip, queries[0], model=model, processor=processor)
    several = segment(tiny_clip, queries, model=model, processor=processor)
    assert_same(pipe(str(tiny_clip), queries[0]), one)
    assert_same(pipe({"video": tiny_clip, "query": queries[0]}), one)
    for found, expected in zip(pipe(tiny_clip, queries), several, strict=True):
        assert_same(found, expected)
    assert one.masks.any() and len(pipe(tiny_clip, queries[:1])) == 1


def test_the_results_are_plain_but_for_the_masks(pipe, frames):
    found = pipe(frames, "the block")
    masks = found.pop("masks"), found.pop("object_masks")
    assert json.loads(json.dumps(found)) == found
    assert [each.shape for each in masks] == [(5, 64, 96), (5, 1, 64, 96)]
    assert np.array_equal(masks[0], masks[1][:, 0])


@pytest.mark.parametrize("kind", ["tensor", "list", "images", "image", "picture file"])
def test_every_kind_of_video_is_taken(pipe, frames, tmp_path, kind):
    Image.fromarray(frames[0]).save(tmp_path / "picture.png")
    video = {
        "tensor": torch.from_numpy(frames),
        "list": list(frames),
        "images": [Image.fromarray(frame) for frame in frames],
        "image": Image.fromarray(frames[0]),
        "picture file": tmp_path / "picture.png",
    }[kind]
    expected = pipe(frames[:1] if "e " in kind or kind == "image" else frames, "the block")
    assert np.array_equal(pipe(video, "the block")["masks"], expected["masks"])


def test_several_videos_are_the_same_as_each_alone(pipe, frames):
    inputs = [
        {"video": frames, "query": "the block"},
        {"video": frames[1:4, :40], "query": ["the block", "the ground"]},
        {"video": frames[::-1].copy(), "query": {"query": "the block", "target_frame": 0}},
    ]
    first, second, third = pipe(inputs, threshold=0.4)
    assert [len(second), first["target_frame"], third["target_frame"]] == [2, 2, 0]
    for found, given in ((first, inputs[0]), (third, inputs[2]), (second[1], {**inputs[1], "query": "the ground"})):
        alone = pipe(given["video"], given["query"], threshold=0.4)
        assert np.array_equal(found["masks"], alone["masks"])
        np.testing.assert_allclose(found["frame_scores"], alone["frame_scores"], atol=2e-5, rtol=0)
    assert pipe([]) == []


def test_generators_and_datasets_are_gone_through_one_by_one(pipe, frames):
    taken = []

    def inputs():
        for number in range(3):
            taken.append(number)
            yield {"video": frames[: number + 1], "query": "the block"}

    for results in (pipe(inputs()), pipe(map(dict, inputs()))):
        taken.clear()
        lengths = []
        for result in results:
            lengths.append(len(result["masks"]))
            assert len(taken) <= len(lengths) + 1, "inputs are taken before their turn"
        assert lengths == [1, 2, 3]

    class Rows(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, number):
            if number >= len(self):
                raise IndexError(number)
            return {"video": frames[: number + 1], "query": "the block", "row": {"video": frames, "query": ["it"]}}

    results = pipe(KeyDataset(Rows(), "row"))
    assert [len(result) for result in results] == [1, 1]
    rows = datasets.Dataset.from_list([{"video": "none.mp4", "query": "it"}])
    with pytest.raises(FileNotFoundError, match="There is no video at `none.mp4`"):
        next(iter(pipe(rows)))
    with pytest.raises(ValueError, match="An input has the key 'row', but only `video` and `query` are known."):
        next(iter(pipe(Rows())))


def test_several_masks_one_and_none_stand_beside_their_answers(pipe, frames):
    asked = [{"query": "a", "answer": SEVERAL}, "b", {"query": "c", "answer": "There is none."}]
    several, one, none = pipe(frames, asked)
    assert [each["answer"] for each in (several, one, none)] == [SEVERAL, ANSWER, "There is none."]
    for found, number in ((several, 2), (one, 1), (none, 0)):
        assert found["object_masks"].shape == (5, number, 64, 96)
        assert len(found["scores"]) == number and [len(scores) for scores in found["frame_scores"]] == [number] * 5
        objects = np.asarray(found["object_masks"])
        assert objects.sum(axis=1).max(initial=0) <= 1
        assert np.array_equal(objects.any(axis=1), found["masks"])
    assert np.any(one["masks"]) and not np.any(none["masks"])


def test_a_reason_is_asked_for_in_the_published_words(pipe, demo, frames, monkeypatch):
    processor = demo[1]
    seen = []
    build = processor.build_prompt
    monkeypatch.setattr(
        processor, "build_prompt", lambda *args, **kwargs: seen.append(build(*args, **kwargs)) or seen[-1]
    )
    pipe(frames, ["the block", {"query": "the block", "explain": False}], explain=True, max_new_tokens=3)
    assert "\nthe blockPlease output segmentation mask in the Target Image and explain why. ASSISTANT:" in seen[0]
    assert "\nWhat is the block in the Reference Video? Please respond with" in seen[1]


def test_arguments_are_those_of_segment(pipe, demo, frames):
    model, processor = demo
    options = {"threshold": 0.3, "target_frame": 3, "reference_frames": [1], "start": "1f", "end": "5f", "every": 2}
    options |= {"explain": True, "max_new_tokens": 2, "fps": 10}
    expected = segment(frames, "the block", model=model, processor=processor, **options)
    assert_same(pipe(frames, "the block", **options), expected)
    assert expected.frame_indices == (1, 3)
    # Given when the pipeline is made, they hold for each call that does not say otherwise.
    made = pipeline(TASK, model=model, processor=processor, device="cpu", **options)
    assert_same(made(frames, "the block"), expected)
    assert made(frames, "the block", every=1)["frame_indices"] == [1, 2, 3, 4]
    last = pipe(frames, "the block", sampler=lambda view, _: view.select(view.at_share(1.0), "the last one"))
    assert last["target_frame"] == 4


@pytest.mark.parametrize("number", [1, 2, 64])
def test_masks_do_not_depend_on_the_batch_size(pipe, demo, frames, number):
    queries = ["the block", "what is left of it?", "the ground"]
    made = pipeline(TASK, model=demo[0], processor=demo[1], device="cpu", batch_size=number)
    for results in (pipe(frames, queries, batch_size=number), made(frames, queries)):
        for found, expected in zip(results, pipe(frames, queries), strict=True):
            assert np.array_equal(found["masks"], expected["masks"])
            np.testing.assert_allclose(found["frame_scores"], expected["frame_scores"], atol=2e-5, rtol=0)


def test_a_saved_folder_is_loaded_by_name(checkpoint, pipe, frames):
    """The package is here: its own pipeline is used, and nobody need be trusted."""
    loaded = pipeline(TASK, model=str(checkpoint), device="cpu", dtype="float32")
    assert type(loaded) is VisaPipeline and type(loaded.model) is VisaForVideoSegmentation
    assert np.array_equal(loaded(frames, "the block")["masks"], pipe(frames, "the block")["masks"])
    trusted = pipeline(TASK, model=str(checkpoint), trust_remote_code=True, device="cpu", local_files_only=True)
    assert np.array_equal(trusted(frames, "the block")["masks"], pipe(frames, "the block")["masks"])
    halved = pipeline(TASK, model=str(checkpoint), dtype=torch.bfloat16, device="cpu")
    assert halved.model.dtype == torch.bfloat16 and len(halved(frames, "the block")["masks"]) == 5


def test_saving_writes_everything_that_loading_needs(pipe, frames, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["custom_pipelines"] == CUSTOM_PIPELINES
    assert (tmp_path / "saved" / "pipeline_visa.py").is_file()
    # In memory the package's own pipeline is meant.
    assert "custom_pipelines" not in pipe.model.config.to_dict()
    assert "custom_pipelines" not in AutoConfig.from_pretrained(tmp_path / "saved").to_dict()
    loaded = pipeline(TASK, model=str(tmp_path / "saved"), device="cpu")
    assert np.array_equal(loaded(frames, "the block")["masks"], pipe(frames, "the block")["masks"])


def test_a_model_in_training_is_evaluated(demo):
    model, processor = demo
    model.train()
    pipeline(TASK, model=model, processor=processor, device="cpu")
    assert not model.training and not model.tracker.training


def test_lazy_masks_read_like_the_array_that_they_stand_for():
    full = np.random.default_rng(0).random((4, 2, 5, 6)) > 0.5
    unpacked = []
    masks = LazyMasks(lambda position: unpacked.append(position) or full[position], full.shape)
    assert (len(masks), masks.shape, masks.ndim, masks.dtype) == (4, (4, 2, 5, 6), 4, bool)
    assert repr(masks) == "LazyMasks(shape=(4, 2, 5, 6), dtype=bool)"
    assert unpacked == []
    assert np.array_equal(masks[-1], full[-1]) and unpacked == [3]
    assert np.array_equal(masks[np.int64(1)], full[1]) and np.array_equal(masks[1:3], full[1:3])
    assert unpacked == [3, 1, 1, 2]
    for index in (slice(None, None, -2), slice(2, 2), (slice(None), 1), (0, ..., 3), [2, 0], full[:, 0, 0, 0]):
        assert np.array_equal(masks[index], full[index]) and masks[index].dtype == bool
    assert np.array_equal(np.stack(list(masks)), full) and np.array_equal(np.asarray(masks), full)
    assert np.asarray(masks, dtype=np.uint8).dtype == np.uint8 and np.sum(masks) == full.sum()
    with pytest.raises(IndexError):
        _ = masks[4]
    with pytest.raises(ValueError, match="The masks are packed: as an array they are a copy."):
        np.array(masks, copy=False)


def test_results_can_be_pickled(pipe, frames):
    found = pipe(frames, "the block")
    again = pickle.loads(pickle.dumps(found))
    assert np.array_equal(again["masks"], found["masks"]) and again["scores"] == found["scores"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ["clip.mp4"],
            TypeError,
            "An input is a str but must be a dictionary with `video` and `query`. For one video, ",
        ),
        ([["a.mp4", "b.mp4"]], TypeError, "An input is a str but must be a dictionary"),
        ([{"video": "clip.mp4"}], ValueError, "An input has no `query`. Give a dictionary with `video` and `query`."),
        ([{"query": "it"}], ValueError, "An input has no `video`."),
        ([{"video": "a", "text": "it"}], ValueError, "An input has the key 'text', but only `video` and `query` are"),
        (["clip.mp4", []], ValueError, "`query` is an empty list. Give at least one sentence."),
        (["clip.mp4", "it"], FileNotFoundError, "There is no video at `clip.mp4`."),
    ],
)
def test_inputs_that_cannot_be_used_are_refused(pipe, arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pipe(*arguments)


@pytest.mark.parametrize(
    ("query", "options", "error", "message"),
    [
        (5, {}, TypeError, "A query is a int but must be a string, or a dictionary of the arguments of `add_query`."),
        ("", {}, ValueError, "`query` is empty ('')."),
        ("it", {"treshold": 0.4}, TypeError, "The pipeline has no argument `treshold`. Did you mean `threshold`?"),
        ("it", {"threshold": 2}, ValueError, "`threshold` is 2 but must be a probability"),
        ("it", {"max_frames": 3}, ValueError, "5 frames would be tracked but `max_frames` is 3."),
        ("it", {"explain": 1}, TypeError, "`explain` is 1 but must be `True` or `False`."),
        ("it", {"target_frame": 5}, ValueError, "`target_frame` is 5 but the video"),
        ("it", {"batch_size": 0}, ValueError, "`max_queries_per_batch` is 0 but must be at least 1."),
        ({"query": "it", "thresh": 1}, {}, ValueError, "A query has no argument 'thresh'. Did you mean"),
    ],
)
def test_queries_and_arguments_that_cannot_be_used_are_refused(pipe, frames, query, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        pipe(frames, query, **options)


def test_models_and_processors_that_do_not_fit_are_refused(demo):
    model, processor = demo
    with pytest.raises(ValueError, match="`processor` is missing. Give the one that was saved with the model."):
        VisaPipeline(model=model, device="cpu")
    other = SimpleNamespace(seg_token_id=3)
    with pytest.raises(ValueError, match=re.escape("token 1200 but its processor's is 3. Use the processor that was")):
        VisaPipeline(model=model, processor=other, device="cpu")
    with pytest.raises(TypeError, match="`model` is a XMemModel, which is no VISA model. Give a folder, a Hub id, or"):
        VisaPipeline(model=model.tracker, processor=processor, device="cpu")
    with pytest.raises(TypeError, match="The pipeline has no argument `thresh`. Did you mean `threshold`?"):
        pipeline(TASK, model=model, processor=processor, device="cpu", thresh=0.4)
