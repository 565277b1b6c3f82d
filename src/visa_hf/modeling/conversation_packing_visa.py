"""Several conversations about one video as one sequence: what they begin with is read once.

Their prompts begin alike, with hundreds of visual tokens; questions and answers are short. A packed sequence holds
the common beginning, then one branch for each conversation, which sees the beginning and itself, at the positions
that it would have alone. The language model then computes the same states, up to rounding, at a fraction of the cost.
Which tokens stand where is decided here, on token ids; nothing is computed from hidden states.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .inputs_visa import Videos

# Attention that takes any mask.
PACKABLE_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class PackedConversations:
    """Where the tokens of N conversations of at most S tokens stand in M sequences of at most L tokens.

    Args:
        input_ids (`torch.Tensor` of shape `(M, L)`, int64): tokens; 0 behind the end of a sequence.
        position_ids (`torch.Tensor` of shape `(M, L)`, int64): the position that each token has in its conversation.
        is_seen (`torch.Tensor` of shape `(M, 1, L, L)`, bool): whether the token of a row sees that of a column.
        places (`torch.Tensor` of shape `(N, S)`, int64): where each token of the conversations stands, counted through
            all sequences; padding stands where the first token does.
        frame_rows (`list[int]`): rows of the frames that the sequences show, in order.
    """

    input_ids: Tensor
    position_ids: Tensor
    is_seen: Tensor
    places: Tensor
    frame_rows: list[int]

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to attention scores, `(M, 1, L, L)`."""
        return torch.zeros(self.is_seen.shape, dtype=dtype, device=self.is_seen.device).masked_fill(
            ~self.is_seen, torch.finfo(dtype).min
        )

    def unpack(self, states: Tensor) -> Tensor:
        """Return the states of the conversations, `(N, S, D)`, from those of the sequences, `(M, L, D)`."""
        return states.flatten(0, 1)[self.places]


def pack_conversations(
    input_ids: Tensor, attention_mask: Tensor | None, videos: Videos, image_token_id: int
) -> PackedConversations | None:
    """Pack conversations about the same video into one sequence each.

    Args:
        input_ids (`torch.Tensor` of shape `(N, S)`, int64): the conversations, padded on the right.
        attention_mask (`torch.Tensor` of shape `(N, S)`, *optional*): 1 for tokens, 0 for padding.
        videos (`Videos`): which conversation is about which video.
        image_token_id (`int`): the token that stands for visual tokens.

    Returns:
        [`PackedConversations`], or `None` where packing is of no use (no video has two conversations, or sequences
        would be so long that there were more tokens to read) or not possible (padding on the left or inside, a mask
        of another shape, or frames behind what conversations about one video have in common).
    """
    members: dict[int, list[int]] = {}
    for conversation, video in enumerate(videos.video_of):
        # Text alone shares nothing.
        members.setdefault(video if video >= 0 else -1 - conversation, []).append(conversation)
    if len(members) == len(input_ids):
        return None
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    if mask.ndim != 2 or not mask[:, 0].all() or (mask.diff(dim=1) > 0).any():
        return None
    lengths = mask.sum(dim=1).tolist()
    sequences = []
    for rows in members.values():
        start = _common_length(input_ids[rows], [lengths[row] for row in rows])
        if (input_ids[rows, start:] == image_token_id).any():
            return None
        sequences.append((rows, start))
    sizes = [start + sum(lengths[row] - start for row in rows) for rows, start in sequences]
    if len(sizes) * max(sizes) > input_ids.numel():
        return None
    frame_rows = replace(videos, video_of=list(members)).frame_rows()
    return _packed(input_ids, lengths, sequences, max(sizes), frame_rows)


def _common_length(rows: Tensor, lengths: list[int]) -> int:
    """Number of first tokens that all rows share, at least one less than the shortest has."""
    differs = (rows != rows[:1]).any(dim=0)
    common = int(differs.int().argmax()) if differs.any() else rows.shape[1]
    return min(common, min(lengths) - 1)


def _packed(
    input_ids: Tensor,
    lengths: list[int],
    sequences: list[tuple[list[int], int]],
    length: int,
    frame_rows: list[int],
) -> PackedConversations:
    """Lay out sequences of `length` tokens: for each its conversations and how many tokens these have in common."""
    shape = (len(sequences), length)
    ids, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    # 0 is the common beginning, -1 what is behind the end.
    branches = torch.full(shape, -1)
    places = torch.zeros(input_ids.shape, dtype=torch.int64)
    source = input_ids.cpu()
    for number, (rows, start) in enumerate(sequences):
        ids[number, :start] = source[rows[0], :start]
        positions[number, :start] = torch.arange(start)
        branches[number, :start] = 0
        end = start
        for branch, row in enumerate(rows, start=1):
            begin, end = end, end + lengths[row] - start
            ids[number, begin:end] = source[row, start : lengths[row]]
            positions[number, begin:end] = torch.arange(start, lengths[row])
            branches[number, begin:end] = branch
            places[row] = number * length
            places[row, :start] += torch.arange(start)
            places[row, start : lengths[row]] += torch.arange(begin, end)
    is_seen = (branches[:, None, :] == 0) | (branches[:, None, :] == branches[:, :, None])
    is_seen &= torch.ones(length, length, dtype=torch.bool).tril()
    device = input_ids.device
    return PackedConversations(
        ids.to(device), positions.to(device), is_seen[:, None].to(device), places.to(device), frame_rows
    )
