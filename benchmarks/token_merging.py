"""Token merging of 12 frames (256 patches, 1024 channels, 64 + 32 + 16 clusters): all frames at once against a loop.

Two loops are timed, both in this process and in turns with ours:
- "frame by frame": the published steps with torch functions inside a frame (cdist, topk, index_add), one frame after
  another, as the published model runs them;
- "ours, one by one": `merge_visual_tokens` called once per frame, which shows what the batching alone brings.

    python benchmarks/token_merging.py [--device cuda] [--repeats 20]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from visa_hf.modeling.visual_tokens_visa import merge_visual_tokens

COUNTS, NEIGHBORS = (64, 32, 16), (5, 3, 3)
NUM_FRAMES, NUM_PATCHES, NUM_CHANNELS = 12, 256, 1024


def merge_one_frame(tokens: Tensor) -> Tensor:
    """The published steps for one frame (N, C), without their random noise."""
    merged = []
    for num_clusters, num_neighbors in zip(COUNTS, NEIGHBORS, strict=True):
        num_tokens, num_channels = tokens.shape
        dist = torch.cdist(tokens[None], tokens[None])[0] / num_channels**0.5
        nearest = dist.topk(num_neighbors, dim=-1, largest=False).values
        density = (-(nearest**2).mean(dim=-1)).exp()
        is_denser = (density[None, :] > density[:, None]).to(tokens.dtype)
        delta = (dist * is_denser + dist.max() * (1 - is_denser)).min(dim=-1).values
        centers = (delta * density).topk(num_clusters).indices
        clusters = dist[centers].argmin(dim=0)
        clusters[centers] = torch.arange(num_clusters, device=tokens.device)
        counts = tokens.new_zeros(num_clusters).index_add_(0, clusters, tokens.new_ones(num_tokens)) + 1e-6
        weighted = tokens / counts[clusters][:, None]
        tokens = tokens.new_zeros(num_clusters, num_channels).index_add_(0, clusters, weighted)
        merged.append(tokens)
    return torch.cat(merged)


def milliseconds(functions: dict[str, Callable[[], Tensor]], repeats: int, device: str) -> dict[str, float]:
    """Shortest time of each function, the one least disturbed by other load; the functions take turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 3):
        for name, function in functions.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= 3:  # the first ones warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    features = torch.randn(NUM_FRAMES, NUM_PATCHES, NUM_CHANNELS, device=arguments.device)
    functions = {
        "ours": lambda: merge_visual_tokens(features, COUNTS, NEIGHBORS),
        "frame by frame": lambda: torch.stack([merge_one_frame(frame) for frame in features]),
        "ours, one by one": lambda: torch.cat(
            [merge_visual_tokens(frame[None], COUNTS, NEIGHBORS) for frame in features]
        ),
    }
    difference = (functions["ours"]() - functions["frame by frame"]()).abs().max().item()
    print(f"largest difference between ours and frame by frame: {difference:.1e}")
    print(f"{'threads':>7}  {'what':<18}{'ms':>8}  ours is faster by")
    for num_threads in (1, 2) if arguments.device == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(num_threads)
        with torch.no_grad():
            times = milliseconds(functions, arguments.repeats, arguments.device)
        for name, value in times.items():
            print(f"{num_threads:>7}  {name:<18}{value:8.1f}  {value / times['ours']:.2f}x")


if __name__ == "__main__":
    main()
