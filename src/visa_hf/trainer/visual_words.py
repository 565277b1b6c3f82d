"""Visual words: a first training of the visual tower alone, in which it learns to see what answers say.

The published system begins with CLIP, which has learnt from captions. A model that begins from nothing has to see
before it can be told about it: the patches inside a mask, averaged and projected as the language model would get
them, are to predict the words of the answer that the mask belongs to, through the language model's own head
(bags of words as targets: "Learning Visual Features from Large Weakly Supervised Data",
https://huggingface.co/papers/1511.02251). Neither of the two runs in a step, and each mask tells the tower which
patches its words are about.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.trainer_utils import unwrap_peft_model

from visa_hf.modeling.losses_visa import IGNORE_INDEX
from visa_hf.modeling.outputs_visa import VisaOutput
from visa_hf.trainer.visa_trainer import VisaTrainer


class VisualWordsTrainer(VisaTrainer):
    """Trains visual tower, projector and head of the language model, with `args.objective` "visual_words".

    The loss of a mask is the mean, over the different words of its answer, of the negative log-likelihood of the word
    given the mask's patches; a word weighs the more, the fewer answers of the batch have it, so that "it is the"
    weighs nothing. That of a step is the mean over its masks. Masks that cover no patch of what the tower sees, and
    answers without a word of their own, count as 0. Logs hold it as `loss` and `text_loss`. Target frames alone are
    seen.

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
        self._base = base
        self._no_words = torch.tensor(sorted(processing_class.tokenizer.all_special_ids), device=args.device)

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], num_tokens: Tensor | None, num_masks: Tensor | None
    ) -> VisaOutput:
        """Return the loss; `num_masks` is the step's, `None` for the micro-batch's own."""
        losses = self._mask_losses(inputs)
        loss: Any = losses.sum() / (max(len(losses), 1) if num_masks is None else num_masks.clamp(min=1))
        nothing: Any = torch.zeros_like(loss)
        return VisaOutput(loss=loss, text_loss=loss, bce_loss=nothing, dice_loss=nothing)

    def _mask_losses(self, inputs: dict[str, Any]) -> Tensor:
        """Loss of each mask of a micro-batch."""
        network, processor = self._base.model, self.processing_class
        videos = inputs["conversation_to_video"].tolist()
        last_frames = inputs["num_frames"].cumsum(0) - 1  # the target is the last frame of its video
        patches = network.get_image_features(inputs["pixel_values"][last_frames]).last_hidden_state
        side = round(patches.shape[1] ** 0.5)
        rows: list[Tensor] = []
        words: list[Tensor] = []
        for video, labels, masks in zip(videos, inputs["labels"], inputs["mask_labels"], strict=True):
            if len(masks) == 0:
                continue
            shares = patch_shares(masks, processor.image_processor, side).to(patches)  # (K, patches)
            rows.append(shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6) @ patches[video])
            said = labels[labels != IGNORE_INDEX].unique()
            said = said[~torch.isin(said, self._no_words)]
            words += [said if bool(share.any()) else said[:0] for share in shares]
        if not rows:  # a loss, but of nothing
            return next(value for value in network.vision_tower.parameters() if value.requires_grad).sum()[None] * 0
        features = network.mm_projector(torch.cat(rows).to(network.mm_projector.weight.dtype))
        return bag_of_words_losses(self._base.lm_head(features), words)


def bag_of_words_losses(logits: Tensor, words: Sequence[Tensor]) -> Tensor:
    """Mean negative log-likelihood of the words of each row, weighted by how telling they are.

    The weight of a word is log(rows with words / rows with this word) (inverse document frequency).

    Args:
        logits (`torch.Tensor` of shape `(M, V)`): scores of the vocabulary.
        words (list of M `torch.Tensor`, int64): different words of each row, in [0, V).

    Returns:
        `torch.Tensor` of shape `(M,)`, float32; 0 for rows without a word that others lack.
    """
    is_said = torch.zeros(logits.shape, device=logits.device)
    for row, said in zip(is_said, words, strict=True):
        row[said] = 1
    num_rows = is_said.any(dim=1).sum()
    weights = is_said * (num_rows / is_said.sum(dim=0).clamp(min=1)).log().clamp(min=0)
    surprise = -F.log_softmax(logits.float(), dim=-1)
    return (weights * surprise).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)


def patch_shares(masks: Tensor, image_processor: Any, side: int) -> Tensor:
    """How much of each patch of the visual tower a mask covers, after what the image processor does to the frame.

    Args:
        masks (`torch.Tensor` of shape `(K, H, W)`): masks of a frame, 0 or 1.
        image_processor (`CLIPImageProcessorPil`): resizes the frame, and may crop its middle.
        side (`int`): patches in a row, and rows.

    Returns:
        `torch.Tensor` of shape `(K, side * side)`, float32 in [0, 1], rows from top to bottom.
    """
    height, width = masks.shape[1:]
    size = image_processor.size
    if image_processor.do_center_crop:
        scale = size.shortest_edge / min(height, width)
        resized = (round(height * scale), round(width * scale))
        window = (image_processor.crop_size.height, image_processor.crop_size.width)
    else:
        resized = window = (size.height, size.width)
    seen = F.interpolate(masks[:, None].float(), resized, mode="area")
    top, left = ((whole - part) // 2 for whole, part in zip(resized, window, strict=True))
    seen = seen[:, :, top : top + window[0], left : left + window[1]]
    return F.adaptive_avg_pool2d(seen, side).flatten(1)
