"""`segment`: the same masks by every road, and refusals that say what to do."""

import copy
import dataclasses
import json
import logging
import re
import shutil
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.media import cut_off, test_frame, write_constant_rate, write_folder, write_video
from tests.random_model import ANSWER, build_demo_checkpoint, make_demo_model
from visa_hf import VisaVideoSession, segment
from visa_hf.bundled import BUNDLED_MODEL
from visa_hf.inference import check_before_loading, load_model, resolve_device, resolve_dtype


@pytest.fixture(scope="module")
def demo():
    return make_demo_model()


@pytest.fixture(scope="module")
def ask(demo):
    """`segment` with the demo model, already loaded."""
    model, processor = demo
    return lambda video, query=None, **options: segment(video, query, model=model, processor=processor, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "demo"
    build_demo_checkpoint(folder)
    return folder


def frames_of(num_frames):
    return np.stack([test_frame(number) for number in range(num_frames)])


def square(height=64, width=96):
    mask = np.zeros((height, width), dtype=bool)
    mask[10:40, 20:60] = True
    return mask


def test_a_real_file_is_segmented_in_every_frame(ask, tiny_clip):
    result = ask(tiny_clip, "the white block")
    assert (len(result), result.height, result.width, result.fps) == (12, 64, 96, 25)
    assert (result.query, result.answer, result.video) == ("the white block", ANSWER, "tiny")
    assert (result.frame_selection.target_idx, result.num_objects) == (6, 1)
    assert result.frame_indices == tuple(range(12))
    assert result.masks.shape == (12, 64, 96)
    assert 0.02 < result.masks.mean() < 0.98, "the demo model should neither find nothing nor everything"


def test_the_target_mask_is_the_model_s_own(demo, ask, tiny_clip):
    model, processor = demo
    result = ask(tiny_clip, "The  White block", target_frame=3, reference_frames=[1, 9])
    with processor.init_video_session(tiny_clip) as session:
        *references, target = session.source.get_many([1, 9, 3])
    output = model.generate_masks(**processor(target, references, "the white block"))
    assert np.array_equal(result.mask_of(3), output.mask_logits[0][0].numpy() > 0)
    assert result.scores == pytest.approx(output.iou_scores[0].tolist())


def test_frame_scores_say_how_sure_each_mask_is(demo, tiny_clip):
    """The means of what the session yields as probabilities, which those before the target are rounded of."""
    model, processor = demo
    result = segment(tiny_clip, "the white block", model=model, processor=processor, target_frame=5, every=2)
    with processor.init_video_session(tiny_clip, every=2, want_probs=True) as session:
        model.add_query(session, "the white block", target_frame=5)
        outputs = list(model.propagate_in_video_iterator(session))
    assert len(result.frame_scores) == len(result.frame_indices) == 6
    for scores, output in zip(result.frame_scores, outputs, strict=True):
        (masks,), (probs,) = output.masks, output.mask_probs
        assert scores == pytest.approx([float(probs[0][masks[0]].mean())], abs=2e-5)
        assert 0.5 <= scores[0] <= 1


def test_a_reason_can_be_asked_for(demo, tiny_clip, monkeypatch):
    model, processor = demo
    seen = []
    build = processor.build_prompt
    monkeypatch.setattr(processor, "build_prompt", lambda *args, **how: seen.append(build(*args, **how)) or seen[-1])
    result = segment(tiny_clip, "The block", model=model, processor=processor, explain=True)
    assert result.answer == ANSWER
    assert seen[0].endswith("the blockPlease output segmentation mask in the Target Image and explain why. ASSISTANT:")
    with pytest.raises(ValueError, match="`explain` and a `first_mask` are given, but with a mask the model is not"):
        segment(tiny_clip, first_mask=square(), model=tiny_clip, explain=True)  # before a model is looked for


def test_two_runs_give_the_same(ask, tiny_clip):
    assert ask(tiny_clip, "it") == ask(tiny_clip, "it")


def test_several_queries_are_the_same_as_one_at_a_time(ask, tiny_clip):
    queries = ["the white block", "what is left of it?"]
    together = ask(tiny_clip, queries)
    assert [result.query for result in together] == queries
    for result, query in zip(together, queries, strict=True):
        alone = ask(tiny_clip, query)
        # Rows of larger matrix products may round otherwise in the last bit: the masks are the same, scores nearly.
        assert result.scores == pytest.approx(alone.scores, abs=1e-5)
        np.testing.assert_allclose(result.frame_scores, alone.frame_scores, atol=2e-5, rtol=0)
        assert dataclasses.replace(result, scores=alone.scores, frame_scores=alone.frame_scores) == alone


@pytest.mark.parametrize("kind", ["folder", "array", "list", "tensor", "paths"])
def test_every_kind_of_video_gives_the_same_masks(ask, tmp_path, kind):
    frames = frames_of(6)
    video = {
        "array": frames,
        "list": [Image.fromarray(frame) for frame in frames],
        "tensor": torch.tensor(frames),
        "folder": tmp_path / "frames",
        "paths": [tmp_path / "frames" / f"frame{number}.png" for number in range(1, 7)],
    }[kind]
    write_folder(tmp_path / "frames", 6)
    expected = ask(frames, "the block")
    result = ask(video, "the block", fps=10)
    assert np.array_equal(result.masks, expected.masks)
    assert (result.fps, expected.fps) == (Fraction(10), None)


def test_an_image_is_a_video_of_one_frame(ask, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(test_frame(3)).save(path)
    result = ask(path, "the block")
    assert (len(result), result.frame_selection.reference_idx, result.video) == (1, (0,), "picture")


def test_rotation_stored_in_the_file_is_applied(ask, tmp_path):
    lossless = {"pix_fmt": "yuv444p", "options": {"qp": "0"}}
    result = ask(write_video(tmp_path / "turned.mp4", 4, rotation=90, **lossless), "the block")
    upright = write_video(
        tmp_path / "upright.mp4", 4, size=(96, 64), draw=lambda n, *_: np.rot90(test_frame(n)).copy(), **lossless
    )
    assert (result.height, result.width) == (96, 64)
    assert np.array_equal(result.masks, ask(upright, "the block").masks)


def test_odd_sizes_and_narrow_frames(ask):
    for height, width in ((17, 31), (33, 16), (200, 40)):
        frames = np.stack([test_frame(number, height, width) for number in range(3)])
        assert ask(frames, "the block").masks.shape == (3, height, width)


def test_a_first_mask_is_tracked_without_asking(ask):
    mask = square()
    result = ask(frames_of(4), first_mask=mask)
    assert (result.answer, result.query, result.scores) == ("", "", (1.0,))
    assert result.frame_scores[0] == (1.0,) and 0 < min(min(result.frame_scores)) < 1
    assert result.frame_selection.target_idx == 0
    assert np.array_equal(result.mask_of(0), mask)
    named = ask(frames_of(4), "the square", first_mask=mask, target_frame=0)
    assert np.array_equal(named.masks, result.masks) and named.query == "the square"


def test_two_first_masks_are_two_objects_that_never_overlap(ask):
    masks = np.stack([square(), ~square()])
    result = ask(frames_of(4), first_mask=masks, target_frame=2)
    assert result.num_objects == 2
    for position in range(4):
        assert result.object_masks_of(position).sum(axis=0).max() <= 1


def test_an_empty_first_mask_is_empty_everywhere(ask):
    result = ask(frames_of(4), first_mask=np.zeros((64, 96)))
    assert not result.masks.any() and result.frame_scores == ((0.0,),) * 4


def test_an_answer_without_seg_is_nothing_to_segment(demo):
    model, processor = demo
    silent = copy.deepcopy(model)
    with torch.no_grad():
        silent.lm_head.weight[model.config.seg_token_id] = 0
    result = segment(frames_of(3), "the block", model=silent, processor=processor, max_new_tokens=4)
    assert (result.num_objects, result.scores, len(result)) == (0, (), 3)
    assert result.masks.shape == (3, 64, 96) and not result.masks.any()


def test_several_seg_tokens_are_several_objects_that_never_overlap(demo):
    model, processor = demo
    talkative = copy.deepcopy(model)
    seg = model.config.seg_token_id
    with torch.no_grad():
        # Say [SEG] whatever comes before: channel i of the states says that answer token i is due.
        talkative.lm_head.weight[seg, :4] = 2
    result = segment(frames_of(3), "the blocks", model=talkative, processor=processor, max_new_tokens=3)
    assert result.answer.count("[SEG]") == result.num_objects == 3
    for position in range(3):
        assert result.object_masks_of(position).sum(axis=0).max() <= 1


def test_the_threshold_is_a_probability_on_the_target_frame(ask, tiny_clip):
    loose, strict = (ask(tiny_clip, "it", threshold=threshold).mask_of(6) for threshold in (0.3, 0.7))
    assert strict.sum() < loose.sum() and not (strict & ~loose).any()


def test_every_third_frame_around_the_target(ask):
    frames = frames_of(10)
    result = ask(frames, first_mask=square(), target_frame=4, every=3)
    assert result.frame_indices == (1, 4, 7)
    assert np.array_equal(result.masks, ask(frames[1::3], first_mask=square(), target_frame=1).masks)


def test_a_part_of_the_video_in_seconds_and_in_frames(ask, tmp_path):
    path = write_constant_rate(tmp_path / "clip.mp4", 20)
    by_frames = ask(path, "the block", start="5f", end="10f")
    by_seconds = ask(path, "the block", start=0.2, end=0.4)  # 25 frames per second
    assert by_frames == by_seconds
    assert by_frames.frame_indices == (5, 6, 7, 8, 9)
    assert by_frames.frame_selection.target_idx == 7
    assert set(by_frames.frame_selection.reference_idx) <= set(range(5, 10))


def test_a_truncated_file_is_used_up_to_its_damage_when_allowed(ask, tmp_path):
    # Index first, so that a file that breaks off can be opened.
    whole = write_constant_rate(tmp_path / "whole.mp4", 60, container_options={"movflags": "faststart"})
    broken = cut_off(whole, tmp_path / "broken.mp4", 0.7)
    with pytest.raises(ValueError, match=re.escape("`allow_truncated=True` (`--allow-truncated`)")):
        ask(broken, first_mask=square())
    result = ask(broken, first_mask=square(), allow_truncated=True)
    assert 0 < len(result) < 60


def test_a_saved_checkpoint_gives_the_same_as_the_model(ask, checkpoint, tiny_clip):
    expected = ask(tiny_clip, "it")
    loaded = segment(tiny_clip, "it", model=checkpoint, device="cpu")
    assert np.array_equal(loaded.masks, expected.masks) and loaded.answer == expected.answer
    assert loaded.scores == pytest.approx(expected.scores, abs=1e-5)
    # A loaded model knows the folder of its processor.
    model, _ = load_model(str(checkpoint), device="cpu")
    assert segment(tiny_clip, "it", model=model) == loaded


def test_without_a_model_the_bundled_one_is_used_and_says_so(tiny_clip, caplog):
    with caplog.at_level(logging.WARNING, logger="visa_hf.inference"):
        result = segment(tiny_clip, "the red circle", device="cpu")
    (record,) = caplog.records
    assert record.getMessage() == (
        "No `model` was given: using the small bundled one, which knows drawn shapes only, not real videos. Give a "
        "checkpoint's folder or Hub id for those."
    )
    assert result == segment(tiny_clip, "the red circle", model=BUNDLED_MODEL, dtype="float32", device="cpu")


def test_the_demo_model_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    make_demo_model()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_number_formats_run(checkpoint, tiny_clip, dtype):
    result = segment(tiny_clip, "it", model=checkpoint, dtype=dtype, device="cpu", end="3f")
    assert result.masks.shape == (3, 64, 96)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query": ""}, ValueError, "`query` is empty"),
        ({"query": "  \n"}, ValueError, "`query` is empty"),
        ({"query": "\u200b \u2060"}, ValueError, "`query` is empty"),
        ({"query": []}, ValueError, "`query` is an empty list"),
        ({"query": 5}, TypeError, "`query` is a int but must be a string, or a list of strings"),
        ({"query": b"it"}, TypeError, "`query` is a bytes but must be a string"),
        ({"query": ["it", None]}, TypeError, "`query[1]` is a NoneType but must be a string"),
        ({"query": "it", "target_frame": 1.0}, TypeError, "`target_frame` is 1.0 but must be a whole number"),
        (
            {"query": "it", "reference_frames": [1], "num_reference_frames": 2},
            ValueError,
            "`reference_frames` and `num_reference_frames` (2) are both given",
        ),
        ({}, ValueError, "Neither `query` nor `first_mask` is given"),
        ({"query": "the [SEG]"}, ValueError, "`[SEG]`, which the model reads as a special token"),
        ({"query": "an <image>"}, ValueError, "`<image>`, which the model reads as a special token"),
        ({"query": "cat " * 5000}, ValueError, "fit into the model's context"),
        ({"query": "it", "target_frame": 12}, ValueError, "`target_frame` is 12 but the video"),
        ({"first_mask": square(), "target_frame": 12}, ValueError, "`target_frame` is 12 but the video"),
        ({"first_mask": square(10, 12)}, ValueError, "`first_mask` has shape (10, 12) but the frames are 64 x 96"),
        ({"query": "it", "target_frame": 1, "start": "2f"}, ValueError, "has frames 2 to 11. Give one of those."),
        ({"query": "it", "max_frames": 11}, ValueError, "12 frames would be tracked but `max_frames` is 11"),
        ({"query": "it", "start": 9}, ValueError, "No frame lies between `start` 9 and `end` None"),
        ({"query": "it", "threshold": 2}, ValueError, "`threshold` is 2 but must be a probability"),
        ({"query": "it", "fps": 5}, ValueError, "is a video file with its own: omit it"),
    ],
)
def test_bad_input_is_refused(ask, tiny_clip, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ask(tiny_clip, **options)


def test_no_such_video(ask, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no video at"):
        ask(tmp_path / "none.mp4", "it")


def test_the_video_is_looked_at_before_the_model_is_loaded(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no video at"):
        segment(tmp_path / "none.mp4", "it", model=tmp_path / "nor a model")


def test_a_checkpoint_that_cannot_be_used_is_refused(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no model folder"):
        load_model(tmp_path / "none")
    # A folder is meant, although the name would be a Hub id without its beginning.
    for name in ("./x/y", "../x/y", "x", "x/y/z"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"There is no model folder `{name}`")):
            load_model(name)
    with pytest.raises(FileNotFoundError, match="is no model: it has no config.json"):
        load_model(tmp_path)
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FileNotFoundError, match=re.escape("has no weights (*.safetensors or pytorch_model*.bin)")):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(checkpoint, demo, tmp_path):
    model, processor = demo
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("lm_head")}
    model.save_pretrained(tmp_path, state_dict=weights)
    processor.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="lacks 1 of the weights that its config.json asks for: lm_head.weight"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds a list but must hold a JSON object"),
        ("{}", "has the `model_type` None but 'visa' is needed"),
        ('{"model_type": "llama"}', "has the `model_type` 'llama' but 'visa' is needed. Give a VISA checkpoint"),
    ],
)
def test_a_config_of_another_model_is_refused(checkpoint, tmp_path, config, message):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=re.escape(f"The config.json of `{tmp_path}` {message}")):
        load_model(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def as_pickle(path):
    torch.save(load_file(path), path.parent / "pytorch_model.bin")
    path.unlink()
    return path.parent / "pytorch_model.bin"


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_bytes(b""),
        lambda path: cut(as_pickle(path)),
        lambda path: as_pickle(path).write_bytes(b""),
    ],
    ids=["cut", "empty", "cut pickle", "empty pickle"],
)
def test_damaged_weights_are_called_damaged(checkpoint, tmp_path, damage):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "model.safetensors")
    with pytest.raises(
        RuntimeError, match=re.escape(f"The weights in `{tmp_path}` are damaged or cut short")
    ) as caught:
        load_model(tmp_path)
    assert str(caught.value).endswith("Download or convert them again.")


def test_a_missing_shard_is_named(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    places = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    with pytest.raises(
        FileNotFoundError, match=r"are incomplete \(.*model-00002-of-00002.safetensors.*\). Download or"
    ):
        load_model(tmp_path)


def test_weights_of_other_shapes_are_refused_in_one_line(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    rows, width = weights["lm_head.weight"].shape
    weights["lm_head.weight"] = weights["lm_head.weight"][:-3].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = f"have other shapes than its config.json asks for: lm_head.weight has {(rows - 3, width)} instead of"
    with pytest.raises(RuntimeError, match=re.escape(f"1 of the weights in `{tmp_path}` {message}")):
        load_model(tmp_path)


@pytest.fixture
def transformers_log():
    """What transformers says while a test runs."""
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    logging.getLogger("transformers").addHandler(handler)
    yield said
    logging.getLogger("transformers").removeHandler(handler)


def test_loading_says_nothing(checkpoint, transformers_log):
    load_model(checkpoint)
    assert transformers_log == []
    logging.getLogger("transformers.modeling_utils").warning("Loading is over.")
    assert [record.getMessage() for record in transformers_log] == ["Loading is over."]


def test_the_report_of_a_loading_that_fails_is_left_out(checkpoint, tmp_path, transformers_log):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="lacks 1 of the weights that its config.json asks for: lm_head.weight"):
        load_model(tmp_path)
    assert transformers_log == []


@pytest.mark.parametrize("name", ["processor_config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_checkpoint_without_its_processor_is_refused(checkpoint, demo, tmp_path, name):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("{")
    with pytest.raises(OSError, match=re.escape(f"The processor in `{tmp_path}` cannot be read: ")):
        load_model(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"The model folder `{tmp_path}` has no {name}, which the")):
        load_model(tmp_path)
    load_model(tmp_path, demo[1])  # not needed where a processor is given


def refusal(kind):
    """An error of the Hub, which wants the response that it is about."""
    response = SimpleNamespace(headers={}, request=None)
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(RepositoryNotFoundError), "the Hub has no such model, or shows it only to those who are logged in"),
        (refusal(GatedRepoError), "the Hub gives it only to those who were granted access"),
        (OfflineModeIsEnabled("offline"), "the Hub is not asked because `HF_HUB_OFFLINE` is set"),
        (TimeoutError("slow"), "the Hub cannot be reached (TimeoutError)"),
    ],
)
def test_a_hub_id_without_the_hub(checkpoint, tmp_path, monkeypatch, error, message):
    asked = []

    def unreachable(url, timeout):
        asked.append((url, timeout))
        raise error

    monkeypatch.setattr("visa_hf.inference.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    expected = f"The model `someone/demo` is neither a folder nor among the downloaded models, and {message}"
    with pytest.raises(OSError, match=re.escape(expected)):
        load_model("someone/demo")
    assert len(asked) == 1 and "someone/demo" in asked[0][0] and asked[0][1] <= 10
    # What was downloaded before is used, without asking again.
    cached = tmp_path / "models--someone--demo"
    shutil.copytree(checkpoint, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    model, processor = load_model("someone/demo", device="cpu")
    assert processor.seg_token_id == model.config.seg_token_id and len(asked) == 2


def test_a_model_on_the_hub_must_be_of_visa(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr("visa_hf.inference.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("visa_hf.inference.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="The config.json of `someone/bert` has the `model_type` 'bert' but 'visa'"):
        load_model("someone/bert")


def test_a_name_that_is_neither_a_folder_nor_a_hub_id():
    with pytest.raises(
        FileNotFoundError, match="There is no model folder `my models/demo`, and it is no Hub id either"
    ):
        load_model("my models/demo")


@pytest.mark.parametrize("model", [5, torch.nn.Linear(1, 1), b"folder"])
def test_what_is_no_model_is_refused(demo, model):
    with pytest.raises(TypeError, match=f"`model` is a {type(model).__name__}, which is no VISA model. Give a folder"):
        load_model(model, demo[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": [""]}, "`query` is empty"),
        ({"queries": ["it", "\u200b"]}, "`query` is empty"),
        ({"queries": []}, "Neither `query` nor `first_mask` is given"),
        ({"queries": ["it"], "target_frame": 12}, "`target_frame` is 12 but the video"),
        ({"queries": ["it"], "reference_frames": [1, 1]}, "`reference_frames` names frame 1 twice"),
        ({"queries": [], "first_mask": square(5, 5)}, "`first_mask` has shape (5, 5)"),
        ({"queries": [None], "first_mask": square(), "num_reference_frames": 2}, "with a mask the model is not asked"),
    ],
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(tiny_clip, monkeypatch, options, message):
    with VisaVideoSession(tiny_clip, None) as session:
        check_before_loading(session, ["it"], target_frame=11, reference_frames=[0])
        check_before_loading(session, [], first_mask=square())
        with pytest.raises(ValueError, match=re.escape(message)):
            check_before_loading(session, **options)
    monkeypatch.setattr("visa_hf.inference.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    asked = {name: value for name, value in options.items() if name != "queries"}
    words = [query for query in options["queries"] if query is not None] or None
    with pytest.raises(ValueError, match=re.escape(message)):
        segment(tiny_clip, words, **asked)


def test_a_checkpoint_without_seg_is_refused(checkpoint, tmp_path):
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != "[SEG]"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if "SEG" not in json.dumps(value)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=re.escape("`seg_token` '[SEG]' is not one known token of the tokenizer")):
        load_model(tmp_path)


def test_a_processor_of_another_model_is_refused(demo):
    model, processor = demo
    other = copy.deepcopy(model)
    other.config.seg_token_id = 5
    with pytest.raises(ValueError, match=re.escape("The model's [SEG] is token 5 but its processor's is 1200.")):
        load_model(other, processor)


def test_a_model_from_nowhere_needs_a_processor(demo):
    with pytest.raises(ValueError, match="its processor is unknown. Give `processor`."):
        load_model(demo[0])


def test_a_model_without_a_tracker_segments_images_only(demo):
    model, processor = demo
    untracked = copy.deepcopy(model)
    untracked.tracker = None
    assert len(segment(frames_of(1), "it", model=untracked, processor=processor)) == 1
    with pytest.raises(ValueError, match="The model has no tracker, but the video has 3 frames"):
        segment(frames_of(3), "it", model=untracked, processor=processor)


def test_devices_and_number_formats_that_do_not_exist():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_dtype("bfloat16") is torch.bfloat16 and resolve_dtype(None) is None
    with pytest.raises(ValueError, match="`device` is 'gpu' but must be"):
        resolve_device("gpu")
    for device in ("cpu:0", "cpu:3", "meta", "xpu", 1.5):
        with pytest.raises(ValueError, match=f"`device` is '{device}' but must be"):
            resolve_device(device)
    for dtype in ("int8", torch.int8, torch.bool, torch.float8_e4m3fn, ["float32"]):
        message = f"`dtype` is {dtype!r} but must be one of float32, bfloat16, float16"
        with pytest.raises(ValueError, match=re.escape(message)):
            resolve_dtype(dtype)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`device` is 'cuda' but this machine, or this PyTorch, has none"):
            resolve_device("cuda")


def test_a_video_file_without_pyav_says_what_to_install(ask, tiny_clip, monkeypatch):
    monkeypatch.setattr("visa_hf.modeling.frame_source_visa.is_av_available", lambda: False)
    with pytest.raises(ImportError, match="pip install av"):
        ask(tiny_clip, "it")


def test_the_video_is_closed_also_after_an_error(ask, tiny_clip, monkeypatch):
    closed = []
    monkeypatch.setattr(VisaVideoSession, "close", lambda self: closed.append(self.source))
    with pytest.raises(ValueError, match="`target_frame` is 99"):
        ask(tiny_clip, "it", target_frame=99)
    assert len(closed) == 1


def test_progress_goes_to_stderr(ask, tiny_clip, capsys):
    ask(tiny_clip, "it", progress=True)
    captured = capsys.readouterr()
    assert captured.out == "" and "tracking" in captured.err
    ask(tiny_clip, "it")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


# Who chooses the target


def test_a_sampler_chooses_the_target_unless_it_is_named(ask, tiny_clip):
    last = ask(tiny_clip, "it", sampler=lambda view, query: view.select(view.at_share(1.0), f"{query}: the end"))
    assert last.frame_selection.target_idx == 11 and last.frame_selection.reason.startswith("it: the end")
    assert ask(tiny_clip, "it", sampler="visa").frame_selection.reason.startswith("text-guided: ")
    named = ask(tiny_clip, "it", sampler="visa", target_frame=2)
    assert named.frame_selection.target_idx == 2
