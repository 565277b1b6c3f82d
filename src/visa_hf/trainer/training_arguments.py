"""How to train: transformers' arguments with VISA's defaults, without what VISA's batches do not survive.

Defaults of the optimiser are those of the paper's appendix (https://huggingface.co/papers/2407.11325). What of the
model is trained is chosen in lora.py, what is trained on in `visa_hf.datasets_scripts`, weights of the losses in the
model's configuration.
"""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import parse_flag_from_env  # type: ignore[import-untyped]
from transformers import TrainingArguments

# Arguments, and accelerate's environment variables, that split the model between processes.
_SHARDING = ("fsdp", "fsdp_config", "parallelism_config")
_SHARDING_VARIABLES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")
OBJECTIVES = ("answers", "visual_words")
_TORCHRUN = "Start one process per GPU instead: `torchrun --nproc_per_node=NUM_GPUS ...`."


@dataclass
class VisaTrainingArguments(TrainingArguments):
    """Arguments of [`VisaTrainer`]: those of `transformers.TrainingArguments`, and a few more.

    Changed defaults: AdamW with betas 0.9 and 0.95, learning rate 2e-5 with a cosine, no weight decay, gradient clip
    1.0; draws in order, since their order is random already; all columns kept.

    Args:
        learning_rates (`dict[str, float]` or JSON text, *optional*): regular expression -> learning rate, for
            parameters in whose name it is found, such as `{"mask_decoder|text_hidden_fcs": 1e-4}`. The first
            expression that is found counts; other parameters take `learning_rate`. Names are the model's own, as
            [`trainable_parameters`] lists them, without what PEFT adds. One that is found nowhere is an error.
        pack_conversations (`bool`, defaults to `True`): let the language model read what the conversations of one
            sample begin with, the frames above all, once. The same losses up to rounding (LoRA's dropout draws other
            numbers), faster; without effect on attention other than SDPA and eager, and under ZeRO-3.
        objective (`str`, defaults to `"answers"`): `"answers"` trains the model to answer and to mask;
            `"visual_words"` its visual tower alone to see the words of answers, for trainings from nothing
            ([`VisualWordsTrainer`]).
        visual_words_weight (`float`, defaults to 0.0): weight of the losses of visual words (visual_words.py) beside
            those of answers and masks, for trainings from nothing; they keep visual tokens telling. One process alone.
        pointing_weight (`float`, defaults to 0.0): weight of the loss of where the language model looks while it
            describes what it is about to mask (pointing.py), for trainings from nothing. One process alone.
        num_overlays (`int`, defaults to 4): pictures of the target frame, its true and its predicted masks that each
            evaluation sends to TensorBoard and the other trackers of `report_to`.

    Raises:
        ValueError: for arguments that would cut batches apart (`accelerator_config` with `dispatch_batches` or
            `split_batches`, several GPUs in one process), split the model (FSDP and the like), drop or reorder
            samples, lose checkpoints, or have no effect.
    """

    learning_rates: dict | str | None = field(
        default=None, metadata={"help": "Regular expression -> learning rate of the parameters whose name has it."}
    )
    pack_conversations: bool = field(
        default=True, metadata={"help": "Read the common beginning of a sample's conversations once."}
    )
    objective: str = field(
        default="answers", metadata={"help": "answers, or visual_words: the visual tower alone, before the rest."}
    )
    visual_words_weight: float = field(
        default=0.0, metadata={"help": "Weight of the losses of visual words beside those of answers and masks."}
    )
    pointing_weight: float = field(
        default=0.0, metadata={"help": "Weight of the loss of where the language model looks while it describes."}
    )
    num_overlays: int = field(default=4, metadata={"help": "Pictures that each evaluation logs."})

    # Changed defaults.
    learning_rate: float = 2e-5
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "cosine"
    train_sampling_strategy: str = "sequential"
    remove_unused_columns: bool = False
    # Every parameter that is trained gets a gradient in every micro-batch, also without a [SEG].
    ddp_find_unused_parameters: bool | None = False

    def __post_init__(self) -> None:
        # First: with these, the base class sets up the process for them.
        self._check_sharding()
        super().__post_init__()
        if self.deepspeed and self.use_cpu:
            # On a CPU, transformers leaves DeepSpeed to believe that there is one process, which ZeRO-3 builds on.
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        if self.device.type == "cpu":
            # Pinned memory is a GPU's; asking for it here only warns.
            self.dataloader_pin_memory = False
        self._check_batches()
        self._check_checkpoints()
        self.learning_rates = _checked_learning_rates(self.learning_rates)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"`objective` is {self.objective!r} but must be one of {', '.join(OBJECTIVES)}.")
        for name in ("visual_words_weight", "pointing_weight"):
            self._check_weight(name)
        if self.num_overlays < 0:
            raise ValueError(f"`num_overlays` is {self.num_overlays} but must be at least 0.")

    def _check_weight(self, name: str) -> None:
        """Refuse a weight of losses of visual tokens that is none, or that other arguments leave without effect."""
        weight = getattr(self, name)
        if not weight >= 0:
            raise ValueError(f"`{name}` is {weight} but must be at least 0.")
        if weight and self.objective == "visual_words":
            raise ValueError(
                f"`{name}` is {weight} and `objective` 'visual_words', but then there are no other losses to weigh "
                f"them against. Leave `{name}` out."
            )
        if weight and (self.world_size > 1 or self.deepspeed):
            raise ValueError(
                f"`{name}` is {weight}, with which one process alone trains, without DeepSpeed. Start one, without "
                "`deepspeed`, or set it to 0."
            )

    def _check_sharding(self) -> None:
        """Refuse what splits the model in other ways than DeepSpeed's.

        They wait for ever where a process has no [SEG] and runs other modules than the rest (lockstep.py is for
        ZeRO-3), and save weights in their own layout.
        """
        given = [f"`{name}` is {getattr(self, name)!r}" for name in _SHARDING if getattr(self, name)]
        # Set by `accelerate launch` or its configuration file; accelerate obeys them whatever the arguments say.
        given += [
            f"the environment variable `{name}` is {os.environ[name]!r}"
            for name in _SHARDING_VARIABLES
            if parse_flag_from_env(name)
        ]
        if given:
            raise ValueError(
                f"{' and '.join(given)}, but FSDP, Megatron and tensor parallelism are not supported: only DeepSpeed "
                "may split the model between processes. Leave them out, also of `accelerate launch` and its "
                "configuration file, and take ZeRO-3: `deepspeed` with a ZeRO-3 configuration (in a recipe "
                "`deepspeed: zero3`)."
            )

    def _check_batches(self) -> None:
        """Refuse what would cut a batch apart: its frames are concatenated, its rows do not belong together."""
        config: Any = self.accelerator_config
        for name in ("dispatch_batches", "split_batches"):
            if getattr(config, name):
                raise ValueError(
                    f"`accelerator_config` has `{name}` but a batch of several videos cannot be split by rows. Leave "
                    f"it out. {_TORCHRUN}"
                )
        # Left to itself, accelerate dispatches batches of iterable data sets.
        config.dispatch_batches = False
        if self.n_gpu > 1:
            raise ValueError(
                f"This process sees {self.n_gpu} GPUs and would split each batch between them (nn.DataParallel), but "
                f"a batch of several videos cannot be split by rows. {_TORCHRUN} Or show it one: "
                "`CUDA_VISIBLE_DEVICES=0`."
            )
        if self.remove_unused_columns:
            raise ValueError("`remove_unused_columns` is true but samples are no columns. Leave it out.")
        if self.train_sampling_strategy != "sequential":
            raise ValueError(
                f"`train_sampling_strategy` is {self.train_sampling_strategy!r} but must be 'sequential': the number "
                "of a draw decides what it holds, at random, and resuming counts draws. Leave it out."
            )
        if self.bf16_full_eval or self.fp16_full_eval:
            raise ValueError(
                "`bf16_full_eval` or `fp16_full_eval` is set, which would round the weights that are trained. Leave "
                "it out: evaluation runs in the precision of the training (`bf16`)."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor` is {self.label_smoothing_factor} but VISA's text loss has none. Leave it "
                "out."
            )

    def _check_checkpoints(self) -> None:
        """Refuse what would delete the newest checkpoint at the end of the training."""
        if self.save_total_limit == 1 and self.metric_for_best_model is not None:
            raise ValueError(
                "`save_total_limit` is 1 with `metric_for_best_model`, so the newest checkpoint or the best one would "
                "be deleted. Set it to at least 2."
            )


def _checked_learning_rates(given: Any) -> dict[str, float] | None:
    """Return the learning rates as a dictionary, or say what is wrong with them."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise ValueError(f"`learning_rates` is {given!r} but must be a JSON object: {error}.") from None
    if given is None:
        return None
    if not isinstance(given, dict):
        raise TypeError(f"`learning_rates` is {given!r} but must map regular expressions to numbers.")
    for pattern, rate in given.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not rate >= 0:
            raise ValueError(f"`learning_rates` gives {pattern!r} {rate!r} but a number of at least 0 is needed.")
    return {str(pattern): float(rate) for pattern, rate in given.items()}
