"""Pointing: while an answer describes a thing, the language model is to look at that thing's visual tokens.

The published system begins with a Llama that knows how to look things up. A model that begins from nothing learns to
read the words of a question and to put what is seen into words long before it learns to look where the words say.
Masks tell where that is: the attention weights of half of the heads of one layer, the first of the model's second
half, are trained to lie on the visual tokens of the mask that the answer is about to ask for ("Supervising Neural
Attention Models for Video Captioning by Human Gaze Data", https://huggingface.co/papers/1707.06029).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

# Kinds of text models whose attention is computed here as they compute it.
POINTING_MODELS = ("llama", "qwen2", "qwen3")

# Of a thing that covers less of every visual token, there is nothing to look at.
_LEAST_SHARE = 0.1
# Added to weights, so that their logarithm stays finite.
_LEAST_WEIGHT = 1e-6


def check_pointing(config: Any, weight: float) -> None:
    """Refuse a text model whose attention weights are not computed here.

    Raises:
        ValueError: if it is of another kind than `POINTING_MODELS`, or does not see all that is before.
    """
    text = config.text_config
    kinds = sorted(set(getattr(text, "layer_types", None) or ["full_attention"]))
    if text.model_type not in POINTING_MODELS or kinds != ["full_attention"]:
        raise ValueError(
            f"`pointing_weight` is {weight}, which needs a text model of type {', '.join(POINTING_MODELS)} with "
            f"layers of full_attention, but it is {text.model_type!r} with {', '.join(kinds)}. Set it to 0."
        )


def pointing_losses(model: nn.Module, middle: Tensor, inputs: dict[str, Any], shares: Tensor, stop_id: int) -> Tensor:
    """Losses of where the language model looks while it describes what it is about to mask.

    The loss of a mask is the mean of -log(attention weight on the visual tokens of the target frame that the mask
    covers, each weighed by the share of it that the mask covers), over the heads that are taught and the positions
    that predict the tokens from the beginning of the sentence with the mask's [SEG], or from the [SEG] before it in
    the same sentence, up to the mask's own [SEG].

    Args:
        model ([`VisaForVideoSegmentation`]): what is trained, without wrappers.
        middle (`torch.Tensor` of shape `(N, S, D)`): its `middle_hidden_state`.
        inputs (`dict`): the micro-batch that it is of, as [`VisaDataCollator`] makes it: padded on the right.
        shares (`torch.Tensor` of shape `(M, L)`): how much of each visual token of the target frame each mask covers,
            [`token_shares`], in the order of the conversations and of their [SEG]s.
        stop_id (`int`): the token that ends a sentence.

    Returns:
        `torch.Tensor` of shape `(M,)`, float32; 0 for masks that cover next to nothing of every token.
    """
    config: Any = model.config
    spans: list[tuple[int, int, int]] = []  # conversation, and the positions that point: first, and behind the last
    for number, labels in enumerate(inputs["labels"]):
        spans += [(number, *span) for span in describing_spans(labels, config.seg_token_id, stop_id)]
    told = (shares.amax(dim=1) > _LEAST_SHARE).nonzero()[:, 0].tolist()
    losses = shares.new_zeros(len(shares), dtype=torch.float32)
    if not told:
        return losses
    conversations = sorted({spans[row][0] for row in told})
    rows = [conversations.index(spans[row][0]) for row in told for _ in range(*spans[row][1:])]
    places = [place for row in told for place in range(*spans[row][1:])]
    lengths = [spans[row][2] - spans[row][1] for row in told]
    weights = attention_weights(model, middle[conversations], rows, places)  # (P, heads, S)
    is_image = inputs["input_ids"][conversations] == config.image_token_id
    length = shares.shape[1]
    columns = torch.stack([row.nonzero()[-length:, 0] for row in is_image])  # (N', L)
    seen = weights.gather(2, columns[rows][:, None].expand(-1, weights.shape[1], -1))  # (P, heads, L)
    covered = shares[told].repeat_interleave(torch.tensor(lengths, device=shares.device), dim=0)
    surprise = -((seen * covered[:, None]).sum(dim=2) + _LEAST_WEIGHT).log().mean(dim=1)  # (P,)
    means = torch.stack([part.mean() for part in surprise.split(lengths)])
    return losses.index_put((torch.tensor(told, device=losses.device),), means)


def describing_spans(labels: Tensor, seg_token_id: int, stop_id: int) -> list[tuple[int, int]]:
    """Find the positions that predict each [SEG] of an answer and what describes it.

    Args:
        labels (`torch.Tensor` of shape `(S,)`, int64): of one conversation, not shifted.
        seg_token_id (`int`), stop_id (`int`): [SEG], and the token that ends a sentence.

    Returns:
        list of `(first, behind the last)`, positions for each [SEG].
    """
    spans = []
    begin = -1
    for place, label in enumerate(labels.tolist()):
        if label < 0:
            begin = -1
            continue
        begin = place if begin < 0 else begin
        if label == seg_token_id:
            spans.append((begin - 1, place))
        if label in (seg_token_id, stop_id):
            begin = place + 1
    return spans


def attention_weights(model: nn.Module, middle: Tensor, rows: Sequence[int], places: Sequence[int]) -> Tensor:
    """Weights with which the layer after `middle` looks at each position: those of the first half of its heads.

    They are computed from the layer's own projections, for some positions alone: the attention that the model runs
    keeps no weights, and all of them would be many.

    Args:
        model ([`VisaForVideoSegmentation`]): the model.
        middle (`torch.Tensor` of shape `(N, S, D)`): its `middle_hidden_state`, of conversations padded on the right.
        rows (sequence of P `int`): the conversation of each position asked for, ascending.
        places (sequence of P `int`): the position in it.

    Returns:
        `torch.Tensor` of shape `(P, heads / 2, S)`, float32; at least one head.
    """
    text: Any = model.model.language_model  # type: ignore[union-attr]
    layer = text.layers[model.middle_layer]
    attention = layer.self_attn
    states = layer.input_layernorm(middle)
    queries = _heads(attention, "q", states[rows, places])  # (P, heads, d)
    keys = _heads(attention, "k", states)  # (N, S, key heads, d)
    cos, sin = text.rotary_emb(states, torch.arange(middle.shape[1], device=middle.device)[None])
    queries = _rotated(queries, cos[0, places][:, None], sin[0, places][:, None])
    keys = _rotated(keys, cos[:, :, None], sin[:, :, None])
    half = max(queries.shape[1] // 2, 1)
    group = queries.shape[1] // keys.shape[2]
    queries, keys = queries[:, :half], keys.repeat_interleave(group, dim=2)[:, :, :half]
    # One product for each conversation: its positions with its own keys.
    counts = torch.tensor(rows).bincount(minlength=len(middle)).tolist()
    products = [
        torch.einsum("phd,shd->phs", asking, asked)
        for asking, asked in zip(queries.split(counts), keys.unbind(), strict=True)
    ]
    scores = torch.cat(products).float() * attention.scaling
    place = torch.tensor(places, device=middle.device)
    is_later = torch.arange(middle.shape[1], device=middle.device) > place[:, None]
    return scores.masked_fill(is_later[:, None], -torch.inf).softmax(dim=-1)


def _heads(attention: Any, name: str, states: Tensor) -> Tensor:
    """Project to queries ("q") or keys ("k"), one row for each head, and normalise them where the model does."""
    projected = getattr(attention, f"{name}_proj")(states).unflatten(-1, (-1, attention.head_dim))
    normalise = getattr(attention, f"{name}_norm", None)
    return projected if normalise is None else normalise(projected)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, as the text models of `POINTING_MODELS` have them."""
    return heads * cos + rotate_half(heads) * sin
