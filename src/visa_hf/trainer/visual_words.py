"""Visual words: what the visual tower learns from masks and their answers directly.

The published system begins with CLIP, which has learnt from captions. A model that begins from nothing has to see
before it can be told about it. Three losses ask it of the patch features of target frames, the first also of what the
language model makes of them:

- words: the patches inside a mask, averaged and projected as the language model would get them, predict the words of
  the answer that the mask belongs to, through the language model's own head (bags of words as targets: "Learning
  Visual Features from Large Weakly Supervised Data", https://huggingface.co/papers/1511.02251);
- groups: patches of one thing are nearer to each other than to others, by the distance that token merging clusters
  them with, so that a visual token is of one thing;
- layout: three channels say where the thing is and how large, so that both survive the averaging.

The tower is trained with them alone in visual_words_trainer.py; they count beside the losses of answers and
masks in visa_trainer.py.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visa_hf.modeling.losses_visa import IGNORE_INDEX
from visa_hf.modeling.visual_tokens_visa import assign_clusters, average_clusters

# A thing's size is the side of a square of as many patches, as a share of the frame's side, on a scale on which things
# of the synthetic world lie as far apart as their places do.
_SIZE_SCALE, _SIZE_OFFSET = 40, 7


class FrameMasks(NamedTuple):
    """What masks of a micro-batch's target frames cover, and the words that are said about them.

    Args:
        videos (`list[int]`): the video of each of M masks.
        shares (`torch.Tensor` of shape `(M, patches)`): how much of each patch each mask covers.
        words (list of M `torch.Tensor`, int64): different words of the answer, without its sentences before the one
            with `[SEG]`; none where nothing is covered.
        side (`int`): patches in a row, and rows.
        groups (`dict[int, torch.Tensor]`): [`patch_groups`] of each video that has masks.
    """

    videos: list[int]
    shares: Tensor
    words: list[Tensor]
    side: int
    groups: dict[int, Tensor]


def frame_masks(processor: Any, inputs: dict[str, Any], num_patches: int) -> FrameMasks:
    """Collect the masks of a micro-batch that [`VisaDataCollator`] made, for a tower of so many patches."""
    no_words = torch.tensor(sorted(processor.tokenizer.all_special_ids), device=inputs["labels"].device)
    side = round(num_patches**0.5)
    videos: list[int] = []
    shares: list[Tensor] = []
    words: list[Tensor] = []
    conversations = zip(inputs["conversation_to_video"].tolist(), inputs["labels"], inputs["mask_labels"], strict=True)
    for video, labels, masks in conversations:
        if len(masks) == 0:
            continue
        videos += [video] * len(masks)
        shares.append(patch_shares(masks, processor.image_processor, side))
        said = _words_of_masks(labels[labels != IGNORE_INDEX], processor).unique()
        said = said[~torch.isin(said, no_words)]
        words += [said if bool(share.any()) else said[:0] for share in shares[-1]]
    together = torch.cat(shares) if shares else torch.zeros(0, num_patches)
    owner = torch.tensor(videos)
    groups = {video: patch_groups(together[owner == video], side) for video in sorted(set(videos))}
    return FrameMasks(videos, together, words, side, groups)


def _words_of_masks(answer: Tensor, processor: Any) -> Tensor:
    """Leave out the sentences before the one with [SEG]: they may be of other things than the masks are."""
    first_seg = int((answer == processor.seg_token_id).int().argmax())
    stops = (answer[:first_seg] == processor.tokenizer.convert_tokens_to_ids(".")).nonzero()
    return answer[int(stops[-1]) + 1 :] if len(stops) else answer


def tower_losses(model: nn.Module, patches: Tensor, masks: FrameMasks) -> tuple[Tensor, Tensor]:
    """Losses of the patch features of target frames.

    The loss of a mask's words is the mean, over the different words of its answer, of the negative log-likelihood of
    the word given the mask's patches; a word weighs the more, the fewer answers of the batch have it, so that "it is
    the" weighs nothing. Masks that cover no patch of what the tower sees, and answers without a word of their own,
    count as 0. Masks of one frame share the loss of its groups and layout.

    Args:
        model ([`VisaForVideoSegmentation`]): what is trained, without wrappers.
        patches (`torch.Tensor` of shape `(B, patches, C)`): features of the target frame of each video.
        masks ([`FrameMasks`]): M masks of these frames, at least one.

    Returns:
        two `torch.Tensor` of shape `(M,)`, float32: of their words, and of groups and layout.
    """
    network: Any = model.model
    head: Any = model.lm_head
    shares = masks.shares.to(patches)
    weights = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6)  # (M, patches)
    features = (weights[:, None] @ patches[masks.videos])[:, 0]  # (M, C)
    features = network.mm_projector(features.to(network.mm_projector.weight.dtype))
    layout = {
        video: grouping_loss(patches[video], groups) + layout_loss(patches[video], groups, masks.side)
        for video, groups in masks.groups.items()
    }
    words = word_losses(surprises(head(features)), masks.words)
    return words, torch.stack([layout[video] for video in masks.videos])


def token_losses(model: nn.Module, shares: Tensor, states: Tensor, masks: FrameMasks) -> Tensor:
    """Losses of the language model's states of the target frames' visual tokens.

    There the state of each token is to predict, through the head, the words of what the token is of: also those that
    one frame does not tell, such as where it moves. The states are those in the middle of the model: what is known
    after its last layer, no later token can read. A mask's tokens weigh by the square of the share of them that is
    of the mask. Masks of several groups of patches do not count: their words are of different things.

    Args:
        model ([`VisaForVideoSegmentation`]): what is trained, without wrappers.
        shares (`torch.Tensor` of shape `(M, L)`): how much of each visual token each mask covers, [`token_shares`].
        states (`torch.Tensor` of shape `(B, L, D)`): of the visual tokens, [`visual_token_states`].
        masks ([`FrameMasks`]): M masks of these frames.

    Returns:
        `torch.Tensor`, float32: the loss of each mask that counts.
    """
    head: Any = model.lm_head
    network: Any = model.model
    alone = [
        number
        for number, (video, share) in enumerate(zip(masks.videos, masks.shares, strict=True))
        if len(masks.groups[video][share > 0.5].unique()) == 1
    ]
    if not alone:
        return (states.float().sum() * 0).expand(0)
    owners = [masks.videos[number] for number in alone]
    weights = shares[alone].square()  # (M, L)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
    surprise = surprises(head(network.language_model.norm(states)))  # (B, L, V)
    told = (weights[:, None].to(surprise) @ surprise[owners])[:, 0]  # (M, V)
    return word_losses(told, [masks.words[number] for number in alone])


def token_shares(config: Any, patches: Tensor, shares: Tensor, owners: Sequence[int]) -> Tensor:
    """How much of each visual token a mask covers: shares are averaged as the features of patches are.

    Args:
        config ([`VisaConfig`]): says how tokens are merged.
        patches (`torch.Tensor` of shape `(B, patches, C)`): features of the frames.
        shares (`torch.Tensor` of shape `(M, patches)`): how much of each patch each mask covers.
        owners (sequence of M `int`): the frame of each mask.

    Returns:
        `torch.Tensor` of shape `(M, L)`, float32 in [0, 1].
    """
    parts = [shares.float()[:, :, None]]
    if not config.use_token_merging:
        return parts[0][:, :, 0]
    tokens = patches.detach().float()
    for num_clusters, num_neighbors in zip(config.merge_sizes, config.merge_neighbors, strict=True):
        clusters = assign_clusters(tokens, num_clusters, num_neighbors)
        tokens = average_clusters(tokens, clusters, num_clusters)
        parts.append(average_clusters(parts[-1], clusters[list(owners)], num_clusters))
    return torch.cat(parts[1:], dim=1)[:, :, 0]


def target_patches(patch_features: Tensor, num_frames: Tensor) -> Tensor:
    """Features of the target frame, the last one, of each of B videos: (F, patches, C) -> (B, patches, C)."""
    return patch_features[num_frames.cumsum(0) - 1]


def visual_token_states(model: nn.Module, states: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Pick the states of the target frame's visual tokens: (N, S, D) of conversations -> (B, L, D) of videos."""
    config: Any = model.config
    videos = inputs["conversation_to_video"].tolist()
    # Conversations about one video begin alike, and every video has one.
    first = [videos.index(video) for video in range(len(inputs["num_frames"]))]
    is_image = inputs["input_ids"][first, : states.shape[1]] == config.image_token_id
    length = config.num_visual_tokens
    nothing = states.new_zeros(length, states.shape[2])  # of a video without frames
    rows = zip(states[first], is_image, strict=True)
    return torch.stack([row[places][-length:] if places.any() else nothing for row, places in rows])


def surprises(logits: Tensor) -> Tensor:
    """Negative log-likelihood of each word of the vocabulary, float32."""
    return -F.log_softmax(logits.float(), dim=-1)


def word_losses(surprise: Tensor, words: Sequence[Tensor]) -> Tensor:
    """Mean surprise of the words of each row, weighted by how telling they are.

    The weight of a word is log(rows with words / rows with this word) (inverse document frequency).

    Args:
        surprise (`torch.Tensor` of shape `(M, V)`): negative log-likelihood of each word of the vocabulary.
        words (list of M `torch.Tensor`, int64): different words of each row, in [0, V).

    Returns:
        `torch.Tensor` of shape `(M,)`; 0 for rows without a word that others lack.
    """
    is_said = torch.zeros_like(surprise)
    for row, said in zip(is_said, words, strict=True):
        row[said] = 1
    num_rows = is_said.any(dim=1).sum()
    weights = is_said * (num_rows / is_said.sum(dim=0).clamp(min=1)).log().clamp(min=0)
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


def patch_groups(shares: Tensor, side: int) -> Tensor:
    """Number patches by what they show: those that are in the same masks and touch each other belong together.

    Args:
        shares (`torch.Tensor` of shape `(K, side * side)`): how much of each patch each mask covers, in [0, 1].
        side (`int`): patches in a row, and rows.

    Returns:
        `torch.Tensor` of shape `(side * side,)`, int64: equal numbers for patches of one group; 0 for all of those
        that no mask covers by more than half.
    """
    is_covered = (shares > 0.5).cpu()
    masks_of = [tuple(masks) for masks in is_covered.T.tolist()]
    groups = [0] * (side * side)
    # Few patches are covered: to walk from one to the next is faster than tensors are.
    waiting = {patch for patch, masks in enumerate(masks_of) if any(masks)}
    while waiting:
        first = min(waiting)
        waiting.discard(first)
        reached = [first]
        for patch in reached:
            groups[patch] = first + 1
            row, column = divmod(patch, side)
            steps = ((row > 0, -side), (row < side - 1, side), (column > 0, -1), (column < side - 1, 1))
            for is_inside, step in steps:
                other = patch + step
                if is_inside and other in waiting and masks_of[other] == masks_of[patch]:
                    waiting.discard(other)
                    reached.append(other)
    return torch.tensor(groups, device=shares.device)


def grouping_loss(patches: Tensor, groups: Tensor) -> Tensor:
    """How far patches of a frame are from their own group, compared with all others (supervised contrast).

    Token merging puts patches together that are near each other in the tower's features, by squared distance over
    channels. Here the same distance makes probabilities: softmax, over the other patches, of minus the distance. The
    loss of a patch is the mean negative log-likelihood of those of its own group
    ("Supervised Contrastive Learning", https://huggingface.co/papers/2004.11362); each group counts the same.

    Args:
        patches (`torch.Tensor` of shape `(N, C)`): features of the patches.
        groups (`torch.Tensor` of shape `(N,)`, int64): which of them belong together.

    Returns:
        `torch.Tensor` of shape `()`, float32; 0 if no patch has another one of its group.
    """
    features = patches.float()
    squares = features.square().sum(dim=1)
    distances = (squares[:, None] + squares[None] - 2 * features @ features.T) / features.shape[1]
    itself = torch.eye(len(features), dtype=torch.bool, device=features.device)
    scores = (-distances.clamp(min=0)).masked_fill(itself, -torch.inf).log_softmax(dim=1).masked_fill(itself, 0)
    is_same = (groups[:, None] == groups[None]) & ~itself
    num_same = is_same.sum(dim=1)
    has_same = num_same > 0
    losses = -(scores * is_same).sum(dim=1) / num_same.clamp(min=1)
    weights = has_same / (num_same + 1)  # 1 for each group
    return (losses * weights).sum() / weights.sum().clamp(min=1)


def layout_loss(patches: Tensor, groups: Tensor, side: int) -> Tensor:
    """How far the first three channels of patches are from the place and size of what they show.

    Averages over tokens keep what is linear in the features, so that the language model can read from a token, and
    compare between things and frames, where its thing is and how large. (A token does not tell of how many patches it
    is the average.)

    Args:
        patches (`torch.Tensor` of shape `(side * side, C)`): features of the patches, three channels at least.
        groups (`torch.Tensor` of shape `(side * side,)`, int64): which of them belong together; 0 belongs to nothing.
        side (`int`): patches in a row, and rows.

    Returns:
        `torch.Tensor` of shape `()`, float32: mean over groups of the squared differences between the channels and the
        group's centre, x and y in [-5, 5], and size, see `_SIZE_SCALE`; 0 without a group.
    """
    numbers = torch.arange(side * side, device=patches.device)
    places = (torch.stack([numbers % side, numbers // side], dim=1) + 0.5) / side * 10 - 5
    losses = []
    for group in groups.unique().tolist():
        if group:
            is_in = groups == group
            size = _SIZE_SCALE * is_in.sum().sqrt() / side - _SIZE_OFFSET
            layout = torch.cat([places[is_in].mean(dim=0), size[None]])
            losses.append((patches[is_in, :3].float() - layout).square().sum(dim=1).mean())
    return torch.stack(losses).mean() if losses else patches.new_zeros((), dtype=torch.float32)
