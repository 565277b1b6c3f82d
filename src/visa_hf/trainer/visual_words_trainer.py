"""A first training of the visual tower alone, in which it learns to see what answers say: visual_words.py."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import unwrap_peft_model

from visa_hf.modeling.outputs_visa import VisaOutput
from visa_hf.trainer.visa_trainer import VisaTrainer
from visa_hf.trainer.visual_words import frame_masks, tower_losses


class VisualWordsTrainer(VisaTrainer):
    """Trains visual tower, projector and head of the language model, with `args.objective` "visual_words".

    The loss of a step is the mean over its masks of those of [`tower_losses`]. Logs hold it as `loss`, and its part
    that is of words as `text_loss`. Target frames alone are seen.

    Args:
        As of [`VisaTrainer`].

    Raises:
        ValueError: with several processes or DeepSpeed, an evaluation, or if the visual tower is not trained.
    """

    def __init__(self, model: nn.Module, args: Any, processing_class: Any, **kwargs: Any) -> None:
        refusal = "`objective` is 'visual_words', which"
        if args.world_size > 1 or args.deepspeed:
            raise ValueError(f"{refusal} one process alone trains, without DeepSpeed. Start one, without `deepspeed`.")
        if kwargs.get("eval_dataset") is not None:
            raise ValueError(f"{refusal} makes no masks to evaluate. Leave the evaluation out.")
        base: Any = unwrap_peft_model(model)
        if not any(parameter.requires_grad for parameter in base.model.vision_tower.parameters()):
            raise ValueError(f"{refusal} trains the visual tower. Name `vision_tower` in `unfreeze`.")
        super().__init__(model, args, processing_class, **kwargs)

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], num_tokens: Tensor | None, num_masks: Tensor | None
    ) -> VisaOutput:
        """Return the loss; `num_masks` is the step's, `None` for the micro-batch's own."""
        base: Any = unwrap_peft_model(model)
        if not any(map(len, inputs["mask_labels"])):  # a loss, but of nothing
            tower = base.model.vision_tower
            nothing: Any = next(value for value in tower.parameters() if value.requires_grad).sum() * 0
            return VisaOutput(loss=nothing, text_loss=nothing, bce_loss=nothing, dice_loss=nothing)
        last_frames = inputs["num_frames"].cumsum(0) - 1  # the target is the last frame of its video
        patches = base.model.get_image_features(inputs["pixel_values"][last_frames]).last_hidden_state
        masks = frame_masks(self.processing_class, inputs, patches.shape[1])
        words, layout = tower_losses(base, patches, masks)
        number = len(words) if num_masks is None else num_masks.clamp(min=1)
        words_loss: Any = words.sum() / number
        loss: Any = words_loss + layout.sum() / number
        zero: Any = torch.zeros_like(loss)
        return VisaOutput(loss=loss, text_loss=words_loss, bce_loss=zero, dice_loss=zero)
