"""XMem: steps per second against the plain transcription of the published step, and memory over a long stream.

    python benchmarks/xmem_speed.py [--frames 16] [--objects 1 3] [--size 480 854] [--threads 2]

Three tables. 1: the memory's elements and the process's peak memory over thousands of small frames. 2: reading memory
alone, for the sizes that it has at the start and later (a large difference is a position where the 30th and the 31st
best element are equal within rounding, and the sides choose differently). 3: steps, both sides on the same clip in one
process, taking turns frame by frame, with random weights of full size: from the first frame, and with the mean working
memory of a long video (`+7` memory frames beforehand). `differing` counts pixels whose mask differs, and
`undecided` those where the two best probabilities are within 1e-4 of each other, so that rounding may decide. `of cpu`
is the ratio of processor time, which other programs on the machine disturb less.
"""

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visa_hf import XMemConfig, XMemModel
from visa_hf.modeling.memory_xmem import XMemMemory

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.modeling.xmem_reference import ReferenceTracker


def random_model(config: XMemConfig) -> XMemModel:
    """Random weights that keep the size of the features, so that objects differ and masks have edges."""
    torch.manual_seed(0)
    model = XMemModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
        model.decoder.mask_head.bias.fill_(-1.0)
    return model


def moving_clip(num_frames: int, height: int, width: int, num_objects: int) -> tuple[Tensor, Tensor]:
    """Frames (T, 3, H, W) of a moving picture and masks (N, H, W) of the first one."""
    generator = torch.Generator().manual_seed(0)
    margin = 4 * num_frames
    picture = torch.randn(1, 3, height // 16, width // 16, generator=generator)
    picture = F.interpolate(picture, (height + margin, width + margin), mode="bilinear", align_corners=False)[0]
    frames = torch.stack([picture[:, 2 * t : 2 * t + height, 4 * t : 4 * t + width] for t in range(num_frames)])
    masks = torch.zeros(num_objects, height, width)
    for i, mask in enumerate(masks):
        mask[height // 8 : height // 2, (2 * i + 1) * width // 8 : (2 * i + 2) * width // 8] = 1
    return frames, masks


def timed(function: Callable[[], Tensor]) -> tuple[float, float, Tensor]:
    """Seconds on the clock, seconds of processor time, result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start, time.process_time() - cpu_start, result


def memorise_random(
    config: XMemConfig, memory: XMemMemory, plain: ReferenceTracker, size: tuple[int, int], num_objects: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Add a memory frame of random numbers to both sides; return its key and selection (CK, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (-(-side // 16) for side in size)
    key, selection = torch.rand(2, config.key_dim, height, width, generator=generator)
    shrinkage = 1 + torch.rand(1, height, width, generator=generator)
    value = torch.randn(num_objects, config.value_dim, height, width, generator=generator)
    memory.add(key, shrinkage, selection, value)
    plain.add_memory(*(plane.flatten(1)[None] for plane in (key, shrinkage, selection)), value.flatten(2))
    return key, selection


def compare_steps(model: XMemModel, num_frames: int, size: tuple[int, int], num_objects: int, before: int) -> None:
    """Print one row: `num_frames` steps after the first, with `before` random memory frames added beforehand."""
    frames, masks = moving_clip(num_frames + 1, *size, num_objects)
    memory, plain = model.init_memory(), ReferenceTracker(model)
    model.step(memory, frames[0], masks)
    plain.step(frames[0], masks, list(range(num_objects)))
    for seed in range(before):
        memorise_random(model.config, memory, plain, size, num_objects, seed)
    times: list[tuple[float, float]] = []
    cpu_ratios: list[float] = []
    elements: list[int] = []
    differing = undecided = 0
    for frame_idx, frame in enumerate(frames[1:]):
        elements.append(memory.num_working + memory.num_long_term)
        # Whose turn is first changes, so that neither always finds the caches warm.
        sides = [partial(model.step, memory, frame), partial(plain.step, frame)]
        order = (0, 1) if frame_idx % 2 else (1, 0)
        results = {side: timed(sides[side]) for side in order}
        (our_time, our_cpu, ours), (plain_time, plain_cpu, theirs) = results[0], results[1]
        times.append((our_time, plain_time))
        cpu_ratios.append(plain_cpu / our_cpu)
        best = theirs.topk(2, dim=0).values
        differing += int((ours.argmax(dim=0) != theirs.argmax(dim=0)).sum())
        undecided += int((best[0] - best[1] < 1e-4).sum())
    our_time, plain_time = (statistics.median(side) for side in zip(*times, strict=True))
    ratio, cpu_ratio = statistics.median(b / a for a, b in times), statistics.median(cpu_ratios)
    print(
        f"{num_objects:7d} {f'+{before}' if before else 'start':>7s} {min(elements):6d}-{max(elements):<6d}"
        f"{1 / our_time:9.3f} {1 / plain_time:9.3f} {ratio:6.2f}x {cpu_ratio:6.2f}x {differing:10d} {undecided:10d}",
        flush=True,
    )


def compare_reading(size: tuple[int, int], num_objects: int, repeats: int) -> None:
    """Print a row for each of some sizes of the memory, made of random numbers."""
    with torch.device("meta"):
        model = XMemModel(XMemConfig(use_long_term=False))
    memory, plain = model.init_memory(), ReferenceTracker(model)
    for num_memory_frames in range(1, 17):
        key, selection = memorise_random(model.config, memory, plain, size, num_objects, seed=num_memory_frames)
        if num_memory_frames not in (1, 5, 10, 16):
            continue
        pairs = []
        for _ in range(repeats):
            our_time, _, ours = timed(partial(memory.read, key, selection))
            plain_time, _, theirs = timed(partial(plain.match_memory, key[None], selection[None]))
            pairs.append((our_time, plain_time))
        ratio = statistics.median(b / a for a, b in pairs)
        our_time, plain_time = (min(side) for side in zip(*pairs, strict=True))
        difference = (ours - theirs).abs().max().item()
        print(
            f"{num_objects:7d} {memory.num_working:9d}  {our_time * 1e3:8.0f} {plain_time * 1e3:9.0f} {ratio:6.2f}x"
            f"   {difference:.1e}",
            flush=True,
        )


def show_growth(num_frames: int) -> None:
    model = random_model(XMemConfig.tiny(num_prototypes=16, max_long_term_elements=256))
    frames, masks = moving_clip(20, 48, 80, 2)
    memory = model.init_memory()
    for frame_idx in range(num_frames):
        # A second object enters later: two groups.
        given = {0: (masks[:1], [1]), 30: (masks[1:], [2])}.get(frame_idx, (None, None))
        model.step(memory, frames[frame_idx % 20], *given)
        if frame_idx % (num_frames // 8) == 0 or frame_idx == num_frames - 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(f"{frame_idx:7d} {memory.num_working:9d} {memory.num_long_term:9d}  {peak:10.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--size", type=int, nargs=2, default=[480, 854], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="readings per row of the second table")
    parser.add_argument("--stream", type=int, default=2000, help="frames of the first table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = tuple(arguments.size)

    print("memory of a stream of 48 x 80 pixels, tiny tracker, at most 160 working and 256 long-term elements")
    print("  frame   working long-term   peak MiB")
    show_growth(arguments.stream)
    print("\nreading memory alone, milliseconds (best)")
    print("objects  elements      ours     plain   ratio   largest difference")
    for num_objects in arguments.objects:
        compare_reading(size, num_objects, arguments.repeats)
    print(f"\nsteps per second at {size[0]} x {size[1]}, {arguments.threads} threads, medians over the frames")
    print("objects    from   elements         ours     plain   ratio  of cpu  differing  undecided")
    model = random_model(XMemConfig())
    for num_objects in arguments.objects:
        for before in (0, 7):
            compare_steps(model, arguments.frames, size, num_objects, before)


if __name__ == "__main__":
    main()
