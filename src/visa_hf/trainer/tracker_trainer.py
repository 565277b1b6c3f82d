"""The Trainer of trackers: XMem's losses on whole clips, and J and F of videos that are tracked as at inference."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from visa_hf.modeling.modeling_xmem import XMemModel
from visa_hf.trainer.optimizer import parameter_groups
from visa_hf.trainer.tracker_forward import hard_share_at, track_clips, tracking_losses
from visa_hf.trainer.tracker_samples import ClipCollator, TrackedVideo
from visa_hf.trainer.tracker_scores import score_tracker
from visa_hf.trainer.training_arguments import VisaTrainingArguments
from visa_hf.trainer.whole_checkpoints import LogBeforeSaveCallback, WholeCheckpointsTrainer

_PARTS = ("ce_loss", "dice_loss")


@dataclass(frozen=True)
class TrackerLosses:
    """Weights of the losses, and which pixels count. The defaults are about XMem's.

    Attributes:
        ce_weight, dice_weight (`float`): of cross-entropy and dice loss.
        hard_share (`float`, in (0, 1]): share of pixels, those of the highest cross-entropy, that counts in the end.
        hard_start, hard_end (`float`, in [0, 1]): shares of the training at which the share of pixels begins to fall
            from 1, and has fallen.
    """

    ce_weight: float = 1.0
    dice_weight: float = 1.0
    hard_share: float = 0.15
    hard_start: float = 0.15
    hard_end: float = 0.5

    def __post_init__(self) -> None:
        for name in ("ce_weight", "dice_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)} but must be at least 0.")
        if not 0 < self.hard_share <= 1:
            raise ValueError(f"`hard_share` is {self.hard_share} but must lie in (0, 1].")
        if not 0 <= self.hard_start <= self.hard_end <= 1:
            raise ValueError(
                f"`hard_start` is {self.hard_start} and `hard_end` {self.hard_end}, but 0 <= hard_start <= hard_end "
                "<= 1 is needed."
            )


class TrackedVideos(Dataset[TrackedVideo]):
    """Whole videos, by number, of a source of clips.

    Args:
        source ([`ClipSource`]): where they are.
        numbers (sequence of `int`): which of its videos.
    """

    def __init__(self, source: Any, numbers: Sequence[int]) -> None:
        self.source, self.numbers = source, list(numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> TrackedVideo:
        return self.source.video(self.numbers[position])


class XMemTrainer(WholeCheckpointsTrainer):
    """Trains an [`XMemModel`] on clips.

    Logs hold `loss` and its unweighted parts `ce_loss` and `dice_loss`. An evaluation tracks whole videos from their
    true first masks and logs `J`, `F`, `JF` (means over objects, in [0, 1]) and `num_objects`.

    Args:
        model ([`XMemModel`]): what is trained. Its BatchNorm is too if `config.train_batch_norm` is set.
        args ([`VisaTrainingArguments`]): how to train.
        losses ([`TrackerLosses`]): weights of the losses.
        train_dataset (map-style `Dataset`, *optional*): its item n is draw n, a [`Clip`]. It should hold all draws.
        eval_dataset (map-style `Dataset` of [`TrackedVideo`], *optional*).
    """

    args: VisaTrainingArguments

    def __init__(
        self,
        model: XMemModel,
        args: VisaTrainingArguments,
        losses: TrackerLosses | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
    ) -> None:
        # XMem itself has no `forward`; those that wrap models (DDP, autocast) want one.
        model.forward = partial(track_clips, model)
        # Where all frames between the first and the last are memorised, one of the two sensory updates has no part.
        args.ddp_find_unused_parameters = True
        super().__init__(
            model=model,
            args=args,
            data_collator=ClipCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=[LogBeforeSaveCallback()],
        )
        self._tracker = model
        self._losses = losses or TrackerLosses()
        self._parts = torch.zeros(len(_PARTS), device=args.device)
        self._num_parts = 0

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a micro-batch."""
        labels, is_object = inputs["labels"], inputs["is_object"]
        first_masks = F.one_hot(labels[:, 0], 1 + is_object.shape[1])[..., 1:].movedim(-1, 1).float()
        logits = model(inputs["frames"], first_masks, is_object, inputs["memory_frames"])
        progress = self.state.global_step / max(self.state.max_steps, 1)
        options = self._losses
        hard_share = hard_share_at(progress, options.hard_start, options.hard_end, options.hard_share)
        ce, dice = tracking_losses(logits, labels[:, 1:], is_object, hard_share)
        if model.training:
            self._parts += torch.stack([ce.detach(), dice.detach()])
            self._num_parts += 1
        loss = options.ce_weight * ce + options.dice_weight * dice
        return (loss, logits) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, together with the loss, its parts: means over the steps since the last time."""
        # Every process gets here.
        if "loss" in logs and self._num_parts:
            parts: Any = self.accelerator.reduce(self._parts, "mean")
            logs.update(zip(_PARTS, (parts / self._num_parts).tolist(), strict=True))
            self._parts = torch.zeros_like(self._parts)
            self._num_parts = 0
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimiser, with the learning rates of `args.learning_rates`."""
        if self.optimizer is None:
            module = self._tracker
            parameters = {name: one for name, one in module.named_parameters() if one.requires_grad}
            decayed = set(self.get_decay_parameter_names(module))
            learning_rates: Any = self.args.learning_rates
            groups = parameter_groups(parameters, decayed, self.args.weight_decay, learning_rates)
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, module)
            self.optimizer = optimizer_class(groups, **arguments)
        return self.optimizer

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Track the videos of a data set, each process its share; see the class.

        Raises:
            ValueError: there is no data set.
        """
        videos: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if videos is None or len(videos) == 0:
            raise ValueError("There is nothing to evaluate. Give an `eval_dataset` that has videos.")
        start = time.monotonic()
        share = range(self.args.process_index, len(videos), self.args.world_size)
        scores = score_tracker(self._tracker, (videos[position] for position in share))
        sums = torch.tensor(
            [sum(score.J for score in scores), sum(score.F for score in scores), len(scores)],
            dtype=torch.float64,
            device=self.args.device,
        )
        total_j, total_f, count = self.accelerator.reduce(sums, "sum").tolist()
        metrics = {"num_objects": int(count), "runtime": round(time.monotonic() - start, 2)}
        if count:
            j, f = total_j / count, total_f / count
            metrics |= {"J": j, "F": f, "JF": (j + f) / 2}
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(named)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named
