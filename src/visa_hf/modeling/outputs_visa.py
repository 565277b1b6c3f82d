"""What the model, the frame sampler and the video session hand over: data only.

`ModelOutput`s are returned by `forward`-like calls; frozen dataclasses cross module borders. Nothing here computes
more than a view of its own fields.
"""

import zlib
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import torch
from transformers import Cache
from transformers.utils import ModelOutput


@dataclass
class VisaOutput(ModelOutput):
    """Output of `VisaForVideoSegmentation.forward`, for N conversations over B videos.

    Args:
        loss (`torch.FloatTensor` of shape `()`): weighted sum of the three losses, when `labels` are given.
        text_loss, bce_loss, dice_loss (`torch.FloatTensor` of shape `()`): the parts, unweighted.
        logits (`torch.FloatTensor` of shape `(N, S, vocab_size)`): scores of the next token.
        low_res_mask_logits (list of N tensors of shape `(K_n, h, w)`): mask logits at SAM's own size, a quarter of
            its input, one for each [SEG] of the conversation, in order; `K_n` may be 0.
        mask_logits (list of N tensors of shape `(K_n, H, W)`): the same at the size of the target frame; a pixel
            belongs to the object where the logit is above 0.
        iou_scores (list of N tensors of shape `(K_n,)`): SAM's own estimate of each mask's IoU.
        seg_embeddings (`torch.FloatTensor` of shape `(sum of K_n, C)`): prompts made from the [SEG] states, in the
            order of the conversations.
        past_key_values (`Cache`): the text model's keys and values.
        hidden_states (tuple of `torch.FloatTensor` of shape `(N, S, D)`): with `output_hidden_states`, states of the
            text model after each layer, the embeddings first.
        attentions (tuple of `torch.FloatTensor` of shape `(N, heads, S, S)`): with `output_attentions` and eager
            attention, the attention weights of each layer.
        middle_hidden_state (`torch.FloatTensor` of shape `(N, S, D)`): with `output_visual_states`, states of the text
            model after the first half of its layers (of seven, four), as its next layer gets them.
        patch_features (`torch.FloatTensor` of shape `(F, patches, channels)`): with `output_visual_states`, what the
            visual tower made of the frames, before they are merged.
    """

    loss: torch.FloatTensor | None = None
    text_loss: torch.FloatTensor | None = None
    bce_loss: torch.FloatTensor | None = None
    dice_loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    low_res_mask_logits: list[torch.FloatTensor] | None = None
    mask_logits: list[torch.FloatTensor] | None = None
    iou_scores: list[torch.FloatTensor] | None = None
    seg_embeddings: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    middle_hidden_state: torch.FloatTensor | None = None
    patch_features: torch.FloatTensor | None = None


@dataclass
class VisaGenerateOutput(ModelOutput):
    """Output of `VisaForVideoSegmentation.generate_masks`, for N conversations.

    Args:
        sequences (`torch.LongTensor` of shape `(N, S)`): prompt and answer, padded.
        answer_ids (list of N tensors of shape `(A_n,)`): the generated tokens alone, without padding.
        low_res_mask_logits, mask_logits, iou_scores, seg_embeddings: as in [`VisaOutput`], one mask for each [SEG] of
            the answer.
    """

    sequences: torch.LongTensor | None = None
    answer_ids: list[torch.LongTensor] | None = None
    low_res_mask_logits: list[torch.FloatTensor] | None = None
    mask_logits: list[torch.FloatTensor] | None = None
    iou_scores: list[torch.FloatTensor] | None = None
    seg_embeddings: torch.FloatTensor | None = None


@dataclass(frozen=True)
class FrameSelection:
    """The frames that the language model sees: the target, and the references in time order.

    Args:
        target_idx (`int`): frame that the model segments.
        reference_idx (`tuple[int, ...]`): context frames, ascending, none twice; may contain the target.
        num_frames (`int`): frames of the video.
        reason (`str`): how the frames were chosen, for people to read.
        scores (tuple of pairs of `int` and `float`): frames that a sampler considered as targets, each with its
            probability; several answers may mean the same frame. Empty where nothing was weighed.

    Raises:
        ValueError: if an index lies outside the video, or the references are not ascending.
    """

    target_idx: int
    reference_idx: tuple[int, ...]
    num_frames: int
    reason: str = ""
    scores: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        for idx in (self.target_idx, *self.reference_idx):
            if not 0 <= idx < self.num_frames:
                raise ValueError(f"Frame index {idx} is outside the video, which has {self.num_frames} frames.")
        if list(self.reference_idx) != sorted(set(self.reference_idx)):
            raise ValueError(
                f"`reference_idx` is {self.reference_idx} but must be ascending, no frame twice: the model was "
                "trained on frames in time order."
            )


@dataclass(frozen=True)
class PackedMask:
    """A mask of shape `(H, W)`, bool, packed to a small string of bytes: one bit a pixel, deflated.

    Args:
        height, width (`int`): size in pixels of the source video.
        data (`bytes`): the packed pixels; empty for a mask without a pixel.
    """

    height: int
    width: int
    data: bytes = b""

    @classmethod
    def pack(cls, mask: np.ndarray) -> "PackedMask":
        """Pack `mask` (`np.ndarray` of shape `(H, W)`, bool)."""
        height, width = mask.shape
        return cls(height, width, zlib.compress(np.packbits(mask).tobytes(), 1) if mask.any() else b"")

    def unpack(self) -> np.ndarray:
        """Return the mask, `np.ndarray` of shape `(H, W)`, bool."""
        if not self.data:
            return np.zeros((self.height, self.width), dtype=bool)
        bits = np.frombuffer(zlib.decompress(self.data), dtype=np.uint8)
        return np.unpackbits(bits, count=self.height * self.width).reshape(self.height, self.width).astype(bool)


@dataclass(frozen=True)
class VideoFrameOutput:
    """Masks of one frame for all queries of a session.

    The score of an object in a frame is the mean, over the pixels of its mask, of the probability that was thresholded
    or compared there: on the query's target frame the sigmoid of SAM's logit, in all others the tracker's probability
    of this object, against the query's other objects and the background. It is 0 where the mask is empty, and 1 on the
    frame of a mask that was given. Asked alone or with others, scores differ as little as probabilities.

    Args:
        frame_idx (`int`): index of the frame in the session's video.
        query_ids (`tuple[int, ...]`): the queries, in the order in which they were added.
        masks (list of `torch.Tensor` of shape `(K_q, H, W)`, bool, CPU): one mask per object of each query, in pixels
            of the source frame; `K_q` is 0 where there is nothing to segment. Masks of one query do not overlap.
        scores (list of `torch.Tensor` of shape `(K_q,)`, float32, in [0, 1], CPU): how sure each mask is, see above.
        mask_probs (list of `torch.Tensor` of shape `(K_q, H, W)`, float32, in [0, 1], CPU): the tracker's
            probabilities; `None` unless the session was asked for them.
    """

    frame_idx: int
    query_ids: tuple[int, ...]
    masks: list[torch.Tensor]
    scores: list[torch.Tensor]
    mask_probs: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class PackedFrame:
    """What is kept of a [`VideoFrameOutput`]: per query, packed masks of its objects and their scores."""

    masks: tuple[tuple[PackedMask, ...], ...]
    scores: tuple[tuple[float, ...], ...]

    @classmethod
    def pack(cls, output: VideoFrameOutput) -> "PackedFrame":
        """Pack one frame."""
        return cls(
            masks=tuple(tuple(PackedMask.pack(mask) for mask in masks.numpy()) for masks in output.masks),
            scores=tuple(tuple(scores.tolist()) for scores in output.scores),
        )


@dataclass(frozen=True)
class VideoSegmentation:
    """The masks of what one query means, in every frame of a video.

    Args:
        query (`str`): the sentence, as given.
        answer (`str`): the model's text; empty when a first mask was given instead of asking the model.
        frame_selection (`FrameSelection`): target and reference frames.
        frame_indices (`tuple[int, ...]`): indices, in the source video, of the T frames segmented here.
        object_masks (tuple of T tuples of N [`PackedMask`]): per frame and object, one object for each [SEG] of the
            answer. N is 0 when there is nothing to segment, which is a normal result.
        scores (`tuple[float, ...]`): SAM's estimate of each object's IoU on the target frame, about [0, 1].
        frame_scores (tuple of T tuples of N `float`): how sure the mask of each object is in each frame, in [0, 1]:
            the mean probability of its pixels, 0 where it is empty; defined in [`VideoFrameOutput`].
        height, width (`int`): size of the frames in pixels.
        fps (`Fraction` or `None`): average frame rate of the source, frames per second.
        video (`str`): name of the source.
    """

    query: str
    answer: str
    frame_selection: FrameSelection
    frame_indices: tuple[int, ...]
    object_masks: tuple[tuple[PackedMask, ...], ...] = field(repr=False)
    scores: tuple[float, ...]
    frame_scores: tuple[tuple[float, ...], ...] = field(repr=False)
    height: int
    width: int
    fps: Fraction | None = None
    video: str = ""

    def __len__(self) -> int:
        return len(self.frame_indices)

    @property
    def num_objects(self) -> int:
        """Objects that the answer named: its number of [SEG] tokens."""
        return len(self.scores)

    def object_masks_of(self, position: int) -> np.ndarray:
        """Return the objects' masks of the frame at `position` (0 to T - 1): `(N, H, W)`, bool."""
        masks = [packed.unpack() for packed in self.object_masks[position]]
        return np.stack(masks) if masks else np.zeros((0, self.height, self.width), dtype=bool)

    def mask_of(self, position: int) -> np.ndarray:
        """Return the union of the objects in the frame at `position` (0 to T - 1): `(H, W)`, bool."""
        return np.asarray(self.object_masks_of(position).any(axis=0))

    @property
    def masks(self) -> np.ndarray:
        """Union of the objects in all frames: `(T, H, W)`, bool. Unpacks everything; for long videos use `mask_of`."""
        return np.stack([self.mask_of(position) for position in range(len(self))])
