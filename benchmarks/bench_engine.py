"""One video, many queries: the released procedure against the session engine, on one model and in one process.

    python benchmarks/bench_engine.py [--frames 60] [--queries 34] [--growth 1 4 16 64] [--memory]

Both sides are given the same decoded frames of a real clip, the same targets, the published references (every s-th
frame, s = ceil(T / 11)) and the published answer, so that both must find the same masks: `mode="published"` asks the
language model on every frame of every expression and tracks each expression by itself; the engine shares whatever
depends on frames alone. The model has random weights, and parts whose shares of the released evaluation's FLOPs are
those of the 7B system within a factor of two (language model 67, SAM 21, visual tower 6 per cent; the tracker apart).

Tables: 1 the shares, 2 calls of each part next to the least that is needed, 3 seconds by part and their ratio, with
and without the tracker, 4 seconds per query as queries grow, 5 (`--memory`) peak memory of processes with few and many
frames and queries. On a CPU, seconds are of processor time, of all threads together.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

import visa_hf
from visa_hf import VisaConfig, VisaForVideoSegmentation, VisaProcessor, XMemConfig
from visa_hf.modeling.frame_sampling_visa import frame_at_share, stride_references
from visa_hf.modeling.frame_source_visa import open_frames
from visa_hf.modeling.video_session_visa import VisaVideoSession

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.media import real_clip

# Shares of the 7B system in the released evaluation of a video (60 frames, 34 expressions), without frame sampler.
SHARES = {"language model": 0.67, "SAM": 0.21, "visual tower": 0.06}
WORDS = ("the car", "the dog that runs first", "what will be overtaken?", "the person on the left", "which one wins?")


def make_model(device: str) -> tuple[Any, VisaProcessor]:
    """Build a random model with the published proportions, and its processor."""
    tiny = VisaConfig.tiny()
    sam = tiny.sam_config.to_dict()
    sam["vision_config"] |= {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "image_size": 256,
        "window_size": 4,
        "global_attn_indexes": [3],
        "mlp_dim": 512,
    }
    sam["prompt_encoder_config"] |= {"image_size": 256, "image_embedding_size": 16}
    config = VisaConfig.tiny(
        vision_config=tiny.vision_config.to_dict() | {"patch_size": 4, "num_hidden_layers": 2},
        vision_feature_layer=-1,
        text_config=tiny.text_config.to_dict() | {"hidden_size": 128, "intermediate_size": 352},
        sam_config=sam,
        merge_cluster_counts=(64, 32, 16),
        tracker_config=XMemConfig.tiny(input_size=96),
    )
    torch.manual_seed(0)
    model: Any = VisaForVideoSegmentation(config).eval()
    with torch.no_grad():
        for parameter in (*model.model.parameters(), model.lm_head.weight):
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    assets = Path(visa_hf.__file__).parent / "assets" / "tokenizer"
    return model.to(device), VisaProcessor.from_config(config, PreTrainedTokenizerFast.from_pretrained(assets))


class Meter:
    """Calls, rows and seconds of the model's parts while it is open."""

    def __init__(self, model: Any) -> None:
        self.device = model.device
        self.calls: dict[str, int] = {}
        self.rows: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self._handles: list[Any] = []
        self._begun: dict[str, float] = {}
        parts: dict[str, nn.Module] = {
            "visual tower": model.model.vision_tower,
            "language model": model.model.language_model,
            "SAM": model.model.sam.vision_encoder,
            "SAM decoder": model.model.sam.mask_decoder,
            "tracker: key encoder": model.tracker.key_encoder,
            "tracker: value encoder": model.tracker.value_encoder,
            "tracker: decoder": model.tracker.decoder,
        }
        for name, module in parts.items():
            self.calls[name], self.rows[name], self.seconds[name] = 0, 0, 0.0
            self._handles.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._after(name)))

    def clock(self) -> float:
        """Seconds of processor time, which other programs disturb little; on a GPU, on the clock once all is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def _before(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            self.calls[name] += 1
            self.rows[name] += len(first) if isinstance(first, torch.Tensor) else 1
            self._begun[name] = self.clock()

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.seconds[name] += self.clock() - self._begun[name]

        return hook

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for handle in self._handles:
            handle.remove()


def clip_frames(num_frames: int) -> np.ndarray:
    """Frames of a real clip, decoded: (T, H, W, 3), uint8; there and back again if it is too short."""
    with open_frames(real_clip("carphone_pristine.mp4")) as source:
        last = source.num_frames - 1
        wanted = [abs((idx + last) % (2 * last) - last) if last else 0 for idx in range(num_frames)]
        return np.stack(source.get_many(wanted))


def requests_of(num_queries: int, num_frames: int) -> list[dict[str, Any]]:
    """Sentences, and targets as the published sampler gives them: the mean of ten answers, in tenths."""
    generator = np.random.default_rng(0)
    shares = generator.integers(0, 11, (num_queries, 10)).mean(axis=1) / 10
    return [
        {"query": f"{WORDS[idx % len(WORDS)]} {idx}", "target_frame": frame_at_share(num_frames, share)}
        for idx, share in enumerate(shares)
    ]


def run_side(
    model: Any, processor: VisaProcessor, frames: np.ndarray, asked: list[dict[str, Any]], **options: Any
) -> tuple[list[Any], list[Any], Meter, float, float]:
    """Answer and propagate; masks on target frames, masks of all frames, the meter, seconds of both halves."""
    is_published = options.get("mode") == "published"
    common = {} if is_published else {"reference_strategy": "stride", "answer": "It is [SEG]."}
    with VisaVideoSession(frames, processor, **options) as session, Meter(model) as meter:
        start = meter.clock()
        model.add_queries(session, asked, **common)
        asked_at = meter.clock()
        tracked = [[mask.numpy() for mask in output.masks] for output in model.propagate_in_video_iterator(session)]
        end = meter.clock()
        targets = [query.target_masks for query in session.queries]
    return targets, tracked, meter, asked_at - start, end - asked_at


def flops_of(model: Any, processor: VisaProcessor, frames: np.ndarray) -> dict[str, float]:
    """FLOPs of one target frame in the released evaluation, by part."""
    target = len(frames) // 2
    references = list(frames[list(stride_references(len(frames), target))])
    inputs = processor(
        target_frame=frames[target], reference_frames=references, query=WORDS[0], answer="It is [SEG]."
    ).to(model.device)
    counted = FlopCounterMode(display=False, depth=4)
    with counted, torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "labels"})
    by_module = {name: sum(ops.values()) for name, ops in counted.get_flop_counts().items()}
    total = by_module["Global"]
    of = {
        "language model": by_module["VisaForVideoSegmentation.model.language_model"]
        + by_module["VisaForVideoSegmentation.lm_head"],
        "SAM": by_module["VisaForVideoSegmentation.model.sam.vision_encoder"],
        "visual tower": by_module["VisaForVideoSegmentation.model.vision_tower"],
    }
    return {**of, "all": total}


def show_shares(flops: dict[str, float]) -> None:
    print(f"1. FLOPs of one target frame, released evaluation: {flops['all'] / 1e9:.2f} GFLOP")
    print("part              share  7B system  within a factor of two")
    for name, share in SHARES.items():
        ours = flops[name] / flops["all"]
        print(f"{name:16s} {ours:6.1%} {share:10.0%}  {'yes' if 0.5 <= ours / share <= 2 else 'NO'}")


def show_calls(ours: Meter, published: Meter | None, asked: list[dict[str, Any]], num_frames: int) -> None:
    num_targets = len({query["target_frame"] for query in asked})
    stride = -(-num_frames // 11)
    targets_of: dict[int, set[int]] = {}
    for query in asked:
        targets_of.setdefault(query["target_frame"] % stride, set()).add(query["target_frame"])
    num_queries = len(asked)
    # What was read once for several queries is not a query's own pass.
    prefixes = num_targets + sum(len(targets) > 1 for targets in targets_of.values())
    ideal = {
        "visual tower": num_frames,
        "SAM": num_targets,
        "language model": num_queries,
        "tracker: key encoder": num_frames,
    }
    print(f"\n2. calls, {num_frames} frames, {num_queries} queries, {num_targets} distinct targets")
    print("part                    published   engine    ideal")
    for name, least in ideal.items():
        found = ours.rows[name] - (prefixes if name == "language model" else 0)
        theirs = "-" if published is None else str(published.rows[name])
        print(f"{name:22s} {theirs:>10s} {found:8d} {least:8d}{'' if found <= least else '  MORE'}")
    print(f"(the engine's language model besides read {prefixes} prefixes shared by queries)")


def show_seconds(
    ours: Meter, our_halves: tuple[float, float], published: Meter | None, halves: tuple[float, float] | None
) -> None:
    print("\n3. seconds               published   engine    ratio")

    def row(name: str, theirs: float | None, mine: float) -> None:
        ratio = "" if theirs is None else f"{theirs / max(mine, 1e-9):8.1f}x"
        print(f"{name:24s} {'-' if theirs is None else f'{theirs:9.2f}'} {mine:8.2f} {ratio}")

    for name in ours.seconds:
        row(name, None if published is None else published.seconds[name], ours.seconds[name])
    row("without the tracker", None if halves is None else halves[0], our_halves[0])
    row("tracking", None if halves is None else halves[1], our_halves[1])
    row("end to end", None if halves is None else sum(halves), sum(our_halves))


def show_growth(model: Any, processor: VisaProcessor, frames: np.ndarray, numbers: list[int]) -> None:
    print("\n4. the engine as queries grow\nqueries  asking  tracking     all  seconds per query")
    for number in numbers:
        *_, asking, tracking = run_side(model, processor, frames, requests_of(number, len(frames)), **ENGINE)
        total = asking + tracking
        print(f"{number:7d} {asking:7.2f} {tracking:9.2f} {total:7.2f} {total / number:9.3f}", flush=True)


def measure_memory(num_frames: int, num_queries: int, max_tracked: int) -> None:
    """Print the peak memory of this process, in MiB; frames are read from files as they are needed."""
    model, processor = make_model("cpu")
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for idx, frame in enumerate(clip_frames(20)):
            paths.append(Path(folder) / f"{idx}.png")
            Image.fromarray(frame).save(paths[-1])
        video = [str(paths[idx % 20]) for idx in range(num_frames)]
        with VisaVideoSession(video, processor, max_tracked_queries=max_tracked, max_queries_per_batch=4) as session:
            model.add_queries(
                session, [f"{WORDS[0]} {idx}" for idx in range(num_queries)], answer="It is [SEG].", target_frame=10
            )
            for _ in model.propagate_in_video_iterator(session):
                pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def show_memory() -> None:
    print("\n5. peak memory of a process, MiB (at most 8 queries tracked at once)\n frames  queries   peak MiB")
    for num_frames, num_queries in ((200, 2), (2000, 2), (60, 8), (60, 16), (60, 32)):
        command = [sys.executable, __file__, "--measure", str(num_frames), str(num_queries), "8"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"{num_frames:7d} {num_queries:8d} {int(done.stdout.split()[-1]):10d}", flush=True)


# All frames between the first and the last target are encoded once: the clip is short.
ENGINE = {"max_cached_tracker_frames": 10_000, "max_cached_targets": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--queries", type=int, default=34)
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 4, 16, 34, 64], metavar="QUERIES")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8, help="queries that go through a network together")
    parser.add_argument("--no-published", action="store_true", help="leave the slow side out")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--measure", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        measure_memory(*arguments.measure)
        return
    ENGINE["max_queries_per_batch"] = arguments.batch
    model, processor = make_model(arguments.device)
    frames = clip_frames(arguments.frames)
    asked = requests_of(arguments.queries, arguments.frames)
    show_shares(flops_of(model, processor, frames))
    run_side(model, processor, frames[:12], requests_of(1, 12), **ENGINE)  # warm up

    targets, tracked, ours, *our_halves = run_side(model, processor, frames, asked, **ENGINE)
    published, halves = None, None
    if not arguments.no_published:
        other_targets, other_tracked, published, *both = run_side(model, processor, frames, asked, mode="published")
        halves = (both[0], both[1])
        differing = sum(int((mask != other).sum()) for mask, other in zip(targets, other_targets, strict=True))
        tracked_differing = sum(
            int((mask != other).sum())
            for masks, others in zip(tracked, other_tracked, strict=True)
            for mask, other in zip(masks, others, strict=True)
        )
    show_calls(ours, published, asked, arguments.frames)
    show_seconds(ours, (our_halves[0], our_halves[1]), published, halves)
    if published is not None:
        print(f"pixels whose mask differs: {differing} on target frames, {tracked_differing} in all frames")
    if arguments.growth:
        show_growth(model, processor, frames, arguments.growth)
    if arguments.memory:
        show_memory()


if __name__ == "__main__":
    main()
