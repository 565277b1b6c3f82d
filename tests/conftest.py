"""Fixtures for all tests: a tiny model, its processor, and a real small video."""

import os

# Before torch is imported, and for subprocesses too: the models here are too small for a second thread to help, and
# threads that wait for each other make a busy machine several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from tests.media import write_video
from visa_hf import VisaConfig, VisaForVideoSegmentation, VisaProcessor
from visa_hf.convert import convert_tokenizer

REFERENCE = Path(__file__).parent / "reference"


@pytest.fixture
def tiny_config() -> VisaConfig:
    return VisaConfig.tiny()


@pytest.fixture(scope="session")
def tiny_model() -> VisaForVideoSegmentation:
    """A seeded model in eval mode, for all tests together: whoever changes it works on a `copy.deepcopy`."""
    torch.manual_seed(0)
    model = VisaForVideoSegmentation(VisaConfig.tiny()).eval()
    # Freshly initialised weights are so small that all outputs look alike, and a wrong one would look right.
    with torch.no_grad():
        for parameter in (*model.model.parameters(), model.lm_head.weight):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return convert_tokenizer(REFERENCE / "tokenizer" / "tokenizer.model")


@pytest.fixture(scope="session")
def tiny_processor(tiny_tokenizer) -> VisaProcessor:
    return VisaProcessor.from_config(VisaConfig.tiny(), tiny_tokenizer)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An mp4 of 12 frames, 64 x 96 pixels, 25 frames per second."""
    path = tmp_path_factory.mktemp("media") / "tiny.mp4"
    write_video(path, num_frames=12)
    return path
