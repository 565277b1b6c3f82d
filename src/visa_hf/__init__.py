"""Reasoning video segmentation: a video and a sentence in, the masks of the thing it means out.

Importing this registers the classes with transformers, so that `AutoConfig`, `AutoModel`, `AutoProcessor` and
`pipeline("reasoning-video-segmentation")` load a saved folder right away. What is not needed for that is imported when
it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from visa_hf.modeling.configuration_visa import VisaConfig, XMemConfig
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.modeling_xmem import XMemModel
from visa_hf.modeling.outputs_visa import FrameSelection, VideoSegmentation
from visa_hf.modeling.pipeline_visa import TASK, VisaPipeline
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.modeling.video_session_visa import VisaVideoSession

if TYPE_CHECKING:
    from visa_hf.inference import segment
    from visa_hf.segment_many import segment_videos

__version__ = "0.1.0"

__all__ = [
    "FrameSelection",
    "VideoSegmentation",
    "VisaConfig",
    "VisaForVideoSegmentation",
    "VisaProcessor",
    "VisaVideoSession",
    "XMemConfig",
    "XMemModel",
    "segment",
    "segment_videos",
]

# Where the names that are imported on first use live.
_LAZY = {"segment": "visa_hf.inference", "segment_videos": "visa_hf.segment_many"}

for _config_class, _model_class in ((VisaConfig, VisaForVideoSegmentation), (XMemConfig, XMemModel)):
    AutoConfig.register(_config_class.model_type, _config_class)
    AutoModel.register(_config_class, _model_class)
AutoProcessor.register(VisaConfig, VisaProcessor)
PIPELINE_REGISTRY.register_pipeline(TASK, pipeline_class=VisaPipeline, pt_model=AutoModel, type="multimodal")
VisaConfig.has_registered_pipeline = True
# Saved folders carry the code of `modeling/` and load with `trust_remote_code=True` where this package is missing.
VisaConfig.register_for_auto_class()
VisaForVideoSegmentation.register_for_auto_class("AutoModel")
VisaProcessor.register_for_auto_class()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
