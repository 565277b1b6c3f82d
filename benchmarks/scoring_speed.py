"""A scoring run of the size of ReVOS valid: seconds and peak memory, in one process (0 workers) and in several.

Makes videos of moving blobs (about 9,000 expressions of 60 frames, 480 x 854, in 420 videos; objects come from a small
library of clips), writes true masks as prepared rows and predictions as `predictions.jsonl`, and scores them in fresh
processes. Prints a table (CPU seconds: of all processes, with their start); the figures of all runs must be the same
to the last digit.

    OMP_NUM_THREADS=1 python benchmarks/scoring_speed.py [--fraction 0.05] [--workers 0 2]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.metrics_speed import wobbly_blob  # noqa: E402
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet  # noqa: E402
from visa_hf.evaluation.predictions import open_predictions  # noqa: E402
from visa_hf.evaluation.score import score_predictions  # noqa: E402
from visa_hf.rle import encode_masks  # noqa: E402

NUM_VIDEOS, EXPRESSIONS_PER_VIDEO, OBJECTS_PER_VIDEO = 420, 22, 4
SIZE = (480, 854)
LIBRARY = 12


def library(num_frames: int) -> tuple[list, list, list]:
    """Clips as run lengths: true, predicted (a few pixels off), and the union of the first four true ones."""
    clips = [wobbly_blob(num_frames, SIZE, 0.15 + 0.06 * number, seed=number) for number in range(LIBRARY)]
    clips = [np.roll(clip, 37 * number, axis=1) for number, clip in enumerate(clips)]
    return (
        [encode_masks(clip) for clip in clips],
        [encode_masks(np.roll(clip, 4, axis=2)) for clip in clips],
        encode_masks(np.logical_or.reduce(clips[:OBJECTS_PER_VIDEO])),
    )


def make(folder: Path, num_videos: int, num_frames: int) -> None:
    """Write rows and predictions to `folder`."""
    import datasets

    datasets.disable_progress_bars()
    from visa_hf.datasets_scripts.features import EXPRESSION_FEATURES, MASK_FEATURES, VIDEO_FEATURES

    true, predicted, foreground = library(num_frames)
    names = [f"{number:05d}.jpg" for number in range(num_frames)]

    def expressions() -> Iterator[dict[str, Any]]:
        for video in range(num_videos):
            for number in range(EXPRESSIONS_PER_VIDEO):
                objects = [number % OBJECTS_PER_VIDEO] if number % 5 else [0, 1]
                type_id = 2 if number == 0 else number % 2
                yield {
                    "dataset": "revos",
                    "video_id": f"v{video}",
                    "expression_id": str(number),
                    "expression": f"object number {number}",
                    "type_id": type_id,
                    "anno_ids": [] if type_id == 2 else [f"v{video}-{each}" for each in objects],
                    "frames": names,
                    "height": SIZE[0],
                    "width": SIZE[1],
                }

    def masks() -> Iterator[dict[str, Any]]:
        for video in range(num_videos):
            for each in range(OBJECTS_PER_VIDEO):
                rle = true[(video + each) % LIBRARY]
                yield {"video_id": f"v{video}", "anno_id": f"v{video}-{each}", "rle": rle}

    def videos() -> Iterator[dict[str, Any]]:
        for video in range(num_videos):
            yield {
                "video_id": f"v{video}",
                "frames": names,
                "height": SIZE[0],
                "width": SIZE[1],
                "foreground_rle": foreground,
                "foreground_ratio": [0.3] * num_frames,
            }

    for name, rows, features in (
        ("expressions", expressions, EXPRESSION_FEATURES),
        ("masks", masks, MASK_FEATURES),
        ("videos", videos, VIDEO_FEATURES),
    ):
        made = datasets.Dataset.from_generator(rows, features=features, cache_dir=str(folder / "cache"))
        made.save_to_disk(folder / name)
    with (folder / "predictions.jsonl").open("w") as file:
        for row in expressions():
            shown = predicted[(int(row["video_id"][1:]) + int(row["expression_id"])) % LIBRARY]
            line = {"video": row["video_id"], "expression_id": row["expression_id"], "masks": dict(enumerate(shown))}
            file.write(json.dumps(line) + "\n")


def measure(folder: Path, num_workers: int) -> None:
    """Score what `make` wrote, and print what it took as JSON."""
    import datasets

    began = time.perf_counter()
    rows = [datasets.load_from_disk(str(folder / name)) for name in ("expressions", "masks", "videos")]
    evaluation_set = EvaluationSet(BENCHMARKS["revos"], "valid", folder, *rows)
    result = score_predictions(evaluation_set, open_predictions(folder / "predictions.jsonl"), num_workers=num_workers)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "scores": result.as_json()}))


def watch(process: subprocess.Popen) -> tuple[float, float]:
    """Wait for a process; return the most memory that it and its own processes held at once, in MiB, and CPU seconds.

    Both as sampled; memory that they share counts once for each.
    """
    peak, root, cpu_seconds = 0, psutil.Process(process.pid), {}
    while process.poll() is None:
        held = 0
        with suppress(psutil.NoSuchProcess):
            for each in (root, *root.children(recursive=True)):
                held += each.memory_info().rss
                times = each.cpu_times()
                cpu_seconds[each.pid] = times.user + times.system
        peak = max(peak, held)
        time.sleep(0.1)
    return peak / 2**20, sum(cpu_seconds.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the videos")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="0: in one process")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure, args.workers[0])
        return
    num_videos = max(2, round(NUM_VIDEOS * args.fraction))
    num_expressions = num_videos * EXPRESSIONS_PER_VIDEO
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), num_videos, args.frames)
        size = os.path.getsize(Path(folder) / "predictions.jsonl") / 2**20
        print(
            f"{num_expressions} expressions, {num_videos} videos of {args.frames} frames; predictions {size:.0f} MiB",
            flush=True,
        )
        print(f"{'workers':>10}{'seconds':>10}{'CPU s':>10}{'ms/frame':>10}{'peak MiB':>10}")
        scores = []
        for number in args.workers:
            command = [sys.executable, __file__, "--measure", folder, "--workers", str(number)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            peak, cpu_seconds = watch(process)
            assert process.stdout is not None
            taken = json.loads(process.stdout.read().splitlines()[-1])
            per_frame = 1000 * taken["seconds"] / num_expressions / args.frames
            print(
                f"{number:10d}{taken['seconds']:10.1f}{cpu_seconds:10.1f}{per_frame:10.2f}{peak:10.0f}",
                flush=True,
            )
            scores.append(taken["scores"])
    print("same figures in all runs:", all(other == scores[0] for other in scores))


if __name__ == "__main__":
    main()
