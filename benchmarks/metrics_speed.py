"""J and F of a clip: `visa_hf.evaluation` against the classical DAVIS way, values compared bit by bit.

Both sides run in this process on one core, turn by turn, on the same bool masks; the classical way (full-frame
boundary maps, dilation with a disk) is the transcription in `tests/evaluation/davis_reference.py`, with OpenCV's
dilation where OpenCV is installed and with plain numpy's. Prints a table, the ratio of the medians, and how long J, F,
A and R take from run-length masks.

    OMP_NUM_THREADS=1 python benchmarks/metrics_speed.py [--frames 60] [--size 480 854] [--rounds 5]
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.evaluation import davis_reference as davis  # noqa: E402
from visa_hf.evaluation import score_clip  # noqa: E402
from visa_hf.rle import encode_masks  # noqa: E402


def wobbly_blob(num_frames: int, size: tuple[int, int], scale: float, seed: int) -> np.ndarray:
    """Return a moving object `(T, H, W)`, bool: an ellipse whose radius wavers, `scale` of the frame's height high."""
    height, width = size
    rng = np.random.default_rng(seed)
    waves = [(n, rng.normal(0, 0.3 / n), rng.uniform(0, 2 * math.pi)) for n in range(2, 24)]
    rows, columns = np.mgrid[:height, :width]
    masks = np.zeros((num_frames, height, width), dtype=bool)
    for position in range(num_frames):
        x = width * (0.3 + 0.4 * position / num_frames)
        angle = np.arctan2(rows - height / 2, columns - x)
        wobble = sum(strength * np.sin(n * angle + phase + 0.1 * position) for n, strength, phase in waves)
        distance = np.hypot(rows - height / 2, (columns - x) / 1.3)
        masks[position] = distance < scale * height / 2 * (1 + wobble)
    return masks


def cases(num_frames: int, size: tuple[int, int]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return pairs of clips, predicted and true."""
    rng = np.random.default_rng(0)
    coarse = rng.random((num_frames, size[0] // 16 + 1, size[1] // 16 + 1)) < 0.5
    blocks = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, : size[0], : size[1]]
    true = {scale: wobbly_blob(num_frames, size, scale, seed=1) for scale in (0.2, 0.5)}
    pairs = {f"object {scale:.0%} high": (np.roll(mask, 5, axis=2), mask) for scale, mask in true.items()}
    pairs["blocks of 16 all over"] = (blocks, np.roll(blocks, 3, axis=2))
    pairs["noise, every pixel"] = tuple(rng.random((2, num_frames, *size)) < 0.5)
    return pairs


def classical(dilate: Callable[[np.ndarray, int], np.ndarray], pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    return np.array(
        [
            (davis.classical_region_similarity(p, t), davis.classical_boundary_f(p, t, dilate=dilate))
            for p, t in zip(pred, true, strict=True)
        ]
    )


def ours(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    per_frame = score_clip(pred, true).per_frame
    return np.stack([per_frame["J"], per_frame["F"]], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--size", type=int, nargs=2, default=(480, 854), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    # The plain numpy dilation is slow: it is timed on every tenth frame and never decides the ratio where OpenCV is.
    ways: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], int]] = {"visa_hf": (ours, 1)}
    if davis.HAS_OPENCV:
        import cv2

        cv2.setNumThreads(1)
        ways["classical, OpenCV"] = (lambda p, t: classical(davis.dilate_with_opencv, p, t), 1)
    ways["classical, numpy"] = (lambda p, t: classical(davis.dilate_with_numpy, p, t), 10)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    print(
        f"J and F, {args.frames} frames of {args.size[0]} x {args.size[1]}, median of {args.rounds} rounds, one core"
    )
    for name, (pred, true) in cases(args.frames, tuple(args.size)).items():
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        expected = ours(pred, true)
        for _ in range(args.rounds):
            for way, (compute, stride) in ways.items():
                start = time.perf_counter()
                values = compute(pred[::stride], true[::stride])
                seconds[way].append((time.perf_counter() - start) / len(values))
                if not np.array_equal(values, expected[::stride]):
                    raise SystemExit(f"{name}: {way} gives other values")
        base = statistics.median(seconds["visa_hf"])
        start = time.perf_counter()
        rles = [encode_masks(list(masks)) for masks in (pred, true)]
        start = time.perf_counter()
        score_clip(rles[0], rles[1], rles[1])
        rle_seconds = (time.perf_counter() - start) / args.frames
        print(f"\n{name}: identical values, mean J {expected[:, 0].mean():.4f}, mean F {expected[:, 1].mean():.4f}")
        for way, times in seconds.items():
            median = statistics.median(times)
            print(f"  {way:<20} {1e3 * median:8.3f} ms a frame   {median / base:6.1f} x")
        print(f"  J, F, A, R from RLE  {1e3 * rle_seconds:8.3f} ms a frame (decoding three masks included)")


if __name__ == "__main__":
    main()
