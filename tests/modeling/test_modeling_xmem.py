import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from visa_hf.convert import convert_xmem_state_dict
from visa_hf.modeling.configuration_visa import XMemConfig
from visa_hf.modeling.memory_xmem import similarity
from visa_hf.modeling.modeling_xmem import XMemModel, aggregate, pad_to_stride, unpad

from .xmem_reference import ReferenceTracker

REFERENCE = Path(__file__).parents[1] / "reference"
RUNS = json.loads((REFERENCE / "xmem" / "runs.json").read_text())
RUN_NAMES = [name for name in RUNS if name != "weight_overrides"]
# The configuration's names in XMem -> ours.
CONFIG_NAMES = {
    "mem_every": "memory_every",
    "hidden_dim": "sensory_dim",
    "enable_long_term": "use_long_term",
    "enable_long_term_count_usage": "count_long_term_usage",
    "max_mid_term_frames": "max_working_frames",
    "min_mid_term_frames": "min_working_frames",
}
FIRST_CONV = "value_encoder.conv1.weight"


def original_shapes(num_channels: int = 5) -> dict[str, list[int]]:
    """Names and shapes of a published checkpoint.

    The manifest lists the value encoder's first convolution with 4 channels, as for a single object; the golden runs
    were made with 5.
    """
    manifest = json.loads((REFERENCE / "manifests" / "xmem.json").read_text())
    shapes = {name: shape for name, (shape, _) in manifest.items()}
    return shapes | {FIRST_CONV: [64, num_channels, 7, 7]}


def original_tensor(name: str, shape: list[int]) -> Tensor:
    """Weights of the golden runs: the rule of tests/reference/README.md."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("running_mean"):
        x = 0.05 * x
    elif name.endswith("running_var"):
        x = 1 + 0.1 * np.abs(x)
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(".bias"):
        x = 0.02 * x
    else:
        x = 1 + 0.05 * x
    return torch.from_numpy(x.astype(np.float32))


def meta_state_dict(num_channels: int = 5) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in original_shapes(num_channels).items()}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(REFERENCE / "xmem" / "golden.safetensors")


@pytest.fixture(scope="module")
def full_model() -> XMemModel:
    state_dict = {name: original_tensor(name, shape) for name, shape in original_shapes().items()}
    state_dict |= {name: torch.tensor(values) for name, values in RUNS["weight_overrides"].items()}
    with torch.device("meta"):
        model = XMemModel(XMemConfig())
    model.load_state_dict(convert_xmem_state_dict(state_dict), assign=True)
    return model.eval()


def make_model(**settings) -> XMemModel:
    torch.manual_seed(0)
    model = XMemModel(XMemConfig.tiny(**settings)).eval()
    # Statistics, so that BatchNorm does something; weights large enough for objects to differ.
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
            elif isinstance(module, nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
    return model


def make_clip(num_frames: int, height: int = 50, width: int = 61, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth moving frames (T, 3, H, W) and two masks (2, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    picture = torch.randn(1, 3, height // 4 + 2, width // 4 + 2, generator=generator)
    margin = 2 * num_frames
    picture = nn.functional.interpolate(picture, (height + margin, width + margin), mode="bilinear")[0]
    frames = torch.stack([picture[:, t : t + height, 2 * t : 2 * t + width] for t in range(num_frames)])
    masks = torch.zeros(2, height, width)
    masks[0, : height // 2, : width // 2] = 1
    masks[1, height // 2 :, width // 3 :] = 1
    return frames, masks


def assert_same_masks(found: Tensor, expected: Tensor) -> None:
    """Masks agree but for the few pixels that random weights leave undecided, where rounding decides."""
    best = expected.topk(2, dim=0).values
    is_decided = best[0] - best[1] > 1e-4
    assert is_decided.float().mean() > 0.95
    assert torch.equal(found.argmax(dim=0)[is_decided], expected.argmax(dim=0)[is_decided])


# The published numbers.


@pytest.mark.parametrize("name", RUN_NAMES)
def test_probabilities_and_memory_sizes_of_the_published_tracker(full_model, golden, name):
    run = RUNS[name]
    config = XMemConfig(**{CONFIG_NAMES.get(key, key): value for key, value in run["config"].items()})
    full_model.config = config
    memory = full_model.init_memory()
    given = {0: (golden["first_mask"], [1, 2])}
    if name == "late_object":
        given = {0: (golden["first_mask"][:1], [1]), run["enters_at"]: (golden["late_mask"][None], [2])}
    frames, sizes = golden["frames"], []
    for frame_idx, frame in enumerate(frames):
        masks, object_ids = given.get(frame_idx, (None, None))
        probs = full_model.step(memory, frame, masks, object_ids, is_last=frame_idx == len(frames) - 1)
        expected = golden[f"prob.{name}"][frame_idx, : len(probs)]
        torch.testing.assert_close(probs, expected, atol=5e-4, rtol=0)
        sizes.append([memory.num_working, memory.num_long_term])
    assert len(probs) == 3
    assert sizes == run.get("memory_sizes", sizes)


@torch.no_grad()
def test_module_outputs_of_the_published_network(full_model, golden):
    def check(found: Tensor, name: str) -> None:
        expected = golden[f"module.{name}"]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name

    image, masks = golden["module.image"], golden["module.mask"]
    features = full_model.encode_key(image)
    for name in ("key", "shrinkage", "selection"):
        check(getattr(features, name), name)
    check(features.f16.mean(dim=(2, 3)), "f16_mean")
    check(features.f4.mean(dim=(2, 3)), "f4_mean")
    sensory = torch.zeros(1, 2, 64, *features.key.shape[-2:])
    value, sensory = full_model.encode_value(image, features.f16, masks, sensory)
    check(value[:, :, :32], "value")
    check(sensory, "hidden")


# Conversion.


@pytest.mark.parametrize(("num_channels", "single_object"), [(5, False), (4, True)])
def test_conversion_takes_every_published_tensor_and_invents_none(num_channels, single_object):
    original = meta_state_dict(num_channels)
    converted = convert_xmem_state_dict(original)
    with torch.device("meta"):
        expected = XMemModel(XMemConfig(single_object=single_object)).state_dict()
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert {id(tensor) for tensor in converted.values()} == {id(tensor) for tensor in original.values()}


def test_conversion_names_missing_unexpected_and_misshapen_tensors():
    missing = meta_state_dict()
    del missing["key_encoder.layer3.5.bn3.num_batches_tracked"], missing["decoder.pred.bias"]
    missing["decoder.pred.scale"] = torch.empty(1)
    with pytest.raises(ValueError) as error:
        convert_xmem_state_dict(missing)
    assert "missing: decoder.pred.bias, key_encoder.layer3.5.bn3.num_batches_tracked" in str(error.value)
    assert "unexpected: decoder.pred.scale" in str(error.value)
    misshapen = meta_state_dict() | {"decoder.pred.weight": torch.empty(2, 256, 3, 3)}
    with pytest.raises(ValueError, match=r"of another shape: decoder.pred.weight \(2, 256, 3, 3\) instead of \(1,"):
        convert_xmem_state_dict(misshapen)
    misshapen = meta_state_dict() | {FIRST_CONV: torch.empty(64, 6, 7, 7)}
    with pytest.raises(ValueError, match=r"value_encoder.conv1.weight \(64, 6, 7, 7\) instead of \(64, 5, 7, 7\)"):
        convert_xmem_state_dict(misshapen)
    with pytest.raises(ValueError, match=r"missing: .* and \d+ more"):
        convert_xmem_state_dict({})


def test_conversion_follows_the_dimensions_of_the_checkpoint():
    original = meta_state_dict()
    for name in ("key_proj.key_proj", "key_proj.e_proj"):
        original |= {f"{name}.weight": torch.empty(32, 1024, 3, 3), f"{name}.bias": torch.empty(32)}
    with torch.device("meta"):
        expected = XMemModel(XMemConfig(key_dim=32)).state_dict()
    assert convert_xmem_state_dict(original).keys() == expected.keys()


# By hand.


def test_aggregation_by_hand():
    # One object with p = 0.8: odds 4, the background's 0.25.
    probs = aggregate(torch.tensor([0.8]), dim=0).softmax(dim=0)
    torch.testing.assert_close(probs, torch.tensor([0.25, 4.0]) / 4.25)
    # Two with 0.5 and 0.2: background 0.5 * 0.8 = 0.4; odds 2 / 3, 1, 1 / 4.
    probs = aggregate(torch.tensor([[0.5, 0.2]]), dim=1).softmax(dim=1)
    odds = torch.tensor([[2 / 3, 1.0, 0.25]])
    torch.testing.assert_close(probs, odds / odds.sum())
    # A certain object: clamped, finite.
    assert torch.isfinite(aggregate(torch.tensor([1.0, 0.0]), dim=0)).all()


@pytest.mark.parametrize(("height", "width"), [(16, 32), (1, 1), (75, 84), (17, 15)])
def test_padding_is_half_on_each_side_and_can_be_undone(height, width):
    image = torch.rand(3, height, width)
    padded = pad_to_stride(image)
    assert padded.shape == (3, -(-height // 16) * 16, -(-width // 16) * 16)
    top, left = (padded.shape[1] - height) // 2, (padded.shape[2] - width) // 2
    assert torch.equal(padded[:, top : top + height, left : left + width], image)
    assert torch.equal(padded.sum(), image.sum()) or torch.isclose(padded.sum(), image.sum())
    assert torch.equal(unpad(padded, height, width), image)


# The model and the plain transcription.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": None},
        {"use_long_term": False},
        {"deep_update_every": 3},
        {"single_object": True, "count_long_term_usage": False},
    ],
)
def test_step_equals_the_plain_transcription(settings):
    settings = {
        "memory_every": 2,
        "top_k": 8,
        "min_working_frames": 2,
        "max_working_frames": 5,
        "num_prototypes": 10,
        "max_long_term_elements": 200,
        **settings,
    }
    model = make_model(**settings)
    frames, masks = make_clip(30)
    memory, reference = model.init_memory(), ReferenceTracker(model)
    nothing = torch.zeros_like(masks[0])
    for frame_idx, frame in enumerate(frames):
        # Object 7 from the start, object 3 from frame 4, object 7 again on frame 11, both on frame 15.
        ours, plain = {0: ([7], [0]), 4: ([3], [1]), 11: ([7], [0]), 15: ([7, 3], [0, 1])}.get(frame_idx, (None, None))
        if plain is None:
            found, expected = model.step(memory, frame), reference.step(frame)
        else:
            rows = masks.clone() if frame_idx else masks[:1].clone()
            for row in {0, 1}.difference(plain) if frame_idx else ():
                rows[row] = nothing
            found = model.step(memory, frame, masks[plain], ours)
            expected = reference.step(frame, rows, plain)
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        assert_same_masks(found, expected)
        assert memory.num_working == reference.working.size
        assert memory.num_long_term == reference.long.size
    assert memory.object_ids == [7, 3]
    assert (memory.num_long_term > 0) == model.config.use_long_term


def test_memory_drops_the_elements_that_the_plain_transcription_drops():
    model = make_model(
        memory_every=1,
        top_k=8,
        min_working_frames=2,
        max_working_frames=3,
        num_prototypes=5,
        max_long_term_elements=18,
    )
    frames, masks = make_clip(14)
    memory, reference = model.init_memory(), ReferenceTracker(model)
    model.step(memory, frames[0], masks)
    reference.step(frames[0], masks, [0, 1])
    for frame in frames[1:]:
        torch.testing.assert_close(model.step(memory, frame), reference.step(frame), atol=2e-5, rtol=0)
        assert memory.num_long_term == reference.long.size <= 18
    assert memory.num_long_term > 0


# Streams.


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 40), (16, 16), (33, 47), (64, 80)])
def test_any_frame_size_and_a_mask_of_one_pixel(height, width):
    model = make_model(memory_every=1, top_k=30)
    memory = model.init_memory()
    mask = torch.zeros(1, height, width, dtype=torch.bool)
    mask[0, height // 2, width // 2] = True
    frames = torch.randn(6, 3, height, width, generator=torch.Generator().manual_seed(0))
    for frame_idx, frame in enumerate(frames):
        probs = model.step(memory, frame, mask if frame_idx == 0 else None)
        assert probs.shape == (2, height, width)
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(dim=0), torch.ones(height, width))
        if frame_idx == 0:
            assert torch.equal(probs[1] > 0.5, mask[0])


def test_only_background_before_any_object_is_known():
    model = make_model()
    frames, masks = make_clip(4)
    memory = model.init_memory()
    for frame in frames[:2]:
        assert torch.equal(model.step(memory, frame), torch.ones(1, 50, 61))
    assert (memory.num_working, memory.num_long_term, memory.object_ids) == (0, 0, [])
    assert torch.equal(model.step(memory, frames[2], masks[:0], []), torch.ones(1, 50, 61))
    probs = model.step(memory, frames[3], masks)
    assert torch.equal(probs[1:] > 0.5, masks.bool())
    assert memory.num_working == 16


def test_a_later_mask_clears_the_others_there_and_leaves_them_elsewhere():
    model = make_model()
    frames, masks = make_clip(2)
    without, with_mask = model.init_memory(), model.init_memory()
    for memory in (without, with_mask):
        model.step(memory, frames[0], masks[:1], [4])
    predicted = model.step(without, frames[1])
    new_mask = torch.zeros(1, 50, 61)
    new_mask[0, 10:30, 10:40] = 1
    probs = model.step(with_mask, frames[1], new_mask, [9])
    assert with_mask.object_ids == [4, 9]
    assert probs.shape == (3, 50, 61)
    is_new = new_mask[0] > 0
    assert (probs[2][is_new] > 0.99).all()
    assert (probs[1][is_new] < 1e-6).all()
    assert (probs[2][~is_new] < 1e-6).all()
    # Aggregated once more, as in XMem: odds of p against those of 1 - p.
    odds = (predicted / (1 - predicted))[:, ~is_new]
    torch.testing.assert_close(probs[1][~is_new], odds[1] / odds.sum(dim=0), atol=1e-5, rtol=0)


def test_nothing_is_read_where_all_objects_are_given():
    model = make_model(deep_update_every=100)
    frames, masks = make_clip(3)
    memory = model.init_memory()
    model.step(memory, frames[0], masks)
    sensory, age = memory.sensory.clone(), memory._elements.age.clone()
    # Rows follow the ids, not the order they are given in.
    probs = model.step(memory, frames[1], masks.flip(0), list(np.array([2, 1])))
    assert torch.equal(probs[1:] > 0.5, masks.bool())
    assert torch.equal(memory.sensory, sensory)
    assert torch.equal(memory._elements.age[: len(age)], age)
    model.step(memory, frames[2])
    assert not torch.equal(memory.sensory, sensory)


def test_ids_by_default_are_counted_from_one_and_then_mean_all_objects():
    model = make_model()
    frames, masks = make_clip(2)
    memory = model.init_memory()
    model.step(memory, frames[0], masks)
    assert memory.object_ids == [1, 2]
    probs = model.step(memory, frames[1], masks)
    assert torch.equal(probs[1:] > 0.5, masks.bool())
    with pytest.raises(ValueError, match="1 `masks` are given for 2 known objects"):
        model.step(memory, frames[1], masks[:1])


def test_the_last_frame_is_not_memorised_and_ends_the_memory():
    model = make_model(memory_every=1)
    frames, masks = make_clip(3)
    memory = model.init_memory()
    model.step(memory, frames[0], masks)
    sizes, sensory = (memory.num_working, memory.num_long_term), memory.sensory.clone()
    model.step(memory, frames[1], is_last=True)
    assert (memory.num_working, memory.num_long_term) == sizes
    assert torch.equal(memory.sensory, sensory)
    with pytest.raises(RuntimeError, match="seen its last frame .* Start a new one with `init_memory"):
        model.step(memory, frames[2])
    memory = model.init_memory()
    assert torch.equal(model.step(memory, frames[0], masks, is_last=True)[1:] > 0.5, masks.bool())


def test_features_of_a_frame_can_be_shared_by_several_memories():
    model = make_model(memory_every=2)
    frames, masks = make_clip(4)
    alone, shared = model.init_memory(), model.init_memory()
    for frame_idx, frame in enumerate(frames):
        given = masks if frame_idx == 0 else None
        expected = model.step(alone, frame, given)
        found = model.step(shared, frame, given, features=model.encode_frame(frame))
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"`features` has a key of shape \(1, 32, 1, 1\) but \(1, CK, 4, 4\)"):
        model.step(shared, frames[0], features=model.encode_frame(frames[0][:, :16, :16]))


def test_the_same_stream_gives_the_same_probabilities():
    model = make_model(memory_every=1, max_working_frames=4, min_working_frames=2, num_prototypes=4)
    frames, masks = make_clip(12)
    runs = []
    for _ in range(2):
        memory = model.init_memory()
        runs.append([model.step(memory, frame, None if i else masks) for i, frame in enumerate(frames)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_memory_does_not_grow_with_the_stream():
    model = make_model(
        memory_every=1, min_working_frames=2, max_working_frames=4, num_prototypes=6, max_long_term_elements=25
    )
    generator = torch.Generator().manual_seed(0)
    memory = model.init_memory()
    mask = torch.zeros(1, 20, 24)
    mask[0, 5:15, 5:15] = 1
    for frame_idx in range(80):
        is_new = frame_idx in (0, 20, 21, 50)
        frame = torch.randn(3, 20, 24, generator=generator)
        probs = model.step(memory, frame, mask if is_new else None, [frame_idx] if is_new else None)
        assert torch.isfinite(probs).all()
        assert memory.num_working < 4 * 4
        assert memory.num_long_term <= 25
    assert memory.object_ids == [0, 20, 21, 50]
    assert memory.num_long_term > 0


FRAME = torch.zeros(3, 20, 30)
MASKS = torch.zeros(2, 20, 30)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((FRAME[None],), ValueError, r"`frame` has shape \(1, 3, 20, 30\) but must be \(3, H, W\)"),
        ((FRAME.numpy(),), TypeError, "`frame` is a ndarray but must be a `torch.Tensor`"),
        ((FRAME, MASKS.numpy()), TypeError, "`masks` is a ndarray but must be a `torch.Tensor`"),
        ((FRAME[:2],), ValueError, r"`frame` has shape \(2, 20, 30\)"),
        ((FRAME[:, :0],), ValueError, r"`frame` has shape \(3, 0, 30\)"),
        ((FRAME.to(torch.uint8),), TypeError, "`frame` has dtype torch.uint8 but must be floating point. Scale it"),
        ((FRAME + float("nan"),), ValueError, "`frame` has values that are NaN or infinite"),
        ((FRAME[:, :-1],), ValueError, r"`frame` has size \(19, 30\) but the earlier frames .* have \(20, 30\)"),
        ((FRAME, MASKS[0]), ValueError, r"`masks` has shape \(20, 30\) but `frame` is 20 x 30"),
        ((FRAME, MASKS[:, 1:]), ValueError, r"`masks` has shape \(2, 19, 30\) but `frame` is 20 x 30"),
        ((FRAME, MASKS + 255), ValueError, r"`masks` has values from 255.0 to 255.0 but they must be in \[0, 1\]"),
        ((FRAME, MASKS + float("nan")), ValueError, r"must be in \[0, 1\]"),
        ((FRAME, MASKS.to(torch.complex64)), TypeError, "must be bool or real numbers"),
        ((FRAME, None, [1]), ValueError, r"`object_ids` is \[1\] but no `masks` are given"),
        ((FRAME, MASKS, [1]), ValueError, r"1 `object_ids` \[1\] are given for 2 `masks`"),
        ((FRAME, MASKS, [5, 5]), ValueError, r"`object_ids` \[5, 5\] names an object twice"),
        ((FRAME, MASKS, [1, "2"]), TypeError, "`object_ids` contains '2' of type str but ids are `int`"),
        ((FRAME, MASKS, [1, True]), TypeError, "`object_ids` contains True of type bool"),
        ((FRAME, MASKS), ValueError, "2 `masks` are given for 1 known objects"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_memory_as_it_was(arguments, error, text):
    model = make_model()
    memory = model.init_memory()
    model.step(memory, FRAME, MASKS[:1])
    before = {name: value for name, value in vars(memory).items() if not isinstance(value, Tensor)}
    with pytest.raises(error, match=text):
        model.step(memory, *arguments)
    assert {name: value for name, value in vars(memory).items() if not isinstance(value, Tensor)} == before


# Behaviour as a transformers model.


def test_save_and_load_keep_every_tensor_and_the_output(tmp_path):
    model = make_model(train_batch_norm=False)
    model.save_pretrained(tmp_path)
    loaded, info = XMemModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    bookkeeping = {"dtype": None, "_name_or_path": None}
    assert loaded.config.to_dict() | bookkeeping == model.config.to_dict() | bookkeeping
    frames, masks = make_clip(3)
    memories = [model.init_memory(), loaded.init_memory()]
    for frame_idx, frame in enumerate(frames):
        given = masks if frame_idx == 0 else None
        first, second = (m.step(memory, frame, given) for m, memory in zip([model, loaded], memories, strict=True))
        assert torch.equal(first, second)


def test_nothing_is_left_uninitialised():
    model = XMemModel.from_pretrained(None, config=XMemConfig.tiny(), state_dict={})
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.isfinite(tensor).all(), name
        assert tensor.float().abs().max() < 5, name
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.running_var == 1).all() and (module.running_mean == 0).all(), name
            assert (module.weight == 1).all() and module.num_batches_tracked == 0, name
        elif isinstance(module, nn.Conv2d | nn.Linear):
            assert module.weight.std() > 1e-3, name
    # He's initialisation in the ResNets: variance 2 / (out channels * 3 * 3).
    weight = model.key_encoder.backbone.stages[2][0].layers[1].conv.weight
    torch.testing.assert_close(weight.std(), torch.tensor((2 / (96 * 9)) ** 0.5), atol=0, rtol=0.05)


def test_the_tiny_tracker_is_tiny():
    assert sum(p.numel() for p in XMemModel(XMemConfig.tiny()).parameters()) <= 2_000_000


@pytest.mark.parametrize("train_batch_norm", [False, True])
def test_batch_norm_trains_only_when_asked_to(train_batch_norm):
    model = XMemModel(XMemConfig.tiny(train_batch_norm=train_batch_norm))
    wrapper = nn.ModuleDict({"tracker": model})
    wrapper.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert model.training and model.decoder.training
    assert norms and all(norm.training == train_batch_norm for norm in norms)
    wrapper.eval()
    assert not any(module.training for module in model.modules())


def clip_logits(model: XMemModel, frames: Tensor, masks: Tensor) -> Tensor:
    """Logits (B, 1 + N, H, W) of the second frame of (B, 2, 3, H, W), given masks (B, N, H, W) of the first."""
    first, second = model.encode_key(frames[:, 0]), model.encode_key(frames[:, 1])
    size = first.key.shape[-2:]
    sensory = torch.zeros(*masks.shape[:2], model.config.sensory_dim, *size)
    value, sensory = model.encode_value(frames[:, 0], first.f16, masks, sensory)

    def rows(plane: Tensor) -> Tensor:
        return plane.flatten(2).mT

    affinity = similarity(rows(first.key), rows(first.shrinkage), rows(second.key), rows(second.selection)).softmax(-1)
    readout = torch.einsum("bpl,bncl->bncp", affinity, value.flatten(3)).unflatten(3, size)
    logits, sensory = model.segment(second, readout, sensory)
    assert sensory.shape == (*masks.shape[:2], model.config.sensory_dim, *size)
    # Once more with the updated sensory memory, so that its update learns too.
    return logits + model.segment(second, readout, sensory, update_sensory=False)[0]


def test_gradients_reach_every_parameter_in_a_batch_of_clips_and_objects():
    model = make_model().train()
    frames, _ = make_clip(4, 48, 64)
    masks = (torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    logits = clip_logits(model, frames.unflatten(0, (2, 2)), masks)
    target = torch.randint(0, 4, (2, 48, 64), generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(logits, target).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_batch_gives_what_its_clips_and_objects_give_alone_with_and_without_gradients():
    model = make_model(single_object=True)
    frames, _ = make_clip(4, 48, 64)
    frames = frames.unflatten(0, (2, 2))
    masks = (torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    with torch.no_grad():
        together = clip_logits(model, frames, masks)
    for i in range(2):
        # Folded BatchNorm (without gradients) and plain BatchNorm (with them) agree.
        alone = clip_logits(model, frames[i : i + 1], masks[i : i + 1])
        torch.testing.assert_close(together[i], alone[0].detach(), atol=1e-4, rtol=1e-4)


def test_objects_keep_their_own_sensory_memory_in_a_batch():
    model = make_model()
    frames, masks = make_clip(1, 48, 64)
    with torch.no_grad():
        features = model.encode_key(frames)
        generator = torch.Generator().manual_seed(0)
        readout = torch.randn(1, 3, model.config.value_dim, 3, 4, generator=generator)
        sensory = torch.randn(1, 3, model.config.sensory_dim, 3, 4, generator=generator)
        _, together = model.segment(features, readout, sensory)
        for i in range(3):
            _, alone = model.segment(features, readout[:, i : i + 1], sensory[:, i : i + 1])
            torch.testing.assert_close(together[:, i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_a_tracker_in_half_precision_tracks():
    model = make_model(memory_every=1).to(torch.bfloat16)
    frames, masks = make_clip(4)
    memory = model.init_memory()
    for frame_idx, frame in enumerate(frames):
        probs = model.step(memory, frame, masks if frame_idx == 0 else None)
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(dim=0), torch.ones(50, 61))
    assert memory.sensory.dtype == torch.bfloat16


def test_frame_features_are_values():
    features = make_model().encode_frame(torch.zeros(3, 16, 16))
    with pytest.raises(dataclasses.FrozenInstanceError):
        features.key = None
