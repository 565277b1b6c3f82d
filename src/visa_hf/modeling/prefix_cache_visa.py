"""The tokens that several prompts begin with, read by the language model once.

In VISA's prompts the frames come before the question (VISA, https://huggingface.co/papers/2407.11325, prompts of the
released code), so that all questions about the same frames begin with the same thousand tokens or more. Their keys and
values are kept and lent to each group of questions; what is computed is the same. Letters: N prompts of S tokens, the
first P of them shared. Which frames are meant, and how long a prefix is kept, is decided in video_answering_visa.py.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .configuration_visa import VisaConfig


@dataclass(frozen=True)
class SharedPrefix:
    """Keys and values of tokens that prompts begin with.

    Args:
        input_ids (`torch.Tensor` of shape `(P,)`, int64, CPU): the tokens.
        past_key_values (`Cache` of one row): their keys and values, wherever and in whatever dtype they are kept.
        devices (tuple of `torch.device`), dtype: where each layer of the language model takes them, and as what.
    """

    input_ids: Tensor
    past_key_values: Cache
    devices: tuple[torch.device, ...]
    dtype: torch.dtype

    def for_prompts(self, num_prompts: int) -> Cache:
        """Return keys and values of N equal rows, to be continued; those kept here do not change."""
        lent = _copied(self.past_key_values, self.devices, self.dtype)
        for layer in _layers(lent):
            # A view: the first token that follows makes a copy anyway.
            layer.keys = layer.keys.expand(num_prompts, -1, -1, -1)
            layer.values = layer.values.expand(num_prompts, -1, -1, -1)
        return lent


def can_be_shared(past_key_values: Any) -> bool:
    """Tell whether a language model's cache can be lent: plain keys and values, no recurrent or quantised state."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(past_key_values, Cache) and all(type(layer) in plain for layer in past_key_values.layers)


def repeated(past_key_values: Cache, times: int) -> Cache:
    """Return keys and values with each row as many times, to be continued; those given do not change."""
    copied = copy.copy(past_key_values)
    copied.layers = [copy.copy(layer) for layer in past_key_values.layers]
    if times > 1:
        for layer in _layers(copied):
            layer.keys = layer.keys.repeat_interleave(times, dim=0)
            layer.values = layer.values.repeat_interleave(times, dim=0)
    return copied


def make_prefix(
    input_ids: Tensor, past_key_values: Cache, device: torch.device | None, dtype: torch.dtype | None
) -> SharedPrefix:
    """Keep a prefix on `device` and in `dtype`; where and what they are already if these are `None`."""
    layers = _layers(past_key_values)
    devices = tuple(layer.keys.device for layer in layers)
    own: torch.dtype = layers[0].keys.dtype
    kept = _copied(past_key_values, devices if device is None else (device,) * len(layers), dtype or own)
    return SharedPrefix(input_ids.cpu(), kept, devices, own)


def shared_length(rows: Sequence[Tensor], image_token_id: int) -> int:
    """Return how many tokens prompts (S_n,) share: up to the last visual token, 0 if they differ there."""
    lengths = {int((row == image_token_id).nonzero()[-1]) + 1 if (row == image_token_id).any() else 0 for row in rows}
    length = lengths.pop()
    is_shared = not lengths and all(torch.equal(row[:length], rows[0][:length]) for row in rows)
    return length if is_shared else 0


def pad_behind(rows: Sequence[Tensor], num_shared: int, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Make prompts (S_n,) equally long by padding between the shared tokens and the rest.

    With `num_shared` 0 this is padding on the left. Positions count the tokens that are no padding.

    Returns:
        `input_ids` and `attention_mask`, both `(N, S)`, int64.
    """
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_token_id)
    attention_mask = torch.ones_like(input_ids)
    for n, row in enumerate(rows):
        start = length - (len(row) - num_shared)
        input_ids[n, :num_shared], input_ids[n, start:] = row[:num_shared], row[num_shared:]
        attention_mask[n, num_shared:start] = 0
    return input_ids, attention_mask


def positions_of(attention_mask: Tensor) -> Tensor:
    """Positions that count the tokens that are no padding, wherever it lies: (N, S) -> (N, S), int64."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def check_prefix(config: VisaConfig, input_ids: Tensor, attention_mask: Tensor, past_key_values: Cache) -> None:
    """Refuse keys and values that are not those of the first tokens of all prompts, or leave a frame to be read."""
    num_cached = int(past_key_values.get_seq_length())
    if not 0 < num_cached < input_ids.shape[1]:
        raise ValueError(
            f"`past_key_values` hold {num_cached} tokens but the prompts have {input_ids.shape[1]}. Give those of "
            "their first tokens, and leave at least one to be read."
        )
    if not attention_mask[:, :num_cached].all():
        raise ValueError(
            f"A prompt is padded within its first {num_cached} tokens, which `past_key_values` hold. Pad behind them."
        )
    if (input_ids[:, num_cached:] == config.image_token_id).any():
        raise ValueError("`past_key_values` leave out a frame, but all frames must lie in the tokens that they hold.")


def _layers(past_key_values: Cache) -> Sequence[Any]:
    """Layers with keys and values, as `can_be_shared` has made sure."""
    return past_key_values.layers


def _copied(past_key_values: Cache, devices: Sequence[torch.device], dtype: torch.dtype) -> Cache:
    """A cache of its own, whose tensors are shared where they need not be moved: they are only ever replaced."""
    copied = repeated(past_key_values, 1)
    for layer, device in zip(_layers(copied), devices, strict=True):
        layer.keys, layer.values = layer.keys.to(device, dtype), layer.values.to(device, dtype)
    return copied
