"""Pictures of an evaluation: the target frame with its true and its predicted masks, side by side.

Sent to the trackers that know pictures (TensorBoard, Weights & Biases, Trackio) and saved as PNG files for the others.
Drawing is `visa_hf.rendering`'s.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import TrainerCallback

from visa_hf.rendering import overlay_masks


@dataclass(frozen=True)
class Overlay:
    """One picture.

    Args:
        name (`str`): under which it is logged, such as "eval/overlay_0".
        picture (`np.ndarray` of shape `(H, 2 * W, 3)`, uint8): true masks on the left, predicted ones on the right.
    """

    name: str
    picture: np.ndarray


def draw_overlay(name: str, frame: np.ndarray, true_masks: np.ndarray, masks: np.ndarray) -> Overlay:
    """Draw the masks of one conversation.

    Args:
        name (`str`): of the picture.
        frame (`np.ndarray` of shape `(H, W, 3)`, uint8): the target frame.
        true_masks, masks (`np.ndarray` of shape `(K, H, W)`, bool).
    """
    return Overlay(name, np.concatenate([overlay_masks(frame, true_masks), overlay_masks(frame, masks)], axis=1))


def frame_of(sam_pixels: Tensor, image_processor: Any, reshaped: Sequence[int], original: Sequence[int]) -> np.ndarray:
    """Turn what SAM saw back into a frame: about the original, at SAM's resolution at most.

    Args:
        sam_pixels (`torch.Tensor` of shape `(3, P, P)`): normalised frame inside the padded square.
        image_processor (`SamImageProcessorPil`): knows mean and standard deviation.
        reshaped, original: (H, W) of the frame inside the square, and of the frame itself.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8.
    """
    height, width = (int(side) for side in reshaped)
    pixels = sam_pixels[:, :height, :width].float().cpu().permute(1, 2, 0).numpy()
    colors = pixels * np.asarray(image_processor.image_std) + np.asarray(image_processor.image_mean)
    image = Image.fromarray((colors * 255).round().clip(0, 255).astype(np.uint8))
    return np.asarray(image.resize((int(original[1]), int(original[0])), Image.Resampling.BILINEAR))


class OverlayCallback(TrainerCallback):
    """Sends the pictures that an evaluation has drawn to all trackers, once its numbers are logged.

    `pending` holds them until then; `handler` is the trainer's callback handler, which knows the trackers.
    """

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.pending: list[Overlay] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send what is pending; only the main process has drawn."""
        overlays, self.pending = self.pending, []
        if not overlays:
            return
        trackers = {type(callback).__name__: callback for callback in self.handler.callbacks}
        has_pictures = False
        if "TensorBoardCallback" in trackers and trackers["TensorBoardCallback"].tb_writer is not None:
            writer, has_pictures = trackers["TensorBoardCallback"].tb_writer, True
            for overlay in overlays:
                writer.add_image(overlay.name, overlay.picture, state.global_step, dataformats="HWC")
            writer.flush()
        if "WandbCallback" in trackers:
            import wandb  # type: ignore[import-not-found, unused-ignore]

            has_pictures = True
            wandb.log({overlay.name: wandb.Image(overlay.picture) for overlay in overlays})
        if "TrackioCallback" in trackers:
            import trackio  # type: ignore[import-not-found, unused-ignore]

            has_pictures = True
            trackio.log({overlay.name: trackio.Image(overlay.picture) for overlay in overlays})
        others = set(args.report_to) - {"tensorboard", "wandb", "trackio", "none"}
        if others or not has_pictures:
            save_overlays(overlays, Path(args.output_dir) / "overlays" / f"step-{state.global_step}")


def save_overlays(overlays: Sequence[Overlay], folder: str | os.PathLike[str]) -> None:
    """Write each picture as a PNG file into `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for overlay in overlays:
        Image.fromarray(overlay.picture).save(Path(folder) / f"{overlay.name.replace('/', '_')}.png")
