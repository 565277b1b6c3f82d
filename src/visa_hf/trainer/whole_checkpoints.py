"""A part of trainers: checkpoints that are whole or do not count, and a training that goes on where it was stopped."""

import os
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from visa_hf.trainer.checkpoints import (
    clear_checkpoint,
    find_last_checkpoint,
    mark_complete,
    require_complete,
    rotate_checkpoints,
)


class WholeCheckpointsTrainer(Trainer):
    """`transformers.Trainer` whose checkpoints survive a kill at any moment; see checkpoints.py."""

    @property
    def _output_dir(self) -> str:
        return str(self.args.output_dir)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Resumed, the run goes on as if it had never stopped: same samples, same random numbers.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True` takes the newest checkpoint of `output_dir`
                that was written to its end; a path names one.
            kwargs: as in `transformers.Trainer.train`.

        Raises:
            ValueError: if there is no whole checkpoint to resume from, or the folder holds those of another run.
        """
        if isinstance(resume_from_checkpoint, str):
            require_complete(resume_from_checkpoint)
        last = find_last_checkpoint(self._output_dir)
        if resume_from_checkpoint is True:
            if last is None:
                raise ValueError(
                    f"`{self._output_dir}` holds no checkpoint that was written to its end. Start from the "
                    "beginning: leave `resume_from_checkpoint` out."
                )
            resume_from_checkpoint = last
        elif not resume_from_checkpoint and last is not None and not self.state.global_step:
            raise ValueError(
                f"`{self._output_dir}` holds `{os.path.basename(last)}` of an earlier run. Resume it "
                "(`resume_from_checkpoint=True`), or give another `output_dir`."
            )
        return super().train(resume_from_checkpoint, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, then its marker, and only then delete older ones."""
        folder = os.path.join(self._output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            clear_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder)
            rotate_checkpoints(self._output_dir, limit, self.state.best_model_checkpoint)


class LogBeforeSaveCallback(TrainerCallback):
    """Logs at every checkpoint, so that no mean over steps reaches across one: a resumed run logs the same."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for a log where a checkpoint is due."""
        control.should_log = control.should_log or control.should_save
        return control

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> TrainerControl:
        """Ask for a log where a checkpoint is due."""
        return self.on_step_end(args, state, control)
