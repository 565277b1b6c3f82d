"""Training samples -> the tensors of `VisaForVideoSegmentation.forward`.

Frames of all samples are concatenated and conversations say which of them they are about, so a batch is no set of
equally long rows: nothing may cut it apart again (training_arguments.py sees to that). Samples are drawn in
`visa_hf.datasets_scripts.samples`; pixels, prompts and labels are made by the processor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from visa_hf.modeling.processing_visa import VisaProcessor

if TYPE_CHECKING:
    from visa_hf.datasets_scripts.samples import Sample


@dataclass(frozen=True)
class VisaDataCollator:
    """Callable for a DataLoader; it travels to worker processes.

    Args:
        processor ([`VisaProcessor`]): of the model that is trained.
        max_length (`int`, *optional*): longest conversation in tokens; by default the model's context.
    """

    processor: VisaProcessor
    max_length: int | None = None

    def __call__(self, samples: "Sequence[Sample]") -> dict[str, Tensor | list[Tensor]]:
        """Make one batch of B' samples, N conversations in all.

        Args:
            samples (list of `Sample`): as [`TrainingSamples`] draws them.

        Returns:
            `dict` with `input_ids`, `attention_mask`, `labels` `(N, S)`; `pixel_values` `(F, 3, h, w)`, `num_frames`
            `(B,)`; `conversation_to_video` `(N,)`, -1 for text alone; `sam_pixel_values` `(B, 3, s, s)`,
            `original_sizes`, `reshaped_input_sizes` `(B, 2)`, 0 without a target; and `mask_labels`, a list of N
            float32 tensors `(K_n, H, W)`. B counts the samples that have frames.

        Raises:
            ValueError: if there is no sample, or one does not fit together; its source and draw are named.
        """
        if not samples:
            raise ValueError("There is no sample to make a batch of.")
        shown = [sample for sample in samples if _has_frames(sample)]
        video_of = {id(sample): video for video, sample in enumerate(shown)}
        pairs = [(sample, conversation) for sample in samples for conversation in sample.conversations]
        arguments: dict[str, Any] = {
            name: [getattr(conversation, name) for _, conversation in pairs]
            for name in ("query", "answer", "answer_template", "template", "style", "history", "masks")
        }
        if shown:
            arguments["target_frame"] = [sample.target_frame for sample in shown]
            arguments["reference_frames"] = [list(sample.reference_frames) for sample in shown]
        try:
            batch = self.processor(
                **arguments,
                conversation_to_video=[video_of.get(id(sample), -1) for sample, _ in pairs],
                # The target of a sample to which nothing belongs is taken from another video.
                mixed_sizes=any(sample.is_foreign_target for sample in samples),
                max_length=self.max_length,
            )
        except (ValueError, TypeError) as error:
            names = ", ".join(f"draw {sample.draw} of `{sample.source}` ({sample.video_id})" for sample in samples)
            raise ValueError(f"A batch of {names} cannot be made: {error}") from error
        return dict(batch)


def _has_frames(sample: "Sample") -> bool:
    return sample.target_frame is not None or len(sample.reference_frames) > 0
