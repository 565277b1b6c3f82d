"""How sure a mask is: one number for each object and frame, made of the probabilities that the mask was made of.

Our own work: VISA publishes no score of a frame. What SAM says of its masks, an estimate of their IoU, is another
number, which exists on target frames only.
"""

from torch import Tensor


def mask_scores(masks: Tensor, probs: Tensor) -> Tensor:
    """Return the mean probability of the pixels of each mask.

    Args:
        masks (`torch.Tensor` of shape `(K, H, W)`, bool): one mask per object; `K` may be 0.
        probs (`torch.Tensor` of shape `(K, H, W)`, float32, in [0, 1]): probability that a pixel belongs to the
            object.

    Returns:
        `torch.Tensor` of shape `(K,)`, float32, in [0, 1]; 0 for a mask without a pixel.
    """
    num_pixels = masks.flatten(1).sum(dim=1)
    total = (probs * masks).flatten(1).sum(dim=1)
    # Rounding must not lead above 1.
    return (total / num_pixels.clamp(min=1)).clamp(max=1)
