"""Builders of the data sets that VISA is trained and measured on, from the folders that their authors publish.

Each builder is a class of its own (`datasets` runs no script files any more):
`ReVOS("masks", data_dir=FOLDER)`, then `download_and_prepare()` and `as_dataset()`, or `as_streaming_dataset()`.
Nothing is downloaded. A builder is imported when its name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .annotations import AnnotationError
    from .base import VisaBuilderConfig, VisaDatasetBuilder
    from .chat_univi_instruct import ChatUniViInstruct
    from .llava_instruct import LLaVAInstruct
    from .lv_vis import LVVIS
    from .mevis import MeViS
    from .own_data import OwnData
    from .reason_seg import ReasonSeg
    from .ref_davis import RefDAVIS17
    from .ref_youtube_vos import RefYoutubeVOS
    from .refer_seg import ReferSeg
    from .revos import ReVOS
    from .semantic_seg import ADE20K, PACOLVIS, COCOStuff, Mapillary, PascalPart
    from .synthetic_world import Synthetic

__all__ = [
    "ADE20K",
    "COCOStuff",
    "ChatUniViInstruct",
    "LLaVAInstruct",
    "LVVIS",
    "Mapillary",
    "MeViS",
    "OwnData",
    "PACOLVIS",
    "PascalPart",
    "ReVOS",
    "ReasonSeg",
    "RefDAVIS17",
    "RefYoutubeVOS",
    "ReferSeg",
    "Synthetic",
    "AnnotationError",
    "VisaBuilderConfig",
    "VisaDatasetBuilder",
]

_MODULES = {
    "annotations": ["AnnotationError"],
    "base": ["VisaBuilderConfig", "VisaDatasetBuilder"],
    "chat_univi_instruct": ["ChatUniViInstruct"],
    "llava_instruct": ["LLaVAInstruct"],
    "lv_vis": ["LVVIS"],
    "mevis": ["MeViS"],
    "own_data": ["OwnData"],
    "reason_seg": ["ReasonSeg"],
    "ref_davis": ["RefDAVIS17"],
    "ref_youtube_vos": ["RefYoutubeVOS"],
    "refer_seg": ["ReferSeg"],
    "revos": ["ReVOS"],
    "semantic_seg": ["ADE20K", "COCOStuff", "Mapillary", "PACOLVIS", "PascalPart"],
    "synthetic_world": ["Synthetic"],
}
# Where the names that are imported on first use live.
_LAZY = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
