"""The boundary measure of DAVIS the classical way, as the plain version that `visa_hf.evaluation.metrics` must equal.

Own transcription of the definition (Perazzi et al., CVPR 2016, section 5; Martin et al., PAMI 2004): full-frame
boundary maps, each dilated with a disk, one frame at a time. `dilate` is the only choice: OpenCV where it is
installed, as the usual tools do it, or plain numpy.
"""

import importlib.util
import math
from collections.abc import Callable

import numpy as np

HAS_OPENCV = importlib.util.find_spec("cv2") is not None


def classical_region_similarity(pred: np.ndarray, true: np.ndarray) -> float:
    """Return J of one frame from two masks of shape `(H, W)`, bool."""
    intersection, union = np.sum(pred & true), np.sum(pred | true)
    return 1.0 if union == 0 else float(intersection / union)


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Return where the right, lower or lower right neighbour differs, for a mask of shape `(H, W)`, bool."""
    right, below, diagonal = np.zeros_like(mask), np.zeros_like(mask), np.zeros_like(mask)
    right[:, :-1] = mask[:, 1:]
    below[:-1, :] = mask[1:, :]
    diagonal[:-1, :-1] = mask[1:, 1:]
    boundary = (mask ^ right) | (mask ^ below) | (mask ^ diagonal)
    boundary[-1, :] = mask[-1, :] ^ right[-1, :]
    boundary[:, -1] = mask[:, -1] ^ below[:, -1]
    boundary[-1, -1] = False
    return boundary


def disk(radius: int) -> np.ndarray:
    """Return the disk of that radius, `(2 * radius + 1, 2 * radius + 1)`, uint8."""
    offsets = np.arange(-radius, radius + 1)
    return (offsets[:, None] ** 2 + offsets[None, :] ** 2 <= radius**2).astype(np.uint8)


def dilate_with_numpy(boundary: np.ndarray, radius: int) -> np.ndarray:
    """Dilate a map of shape `(H, W)`, bool: every boundary pixel sets the disk around it."""
    height, width = boundary.shape
    padded = np.zeros((height + 2 * radius, width + 2 * radius), dtype=bool)
    rows, columns = np.nonzero(boundary)
    for row_offset, column_offset in np.argwhere(disk(radius)):
        padded[rows + row_offset, columns + column_offset] = True
    return padded[radius : radius + height, radius : radius + width]


def dilate_with_opencv(boundary: np.ndarray, radius: int) -> np.ndarray:
    """Dilate a map of shape `(H, W)`, bool, with OpenCV."""
    import cv2

    return cv2.dilate(boundary.astype(np.uint8), disk(radius)).astype(bool)


def classical_boundary_f(
    pred: np.ndarray,
    true: np.ndarray,
    bound_th: float = 0.008,
    dilate: Callable[[np.ndarray, int], np.ndarray] = dilate_with_numpy,
) -> float:
    """Return F of one frame from two masks of shape `(H, W)`, bool."""
    radius = math.ceil(bound_th * np.linalg.norm(pred.shape)) if bound_th < 1 else int(bound_th)
    pred_boundary, true_boundary = boundary_map(pred), boundary_map(true)
    pred_matched = pred_boundary & dilate(true_boundary, radius)
    true_matched = true_boundary & dilate(pred_boundary, radius)
    num_pred, num_true = int(pred_boundary.sum()), int(true_boundary.sum())
    if num_pred == 0 and num_true == 0:
        return 1.0
    if num_pred == 0 or num_true == 0:
        return 0.0
    precision, recall = pred_matched.sum() / num_pred, true_matched.sum() / num_true
    return 0.0 if precision + recall == 0 else float(2 * precision * recall / (precision + recall))
