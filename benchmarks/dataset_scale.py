"""ReVOS at its real size: preparing, reading and sampling it, against plain JSON with masks copied per expression.

    python benchmarks/dataset_scale.py [--scale 1.0] [--samples 100] [--keep FOLDER]

Writes a meaningless ReVOS of 1,042 videos, 35,074 expressions, about 60 frames each and 8,336 annotated objects (scale
1: a `mask_dict.json` of some 320 MB; the frames of a video are hard links of one picture). Each way is measured
in processes of its own: ours with the `ReVOS` builder (masks in rows of their own, joined when a sample is made), the
plain one by `json.load` of everything and a data set whose rows hold a copy of all masks of their expression. Memory
is the peak of resident memory, with that after imports beside it; a worker's is what it shares with no other process.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from visa_hf.datasets_scripts.synthetic_scale import write_scale_dataset

NUM_VIDEOS, NUM_EXPRESSIONS, MASK_BYTES = 1042, 35_074, 350_000_000
WORKERS = (0, 1, 2)


# --- the plain way ---


def plain_rows(root: str) -> Iterator[dict[str, Any]]:
    """Rows of expressions, each with a copy of the masks that it means; everything is in memory."""
    metas = [json.loads(Path(root, f"meta_expressions_{split}_.json").read_text()) for split in ("train", "valid")]
    masks = json.loads(Path(root, "mask_dict.json").read_text())
    for name, video in (pair for meta in metas for pair in meta["videos"].items()):
        for expression_id, expression in video["expressions"].items():
            yield {
                "video_id": name,
                "expression_id": expression_id,
                "expression": expression["exp"],
                "frames": [f"JPEGImages/{name}/{frame}.jpg" for frame in video["frames"]],
                "masks": [masks[str(anno_id)] for anno_id in expression["anno_id"]],
            }


def prepare_plain(root: Path, cache: Path) -> Any:
    from datasets import Dataset, Features, List, Value

    from visa_hf.datasets_scripts.features import RLE_FEATURE

    text = Value("string")
    features = Features(
        {
            "video_id": text,
            "expression_id": text,
            "expression": text,
            "frames": List(text),
            "masks": List(List(RLE_FEATURE)),
        }
    )
    return Dataset.from_generator(
        plain_rows, features=features, gen_kwargs={"root": str(root)}, cache_dir=str(cache), fingerprint="plain"
    )


class PlainSamples:
    """The same recipe over rows that hold their masks."""

    def __init__(self, rows: Any, root: Path, num_draws: int) -> None:
        self.rows, self.root, self.num_draws = rows, root, num_draws
        self.videos: dict[str, list[int]] = {}
        for number, video in enumerate(rows["video_id"]):
            self.videos.setdefault(video, []).append(number)
        self.names = list(self.videos)

    def __len__(self) -> int:
        return self.num_draws

    def __getitem__(self, draw: int) -> Any:
        import numpy as np
        from PIL import Image

        from visa_hf.rle import decode_mask

        numbers = random.Random(draw)
        chosen = self.videos[numbers.choice(self.names)]
        rows = [self.rows[number] for number in numbers.sample(chosen, min(3, len(chosen)))]
        frames = rows[0]["frames"]
        count = numbers.randint(8, 12)
        bounds = [part * len(frames) // count for part in range(count + 1)]
        references = [numbers.randrange(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        target = numbers.choice(references)
        pictures = [np.array(Image.open(self.root / frames[idx]).convert("RGB")) for idx in references]
        masks = np.zeros((len(rows), *pictures[0].shape[:2]), dtype=np.uint8)
        for mask, row in zip(masks, rows, strict=True):
            for rles in row["masks"]:
                if rles[target] is not None:
                    mask |= decode_mask(rles[target])
        return pictures, masks


# --- measuring: each function runs in a process of its own and returns numbers by name ---


def memory_of(process: str, *fields: str) -> float:
    """Sum of some fields of a process's memory, in MB."""
    lines = Path("/proc", process, "smaps_rollup" if process != "self" else "status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split(":")[0] in fields) / 1024


def peak() -> float:
    return memory_of("self", "VmHWM")


def folder_size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*.arrow")) / 2**20


def open_ours(root: Path, cache: Path) -> Any:
    from visa_hf.datasets_scripts.mixture import GroupConfig, MixtureConfig, SourceConfig
    from visa_hf.datasets_scripts.training_sources import load_sources

    mixture = MixtureConfig((GroupConfig("rvos", 1, (SourceConfig("revos", 1, "revos"),)),))
    return load_sources(mixture, {"revos": root}, cache_dir=cache)


def samples_ours(root: Path, cache: Path, num_draws: int) -> Any:
    from visa_hf.datasets_scripts.mixture import TrainingSamples

    return TrainingSamples(open_ours(root, cache), {"revos": 1.0}, 0, num_draws)


def samples_plain(root: Path, cache: Path, num_draws: int) -> Any:
    return PlainSamples(prepare_plain(root, cache), root, num_draws)


def measure_prepare(way: str, root: Path, cache: Path, _: int) -> dict[str, float]:
    import datasets  # noqa: F401

    from visa_hf.datasets_scripts import ReVOS

    before, start = memory_of("self", "VmRSS"), time.perf_counter()
    if way == "ours":
        for config in ("expressions", "masks", "videos"):
            ReVOS(config, data_dir=root, cache_dir=cache).download_and_prepare()
    else:
        prepare_plain(root, cache)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak": peak(), "imports": before, "disk": folder_size(cache)}


def measure_rows(way: str, root: Path, cache: Path, _: int) -> dict[str, float]:
    from visa_hf.datasets_scripts import ReVOS

    def rate(rows: Any) -> float:
        start, count = time.perf_counter(), 0
        for _row in rows:
            count += 1
        return count / (time.perf_counter() - start)

    if way == "plain":
        streamed, prepared = rate(plain_rows(str(root))), rate(prepare_plain(root, cache))
        return {"expressions streamed": streamed, "expressions prepared": prepared}
    found: dict[str, float] = {}
    for config in ("expressions", "masks"):
        builder = ReVOS(config, data_dir=root, cache_dir=cache)
        found[f"{config} streamed"] = rate(builder.as_streaming_dataset("train"))
        found[f"{config} prepared"] = rate(builder.as_dataset("train"))
    return found


def measure_first(way: str, root: Path, cache: Path, _: int) -> dict[str, float]:
    import visa_hf.datasets_scripts.training_sources  # noqa: F401

    before, start = memory_of("self", "VmRSS"), time.perf_counter()
    samples = (samples_ours if way == "ours" else samples_plain)(root, cache, 1)
    opened = time.perf_counter()
    samples[0]
    return {"open": opened - start, "sample": time.perf_counter() - opened, "imports": before, "peak": peak()}


def identity(batch: list[Any]) -> list[Any]:
    return batch


def measure_samples(way: str, root: Path, cache: Path, num_samples: int) -> dict[str, float]:
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    samples = (samples_ours if way == "ours" else samples_plain)(root, cache, num_samples + 4)
    found: dict[str, float] = {}
    for workers in WORKERS:
        context = "fork" if workers else None
        loader = DataLoader(
            samples, batch_size=1, num_workers=workers, collate_fn=identity, multiprocessing_context=context
        )
        batches = iter(loader)
        for _ in range(4):  # starting the workers is not what is measured
            next(batches)
        start = time.perf_counter()
        count = 0
        for _ in batches:
            count += 1
            if workers and count == num_samples - 1:
                pids = [str(worker.pid) for worker in batches._workers]
                private = [
                    memory_of(pid, "Private_Clean", "Private_Dirty") for pid in pids if Path("/proc", pid).exists()
                ]
                if private:
                    found[f"worker memory, {workers}"] = max(private)
        found[f"samples, {workers}"] = count / (time.perf_counter() - start)
    return found


MEASURES: dict[str, Callable[[str, Path, Path, int], dict[str, float]]] = {
    "prepare": measure_prepare,
    "rows": measure_rows,
    "first": measure_first,
    "samples": measure_samples,
}


def measured(name: str, way: str, root: Path, cache: Path, num_samples: int) -> dict[str, float]:
    """Run one measurement in a new process."""
    command = [sys.executable, __file__, "--measure", name, way, str(root), str(cache), "--samples", str(num_samples)]
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    lines = [
        ("preparation, s", "prepare", "seconds", "lower"),
        ("  peak memory, MB", "prepare", "peak", "lower"),
        ("  of which imports, MB", "prepare", "imports", ""),
        ("  prepared files, MB", "prepare", "disk", "lower"),
        ("expressions/s, streaming", "rows", "expressions streamed", "higher"),
        ("expressions/s, prepared", "rows", "expressions prepared", "higher"),
        ("masks rows/s, streaming", "rows", "masks streamed", ""),
        ("masks rows/s, prepared", "rows", "masks prepared", ""),
        ("opening prepared data, s", "first", "open", "lower"),
        ("  then the first sample, s", "first", "sample", "lower"),
        ("  peak memory, MB", "first", "peak", "lower"),
        *((f"samples/s, {count} workers", "samples", f"samples, {count}", "higher") for count in WORKERS),
        *((f"  own memory of a worker, MB ({n})", "samples", f"worker memory, {n}", "lower") for n in WORKERS[1:]),
    ]
    print(f"{'':34s} {'ours':>10s} {'plain':>10s} {'better by':>10s}")
    for title, name, key, better in lines:
        ours, plain = (results[way][name].get(key) for way in ("ours", "plain"))
        shown = [
            f"{value:10.1f}" if value is not None and value >= 10 else f"{value or 0:10.3f}" for value in (ours, plain)
        ]
        if plain is None:
            shown[1] = f"{'-':>10s}"
        ratio = ""
        if ours and plain and better:
            ratio = f"{plain / ours if better == 'lower' else ours / plain:9.2f}x"
        print(f"{title:34s} {shown[0]} {shown[1]} {ratio:>10s}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="share of ReVOS's size; 0.05 for a quick run")
    parser.add_argument("--samples", type=int, default=100, help="samples to time for each number of workers")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it behind")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, way, root, cache = arguments.measure
        print(json.dumps(MEASURES[name](way, Path(root), Path(cache), arguments.samples)))
        return
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            folder = arguments.keep
            folder.mkdir(parents=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = folder / "ReVOS"
        start = time.perf_counter()
        write_scale_dataset(
            root,
            num_videos=max(4, round(NUM_VIDEOS * arguments.scale)),
            num_expressions=max(8, round(NUM_EXPRESSIONS * arguments.scale)),
            mask_bytes=max(100_000, round(MASK_BYTES * arguments.scale)),
        )
        size = (root / "mask_dict.json").stat().st_size / 2**20
        print(
            f"scale {arguments.scale}: mask_dict.json of {size:.0f} MB, written in {time.perf_counter() - start:.0f} s"
        )
        results: dict[str, dict[str, dict[str, float]]] = {}
        for way in ("ours", "plain"):
            cache = folder / f"cache_{way}"
            results[way] = {name: measured(name, way, root, cache, arguments.samples) for name in MEASURES}
            if not arguments.keep:
                shutil.rmtree(cache)  # the plain one takes gigabytes
        print_table(results)


if __name__ == "__main__":
    main()
