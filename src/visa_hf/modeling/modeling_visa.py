"""VISA: a video and a sentence in, masks of the target frame out. Read this first.

A visual tower and token merging make visual tokens, a language model answers, and the state that predicted each [SEG]
of the answer prompts SAM on the target frame (VISA, https://huggingface.co/papers/2407.11325, section 3). Letters:
N conversations about B videos of F frames in all, S tokens, L visual tokens a frame, K masks, D and C the widths of
the language model and of SAM. Frames are chosen in frame_sampling_visa.py, tensors made in processing_visa.py and
checked in inputs_visa.py, queries about one video answered together in video_answering_visa.py, masks carried through
it in video_tracking_visa.py with the tracker of modeling_xmem.py: none of it happens here.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .configuration_visa import VisaConfig, unknown_name_error
from .conversation_packing_visa import PACKABLE_ATTENTION, PackedConversations, pack_conversations
from .inputs_visa import (
    Videos,
    check_image_tokens,
    check_segs,
    check_shape,
    check_targets,
    check_text,
    check_videos,
    sam_feature_shape,
)
from .losses_visa import (
    IGNORE_INDEX,
    mask_bce_loss,
    mask_dice_loss,
    mean_loss,
    text_loss_sum_and_count,
    token_loss_sum,
)
from .mask_sizes_visa import upscale_mask_logits
from .modeling_xmem import XMemModel
from .outputs_visa import VisaGenerateOutput, VisaOutput
from .pipeline_visa import CUSTOM_PIPELINES
from .prefix_cache_visa import check_prefix, positions_of, repeated
from .video_asking_visa import VisaAskingMixin
from .video_tracking_visa import VisaTrackingMixin
from .visual_tokens_visa import merge_visual_tokens

# Keywords of `from_pretrained` that are likely to be mistyped; only used to name the nearest one in an error.
_LOADING_KEYWORDS = (
    "attn_implementation",
    "device_map",
    "dtype",
    "ignore_mismatched_sizes",
    "local_files_only",
    "output_loading_info",
    "quantization_config",
    "revision",
    "state_dict",
    "subfolder",
    "token",
    "trust_remote_code",
    "use_safetensors",
    "variant",
)
# Arguments of `forward` that make masks; the text alone needs none of them.
_MASK_ARGUMENTS = ("sam_pixel_values", "sam_features", "original_sizes", "reshaped_input_sizes", "mask_labels")

# Settings of a generation that make several rows of each prompt.
_ROWS_OF_A_PROMPT = ("num_beams", "num_return_sequences")
# Those that guess several tokens at once.
_SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens")

# Patches that SAM encodes together, those of one frame at its published size, and prompts that it decodes together:
# both take memory by the hundred megabytes.
_SAM_PATCHES_AT_ONCE = 4096
_PROMPTS_AT_ONCE = 64


def _positions_after_padding(attention_mask: Tensor) -> Tensor:
    """Positions that count from the first token that is not padding: (N, S) -> (N, S), int64."""
    num_leading = (attention_mask.cumsum(dim=1) == 0).sum(dim=1, keepdim=True)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (positions - num_leading).clamp(min=0)


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Floating dtype that a part computes in; parts may differ, as when some stay in float32 or are quantised."""
    return next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())


def _as_input(tensor: Tensor, module: nn.Module) -> Tensor:
    """Bring `tensor` to where and how `module` computes; one whose weights are offloaded has a hook that moves it."""
    device = next(module.parameters()).device
    return tensor.to(tensor.device if device.type == "meta" else device, _dtype_of(module))


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _encoded(image_tokens: Tensor | None, videos: Videos) -> dict[str, Any]:
    """Keyword of `forward` and `generate` for the visual tokens of all frames, (F, L, D)."""
    rows = videos.frame_rows()
    if image_tokens is None or not rows:
        return {}
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=image_tokens[rows])}}


class VisaPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, as in every model of transformers."""

    config: VisaConfig
    base_model_prefix = "model"
    input_modalities = ["image", "video", "text"]
    supports_gradient_checkpointing = True
    # The parts' own entries (layers of the tower, the language model, SAM's encoder) are added by transformers.
    _no_split_modules = ["SamMaskDecoder", "SamPromptEncoder", "SamVisionNeck", "XMemModel"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VisaConfig, **unknown: Any) -> None:
        # What neither `from_pretrained` nor the configuration knows arrives here.
        for name in unknown:
            raise unknown_name_error(
                name, {*config.to_dict(), *_LOADING_KEYWORDS}, f"{type(self).__name__} or its config"
            )
        super().__init__(config)


class VisaModel(VisaPreTrainedModel):
    """The parts of VISA between pixels, token ids and hidden states; its heads are in `VisaForVideoSegmentation`."""

    def __init__(self, config: VisaConfig, **unknown: Any) -> None:
        super().__init__(config, **unknown)
        text_dim, prompt_dim = config.text_config.hidden_size, config.sam_config.mask_decoder_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.mm_projector = nn.Linear(config.vision_config.hidden_size, text_dim)
        self.language_model = AutoModel.from_config(config.text_config)
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(text_dim, text_dim), nn.ReLU(), nn.Linear(text_dim, prompt_dim), nn.Dropout(0.0)
        )
        self.sam = AutoModel.from_config(config.sam_config)
        # As in SAM. transformers draws positions half SAM's width times as wide, where neighbours look unrelated.
        positions = self.sam.shared_image_embedding
        positions.scale = 1.0
        init.normal_(positions.positional_embedding, std=positions.scale)
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        num_frames: Tensor | Sequence[int] | None = None,
        conversation_to_video: Tensor | Sequence[int] | None = None,
    ) -> BaseModelOutputWithPooling:
        """Turn frames into visual tokens; each frame is encoded once, however many conversations show it.

        Args:
            pixel_values (`torch.Tensor` of shape `(F, 3, H, W)`): normalised frames at the visual tower's size.
            num_frames (`torch.Tensor` of shape `(B,)`, *optional*): frames of each video.
            conversation_to_video (`torch.Tensor` of shape `(N,)`, *optional*): video of each conversation, or -1.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` of shape `(F, L, D)`, the visual tokens of each frame; with
            both `num_frames` and `conversation_to_video`, the rows are those of the conversations in order, each with
            all frames of its video. `last_hidden_state` of shape `(F, patches, channels)`: the patch features.

        Raises:
            ValueError: for frames of a wrong size, and numbers that do not fit together.
        """
        size = self.config.vision_config.image_size
        check_shape("pixel_values", pixel_values, "frames", (3, size, size))
        patches = self._encode_patches(pixel_values)  # (F, patches, channels)
        tokens = patches
        if self.config.use_token_merging:
            tokens = merge_visual_tokens(patches, self.config.merge_sizes, self.config.merge_neighbors)
        tokens = self.mm_projector(tokens.to(_dtype_of(self.mm_projector)))  # (F, L, D)
        if num_frames is not None and conversation_to_video is not None:
            num_conversations = len(conversation_to_video)
            videos = check_videos(num_conversations, len(pixel_values), num_frames, conversation_to_video)
            tokens = tokens[videos.frame_rows()]
        return BaseModelOutputWithPooling(last_hidden_state=patches, pooler_output=tokens)

    def _encode_patches(self, pixel_values: Tensor) -> Tensor:
        """Features of one layer of the tower, without its class token: (F, 3, H, W) -> (F, patches, channels)."""
        if len(pixel_values) == 0:
            return pixel_values.new_zeros(0, self.config.num_patches, self.config.vision_config.hidden_size)
        layer = self.config.vision_feature_layer
        pixel_values = _as_input(pixel_values, self.vision_tower)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trainable(self.vision_tower)):
            return self.vision_tower(pixel_values, output_hidden_states=[layer]).hidden_states[layer][:, 1:]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | Sequence[int] | None = None,
        conversation_to_video: Tensor | Sequence[int] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the language model over text and visual tokens. Arguments as in `VisaForVideoSegmentation.forward`."""
        features = None
        if mm_encoder_outputs and mm_encoder_outputs.get("image") is not None:
            features = mm_encoder_outputs["image"].pooler_output
        elif pixel_values is not None:
            features = self.get_image_features(pixel_values, num_frames, conversation_to_video).pooler_output
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, features)
        elif inputs_embeds is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` is given. Give one of the two.")
        if position_ids is None and attention_mask is not None and attention_mask.shape == inputs_embeds.shape[:2]:
            position_ids = _positions_after_padding(attention_mask)
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _embed(self, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Look up the embeddings and put visual tokens (rows, L, D), in order, in the places that hold them."""
        if features is None:
            return self.get_input_embeddings()(input_ids)
        is_image = input_ids == self.config.image_token_id
        num_tokens, num_features = int(is_image.sum()), features.shape[0] * features.shape[1]
        if num_tokens != num_features:
            raise ValueError(
                f"`input_ids` hold {num_tokens} image tokens but the frames make {num_features} "
                f"({features.shape[0]} frames of {features.shape[1]}). Give as many as the frames make."
            )
        # Any row will do, its embedding is overwritten; the image token itself may lie beyond the vocabulary.
        embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        return embeds.masked_scatter(is_image[:, :, None].to(embeds.device), features.to(embeds.device, embeds.dtype))


class VisaForVideoSegmentation(VisaPreTrainedModel, GenerationMixin, VisaAskingMixin, VisaTrackingMixin):
    """VISA with its heads: text answers, and one mask of the target frame for each [SEG] of an answer.

    Training and teacher forcing go through `forward`, answering through `generate_masks`, whole videos through a
    session (`add_query`, `propagate_in_video_iterator`, or `step` for live frames). `tracker` is an [`XMemModel`], or
    `None` when `config.tracker_config` is.

    Args:
        config ([`VisaConfig`]): sizes of all parts.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    # Trainers divide by the number of accumulation steps themselves, unless they give `num_items_in_batch` (below).
    accepts_loss_kwargs = False

    def __init__(self, config: VisaConfig, **unknown: Any) -> None:
        super().__init__(config, **unknown)
        self.model = VisaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.tracker = None if config.tracker_config is None else XMemModel(config.tracker_config)
        # How trainers count learnt tokens: labels shifted by one, as in every causal language model.
        self.loss_type = "ForCausalLM"
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a saved model, as in transformers, and refuse a checkpoint that does not hold all of its weights.

        Raises:
            RuntimeError: if weights are missing: masks of partly random weights look like masks.
            ValueError: for a keyword that is neither one of `from_pretrained` nor a field of the configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        # Whoever gives the weights, or no checkpoint at all, knows what is in them.
        is_checkpoint = pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing and is_checkpoint:
            raise RuntimeError(
                f"The checkpoint `{pretrained_model_name_or_path}` lacks {len(missing)} of the weights that its "
                f"config.json asks for: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. "
                "Convert or download it again; a tracker that was never there is left out with `tracker_config=None`."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the model, as in transformers, with its code and that of its pipeline, which config.json names."""
        self.config.custom_pipelines = CUSTOM_PIPELINES
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            # In memory it would have `pipeline` ask for trust in code that it does not load.
            del self.config.custom_pipelines

    def get_output_embeddings(self) -> nn.Module:
        """Return the head that scores the next token."""
        return self.lm_head

    def get_image_features(
        self,
        pixel_values: Tensor,
        num_frames: Tensor | Sequence[int] | None = None,
        conversation_to_video: Tensor | Sequence[int] | None = None,
    ) -> BaseModelOutputWithPooling:
        """Turn frames into visual tokens: [`VisaModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, num_frames, conversation_to_video)

    def get_sam_features(self, sam_pixel_values: Tensor) -> Tensor:
        """Encode target frames with SAM; large ones one by one, since its global attention takes gigabytes for each.

        Args:
            sam_pixel_values (`torch.Tensor` of shape `(B, 3, P, P)`): normalised frames, longest side at SAM's size P,
                padded to a square at the right and at the bottom.

        Returns:
            `torch.Tensor` of shape `(B, C, h, w)`; without gradients when the encoder is frozen.

        Raises:
            ValueError: for frames of a wrong size.
        """
        encoder, size = self.model.sam.vision_encoder, self.config.sam_config.vision_config.image_size
        check_shape("sam_pixel_values", sam_pixel_values, "videos", (3, size, size))
        sam_pixel_values = _as_input(sam_pixel_values, encoder)
        if len(sam_pixel_values) == 0:
            return sam_pixel_values.new_zeros(0, *sam_feature_shape(self.config))
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trainable(encoder)):
            at_once = max(1, _SAM_PATCHES_AT_ONCE // (size // self.config.sam_config.vision_config.patch_size) ** 2)
            return torch.cat([encoder(images).last_hidden_state for images in sam_pixel_values.split(at_once)])

    def embed_seg_states(self, states: Tensor) -> Tensor:
        """Turn states that predicted a [SEG], `(K, D)`, into prompts for SAM, `(K, C)`."""
        head = self.model.text_hidden_fcs
        return head(states.to(_dtype_of(head)))

    def decode_masks(self, sam_features: Tensor, seg_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Decode one mask for each prompt on one frame; prompts do not see each other.

        Args:
            sam_features (`torch.Tensor` of shape `(C, h, w)`): features of the frame, from `get_sam_features`.
            seg_embeddings (`torch.Tensor` of shape `(K, C)`): prompts, from `embed_seg_states`; `K` may be 0.

        Returns:
            `torch.Tensor` of shape `(K, 4h, 4w)`: mask logits at SAM's own size; and of shape `(K,)`: SAM's own
            estimate of each mask's IoU.
        """
        return self._decode_prompts(sam_features[None], [0] * len(seg_embeddings), seg_embeddings)

    def _decode_prompts(
        self, sam_features: Tensor, frame_of: list[int], seg_embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Decode the masks of prompts (K, C), each on its own of B frames, (B, C, h, w): see `decode_masks`."""
        if not frame_of:
            height, width = sam_features.shape[-2:]
            return seg_embeddings.new_zeros(0, 4 * height, 4 * width), seg_embeddings.new_zeros(0)
        found = []
        for start in range(0, len(frame_of), _PROMPTS_AT_ONCE):
            frames = frame_of[start : start + _PROMPTS_AT_ONCE]
            # Prompts about one frame share its features, of which the decoder makes copies enough.
            features = sam_features[frames[:1] if len(set(frames)) == 1 else frames]
            found.append(self._run_mask_decoder(features, seg_embeddings[start : start + _PROMPTS_AT_ONCE]))
        masks, iou_scores = zip(*found, strict=True)
        return torch.cat(masks), torch.cat(iou_scores)

    def _run_mask_decoder(self, sam_features: Tensor, seg_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Decode the masks of prompts (K, C) on as many frames, or on one: (K or 1, C, h, w)."""
        sam = self.model.sam
        dtype, device = _dtype_of(sam.mask_decoder), seg_embeddings.device
        features = sam_features.to(device, dtype).expand(len(seg_embeddings), -1, -1, -1)  # (K, C, h, w)
        # Weights are asked for through their modules, never read from outside: they may be offloaded.
        no_mask = sam.prompt_encoder.no_mask_embed(torch.zeros(1, dtype=torch.long, device=device))  # (1, C)
        centers = (torch.arange(features.shape[-1], device=device) + 0.5) / features.shape[-1]
        grid = torch.stack(torch.meshgrid(centers, centers, indexing="xy"), dim=-1)  # (h, w, 2): x, y in [0, 1]
        positions = sam.shared_image_embedding(grid).permute(2, 0, 1)[None]  # (1, C, h, w)
        masks, iou_scores = sam.mask_decoder(
            image_embeddings=features,
            image_positional_embeddings=positions.to(device, dtype).expand_as(features),
            # Prompts that share a frame may not see each other: each is a batch of its own.
            sparse_prompt_embeddings=seg_embeddings[:, None, None].to(dtype),  # (K, 1, 1, C)
            dense_prompt_embeddings=no_mask.to(dtype)[:, :, None, None].expand_as(features),
            multimask_output=False,
        )
        return masks[:, 0, 0], iou_scores[:, 0, 0]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | Sequence[int] | None = None,
        conversation_to_video: Tensor | Sequence[int] | None = None,
        sam_pixel_values: Tensor | None = None,
        sam_features: Tensor | None = None,
        original_sizes: Tensor | Sequence[Any] | None = None,
        reshaped_input_sizes: Tensor | Sequence[Any] | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        num_masks_in_batch: Tensor | int | None = None,
        packs_conversations: bool = False,
        skip_logits: bool = False,
        output_visual_states: bool = False,
        **kwargs: Any,
    ) -> VisaOutput:
        """Answer N conversations about B videos, teacher-forced, and decode a mask for each [SEG].

        Args:
            input_ids (`torch.Tensor` of shape `(N, S)`, int64): tokens; each `<image>` is already expanded to
                `config.num_visual_tokens` times `config.image_token_id`, which needs no row in the embeddings.
            attention_mask (`torch.Tensor` of shape `(N, S)`): 1 for tokens, 0 for padding on either side.
            position_ids, past_key_values, inputs_embeds, logits_to_keep: as in every causal language model of
                transformers. `inputs_embeds` stand for `input_ids` and their frames.
            labels (`torch.Tensor` of shape `(N, S)`, int64): tokens to learn, -100 elsewhere; not shifted.
            pixel_values (`torch.Tensor` of shape `(F, 3, H, W)`): frames of all videos for the visual tower; for each
                video the references in time order, then the target.
            num_frames (`torch.Tensor` of shape `(B,)`): frames of each video. Not needed for one video.
            conversation_to_video (`torch.Tensor` of shape `(N,)`): video of each conversation, -1 for text only. Not
                needed when conversation n is about video n.
            sam_pixel_values (`torch.Tensor` of shape `(B, 3, P, P)`): the target frame of each video for SAM; rows of
                videos without a target are not looked at.
            sam_features (`torch.Tensor` of shape `(B, C, h, w)`): given instead, what `get_sam_features` made of it.
            original_sizes (`torch.Tensor` of shape `(B, 2)`): (H, W) of the target frame in pixels; 0 = no target.
            reshaped_input_sizes (`torch.Tensor` of shape `(B, 2)`): (H, W) of the frame inside SAM's padded square.
            mask_labels (list of N `torch.Tensor` of shape `(K_n, H, W)`, values 0 and 1): the true mask of each [SEG]
                of the conversation, in order; `K_n` may be 0.
            mm_encoder_outputs (`dict`): `{"image": output of get_image_features}` with its rows in the order of the
                conversations, instead of `pixel_values`.
            num_items_in_batch (`int`), num_masks_in_batch (`int`): with `config.loss_reduction` "step", the learnt
                tokens and the masks of the whole optimiser step, over all its micro-batches and ranks; the sums of
                this micro-batch are divided by them. Without them, and always with "microbatch", by its own numbers.
            packs_conversations (`bool`, defaults to `False`): let the language model read what the conversations about
                one video begin with once, where that is possible (conversation_packing_visa.py). For training: the
                same results up to rounding, without a cache.
            skip_logits (`bool`, defaults to `False`): leave `logits` out, and score the tokens of `labels` alone.
            output_visual_states (`bool`, defaults to `False`): return `middle_hidden_state` and `patch_features`, for
                losses of visual tokens; no `patch_features` without `pixel_values`.
            kwargs: for the language model (`use_cache`, `output_hidden_states`, ...).

        Returns:
            [`VisaOutput`]: [SEG]s are counted in `labels` when given, else in `input_ids`. Without `sam_pixel_values`
            or `sam_features` there are no masks. `loss` is there with `labels` or `mask_labels`.

        Raises:
            ValueError: if the arguments do not fit together; the text says what was given and what is needed.
        """
        # 1) Check what belongs to what.
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either `input_ids` or `inputs_embeds`, one of the two.")
        has_frames = pixel_values is not None or bool(mm_encoder_outputs)
        if inputs_embeds is not None and has_frames:
            raise ValueError("`inputs_embeds` hold their visual tokens already. Give `input_ids` with `pixel_values`.")
        num_conversations = len(inputs_embeds) if input_ids is None else len(input_ids)  # type: ignore[arg-type]
        total_frames = None if pixel_values is None else len(pixel_values)
        videos = check_videos(
            num_conversations, total_frames, num_frames, conversation_to_video, original_sizes, reshaped_input_sizes
        )
        # Steps of a generation feed one token at a time, which were checked with the prompt.
        if input_ids is not None and input_ids.shape[1] > 1:
            check_text(self.config, input_ids, attention_mask, labels, past_key_values)
            if not mm_encoder_outputs or num_frames is not None:
                check_image_tokens(self.config, input_ids, videos, has_frames)
        wants_masks = sam_pixel_values is not None or sam_features is not None or mask_labels is not None
        if wants_masks:
            check_targets(self.config, videos, sam_pixel_values, sam_features)

        # 2) The language model reads text and visual tokens; 3) and scores the next ones.
        captured: dict[str, Any] = {}
        if output_visual_states:
            layers = kwargs.get("output_hidden_states")
            if isinstance(layers, (list, tuple)):
                kwargs["output_hidden_states"] = [*layers, self.middle_layer]
            elif not self._asks_for("output_hidden_states", kwargs):
                captured = {"output_hidden_states": [self.middle_layer]}
        packed = None
        features: Any = None
        if (
            packs_conversations
            and input_ids is not None
            and self._can_pack(past_key_values, position_ids, mm_encoder_outputs, **kwargs)
        ):
            packed = pack_conversations(input_ids, attention_mask, videos, self.config.image_token_id)
        if packed is not None:
            if pixel_values is not None:
                features = self.get_image_features(pixel_values)
            outputs = self._read_packed(packed, features, **kwargs | captured)
            states = packed.unpack(outputs.last_hidden_state)  # (N, S, D)
        else:
            if pixel_values is not None and mm_encoder_outputs is None:
                features = self.get_image_features(pixel_values, videos.num_frames, videos.video_of)
                mm_encoder_outputs = {"image": features}
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                mm_encoder_outputs=mm_encoder_outputs,
                **kwargs | captured,
            )
            states = outputs.last_hidden_state  # (N, S, D)
        logits = None if skip_logits else self.lm_head(slice_logits_to_keep(states, logits_to_keep))
        if self.config.loss_reduction == "microbatch":
            num_items_in_batch = num_masks_in_batch = None
        losses: dict[str, Any] = {}
        if labels is not None:
            # Before the masks: ranks of a distributed training meet in the order in which modules ran, and those
            # without a [SEG] run the mask decoder last.
            losses["text_loss"] = self._text_loss(states, logits, labels, num_items_in_batch)

        # 4) The state that predicted each [SEG] becomes a prompt, and SAM decodes its mask.
        masks: dict[str, Any] = {}
        if wants_masks:
            seg_states = self._find_seg_states(states, labels if labels is not None else input_ids)
            check_segs(seg_states, videos, mask_labels)
            masks = self._segment(seg_states, videos, sam_pixel_values, sam_features)

        # 5) Losses of the masks.
        if mask_labels is not None:
            losses |= self._mask_losses(masks["mask_logits"], mask_labels, num_masks_in_batch)
        if losses:
            losses["loss"] = sum(getattr(self.config, f"{name}_weight") * value for name, value in losses.items())
            if self.training and (mask_labels is None or not any(map(len, mask_labels))):
                losses["loss"] = losses["loss"] + self._idle_mask_loss(states)
        visual: dict[str, Any] = {}
        if output_visual_states:
            patches = None if features is None else features.last_hidden_state
            middle = outputs.hidden_states[self.middle_layer]
            middle = middle if packed is None else packed.unpack(middle)
            visual = {"middle_hidden_state": middle, "patch_features": patches}
        return VisaOutput(
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=None if captured else outputs.hidden_states,
            attentions=outputs.attentions,
            **visual,
            **losses,
            **masks,
        )

    @property
    def middle_layer(self) -> int:
        """How many layers make the first half of the language model: at least one layer comes after them."""
        num_layers: int = self.config.text_config.num_hidden_layers
        return min((num_layers + 1) // 2, num_layers - 1)

    def _asks_for(self, name: str, kwargs: dict[str, Any]) -> bool:
        """Whether an output of the language model is asked for; what is not given is what its configuration says."""
        value = kwargs.get(name)
        return bool(getattr(self.config.text_config, name, False) if value is None else value)

    def _can_pack(
        self,
        past_key_values: Cache | None,
        position_ids: Tensor | None,
        mm_encoder_outputs: dict[str, Any] | None,
        **kwargs: Any,
    ) -> bool:
        """Whether conversations may be packed: no cache, nothing that counts on one row each, and any mask will do."""
        text = self.config.text_config
        asked = [self._asks_for(name, kwargs) for name in ("use_cache", "output_hidden_states", "output_attentions")]
        return (
            past_key_values is None
            and position_ids is None
            and not mm_encoder_outputs
            and not any(asked)
            and text._attn_implementation in PACKABLE_ATTENTION
            and set(getattr(text, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        )

    def _read_packed(self, packed: PackedConversations, features: Any, **kwargs: Any) -> Any:
        """Run the language model over packed conversations, with what `get_image_features` made of their frames.

        The result's states are of shape (M, L, D).
        """
        tokens = None
        if features is not None and packed.frame_rows:
            tokens = features.pooler_output[packed.frame_rows]
        embeds = self.model._embed(packed.input_ids, tokens)
        return self.model(
            inputs_embeds=embeds,
            attention_mask=packed.attention_mask(embeds.dtype),
            position_ids=packed.position_ids,
            **kwargs,
        )

    def _find_seg_states(self, states: Tensor, tokens: Tensor | None) -> list[Tensor]:
        """States that predicted a [SEG], one (K_n, D) for each of N conversations; `tokens` is (N, S)."""
        if tokens is None:
            raise ValueError("`inputs_embeds` do not tell where the [SEG]s are. Give `labels` or `input_ids` too.")
        is_seg = tokens == self.config.seg_token_id
        if is_seg[:, 0].any():
            raise ValueError("A conversation begins with [SEG], which nothing predicted. Let a prompt come first.")
        # As in LISA and VISA: the state one position earlier, whose next token is [SEG].
        is_before = is_seg[:, 1:].to(states.device)
        return list(states[:, :-1][is_before].split(is_before.sum(dim=1).tolist()))

    def _segment(
        self,
        seg_states: list[Tensor],
        videos: Videos,
        sam_pixel_values: Tensor | None,
        sam_features: Tensor | None,
    ) -> dict[str, Any]:
        """Decode the masks of N conversations; a target frame is encoded once, and only if something asks for it."""
        counts = [len(states) for states in seg_states]
        seg_embeddings = self.embed_seg_states(torch.cat(seg_states))  # (sum of K_n, C)
        prompts = seg_embeddings.split(counts)
        _, height, width = sam_feature_shape(self.config)
        low_res = [seg_embeddings.new_zeros(0, 4 * height, 4 * width) for _ in counts]
        iou_scores = [seg_embeddings.new_zeros(0) for _ in counts]
        members: dict[int, list[int]] = {}
        for conversation, count in enumerate(counts):
            if count:
                members.setdefault(videos.video_of[conversation], []).append(conversation)
        if members:
            if sam_features is not None:
                frame_features = sam_features[list(members)]
            else:
                assert sam_pixel_values is not None
                frame_features = self.get_sam_features(sam_pixel_values[list(members)])
            asking = [n for conversations in members.values() for n in conversations]
            frame_of = [frame for frame, rows in enumerate(members.values()) for n in rows for _ in range(counts[n])]
            masks, scores = self._decode_prompts(frame_features, frame_of, torch.cat([prompts[n] for n in asking]))
            sizes = [counts[n] for n in asking]
            for n, mask, score in zip(asking, masks.split(sizes), scores.split(sizes), strict=True):
                low_res[n], iou_scores[n] = mask, score
        padded_size = self.config.sam_config.vision_config.image_size
        mask_logits: list[Tensor] = []
        # Neighbours of one size together.
        for (original, reshaped), group in groupby(range(len(low_res)), key=videos.sizes_of):
            members_of_size = list(group)
            enlarged = upscale_mask_logits(
                torch.cat([low_res[n] for n in members_of_size]), padded_size, reshaped, original
            )
            mask_logits += enlarged.split([len(low_res[n]) for n in members_of_size])
        return {
            "low_res_mask_logits": low_res,
            "mask_logits": mask_logits,
            "iou_scores": iou_scores,
            "seg_embeddings": seg_embeddings,
        }

    def _text_loss(
        self, states: Tensor, logits: Tensor | None, labels: Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        """Cross-entropy of the learnt tokens, over `num_items` of them or over those given here."""
        if logits is None:
            next_labels = labels[:, 1:].to(states.device)
            is_learnt = next_labels != IGNORE_INDEX
            learnt_logits = self.lm_head(states[:, :-1][is_learnt])  # (learnt, V)
            loss_sum = token_loss_sum(learnt_logits, next_labels[is_learnt].to(learnt_logits.device))
            num_learnt = is_learnt.sum()
        elif logits.shape[1] != labels.shape[1]:
            raise ValueError("`logits_to_keep` leaves out logits that `labels` need. Give one of the two.")
        else:
            loss_sum, num_learnt = text_loss_sum_and_count(logits, labels.to(logits.device))
        return mean_loss(loss_sum, num_learnt if num_items is None else num_items)

    def _mask_losses(
        self, mask_logits: list[Tensor], mask_labels: Sequence[Tensor], num_masks: Tensor | int | None
    ) -> dict[str, Tensor]:
        """BCE and DICE, averaged over `num_masks` masks or over those given here; 0 without a mask."""
        # Without a mask, the labels of a conversation may have any size.
        pairs = [
            (logits, labels.to(logits.device))
            for logits, labels in zip(mask_logits, mask_labels, strict=True)
            if len(logits)
        ]
        if not pairs:
            zero = mask_logits[0].new_zeros(())
            return {"bce_loss": zero, "dice_loss": zero}
        logits, labels = zip(*pairs, strict=True)
        bce, dice = mask_bce_loss(logits, labels), mask_dice_loss(logits, labels)  # (sum of K_n,)
        num_masks = len(bce) if num_masks is None else num_masks
        return {"bce_loss": mean_loss(bce.sum(), num_masks), "dice_loss": mean_loss(dice.sum(), num_masks)}

    def _idle_mask_loss(self, states: Tensor) -> Tensor:
        """0, computed through the mask path with a blank frame.

        Ranks of a distributed training wait for each other's gradients, module by module: a micro-batch without [SEG]
        must run the modules, and give gradients to the parameters, that the others do.
        """
        features = torch.zeros(sam_feature_shape(self.config), device=states.device)
        masks, _ = self.decode_masks(features, self.embed_seg_states(states[:1, -1].detach()))
        return 0.0 * masks.float().sum()

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate text, as in transformers; frames are encoded once. For masks too, use `generate_masks`.

        Takes what the processor makes: the arguments that only masks need are left aside.
        """
        for name in _MASK_ARGUMENTS:
            kwargs.pop(name, None)
        if kwargs.get("pixel_values") is not None and len(kwargs["pixel_values"]) == 0:
            # Text only.
            for name in ("pixel_values", "num_frames", "conversation_to_video"):
                kwargs.pop(name, None)
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if input_ids is not None and kwargs.get("pixel_values") is not None:
            # `forward` does not see the frames any more, only their features.
            videos = check_videos(
                len(input_ids),
                len(kwargs["pixel_values"]),
                kwargs.get("num_frames"),
                kwargs.get("conversation_to_video"),
            )
            check_image_tokens(self.config, input_ids, videos)
            kwargs |= {"num_frames": videos.num_frames, "conversation_to_video": videos.video_of}
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def generate_masks(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        num_frames: Tensor | Sequence[int] | None = None,
        conversation_to_video: Tensor | Sequence[int] | None = None,
        sam_pixel_values: Tensor | None = None,
        sam_features: Tensor | None = None,
        original_sizes: Tensor | Sequence[Any] | None = None,
        reshaped_input_sizes: Tensor | Sequence[Any] | None = None,
        max_new_tokens: int = 64,
        *,
        image_features: Tensor | None = None,
        past_key_values: Cache | None = None,
        **generate_kwargs: Any,
    ) -> VisaGenerateOutput:
        """Let the model answer N conversations, and decode a mask for each [SEG] of its answers.

        Answers are greedy unless `generate_kwargs` say otherwise, and end where the context of the language model
        does. A [SEG] about a video without a target makes no mask. To decode a given answer instead, call the model.

        Args:
            input_ids (`torch.Tensor` of shape `(N, S)`, int64): prompts, padded on the left.
            attention_mask, pixel_values, num_frames, conversation_to_video, sam_pixel_values, sam_features,
                original_sizes, reshaped_input_sizes: as in `forward`.
            max_new_tokens (`int`, defaults to 64): length limit of an answer.
            image_features (`torch.Tensor` of shape `(F, L, D)`): given instead of `pixel_values`, the `pooler_output`
                that `get_image_features` made of them.
            past_key_values (`Cache` of N rows): keys and values of the first tokens of all prompts, which hold all
                frames; it does not change. Prompts may be padded behind these tokens. Not for speculative decoding.
            generate_kwargs: for `generate` (`do_sample`, `num_beams`, `num_return_sequences`, ...).

        Returns:
            [`VisaGenerateOutput`]: with `num_return_sequences` R, rows `R * n` to `R * n + R - 1` are the answers of
            conversation n.

        Raises:
            ValueError: if the arguments do not fit together, or a prompt fills the context of the language model.
        """
        # 1) Check everything, before anything is computed.
        input_ids = input_ids if self.device.type == "meta" else input_ids.to(self.device)
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        num_conversations, prompt_length = input_ids.shape
        frames = pixel_values if image_features is None else image_features
        videos = check_videos(
            num_conversations,
            0 if frames is None else len(frames),
            num_frames,
            conversation_to_video,
            original_sizes,
            reshaped_input_sizes,
        )
        check_text(self.config, input_ids, attention_mask, None, None)
        check_image_tokens(self.config, input_ids, videos, frames is not None)
        check_targets(self.config, videos, sam_pixel_values, sam_features)
        # Beams and speculative decoding do not go token by token.
        gives_states = not any(generate_kwargs.get(name) for name in _SPECULATIVE)
        if past_key_values is not None:
            check_prefix(self.config, input_ids, attention_mask, past_key_values)
            if not gives_states:
                raise ValueError(
                    "`past_key_values` are given, behind which speculative decoding gives other answers. Leave out "
                    f"{' and '.join(f'`{name}`' for name in _SPECULATIVE)}, or let the prompts be read anew."
                )
        if not attention_mask[:, -1].all():
            raise ValueError("A prompt is padded on the right, where its answer should go. Pad on the left.")
        room = self.config.text_config.max_position_embeddings - prompt_length
        if room < 1:
            raise ValueError(
                f"The prompts take {prompt_length} tokens, all that the language model was made for "
                "(`text_config.max_position_embeddings`). Shorten the query, or show fewer reference frames."
            )

        # 2) Encode the frames once, and generate.
        image_tokens = image_features
        if image_tokens is None and pixel_values is not None:
            image_tokens = self.get_image_features(pixel_values).pooler_output
        num_cached = 0 if past_key_values is None else int(past_key_values.get_seq_length())

        def read(videos: Videos, times: int) -> dict[str, Any]:
            """What stands for the frames: their tokens, or a copy of keys and values for each row."""
            if past_key_values is None:
                return _encoded(image_tokens, videos)
            return {"past_key_values": repeated(past_key_values, times)}

        times = max(self._generation_setting(name, generate_kwargs) for name in _ROWS_OF_A_PROMPT)
        generated: Any = self.generate(
            input_ids,
            attention_mask=attention_mask,
            **read(videos, times),
            **{
                "do_sample": False,
                # An answer has no place for a frame.
                "suppress_tokens": [self.config.image_token_id],
                **generate_kwargs,
                "max_new_tokens": min(max_new_tokens, room),
                "output_hidden_states": [-1] if gives_states else None,
                "return_dict_in_generate": True,
            },
        )
        sequences = generated.sequences
        answers = sequences[:, prompt_length:]  # (N * R, A)

        # 3) The state before each generated token: generation gives them, or the answers are read once more.
        times = len(sequences) // num_conversations
        videos = videos.repeated(times)
        if gives_states and isinstance(generated, GenerateDecoderOnlyOutput):
            steps: Any = generated.hidden_states
            states = torch.cat([step[-1][:, -1:] for step in steps], dim=1)  # (N * R, A, D)
        else:
            mask = attention_mask.repeat_interleave(times, dim=0)
            mask = torch.cat([mask, torch.ones_like(answers)], dim=1)
            states = self.model(
                input_ids=sequences[:, num_cached:],
                attention_mask=mask,
                position_ids=positions_of(mask)[:, num_cached:],
                **read(videos, times),
            ).last_hidden_state[:, prompt_length - num_cached - 1 : -1]

        # 4) Masks of the [SEG]s, up to the end of each answer.
        lengths = self._answer_lengths(answers, generate_kwargs)
        answer_ids = [answer[:length] for answer, length in zip(answers, lengths, strict=True)]
        seg_states = []
        for row, answer in enumerate(answer_ids):
            is_seg = answer == self.config.seg_token_id
            if not videos.has_target(row):
                is_seg = torch.zeros_like(is_seg)
            seg_states.append(states[row, : len(answer)][is_seg])
        masks = self._segment(seg_states, videos, sam_pixel_values, sam_features)
        return VisaGenerateOutput(sequences=sequences, answer_ids=answer_ids, **masks)

    def _generation_setting(self, name: str, generate_kwargs: dict[str, Any]) -> Any:
        """A setting of the generation: what is given, or what the checkpoint says."""
        config = generate_kwargs.get("generation_config") or self.generation_config
        value = generate_kwargs.get(name)
        return (getattr(config, name, None) or 1) if value is None else value

    def _answer_lengths(self, answers: Tensor, generate_kwargs: dict[str, Any]) -> list[int]:
        """Tokens of each answer up to and including the token that ended it: (N, A) -> N numbers."""
        config = generate_kwargs.get("generation_config") or self.generation_config
        ends = generate_kwargs.get("eos_token_id", config.eos_token_id)
        if ends is None:
            return [answers.shape[1]] * len(answers)
        is_end = torch.isin(answers, torch.as_tensor(ends, device=answers.device))
        # Tokens before the first end, and that end.
        num_before = (is_end.cumsum(dim=1) == 0).sum(dim=1)
        return (num_before + 1).clamp(max=answers.shape[1]).tolist()
