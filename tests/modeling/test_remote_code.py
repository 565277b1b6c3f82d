"""A saved folder carries its code: it loads where this package is not installed, with `trust_remote_code=True`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import pipeline

QUERY = "the bird that wins"
# What people run who have transformers but not this package. The folder is saved again, and loaded from there too.
SCRIPT = """
import json, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "visa_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
folder, again = sys.argv[1:]

import numpy as np
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

frames = np.load(folder + "/frames.npy")
results = []
for path in (folder, again):
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    inputs = processor(target_frame=frames[1], reference_frames=[frames[0]], query=QUERY)
    forced = processor(target_frame=frames[1], reference_frames=[frames[0]], query=QUERY, answer="It is [SEG].")
    output = model.generate_masks(**inputs, max_new_tokens=4)
    masks = model(**forced).mask_logits[0]
    session = processor.init_video_session(frames)
    first_mask = np.zeros(frames.shape[1:3], dtype=bool)
    first_mask[10:30, 20:50] = True
    model.add_query(session, "it", first_mask=first_mask)
    tracked = [int(frame.masks[0].sum()) for frame in model.propagate_in_video_iterator(session)]
    results.append(
        {
            "classes": [type(each).__module__.split(".")[0] for each in (config, model, processor, model.tracker)],
            "answer": output.answer_ids[0].tolist(),
            "shape": list(masks.shape),
            "mean": float(masks.mean()),
            "tracked": tracked,
        }
    )
    named = pipeline("reasoning-video-segmentation", model=path, trust_remote_code=True, device="cpu")
    unnamed = pipeline(model=path, trust_remote_code=True, device="cpu")
    found = []
    for pipe in (named, unnamed):
        found.append(pipe(frames, {"query": QUERY, "answer": "It is [SEG]."}, explain=True))
        found[-1] |= {name: int(np.sum(found[-1][name])) for name in ("masks", "object_masks")}
    assert found[0] == found[1]
    results[-1]["pipeline"] = found[0]
    results[-1]["classes"].append(type(named).__module__.split(".")[0])
    if path == folder:
        named.save_pretrained(again)
assert not {"visa_hf", "av"} & set(sys.modules)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 48, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tiny_model, tiny_processor, frames, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "tiny"
    tiny_model.save_pretrained(path)
    tiny_processor.save_pretrained(path)
    np.save(path / "frames.npy", frames)
    return path


@pytest.fixture(scope="module")
def elsewhere(folder, tmp_path_factory) -> list[dict[str, Any]]:
    """What the script finds, in a fresh interpreter, in the folder and in the folder saved again."""
    work = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    script = f"QUERY = {QUERY!r}\n{SCRIPT}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(work / "again")],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=work,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_loads_without_the_package(elsewhere) -> None:
    for result in elsewhere:
        assert set(result["classes"]) == {"transformers_modules"}


@torch.no_grad()
def test_it_computes_the_same_without_the_package(elsewhere, tiny_model, tiny_processor, frames) -> None:
    inputs = tiny_processor(target_frame=frames[1], reference_frames=[frames[0]], query=QUERY)
    forced = tiny_processor(target_frame=frames[1], reference_frames=[frames[0]], query=QUERY, answer="It is [SEG].")
    masks = tiny_model(**forced).mask_logits[0]
    for result in elsewhere:
        assert result["answer"] == tiny_model.generate_masks(**inputs, max_new_tokens=4).answer_ids[0].tolist()
        assert result["shape"] == [1, 48, 80] == list(masks.shape)
        assert result["mean"] == pytest.approx(float(masks.mean()), rel=1e-4, abs=1e-6)
        assert result["tracked"][0] == 20 * 30 and len(result["tracked"]) == 3


def test_the_pipeline_finds_the_same_without_the_package(elsewhere, tiny_model, tiny_processor, frames) -> None:
    pipe = pipeline("reasoning-video-segmentation", model=tiny_model, processor=tiny_processor, device="cpu")
    expected = pipe(frames, {"query": QUERY, "answer": "It is [SEG]."}, explain=True)
    expected |= {name: int(np.sum(expected[name])) for name in ("masks", "object_masks")}
    assert expected["masks"] > 0
    for result in elsewhere:
        found = result["pipeline"]
        for name in ("scores", "frame_scores"):
            np.testing.assert_allclose(found.pop(name), expected[name], atol=1e-4, rtol=0)
        assert found == {name: value for name, value in expected.items() if name in found}
        assert set(expected) - set(found) == {"scores", "frame_scores"}


def test_a_folder_saved_again_is_the_same(elsewhere) -> None:
    first, second = elsewhere
    assert first == second


def test_the_saved_folder_holds_all_of_the_code(folder) -> None:
    modeling = Path(__file__).parents[2] / "src" / "visa_hf" / "modeling"
    saved = {path.name for path in folder.glob("*.py")}
    assert saved == {path.name for path in modeling.glob("*_*.py")} - {"__init__.py"}
    for name in saved:
        assert (folder / name).read_bytes() == (modeling / name).read_bytes()


def test_the_saved_folder_names_its_classes(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_visa.VisaConfig",
        "AutoModel": "modeling_visa.VisaForVideoSegmentation",
    }
    assert config["custom_pipelines"] == {
        "reasoning-video-segmentation": {
            "impl": "pipeline_visa.VisaPipeline",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_visa.VisaProcessor"
