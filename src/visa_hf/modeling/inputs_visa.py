"""What `VisaForVideoSegmentation` is given, checked at its border.

Which video a conversation is about, how many frames it shows and where its target is come as tensors of small
integers; here they become the numbers of `Videos`, or an error that says what does not fit. The model trusts them from
then on. Nothing is computed from pixels or hidden states here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import Tensor
from transformers import Cache

from .configuration_visa import VisaConfig
from .losses_visa import IGNORE_INDEX


@dataclass(frozen=True)
class Videos:
    """Which video each conversation is about, how many frames each has, and the sizes of its target: checked numbers.

    `video_of` has N entries (-1: text only), `num_frames`, `original_sizes` and `reshaped_sizes` have B; an original
    size of (0, 0) means that the video has no target.
    """

    video_of: list[int]
    num_frames: list[int]
    original_sizes: list[tuple[int, int]]
    reshaped_sizes: list[tuple[int, int]]

    def frames_of(self, conversation: int) -> int:
        """Number of frames that a conversation shows."""
        video = self.video_of[conversation]
        return 0 if video < 0 else self.num_frames[video]

    def sizes_of(self, conversation: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(H, W) of the target frame of a conversation, and inside SAM's square; (0, 0) without a target."""
        video = self.video_of[conversation]
        return ((0, 0), (0, 0)) if video < 0 else (self.original_sizes[video], self.reshaped_sizes[video])

    def has_target(self, conversation: int) -> bool:
        """Whether there is a frame to segment."""
        return self.sizes_of(conversation)[0] != (0, 0)

    def frame_rows(self) -> list[int]:
        """Rows of the frames in the order of the conversations, each with all frames of its video."""
        starts = [0, *accumulate(self.num_frames)]
        return [row for video in self.video_of if video >= 0 for row in range(starts[video], starts[video + 1])]

    def repeated(self, times: int) -> "Videos":
        """The same videos with each conversation repeated, as `generate` does for several answers to one prompt."""
        return replace(self, video_of=[video for video in self.video_of for _ in range(times)])


def _as_list(values: Tensor | Sequence[Any]) -> list[Any]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


def _as_sizes(values: Tensor | Sequence[Any] | None, num_videos: int, name: str) -> list[tuple[int, int]]:
    """Return B sizes (H, W); without `values` no video has a target."""
    if values is None:
        return [(0, 0)] * num_videos
    sizes = [(int(height), int(width)) for height, width in _as_list(values)]
    if len(sizes) != num_videos:
        raise ValueError(f"`{name}` has {len(sizes)} rows but there are {num_videos} videos. Give one (H, W) each.")
    return [(0, 0) if 0 in size else size for size in sizes]


def sam_feature_shape(config: VisaConfig) -> tuple[int, int, int]:
    """(C, h, w) of what SAM's image encoder makes of a frame."""
    grid = config.sam_config.prompt_encoder_config.image_embedding_size
    return config.sam_config.mask_decoder_config.hidden_size, grid, grid


def check_shape(name: str, tensor: Tensor, rows: str, shape: tuple[int, ...]) -> None:
    """Refuse a tensor that is not a batch, of however many `rows`, of `shape`."""
    if tuple(tensor.shape[1:]) != shape:
        raise ValueError(
            f"`{name}` has shape {tuple(tensor.shape)} but ({rows}, {', '.join(map(str, shape))}) is needed. "
            "Let the processor of this model make it."
        )


def check_videos(
    num_conversations: int,
    total_frames: int | None,
    num_frames: Tensor | Sequence[int] | None,
    conversation_to_video: Tensor | Sequence[int] | None,
    original_sizes: Tensor | Sequence[Any] | None = None,
    reshaped_sizes: Tensor | Sequence[Any] | None = None,
) -> Videos:
    """Check what `forward` was told about its videos and return it as numbers.

    `total_frames` are those of `pixel_values`, `None` without them. Without `num_frames`, all frames are those of one
    video. Without `conversation_to_video`, conversation n is about video n, and conversations without any video are
    text only.
    """
    if num_frames is None:
        if total_frames and num_conversations > 1:
            raise ValueError(
                f"`pixel_values` holds {total_frames} frames for {num_conversations} conversations without "
                "`num_frames`. Say how many frames each video has."
            )
        num_frames = [total_frames] if total_frames else []
    frames = _as_list(num_frames)
    if total_frames is None:
        total_frames = sum(frames)
    if sum(frames) != total_frames or min(frames, default=0) < 0:
        raise ValueError(
            f"`num_frames` is {frames}, {sum(frames)} in all, but `pixel_values` holds {total_frames} frames. "
            "Both must tell of the same frames."
        )
    if conversation_to_video is None:
        if frames and len(frames) != num_conversations:
            raise ValueError(
                f"There are {num_conversations} conversations about {len(frames)} videos. Say with "
                "`conversation_to_video` which video each conversation is about."
            )
        conversation_to_video = range(num_conversations) if frames else [-1] * num_conversations
    video_of = _as_list(conversation_to_video)
    if len(video_of) != num_conversations:
        raise ValueError(
            f"`conversation_to_video` has {len(video_of)} entries but there are {num_conversations} conversations. "
            "Give one index of a video each, or -1 for text only."
        )
    for conversation, video in enumerate(video_of):
        if not -1 <= video < len(frames):
            raise ValueError(
                f"`conversation_to_video` names video {video} for conversation {conversation} but there are "
                f"{len(frames)} videos. Give an index from 0 to {len(frames) - 1}, or -1 for text only."
            )
    return Videos(
        video_of,
        frames,
        _as_sizes(original_sizes, len(frames), "original_sizes"),
        _as_sizes(reshaped_sizes, len(frames), "reshaped_input_sizes"),
    )


def check_text(
    config: VisaConfig,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Refuse what the language model would fail on deep inside, or answer wrongly without a word."""
    text_config, image_token_id = config.text_config, config.image_token_id
    num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    longest = num_cached + input_ids.shape[1]
    if attention_mask is not None and attention_mask.ndim == 2:
        longest = int(attention_mask.sum(dim=1).max())
    if longest > text_config.max_position_embeddings:
        raise ValueError(
            f"The longest conversation has {longest} tokens but the language model was made for "
            f"{text_config.max_position_embeddings} (`text_config.max_position_embeddings`). Shorten the query, "
            f"or show fewer reference frames: each takes {config.num_visual_tokens} tokens."
        )
    is_image = input_ids == image_token_id
    unknown = ((input_ids < 0) | (input_ids >= text_config.vocab_size)) & ~is_image
    if unknown.any():
        raise ValueError(
            f"`input_ids` hold {input_ids[unknown][0].item()}, which is neither in the vocabulary of "
            f"{text_config.vocab_size} tokens nor the image token {image_token_id}. Use the processor of this "
            "model, or enlarge the embeddings with `resize_token_embeddings`."
        )
    if labels is not None:
        if labels.shape != input_ids.shape:
            raise ValueError(
                f"`labels` has shape {tuple(labels.shape)} but `input_ids` {tuple(input_ids.shape)}. "
                "Give one label for each token, -100 where nothing is learnt."
            )
        wrong = ((labels < 0) | (labels >= text_config.vocab_size)) & (labels != IGNORE_INDEX)
        if wrong.any():
            raise ValueError(
                f"`labels` hold {labels[wrong][0].item()}, which is not in the vocabulary of "
                f"{text_config.vocab_size} tokens. Set what is not to be learnt to -100."
            )


def check_image_tokens(config: VisaConfig, input_ids: Tensor, videos: Videos, has_frames: bool = True) -> None:
    """Refuse a conversation that does not hold the visual tokens of its own video."""
    per_frame = config.num_visual_tokens
    num_tokens = (input_ids == config.image_token_id).sum(dim=1).tolist()
    if not has_frames and any(num_tokens):
        raise ValueError(
            f"`input_ids` hold {sum(num_tokens)} image tokens but there are no frames. Give `pixel_values`."
        )
    for conversation, given in enumerate(num_tokens if has_frames else ()):
        num_frames = videos.frames_of(conversation)
        if given != num_frames * per_frame:
            raise ValueError(
                f"Conversation {conversation} holds {given} image tokens but its video has {num_frames} frames of "
                f"{per_frame} visual tokens, {num_frames * per_frame} in all. Write one `<image>` for each frame."
            )


def check_targets(
    config: VisaConfig, videos: Videos, sam_pixel_values: Tensor | None, sam_features: Tensor | None
) -> None:
    """Refuse target frames of which there are too few, or whose sizes are impossible."""
    padded_size = config.sam_config.vision_config.image_size
    name, frames, shape = "sam_pixel_values", sam_pixel_values, (3, padded_size, padded_size)
    if sam_features is not None:
        name, frames, shape = "sam_features", sam_features, sam_feature_shape(config)
    num_videos = len(videos.num_frames)
    if frames is not None:
        check_shape(name, frames, "videos", shape)
    num_targets = 0 if frames is None else len(frames)
    has_targets = any(size != (0, 0) for size in videos.original_sizes)
    if num_targets != num_videos and (frames is not None or has_targets):
        raise ValueError(
            f"There are {num_targets} target frames in `{name}` but {num_videos} videos in `num_frames`. "
            "Give one target frame for each video; it may be blank without a target."
        )
    for video, (original, reshaped) in enumerate(zip(videos.original_sizes, videos.reshaped_sizes, strict=True)):
        fits = 1 <= min(reshaped) and max(reshaped) <= padded_size
        if original != (0, 0) and (min(original) < 1 or not fits):
            raise ValueError(
                f"Video {video} has `original_sizes` {original} and `reshaped_input_sizes` {reshaped}, but a "
                f"frame of 1 to {padded_size} pixels a side inside SAM's square is needed. Give what the "
                "processor returned, or an original size of 0 for no target."
            )


def check_segs(seg_states: list[Tensor], videos: Videos, mask_labels: Sequence[Tensor] | None) -> None:
    """Refuse a [SEG] without a target frame, and true masks that do not fit."""
    for conversation, states in enumerate(seg_states):
        if len(states) and not videos.has_target(conversation):
            raise ValueError(
                f"Conversation {conversation} has {len(states)} [SEG] but its video has no target frame "
                "(`original_sizes` is 0 or not given). Give the target, or take the [SEG] out."
            )
    if mask_labels is None:
        return
    if len(mask_labels) != len(seg_states):
        raise ValueError(
            f"`mask_labels` has {len(mask_labels)} entries but there are {len(seg_states)} conversations. "
            "Give one tensor each, with no mask in it where there is no [SEG]."
        )
    for conversation, (states, labels) in enumerate(zip(seg_states, mask_labels, strict=True)):
        if len(labels) != len(states):
            raise ValueError(
                f"`mask_labels` of conversation {conversation} has {len(labels)} masks but its answer has "
                f"{len(states)} [SEG]. Give one mask for each [SEG]."
            )
        size, _ = videos.sizes_of(conversation)
        if len(states) and tuple(labels.shape[1:]) != size:
            raise ValueError(
                f"`mask_labels` of conversation {conversation} are of size {tuple(labels.shape[1:])} but the "
                f"target frame is {size} (`original_sizes`). Give masks in pixels of the frame."
            )
