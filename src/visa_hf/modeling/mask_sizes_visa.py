"""Mask logits at SAM's own size -> mask logits at the size of the frame.

The reverse of SAM's input transform (SAM, https://huggingface.co/papers/2304.02643, `postprocess_masks`): enlarge to
the padded square, cut the padding off, resize to the frame. Used by the model and by the processor; thresholds are
theirs.
"""

from torch import Tensor
from torch.nn import functional as F


def upscale_mask_logits(
    low_res_mask_logits: Tensor,
    padded_size: int,
    reshaped_size: tuple[int, int],
    original_size: tuple[int, int],
) -> Tensor:
    """Return mask logits at the size of the frame, from those of SAM's decoder.

    Both resizings are bilinear between pixel centres (`align_corners=False`) and computed in float32.

    Args:
        low_res_mask_logits (`torch.Tensor` of shape `(K, h, w)`): logits over the padded square, one mask per object;
            `K` may be 0.
        padded_size (`int`): side in pixels of the square that SAM sees.
        reshaped_size (`tuple[int, int]`): (H', W') in pixels of the resized frame, at the upper left of the square.
        original_size (`tuple[int, int]`): (H, W) in pixels of the frame.

    Returns:
        `torch.Tensor` of shape `(K, H, W)`, float32, any real values: a pixel belongs to the object above 0.

    Raises:
        ValueError: if the resized frame does not lie inside the square, or a size is below one pixel and there is a
            mask to make.
    """
    height, width = (int(side) for side in original_size)
    if low_res_mask_logits.shape[0] == 0:
        # A text-only conversation has no frame (sizes 0) and no mask; `interpolate` refuses such sizes.
        return low_res_mask_logits.new_zeros((0, height, width)).float()
    reshaped_height, reshaped_width = (int(side) for side in reshaped_size)
    if not (1 <= reshaped_height <= padded_size and 1 <= reshaped_width <= padded_size) or min(height, width) < 1:
        raise ValueError(
            f"`reshaped_size` {(reshaped_height, reshaped_width)} and `original_size` {(height, width)} do not fit "
            f"`padded_size` {padded_size}: 1 to {padded_size} pixels, and at least 1, are needed for a mask. Give the "
            "sizes that the processor returned with the frame."
        )
    square = F.interpolate(
        low_res_mask_logits.float()[:, None], (padded_size, padded_size), mode="bilinear", align_corners=False
    )
    frame = square[..., :reshaped_height, :reshaped_width]
    return F.interpolate(frame, (height, width), mode="bilinear", align_corners=False)[:, 0]  # (K, H, W)
