"""Training: a Trainer that knows VISA's losses, what of the model is trained, and checkpoints that survive a kill.

Nothing here is imported by `import visa_hf`. PEFT and DeepSpeed are imported only by those who use them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visa_hf.trainer.checkpoints import find_last_checkpoint, merge_adapter
    from visa_hf.trainer.clip_evaluation import ClipEvaluation
    from visa_hf.trainer.data_collator import VisaDataCollator
    from visa_hf.trainer.lora import TrainingOptions, prepare_for_training, quantization_config, trainable_parameters
    from visa_hf.trainer.tracker_trainer import XMemTrainer
    from visa_hf.trainer.training_arguments import VisaTrainingArguments
    from visa_hf.trainer.visa_trainer import VisaTrainer
    from visa_hf.trainer.visual_words_trainer import VisualWordsTrainer

__all__ = [
    "ClipEvaluation",
    "TrainingOptions",
    "VisaDataCollator",
    "VisaTrainer",
    "VisaTrainingArguments",
    "VisualWordsTrainer",
    "XMemTrainer",
    "find_last_checkpoint",
    "merge_adapter",
    "prepare_for_training",
    "quantization_config",
    "trainable_parameters",
]

_MODULES = {
    "checkpoints": ["find_last_checkpoint", "merge_adapter"],
    "clip_evaluation": ["ClipEvaluation"],
    "data_collator": ["VisaDataCollator"],
    "lora": ["TrainingOptions", "prepare_for_training", "quantization_config", "trainable_parameters"],
    "tracker_trainer": ["XMemTrainer"],
    "training_arguments": ["VisaTrainingArguments"],
    "visa_trainer": ["VisaTrainer"],
    "visual_words_trainer": ["VisualWordsTrainer"],
}
# Where the names that are imported on first use live.
_LAZY = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
