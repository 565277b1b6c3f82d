"""A small random model that runs everything and means nothing: quick, and its answer is always the same.

Its weights are drawn from a fixed seed. So that there is something to draw, they are then bent: the answer is always
"It is [SEG].", and masks on target frames are blobs of about half the picture. Nothing is learnt from anything.
"""

import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast

import visa_hf
from visa_hf.modeling.configuration_visa import VisaConfig
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.processing_visa import VisaProcessor

ANSWER = "It is [SEG]."
_TOKENIZER = Path(visa_hf.__file__).parent / "assets" / "tokenizer"
_SEED = 6


def make_demo_model() -> tuple[VisaForVideoSegmentation, VisaProcessor]:
    """Build the demo model and its processor: the same ones every time.

    Returns:
        A model of `VisaConfig.tiny()` with its tracker, in evaluation mode, and its processor.
    """
    config = VisaConfig.tiny()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_TOKENIZER)
    processor = VisaProcessor.from_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = VisaForVideoSegmentation(config).eval()
        _draw(model)
        _smooth(model.model.sam.mask_decoder.upscale_conv1)
        _smooth(model.model.sam.mask_decoder.upscale_conv2)
        _centre_masks(model)
        answer_ids = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
        _teach_answer(model, [*answer_ids, tokenizer.eos_token_id])
    return model, processor


def build_demo_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Save the demo model and its processor to `folder`, as a checkpoint that `segment(model=folder)` takes."""
    model, processor = make_demo_model()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _draw(model: nn.Module) -> None:
    """Draw all weights, each from a seed of its own name, so that they depend on nothing else.

    They are so large that a layer about keeps the size of its input, but for the language model, whose answer is to be
    decided by `_teach_answer`. Biases become 0; norms stay.
    """
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            values.zero_()
        elif values.ndim > 1 or name.endswith("class_embedding"):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + _SEED)
            is_text = name.startswith(("model.language_model.", "lm_head."))
            scale = 0.02 if is_text else values[0].numel() ** -0.5
            values.copy_(torch.randn(values.shape, generator=generator) * scale)


def _smooth(upscaling: nn.ConvTranspose2d) -> None:
    """Give each pixel that an upscaling makes of another the same weights."""
    kernel = upscaling.weight.mean(dim=(2, 3), keepdim=True) * upscaling.kernel_size[0]
    upscaling.weight.copy_(kernel.expand_as(upscaling.weight))


def _centre_masks(model: Any) -> None:
    """Make mask logits average to 0 and vary by about 2 over a picture of random patches."""
    decoder = model.model.sam.mask_decoder
    side = model.config.sam_config.vision_config.image_size
    generator = torch.Generator().manual_seed(_SEED)
    patches = F.interpolate(torch.randn(1, 3, side // 16, side // 16, generator=generator), (side, side))
    features = model.get_sam_features(patches)[0]
    prompt = torch.zeros(1, features.shape[0])
    channels: list[torch.Tensor] = []
    handle = decoder.upscale_conv2.register_forward_hook(lambda _module, _args, output: channels.append(output))
    model.decode_masks(features, prompt)
    handle.remove()
    # A mask is a weighted sum of these channels: take the part of the weights away that sees their average.
    average = F.normalize(F.gelu(channels[0]).flatten(2).mean(dim=(0, 2)), dim=0)
    last = decoder.output_hypernetworks_mlps[0].proj_out
    last.weight.sub_(torch.outer(average, average @ last.weight))
    last.bias.sub_(average * (average @ last.bias))
    scale = 2 / model.decode_masks(features, prompt)[0].std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)


def _teach_answer(model: Any, answer_ids: list[int]) -> None:
    """Make `answer_ids` the greedy answer to anything.

    Channel i of a token's embedding says that answer token i comes next; for every token that is not in the answer
    this is channel 0.
    """
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embeddings[:, 0] = 1.0
    for place, token_id in enumerate(answer_ids):
        head[token_id, place] = 1.0
        embeddings[token_id, 0] = 0.0
        embeddings[token_id, place + 1] = 1.0
