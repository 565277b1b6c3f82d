"""What of VISA is trained: LoRA on the language model, some parts fully, the rest frozen.

Defaults are the published recipe (VISA, https://huggingface.co/papers/2407.11325, section 4): LoRA r = 8, alpha = 16,
dropout 0.05 on q_proj and v_proj of the language model; embeddings, lm_head, text_hidden_fcs and SAM's mask decoder
fully. How it is trained (learning rates, steps) is training_arguments.py's.
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available, is_peft_available

from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation

_LAYERS = r"model\.language_model\.layers\.\d+\."
# Parts that `unfreeze` may name, and their modules.
TOWERS = {
    "vision_tower": "model.vision_tower",
    "mm_projector": "model.mm_projector",
    "sam": "model.sam.vision_encoder",
}
# What is not quantised: heads, and towers whose Linears are few and sensitive.
_NOT_QUANTIZED = [
    "lm_head",
    "model.text_hidden_fcs",
    "model.mm_projector",
    "model.vision_tower",
    "model.sam",
    "tracker",
]
# SAM's estimate of the IoU takes part in no loss.
_NEVER_TRAINED = re.compile(r"\.mask_decoder\.iou_prediction_head\.")


@dataclass(frozen=True)
class TrainingOptions:
    """Which parameters are trained.

    Args:
        language_model (`str`, defaults to `"lora"`): `"lora"`, `"full"` or `"frozen"`: its layers and final norm.
        lora_rank, lora_alpha (`int`), lora_dropout (`float`): of the adapter.
        lora_targets (`tuple[str, ...]`): names of the Linears in each layer of the language model, of `q_proj`,
            `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj`. Modules of the same names elsewhere
            (CLIP, SAM) are never touched.
        embeddings (`str`, defaults to `"full"`): `embed_tokens` and `lm_head`: `"full"`, `"seg"` (only their row of
            [SEG], which saves gigabytes; with `language_model="lora"`) or `"frozen"`.
        text_hidden_fcs, mask_decoder (`bool`, default to `True`): train them fully.
        unfreeze (`tuple[str, ...]`): of `"vision_tower"`, `"mm_projector"`, `"sam"` (SAM's image encoder), which are
            frozen in the published recipe.
        is_4bit (`bool`, defaults to `False`): the frozen base is in 4 bits (QLoRA): see [`quantization_config`].

    Raises:
        ValueError: for values that do not exist or do not go together.
    """

    language_model: Literal["lora", "full", "frozen"] = "lora"
    lora_rank: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    embeddings: Literal["full", "seg", "frozen"] = "full"
    text_hidden_fcs: bool = True
    mask_decoder: bool = True
    unfreeze: tuple[str, ...] = ()
    is_4bit: bool = False

    def __post_init__(self) -> None:
        for name, known in (("language_model", ("lora", "full", "frozen")), ("embeddings", ("full", "seg", "frozen"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r} but must be one of {', '.join(map(repr, known))}."
                )
        # Lists come from recipes.
        for name in ("lora_targets", "unfreeze"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"`{name}` is {value!r} but must be a list of names. Put it into a list.")
            object.__setattr__(self, name, tuple(value))
        if self.lora_rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"`lora_rank` is {self.lora_rank}, `lora_alpha` {self.lora_alpha} and `lora_dropout` "
                f"{self.lora_dropout}, but at least 1, above 0, and from 0 to below 1 are needed."
            )
        unknown = [name for name in self.unfreeze if name not in TOWERS]
        if unknown:
            raise ValueError(f"`unfreeze` names {unknown[0]!r} but knows only {', '.join(map(repr, TOWERS))}.")
        if self.language_model == "lora" and not self.lora_targets:
            raise ValueError('`lora_targets` is empty. Name Linears, or set `language_model` to "frozen".')
        if self.embeddings == "seg" and self.language_model != "lora":
            raise ValueError(
                f'`embeddings` is "seg" with `language_model` "{self.language_model}", but single rows are trained by '
                'the adapter. Set `language_model` to "lora", or `embeddings` to "full".'
            )
        if self.is_4bit and self.language_model != "lora":
            raise ValueError(
                f'`is_4bit` with `language_model` "{self.language_model}": weights in 4 bits cannot be trained. Set '
                'it to "lora".'
            )


def prepare_for_training(model: VisaForVideoSegmentation, options: TrainingOptions | None = None) -> nn.Module:
    """Freeze what is not trained and, with LoRA, put the adapter around the whole model.

    The adapter is around the model and not inside it, so that checkpoints hold what is trained and nothing else.
    Trained parameters are made float32 if they are of lower precision (train those with `bf16=True`); DeepSpeed keeps
    float32 copies of its own.

    Args:
        model ([`VisaForVideoSegmentation`]): loaded, in 4 bits with `options.is_4bit`. Its adapter will name
            `model.name_or_path` as the base that it belongs to.
        options ([`TrainingOptions`], *optional*): the published recipe by default.

    Returns:
        `peft.PeftModel` with LoRA, else the model itself.

    Raises:
        ValueError: if a name in `lora_targets` fits no module, the model is not quantised as the options say,
            nothing is left to train, or `embeddings` is "seg" under ZeRO-3 without a GPU.
        ImportError: if PEFT is missing.
    """
    options = options or TrainingOptions()
    is_quantized = bool(getattr(model, "is_loaded_in_4bit", False))
    if is_quantized != options.is_4bit:
        raise ValueError(
            f"`is_4bit` is {options.is_4bit} but the model is {'' if is_quantized else 'not '}in 4 bits. Load it with "
            "`quantization_config=quantization_config(options)`, or without."
        )
    if options.embeddings == "seg" and is_deepspeed_zero3_enabled() and not torch.cuda.is_available():
        # PEFT 0.21 gathers the rows on a GPU, whatever the model is on.
        raise ValueError(
            '`embeddings` is "seg" under DeepSpeed\'s ZeRO-3 on a CPU, where PEFT cannot read single rows. Set it to '
            '"full" or "frozen", or take ZeRO-2.'
        )
    model.requires_grad_(False)
    trained = _trained_modules(options)
    prepared: nn.Module = model
    if options.language_model == "lora":
        prepared = _with_adapter(model, options, trained)
    else:
        if options.language_model == "full":
            trained = [*trained, "model.language_model.layers", "model.language_model.norm"]
        for name in trained:
            model.get_submodule(name).requires_grad_(True)
    _freeze_unused(prepared, model)
    if not is_deepspeed_zero3_enabled():
        for parameter in prepared.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    if not trainable_parameters(prepared):
        raise ValueError("Nothing is left to train. Leave at least one part trainable in the options.")
    if options.embeddings == "frozen":
        # With activation checkpointing, gradients reach the layers only if their input asks for them.
        model.enable_input_require_grads()
    return prepared


def quantization_config(options: TrainingOptions) -> BitsAndBytesConfig | None:
    """Return `quantization_config` of `from_pretrained` that the options need: `None`, or NF4 for QLoRA.

    The language model's Linears are stored in 4 bits (QLoRA, https://huggingface.co/papers/2305.14314); heads, CLIP,
    SAM and the tracker stay as they are.

    Raises:
        ImportError: if `is_4bit` and bitsandbytes is missing or older than transformers takes.
        ValueError: if `is_4bit` under DeepSpeed's ZeRO-3.
    """
    if not options.is_4bit:
        return None
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "`is_4bit` is True under DeepSpeed's ZeRO-3, but weights in 4 bits cannot be split between processes. "
            "Take ZeRO-2 (in a recipe `deepspeed: zero2`) or plain DDP, which keep a whole base in each process."
        )
    if not is_bitsandbytes_available():
        raise ImportError(
            f"`is_4bit` needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer, which is not installed: "
            '`pip install "visa-hf[qlora]"`.'
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(_NOT_QUANTIZED),
    )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Keep back transformers' warning about a property that PEFT up to 0.21 asks for and users cannot help."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        yield


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, by the model's own names: those without what wrappers add.

    LoRA's matrices keep theirs: `model.language_model.layers.0.self_attn.q_proj.lora_A.weight`.
    """
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain_name(name: str) -> str:
    """Return the model's own name of a parameter of a wrapped model."""
    # DDP and DeepSpeed; PEFT around the model; PEFT's copies and adapters.
    name = re.sub(r"^(module\.)?(base_model\.model\.)?", "", name)
    name = name.replace(".modules_to_save.default.", ".").replace(".token_adapter.", ".")
    return re.sub(r"\.default(?=\.|$)", "", name)


def _trained_modules(options: TrainingOptions) -> list[str]:
    """Names of the modules that are trained fully whatever happens to the language model's layers."""
    modules = [TOWERS[name] for name in options.unfreeze]
    if options.embeddings == "full":
        modules += ["model.language_model.embed_tokens", "lm_head"]
    if options.text_hidden_fcs:
        modules.append("model.text_hidden_fcs")
    if options.mask_decoder:
        modules.append("model.sam.mask_decoder")
    return modules


def _with_adapter(model: VisaForVideoSegmentation, options: TrainingOptions, trained: list[str]) -> nn.Module:
    """Return the model inside a `PeftModel`."""
    if not is_peft_available():
        raise ImportError('LoRA needs PEFT, which is not installed: `pip install "visa-hf[train]"`.')
    from peft import LoraConfig, get_peft_model

    linears = {name.rsplit(".", 1)[1] for name, _ in model.named_modules() if re.match(_LAYERS, name)}
    unknown = [name for name in options.lora_targets if name not in linears]
    if unknown:
        raise ValueError(
            f"`lora_targets` names {unknown[0]!r} but a layer of the language model has "
            f"{', '.join(sorted(name for name in linears if name.endswith('_proj')))}."
        )
    rows = [model.config.seg_token_id]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        bias="none",
        # A text is matched as a whole: a list of names would also hit CLIP and SAM.
        target_modules=rf"{_LAYERS}\w+\.({'|'.join(options.lora_targets)})",
        modules_to_save=[part for name in trained for part in _parts(name, model)] or None,
        trainable_token_indices={"embed_tokens": rows, "lm_head": rows} if options.embeddings == "seg" else None,
    )
    # Without a `task_type`: the model is more than a causal language model.
    with quiet_peft():
        prepared = get_peft_model(model, config)
    base = model.name_or_path or ""
    prepared.peft_config["default"].base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
    return prepared


def _parts(name: str, model: VisaForVideoSegmentation) -> list[str]:
    """Return `name`, or the largest modules in it whose parameters can all be trained: what PEFT copies and saves."""
    module = model.get_submodule(name)
    parameters = [parameter for parameter, _ in module.named_parameters()]
    is_whole = not any(_is_unused(f"{name}.{parameter}", model) for parameter in parameters)
    if is_whole and not isinstance(module, nn.ModuleList):
        return [name] if parameters else []
    return [part for child, _ in module.named_children() for part in _parts(f"{name}.{child}", model)]


def _is_unused(name: str, model: VisaForVideoSegmentation) -> bool:
    """Whether a parameter can get no gradient: distributed training would wait for it."""
    vision = model.config.vision_config
    layer = model.config.vision_feature_layer
    num_used = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
    behind = re.search(r"\.vision_tower\.(?:\w+\.)*?layers\.(\d+)\.", name)
    is_behind = behind is not None and int(behind[1]) >= num_used
    return is_behind or ".vision_tower.post_layernorm." in name or _NEVER_TRAINED.search(name) is not None


def _freeze_unused(prepared: nn.Module, model: VisaForVideoSegmentation) -> None:
    for name, parameter in prepared.named_parameters():
        if _is_unused(plain_name(name), model):
            parameter.requires_grad_(False)
