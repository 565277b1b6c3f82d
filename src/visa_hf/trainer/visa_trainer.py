"""The Trainer for VISA: losses over whole optimiser steps, and masks measured on the way.

Three losses (section 3.3 of https://huggingface.co/papers/2407.11325) are computed by the model; here is what to
divide them by, over accumulation and processes. What evaluation measures of masks is in evaluation.py and
clip_evaluation.py, what makes checkpoints whole in whole_checkpoints.py. What is trained is chosen in lora.py, the
order of samples by the data set: its item number n is draw n.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_init
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, unwrap_peft_model

from visa_hf.modeling.losses_visa import IGNORE_INDEX
from visa_hf.modeling.outputs_visa import VisaOutput
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.trainer.clip_evaluation import ClipEvaluation, check_weights_are_whole
from visa_hf.trainer.data_collator import VisaDataCollator
from visa_hf.trainer.evaluation import MaskScore, Shard, ShardCollator, mask_metrics, possible_metrics, score_masks
from visa_hf.trainer.lockstep import LockstepForward, targets_of
from visa_hf.trainer.lora import TOWERS, plain_name, trainable_parameters
from visa_hf.trainer.optimizer import parameter_groups
from visa_hf.trainer.overlays import Overlay, OverlayCallback, draw_overlay, frame_of
from visa_hf.trainer.pointing import check_pointing, pointing_losses
from visa_hf.trainer.training_arguments import VisaTrainingArguments
from visa_hf.trainer.visual_words import (
    frame_masks,
    target_patches,
    token_losses,
    token_shares,
    tower_losses,
    visual_token_states,
)
from visa_hf.trainer.whole_checkpoints import LogBeforeSaveCallback, WholeCheckpointsTrainer

_PARTS = ("text_loss", "bce_loss", "dice_loss")


class VisaTrainer(WholeCheckpointsTrainer):
    """Trains [`VisaForVideoSegmentation`], alone, with DDP (`torchrun`) or with DeepSpeed.

    With `config.loss_reduction` "step", every learnt token and every mask of an optimiser step counts the same,
    whichever micro-batch and process it is in: losses and gradients do not depend on how a batch is cut. With
    "microbatch", each micro-batch's own means are averaged, as published. Logs hold `loss` and its unweighted parts
    `text_loss`, `bce_loss`, `dice_loss`.

    Args:
        model (`nn.Module`): what [`prepare_for_training`] returned.
        args ([`VisaTrainingArguments`]): how to train.
        processing_class ([`VisaProcessor`]): of the model; saved with it.
        train_dataset (map-style `Dataset`, *optional*): its item n is draw n, a `Sample`. It should hold all draws of
            the training (one epoch): a second epoch repeats them.
        eval_dataset (map-style `Dataset` of `Sample`s, or a `dict` of them, *optional*).
        clip_evaluation ([`ClipEvaluation`], *optional*): whole clips that are measured too whenever `eval_dataset`
            (or the first of several) is.
        data_collator (callable, *optional*): samples -> arguments of the model; [`VisaDataCollator`] by default.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        TypeError: if `args` are not [`VisaTrainingArguments`].
        ValueError: if a data set has no items by number, clips are to be measured with ZeRO-3, there will be no such
            metric as `args.metric_for_best_model`, or `args.pointing_weight` does not go with the text model.
    """

    model: nn.Module
    args: VisaTrainingArguments
    processing_class: VisaProcessor
    eval_dataset: Any

    def __init__(
        self,
        model: nn.Module,
        args: VisaTrainingArguments,
        processing_class: VisaProcessor,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        clip_evaluation: ClipEvaluation | None = None,
    ) -> None:
        if not isinstance(args, VisaTrainingArguments):
            raise TypeError(f"`args` is a {type(args).__name__} but must be `VisaTrainingArguments`.")
        sets = [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])]
        if any(isinstance(one, IterableDataset) for one in sets):
            raise ValueError(
                "A data set is iterable but items by number are needed: a sample is found again by its number when "
                "the training is resumed. Give a map-style data set, such as `TrainingSamples`."
            )
        if clip_evaluation is not None:
            check_weights_are_whole()
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or VisaDataCollator(processing_class),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), LogBeforeSaveCallback()],
            optimizers=optimizers,
        )
        base = unwrap_peft_model(self.accelerator.unwrap_model(model))
        config = base.config
        if args.pointing_weight:
            check_pointing(config, args.pointing_weight)
        self.clip_evaluation = clip_evaluation
        self._clip_prefix = "target_" if base.tracker is None else "clip_"
        self._check_best_metric()
        self._overlays = OverlayCallback(self.callback_handler)
        self.add_callback(self._overlays)
        self._is_step_reduction = config.loss_reduction == "step"
        self._seg_token_id = config.seg_token_id
        self._loss_weights = [getattr(config, f"{name}_weight") for name in _PARTS]
        # Towers that are trained need a frame and a [SEG] in every process's batch, or their gradients do not meet.
        is_tower = tuple(f"{tower}." for tower in TOWERS.values())
        trains_tower = any(name.startswith(is_tower) for name in trainable_parameters(base))
        self._is_in_lockstep = is_deepspeed_zero3_enabled() or (trains_tower and args.world_size > 1)
        if self._is_in_lockstep:
            base.forward = LockstepForward(base.forward, processing_class, tuple(self._loss_weights))
        elif trains_tower and not self.is_deepspeed_enabled:
            # First: others may look at gradients.
            self.callback_handler.callbacks.insert(0, IdleGradientsCallback())
        # With "step" the model divides by the counts of the whole step; else transformers averages micro-batches.
        self.loss_is_scaled_for_ga = self._is_step_reduction
        self._num_tokens: Tensor | None = None
        self._num_masks: Tensor | None = None
        self._parts = torch.zeros(len(_PARTS), device=args.device)
        self._num_logged_steps = 0

    # Losses

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Collect the micro-batches of an optimiser step, and count what all processes learn in it."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.zeros(2, dtype=torch.int64, device=device)
        for batch in batches:
            counts += torch.tensor(_count(batch), device=device)
        self._num_tokens, self._num_masks = self.accelerator.reduce(counts, "sum")
        if self._is_in_lockstep:
            batches = self._in_lockstep(batches)
        self._num_logged_steps += 1
        return batches, self._num_tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch, scaled so that the gradients of all of them add up to the step's."""
        is_step = model.training and self._is_step_reduction
        outputs = self._forward(model, inputs, *((self._num_tokens, self._num_masks) if is_step else (None, None)))
        loss = outputs.loss
        if model.training:
            parts = torch.stack([getattr(outputs, name).detach().float() for name in _PARTS]).to(self._parts.device)
            # Sums over micro-batches and processes: of shares of the step, or of means to be averaged.
            num_means = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            self._parts += parts if is_step else parts / num_means
            if is_step:
                # DDP and DeepSpeed average gradients over processes; each has its share of the sum.
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _forward(
        self, model: nn.Module, inputs: dict[str, Any], num_tokens: Tensor | None, num_masks: Tensor | None
    ) -> VisaOutput:
        """Run the model; `num_tokens` and `num_masks` are those of the step, `None` for the micro-batch's own."""
        wants_visual = model.training and (self.args.visual_words_weight > 0 or self.args.pointing_weight > 0)
        # Losses of lockstep.py are made of logits. Under ZeRO-3 all processes must run modules in the same order, but
        # one may have nothing to pack.
        outputs = model(
            **inputs,
            use_cache=False,
            num_items_in_batch=num_tokens,
            num_masks_in_batch=num_masks,
            packs_conversations=self.args.pack_conversations and not is_deepspeed_zero3_enabled(),
            skip_logits=not self._is_in_lockstep,
            **({"output_visual_states": True} if wants_visual else {}),
        )
        if wants_visual and any(map(len, inputs["mask_labels"])):
            outputs.loss = outputs.loss + self._visual_loss(model, inputs, outputs, num_masks)
        return outputs

    def _visual_loss(self, model: nn.Module, inputs: dict[str, Any], outputs: Any, num_masks: Tensor | None) -> Tensor:
        """Weighted sums of the losses of visual words and of pointing, over `num_masks` or the micro-batch's masks."""
        base: Any = unwrap_peft_model(model)
        middle = outputs.middle_hidden_state
        patches = target_patches(outputs.patch_features, inputs["num_frames"])
        masks = frame_masks(self.processing_class, inputs, patches.shape[1])
        shares = token_shares(base.config, patches, masks.shares.to(patches.device), masks.videos)
        total = middle.new_zeros(())
        if self.args.visual_words_weight:
            states = visual_token_states(base, middle, inputs)
            losses = [*tower_losses(base, patches, masks), token_losses(base, shares, states, masks)]
            total = total + self.args.visual_words_weight * torch.cat(losses).sum()
        if self.args.pointing_weight:
            stop_id = self.processing_class.tokenizer.convert_tokens_to_ids(".")
            pointing = pointing_losses(base, middle, inputs, shares, stop_id)
            total = total + self.args.pointing_weight * pointing.sum()
        return total / (max(len(masks.videos), 1) if num_masks is None else num_masks.clamp(min=1))

    def _in_lockstep(self, batches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Tell each micro-batch how many targets the process has that has most; at least one."""
        counts = torch.tensor([targets_of(batch, self._seg_token_id) for batch in batches], device=self.args.device)
        most = self.accelerator.gather(counts[None]).amax(dim=0).clamp(min=1).tolist()
        return [{**batch, "num_targets": count} for batch, count in zip(batches, most, strict=True)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, together with the loss, its parts: means over the steps since the last time."""
        # Every process gets here.
        if "loss" in logs and self._num_logged_steps:
            parts = self.accelerator.reduce(self._parts, "sum") / self._num_logged_steps
            position = list(logs).index("loss") + 1
            items = list(logs.items())
            items[position:position] = list(zip(_PARTS, parts.tolist(), strict=True))
            logs.clear()
            logs.update(items)
            self._parts = torch.zeros_like(self._parts)
            self._num_logged_steps = 0
        super().log(logs, start_time)

    # Optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimiser, with the learning rates of `args.learning_rates`."""
        if self.optimizer is None:
            module: Any = self.model if model is None else model
            decayed = {plain_name(name) for name in self.get_decay_parameter_names(module)}
            learning_rates: Any = self.args.learning_rates
            groups = parameter_groups(trainable_parameters(module), decayed, self.args.weight_decay, learning_rates)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Return the batches that this process evaluates, equally many in all processes."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        elif eval_dataset is None:
            eval_dataset = self.eval_dataset
        if eval_dataset is None or len(eval_dataset) == 0:
            raise ValueError("There is nothing to evaluate. Give an `eval_dataset` that has samples.")
        num_workers = self.args.dataloader_num_workers
        return DataLoader(
            Shard(eval_dataset, self.args.process_index, self.args.world_size),
            batch_size=self.args.eval_batch_size,
            collate_fn=ShardCollator(self.data_collator),
            num_workers=num_workers,
            # Of its own: the training's random numbers stay where they are.
            generator=torch.Generator(),
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor if num_workers else None,
        )

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """Return the batches of `test_dataset`, as for an evaluation."""
        return self.get_eval_dataloader(test_dataset)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure losses and, on the target frames with the true answers given, J, F, A and R of each mask.

        Returns:
            `EvalLoopOutput` whose metrics are, after the prefix, `loss`, `text_loss`, `bce_loss`, `dice_loss` (means
            over all learnt tokens and all masks), `num_masks`, and those of `mask_metrics`; and those of
            [`ClipEvaluation`], after "clip_", or "target_" for a model without a tracker. But for the losses, they are
            the same to the last digit for any number of processes that find the same masks. There are no predictions.
        """
        model = self._model_for_evaluation()
        # Text, BCE and DICE, summed over what they are means of; then the numbers of tokens and of masks.
        totals = np.zeros(5)
        scores: list[MaskScore] = []
        num_drawn = 0
        for batch, facts in dataloader:
            if self._is_in_lockstep:
                (batch,) = self._in_lockstep([batch])
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self._forward(model, inputs, None, None)
            if facts is None:
                continue
            num_tokens, num_masks = _count(inputs)
            text, bce, dice = (float(getattr(outputs, name)) for name in _PARTS)
            totals += [text * num_tokens, bce * num_masks, dice * num_masks, num_tokens, num_masks]
            mask_labels: Any = inputs["mask_labels"]
            scores += score_masks(outputs.mask_logits or [], mask_labels, facts)
            if self.is_world_process_zero():
                num_drawn += self._draw_overlays(inputs, outputs, metric_key_prefix, num_drawn)
        samples = dataloader.dataset.samples  # type: ignore[attr-defined]
        metrics = self._losses(torch.tensor(totals, device=self.args.device)) | mask_metrics(gather_object(scores))
        if self.clip_evaluation is not None and samples is self._first_eval_dataset():
            metrics |= self._clip_metrics(self.clip_evaluation)
        return EvalLoopOutput(
            predictions=None,  # type: ignore[arg-type]
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(samples),
        )

    def _model_for_evaluation(self) -> nn.Module:
        """Return the model in evaluation mode: the plain one, or DeepSpeed's, made now if nothing was trained yet."""
        if self.is_deepspeed_enabled and self.deepspeed is None:
            deepspeed_init(self, num_training_steps=0, inference=True)
            self.model_wrapped = self.deepspeed = self.accelerator.prepare(self.model)
        elif not self.accelerator._models and not self.is_deepspeed_enabled:
            self.model = self.model_wrapped = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model: Any = self.deepspeed if self.is_deepspeed_enabled else self.model
        model.eval()  # DeepSpeed's returns nothing
        return model

    def _losses(self, totals: Tensor) -> dict[str, float]:
        """Divide the sums of all processes: see `evaluation_loop`."""
        *sums, num_tokens, num_masks = self.accelerator.reduce(totals, "sum").tolist()
        counts = [num_tokens, num_masks, num_masks]
        parts = [value / max(count, 1) for value, count in zip(sums, counts, strict=True)]
        loss = sum(weight * part for weight, part in zip(self._loss_weights, parts, strict=True))
        return {"loss": loss, **dict(zip(_PARTS, parts, strict=True)), "num_masks": int(num_masks)}

    def _first_eval_dataset(self) -> Any:
        """The data set of an evaluation, or the first one of several."""
        is_several = isinstance(self.eval_dataset, dict)
        return next(iter(self.eval_dataset.values())) if is_several else self.eval_dataset

    def _clip_metrics(self, clips: ClipEvaluation) -> dict[str, float]:
        """Measure whole clips, each process its share of the videos."""
        base = unwrap_peft_model(self.accelerator.unwrap_model(self.model))
        rank, world_size = self.args.process_index, self.args.world_size
        # Outside of the `forward` that accelerate has wrapped: trained weights may be of another type than the others.
        with self.accelerator.autocast():
            scores = clips.score(base, self.processing_class, rank, world_size)
        return {f"{self._clip_prefix}{name}": value for name, value in clips.metrics(gather_object(scores)).items()}

    def _check_best_metric(self) -> None:
        """Refuse a best metric that no evaluation can have: else the first one, perhaps hours later, ends in that."""
        given = self.args.metric_for_best_model
        # Names of several sets' metrics begin with the set's.
        if given is None or self.args.eval_strategy == "no" or isinstance(self.eval_dataset, dict):
            return
        name = given.removeprefix("eval_")
        if name in {"loss", *_PARTS} | possible_metrics():
            return
        if self.clip_evaluation is not None and name.startswith(self._clip_prefix):
            return
        clips = f", or one that begins with `{self._clip_prefix}`" if self.clip_evaluation is not None else ""
        raise ValueError(
            f"`metric_for_best_model` is {given!r}, but evaluations of this training will not have it. Take `loss`, "
            f"`JF`, `overall_JF`{clips}."
        )

    def _draw_overlays(self, inputs: dict[str, Any], outputs: VisaOutput, prefix: str, num_drawn: int) -> int:
        """Draw the first conversations that have masks, until there are enough; return how many."""
        overlays: list[Overlay] = []
        for row, labels in enumerate(inputs["mask_labels"]):
            if len(labels) == 0 or num_drawn + len(overlays) >= self.args.num_overlays:
                continue
            video = int(inputs["conversation_to_video"][row])
            frame = frame_of(
                inputs["sam_pixel_values"][video],
                self.processing_class.sam_image_processor,
                inputs["reshaped_input_sizes"][video].tolist(),
                inputs["original_sizes"][video].tolist(),
            )
            masks = (outputs.mask_logits or [])[row] > 0
            name = f"{prefix}/overlay_{num_drawn + len(overlays)}"
            overlays.append(draw_overlay(name, frame, (labels > 0).cpu().numpy(), masks.cpu().numpy()))
        self._overlays.pending += overlays
        return len(overlays)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint; see [`WholeCheckpointsTrainer`]."""
        self._parts = torch.zeros_like(self._parts)
        self._num_logged_steps = 0
        return super().train(resume_from_checkpoint, **kwargs)


class IdleGradientsCallback(TrainerCallback):
    """Gives a gradient of 0 to what no batch of an optimiser step reached: towers, in steps without a frame or [SEG].

    Several processes give them one (lockstep.py), and an optimiser with momentum moves weights by 0, but not by none.
    """

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Fill in what is missing."""
        assert model is not None
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _count(batch: dict[str, Any]) -> tuple[int, int]:
    """Learnt tokens and masks of a micro-batch, counted as the losses count them."""
    return int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()), sum(map(len, batch["mask_labels"]))
