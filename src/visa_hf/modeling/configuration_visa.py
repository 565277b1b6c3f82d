"""Configurations of VISA and of its tracker.

`VisaConfig` is composite: visual tower, text model, SAM, token merging, frame sampler, losses, optional tracker
(VISA, https://huggingface.co/papers/2407.11325). `XMemConfig` describes the tracker
(XMem, https://huggingface.co/papers/2207.07115). Both are strict: a wrong type, an impossible combination and an
unknown field name are refused. What concerns one run only (thresholds, devices) is not here but in function arguments.
"""

import difflib
import math
from collections.abc import Iterable
from functools import cache, wraps
from typing import Any, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPVisionConfig, PreTrainedConfig, SamConfig
from transformers.configuration_utils import SubConfigSpec

# Keys that transformers itself keeps in a config.json beside a class's own fields.
_BOOKKEEPING = frozenset(
    {
        "model_type",
        "name_or_path",
        "auto_map",
        "custom_pipelines",
        "quantization_config",
        "torch_dtype",
        "num_labels",
        "attn_implementation",
        "experts_implementation",
        "output_attentions",
        "use_cache",
        "per_layer_config",
        "rope_theta",
        "rope_scaling",
    }
)
# Written into every config.json by transformers 4 (which published checkpoints were saved with); meaningless here.
_TRANSFORMERS_4 = frozenset(
    {
        "add_cross_attention",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_decoder",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torchscript",
        "typical_p",
        "use_bfloat16",
    }
)


@cache
def _known_names(config_class: type[PreTrainedConfig]) -> frozenset[str]:
    """Names that `config_class` accepts: its fields (set by default, or derived when saved) and its aliases."""
    fields = set(config_class.__dataclass_fields__) | set(config_class().to_dict())
    return frozenset(fields | set(config_class.attribute_map))


def unknown_name_error(name: str, known: Iterable[str], owner: str) -> ValueError:
    """Return the error for `name`, which `owner` does not know, with the nearest of the names that it knows."""
    nearest = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    own = sorted(set(known) - set(PreTrainedConfig.__dataclass_fields__))
    hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known fields: {', '.join(own)}."
    return ValueError(f"`{name}` is not a field of {owner}. {hint}")


def _refuse_unknown(names: Iterable[str], known: Iterable[str], owner: str) -> None:
    """Raise a `ValueError` that names what is unknown and the nearest known name."""
    known = set(known)
    for name in sorted(names):
        if name.startswith("_") or name in _BOOKKEEPING or name in known:
            continue
        raise unknown_name_error(name, known, owner)


def _checked_sub_config(values: dict[str, Any], config_class: type[PreTrainedConfig], owner: str) -> dict[str, Any]:
    """Return `values` without transformers 4's leftovers, after refusing names that `config_class` does not know."""
    model_type = values.get("model_type", config_class.model_type)
    if model_type != config_class.model_type:
        raise ValueError(
            f"`{owner}` has model_type {model_type!r} but {config_class.model_type!r} is needed. "
            f"Give the values of a {config_class.__name__}."
        )
    known = _known_names(config_class)  # type: ignore[arg-type] # mypy takes the hash of its instances for its own
    values = {name: value for name, value in values.items() if name in known or name not in _TRANSFORMERS_4}
    nested = config_class.sub_configs_defaults or {}
    for name, spec in nested.items():
        if isinstance(values.get(name), dict):
            values[name] = _checked_sub_config(values[name], spec.config_class, f"{owner}.{name}")
    _refuse_unknown(set(values), known, f"`{owner}` ({config_class.__name__})")
    return values


_ConfigClass = TypeVar("_ConfigClass", bound=type)


def _plain_errors(config_class: _ConfigClass) -> _ConfigClass:
    """Let a strict configuration raise `ValueError` and `TypeError`, with nothing but their text around it."""

    def plain(method: Any) -> Any:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except StrictDataclassError as error:
                kind = TypeError if isinstance(error.__cause__, TypeError) else ValueError
                raise kind(str(error.__cause__ or error)) from error

        return call

    for name in ("__init__", "__setattr__", "validate"):
        setattr(config_class, name, plain(getattr(config_class, name)))
    return config_class


class _StrictConfig(PreTrainedConfig):
    """A configuration that refuses unknown names, at construction and in `from_pretrained`."""

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_unknown(kwargs, self._own_names(), type(self).__name__)
        super().__post_init__(**kwargs)

    @classmethod
    def _own_names(cls) -> set[str]:
        # Not `_known_names`: that builds an instance, which is what is being built here.
        return set(cls.__dataclass_fields__) | set(cls.attribute_map)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a dictionary; keywords override its values.

        Args:
            config_dict (`dict`): the content of a config.json.
            kwargs: fields to override. A dictionary for a sub-configuration is merged into it.
                `return_unused_kwargs=True` returns `(config, unused keywords)`, as `from_pretrained` of a model needs.

        Raises:
            ValueError: for a keyword that is not a field, or a combination of values that cannot work.
        """
        return_unused = kwargs.pop("return_unused_kwargs", False)
        for name, spec in (cls.sub_configs_defaults or {}).items():
            if isinstance(kwargs.get(name), dict):
                kwargs[name] = cls._check_sub_config_dict(name, spec, kwargs[name], config_dict.get(name))
        # A copy: the base class writes into the dictionary that it is given.
        config, unused = super().from_dict(dict(config_dict), return_unused_kwargs=True, **kwargs)
        # Overrides are set as attributes, which checks their types but not how they fit together.
        config.validate()
        if return_unused:
            return config, unused
        _refuse_unknown(unused, cls._own_names(), cls.__name__)
        return config

    @classmethod
    def _check_sub_config_dict(
        cls, name: str, spec: SubConfigSpec, values: dict[str, Any], saved: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Refuse unknown names in the dictionary `values` given for the sub-configuration `name`."""
        config_class = spec.config_class
        if config_class is AutoConfig:
            default = (saved or {}).get("model_type", spec.model_type)
            config_class = type(AutoConfig.for_model(values.get("model_type", default)))
        return _checked_sub_config(values, config_class, name)


def _positive(owner: PreTrainedConfig, *names: str) -> None:
    """Raise a `ValueError` unless each named field is at least 1."""
    for name in names:
        if getattr(owner, name) < 1:
            raise ValueError(f"`{name}` is {getattr(owner, name)} but must be at least 1.")


@_plain_errors
@strict
class XMemConfig(_StrictConfig):
    r"""Configuration of the tracker [`XMemModel`]: network sizes and how its three memories are run.

    The defaults are those of the published checkpoint and of XMem's own evaluation
    (https://huggingface.co/papers/2207.07115).

    Args:
        key_dim (`int`, defaults to 64): channels of a memory key.
        value_dim (`int`, defaults to 512): channels of a memory value.
        sensory_dim (`int`, defaults to 64): channels of the sensory memory.
        single_object (`bool`, defaults to `False`): the value encoder sees the image and one mask (4 channels) instead
            of the image, the mask and the sum of the other masks (5 channels).
        memory_every (`int`, defaults to 5): a frame is memorised every so many frames.
        deep_update_every (`int`, defaults to -1): deep update of the sensory memory every so many frames; -1 means
            with the memory frames.
        top_k (`int` or `None`, defaults to 30): memory elements that each position reads from; `None` reads from all.
        use_long_term (`bool`, defaults to `True`): consolidate working memory into long-term memory. Without it the
            working memory keeps every memory frame.
        count_long_term_usage (`bool`, defaults to `True`): drop the least used long-term elements when there are too
            many. Without it the oldest are dropped.
        min_working_frames (`int`, defaults to 5): memory frames that stay in working memory after a consolidation.
        max_working_frames (`int`, defaults to 10): memory frames in working memory that cause a consolidation.
        num_prototypes (`int`, defaults to 128): elements that a consolidation adds to long-term memory.
        max_long_term_elements (`int`, defaults to 10000): bound of the long-term memory.
        input_size (`int` or `None`, defaults to 480): shorter side, in pixels, that frames are resized to before they
            are tracked; `None` tracks them as given.
        key_encoder_layer (`"bottleneck"` or `"basic"`): block of the key encoder's ResNet.
        key_encoder_depths (`tuple[int, int, int]`): blocks in its three stages (ResNet-50 up to stride 16).
        key_encoder_dims (`tuple[int, int, int]`): output channels of its stages, at strides 4, 8 and 16.
        value_encoder_depths (`tuple[int, int, int]`): blocks in the stages of the value encoder (ResNet-18).
        value_encoder_dims (`tuple[int, int, int]`): output channels of its stages.
        decoder_dims (`tuple[int, int]`): channels of the decoder at stride 16 and 8, and at stride 4.
        train_batch_norm (`bool`, defaults to `False`): let `train()` put BatchNorm into training mode. Published
            weights need it off; training from nothing needs it on.
        initializer_range (`float`, defaults to 0.02): standard deviation of newly initialised linear weights.
    """

    model_type = "visa_xmem"
    base_config_key = "tracker_config"

    # Network
    key_dim: int = 64
    value_dim: int = 512
    sensory_dim: int = 64
    single_object: bool = False
    key_encoder_layer: Literal["bottleneck", "basic"] = "bottleneck"
    key_encoder_depths: list[int] | tuple[int, ...] = (3, 4, 6)
    key_encoder_dims: list[int] | tuple[int, ...] = (256, 512, 1024)
    value_encoder_depths: list[int] | tuple[int, ...] = (2, 2, 2)
    value_encoder_dims: list[int] | tuple[int, ...] = (64, 128, 256)
    decoder_dims: list[int] | tuple[int, ...] = (512, 256)
    train_batch_norm: bool = False
    initializer_range: float = 0.02

    # Memory
    memory_every: int = 5
    deep_update_every: int = -1
    top_k: int | None = 30
    use_long_term: bool = True
    count_long_term_usage: bool = True
    min_working_frames: int = 5
    max_working_frames: int = 10
    num_prototypes: int = 128
    max_long_term_elements: int = 10000

    # Input
    input_size: int | None = 480

    @classmethod
    def tiny(cls, **overrides: Any) -> "XMemConfig":
        """Return a tracker of at most 2 million parameters, for tests and demos. `overrides` are fields."""
        values: dict[str, Any] = {
            "key_dim": 32,
            "value_dim": 64,
            "sensory_dim": 16,
            "key_encoder_layer": "basic",
            "key_encoder_depths": (1, 1, 1),
            "key_encoder_dims": (32, 48, 96),
            "value_encoder_depths": (1, 1, 1),
            "value_encoder_dims": (24, 32, 64),
            "decoder_dims": (64, 48),
            "input_size": 128,
        }
        return cls(**{**values, **overrides})

    def validate_sizes(self) -> None:
        """Refuse sizes that no network can have."""
        _positive(self, "key_dim", "value_dim", "sensory_dim")
        expected = {
            "key_encoder_depths": 3,
            "key_encoder_dims": 3,
            "value_encoder_depths": 3,
            "value_encoder_dims": 3,
            "decoder_dims": 2,
        }
        for name, length in expected.items():
            values = getattr(self, name)
            if len(values) != length or any(value < 1 for value in values):
                raise ValueError(f"`{name}` is {tuple(values)} but must be {length} numbers of at least 1.")
        if self.key_encoder_layer == "bottleneck" and any(dim % 4 for dim in self.key_encoder_dims):
            raise ValueError(
                f"`key_encoder_dims` is {tuple(self.key_encoder_dims)} but bottleneck blocks need multiples of 4. "
                'Change them or set `key_encoder_layer` to "basic".'
            )

    def validate_memory(self) -> None:
        """Refuse memory settings that contradict each other."""
        _positive(self, "memory_every", "num_prototypes", "max_long_term_elements")
        if self.deep_update_every != -1 and self.deep_update_every < 1:
            raise ValueError(
                f"`deep_update_every` is {self.deep_update_every} but must be -1 (with the memory frames) or at least "
                "1."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"`top_k` is {self.top_k} but must be at least 1, or None to read from all elements.")
        if self.min_working_frames < 2 or self.max_working_frames <= self.min_working_frames:
            # The first memory frame and the last `min_working_frames - 1` stay; something must be left to consolidate.
            raise ValueError(
                f"`min_working_frames` is {self.min_working_frames} and `max_working_frames` is "
                f"{self.max_working_frames}, but 2 <= min_working_frames < max_working_frames is needed."
            )
        if self.use_long_term and self.num_prototypes > self.max_long_term_elements:
            raise ValueError(
                f"`num_prototypes` is {self.num_prototypes} but long-term memory holds only "
                f"`max_long_term_elements` = {self.max_long_term_elements}. Raise the bound or lower the prototypes."
            )
        if self.input_size is not None and self.input_size < 16:
            raise ValueError(
                f"`input_size` is {self.input_size} but the network works at stride 16: give at least 16, or None "
                "to track frames at their own size."
            )


# CLIP ViT-L/14 at 224 pixels, the visual tower of LLaVA, Chat-UniVi and VISA.
_CLIP_L14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
# Vicuna-style Llama 7B with Chat-UniVi's context length; row 32000 is [SEG].
_LLAMA_7B = {
    "vocab_size": 32001,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_13B = {
    **_LLAMA_7B,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_SAM_VIT_H = {
    "vision_config": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": (7, 15, 23, 31),
    },
    # PyTorch's default, which segment-anything's two-way transformer uses; transformers' differs.
    "mask_decoder_config": {"layer_norm_eps": 1e-5},
}


@_plain_errors
@strict
class VisaConfig(_StrictConfig):
    r"""Configuration of [`VisaForVideoSegmentation`]. The defaults are the published VISA-7B without its tracker.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`): the visual tower (CLIP ViT-L/14 at 224).
        text_config (`dict` or `PreTrainedConfig`): any causal language model of transformers whose decoder takes
            `inputs_embeds` (Llama 7B).
        sam_config (`dict` or `SamConfig`): the mask network (SAM ViT-H).
        tracker_config (`dict` or `XMemConfig`, *optional*): the tracker; `None` segments target frames only.
        vision_feature_layer (`int`, defaults to -2): hidden state of the visual tower that becomes visual tokens.
        image_token_id (`int`, defaults to 32001): id that stands for a visual token. It may lie beyond the vocabulary,
            as in the published checkpoints: it needs no row in the embeddings.
        seg_token_id (`int`, defaults to 32000): id of `[SEG]`.
        use_token_merging (`bool`, defaults to `True`): merge visual tokens by clustering (Chat-UniVi,
            https://huggingface.co/papers/2311.08046). Without it every patch becomes a token.
        merge_cluster_counts (`tuple`, defaults to `(64, 32, 16)`): clusters of each round; a number of at most 1 is a
            share of the tokens of the round before (rounded up).
        merge_neighbors (`tuple[int, ...]`, defaults to `(5, 3, 3)`): nearest neighbours that density is measured with,
            for each round.
        num_reference_frames (`int`, defaults to 12): reference frames that the sampler picks (paper, section 4.1).
        reference_strategy (`str`, defaults to `"global_local"`): `"global_local"`, `"global"`, `"local"` or `"none"`.
        text_loss_weight, bce_loss_weight, dice_loss_weight (`float`, default to 1.0, 2.0, 0.5): weights of the loss.
        loss_reduction (`"step"` or `"microbatch"`, defaults to `"step"`): normalise losses over the whole optimiser
            step, or over each micro-batch as published.
        initializer_range (`float`, defaults to 0.02): standard deviation of newly initialised linear weights.
        tie_word_embeddings (`bool`, defaults to `False`): tie `lm_head` to the input embeddings.

    Raises:
        ValueError: for an unknown field name, here or in a sub-configuration, and for values that do not fit together.
        TypeError: for a value of a wrong type, also when it is assigned later.
    """

    model_type = "visa"
    attribute_map = {"image_token_index": "image_token_id"}
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=CLIPVisionConfig, init_kwargs=_CLIP_L14),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs=_LLAMA_7B),
        "sam_config": SubConfigSpec(config_class=SamConfig, init_kwargs=_SAM_VIT_H),
        "tracker_config": SubConfigSpec(config_class=XMemConfig, optional=True),
    }

    # What a saved config.json says about its pipeline has `pipeline` load the code of that folder. It is left out if
    # the package has registered its own, and has set this.
    has_registered_pipeline = False

    # Parts: dictionaries or configurations when given, configurations from then on.
    vision_config: Any = None
    text_config: Any = None
    sam_config: Any = None
    tracker_config: Any = None

    # Prompt
    image_token_id: int = 32001
    seg_token_id: int = 32000

    # Visual tokens
    vision_feature_layer: int = -2
    use_token_merging: bool = True
    merge_cluster_counts: list[int | float] | tuple[int | float, ...] = (64, 32, 16)
    merge_neighbors: list[int] | tuple[int, ...] = (5, 3, 3)

    # Frame sampler
    num_reference_frames: int = 12
    reference_strategy: Literal["global_local", "global", "local", "none"] = "global_local"

    # Losses
    text_loss_weight: float | int = 1.0
    bce_loss_weight: float | int = 2.0
    dice_loss_weight: float | int = 0.5
    loss_reduction: Literal["step", "microbatch"] = "step"

    # Initialisation
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.has_registered_pipeline:
            kwargs.pop("custom_pipelines", None)
        for name, spec in self.sub_configs_defaults.items():
            values = getattr(self, name)
            if isinstance(values, dict):
                setattr(self, name, self._check_sub_config_dict(name, spec, values))
            elif not isinstance(values, PreTrainedConfig | None):
                raise TypeError(f"`{name}` is {values!r} but a dictionary or a configuration is needed.")
        super().__post_init__(**kwargs)

    @classmethod
    def visa_7b(cls, **overrides: Any) -> "VisaConfig":
        """Return the configuration of the published VISA-7B, without a tracker. `overrides` are fields."""
        return cls(**overrides)

    @classmethod
    def visa_13b(cls, **overrides: Any) -> "VisaConfig":
        """Return the configuration of the published VISA-13B, without a tracker. `overrides` are fields."""
        return cls(**{"text_config": dict(_LLAMA_13B), **overrides})

    @classmethod
    def tiny(cls, **overrides: Any) -> "VisaConfig":
        """Return a very small VISA with a tracker, for tests and demos: 64-pixel tower, 128-pixel SAM.

        Its ids are those of a vocabulary of 1,200 pieces followed by `[SEG]`. `overrides` are fields.
        """
        values: dict[str, Any] = {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 64,
                "patch_size": 8,
                "projection_dim": 32,
            },
            "text_config": {
                **_LLAMA_7B,
                "vocab_size": 1201,
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
            },
            "sam_config": {
                "vision_config": {
                    "hidden_size": 32,
                    "output_channels": 32,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 128,
                    "window_size": 4,
                    "global_attn_indexes": (1,),
                    "num_pos_feats": 16,
                    "mlp_dim": 64,
                },
                "prompt_encoder_config": {"hidden_size": 32, "image_size": 128, "mask_input_channels": 8},
                "mask_decoder_config": {
                    "hidden_size": 32,
                    "mlp_dim": 64,
                    "num_attention_heads": 2,
                    "iou_head_hidden_dim": 32,
                    "layer_norm_eps": 1e-5,
                },
            },
            "tracker_config": XMemConfig.tiny(),
            "image_token_id": 1201,
            "seg_token_id": 1200,
            "merge_cluster_counts": (16, 8, 4),
        }
        return cls(**{**values, **overrides})

    @property
    def num_patches(self) -> int:
        """Patches of one frame in the visual tower, without its class token."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def merge_sizes(self) -> tuple[int, ...]:
        """Visual tokens that each round of merging leaves, with shares turned into counts."""
        sizes = []
        num_tokens = self.num_patches
        for count in self.merge_cluster_counts:
            num_tokens = math.ceil(num_tokens * count) if count <= 1 else int(count)
            sizes.append(num_tokens)
        return tuple(sizes)

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of one frame: 64 + 32 + 16 = 112 in VISA, all patches when merging is off."""
        return sum(self.merge_sizes) if self.use_token_merging else self.num_patches

    def validate_tokens(self) -> None:
        """Refuse token ids that cannot work together."""
        vocab_size = self.text_config.vocab_size
        if not 0 <= self.seg_token_id < vocab_size:
            raise ValueError(
                f"`seg_token_id` is {self.seg_token_id} but the text model has {vocab_size} embedding rows. "
                "[SEG] needs a row: enlarge `text_config.vocab_size` or give an id below it."
            )
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` is {self.image_token_id} but token ids start at 0.")
        if self.image_token_id == self.seg_token_id:
            raise ValueError(f"`image_token_id` and `seg_token_id` are both {self.seg_token_id} but must differ.")

    def validate_visual_tokens(self) -> None:
        """Refuse a merging that has more clusters than tokens, and a feature layer that the tower does not have."""
        vision = self.vision_config
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, name), int):
                raise ValueError(f"`vision_config.{name}` is {getattr(vision, name)} but one number is needed.")
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"`vision_config.image_size` {vision.image_size} is not a multiple of its `patch_size` "
                f"{vision.patch_size}."
            )
        num_layers = vision.num_hidden_layers
        if not -num_layers - 1 <= self.vision_feature_layer <= num_layers:
            raise ValueError(
                f"`vision_feature_layer` is {self.vision_feature_layer} but the visual tower has {num_layers} layers: "
                f"give a number from {-num_layers - 1} to {num_layers}."
            )
        if not self.use_token_merging:
            return
        if not self.merge_cluster_counts or len(self.merge_cluster_counts) != len(self.merge_neighbors):
            raise ValueError(
                f"`merge_cluster_counts` has {len(self.merge_cluster_counts)} rounds and `merge_neighbors` "
                f"{len(self.merge_neighbors)}, but both need the same number, at least one."
            )
        if any(count <= 0 or (count > 1 and count != int(count)) for count in self.merge_cluster_counts):
            raise ValueError(
                f"`merge_cluster_counts` is {tuple(self.merge_cluster_counts)} but needs whole numbers, or shares in "
                "(0, 1]."
            )
        if any(neighbors < 1 for neighbors in self.merge_neighbors):
            raise ValueError(f"`merge_neighbors` is {tuple(self.merge_neighbors)} but must be at least 1 each.")
        available = self.num_patches
        for size in self.merge_sizes:
            if size > available:
                raise ValueError(
                    f"`merge_cluster_counts` {tuple(self.merge_cluster_counts)} asks for {size} clusters of "
                    f"{available} tokens. Each round can only make fewer tokens of those before."
                )
            available = size

    def validate_sam(self) -> None:
        """Refuse SAM parts whose sizes do not fit each other."""
        vision, prompt = self.sam_config.vision_config, self.sam_config.prompt_encoder_config
        decoder = self.sam_config.mask_decoder_config
        if not vision.output_channels == prompt.hidden_size == decoder.hidden_size == 2 * vision.num_pos_feats:
            raise ValueError(
                f"SAM's widths differ: `vision_config.output_channels` {vision.output_channels}, "
                f"`prompt_encoder_config.hidden_size` {prompt.hidden_size}, `mask_decoder_config.hidden_size` "
                f"{decoder.hidden_size}, and twice `vision_config.num_pos_feats` {vision.num_pos_feats}. "
                "All four must be equal."
            )
        if (vision.image_size, vision.patch_size) != (prompt.image_size, prompt.patch_size):
            raise ValueError(
                f"SAM's image encoder takes {vision.image_size} pixels in patches of {vision.patch_size} but its "
                f"prompt encoder {prompt.image_size} in {prompt.patch_size}. Make them equal."
            )
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"`sam_config.vision_config.image_size` {vision.image_size} is not a multiple of its `patch_size` "
                f"{vision.patch_size}."
            )

    def validate_losses(self) -> None:
        """Refuse negative weights."""
        for name in ("text_loss_weight", "bce_loss_weight", "dice_loss_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)} but must be at least 0.")

    def validate_sampler(self) -> None:
        """Refuse a number of reference frames that contradicts the strategy."""
        if self.num_reference_frames < 0:
            raise ValueError(f"`num_reference_frames` is {self.num_reference_frames} but must be at least 0.")
        if self.num_reference_frames == 0 and self.reference_strategy != "none":
            raise ValueError(
                f'`num_reference_frames` is 0 with `reference_strategy` "{self.reference_strategy}". '
                'Set the strategy to "none" or ask for at least one frame.'
            )
