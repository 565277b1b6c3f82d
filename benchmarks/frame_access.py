"""Reading frames of a video file: `open_frames` against a seek per frame with plain PyAV, and peak memory backward.

    python benchmarks/frame_access.py [--frames 300] [--long 2000]

Clips are made on the spot: 480 x 854, H.264 with B-frames; one with a key frame every 25 frames, one with x264's
default of every 250. All ways must give the same frames. Prints seconds (the best of three; opening included), the
ratio, and the peak memory, beyond that of the imports, of a process that reads a short and a long clip backward.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from visa_hf.modeling.frame_source_visa import open_frames

HEIGHT, WIDTH, FPS = 480, 854, 25


def make_clip(path: Path, num_frames: int, key_every: int) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    texture = np.random.default_rng(0).integers(0, 60, (HEIGHT, WIDTH, 1))
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=FPS, options={"g": str(key_every), "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(num_frames):
            picture = np.stack([x // 5, y // 3, (x + y) // 8], axis=2) + np.roll(texture, number, axis=1)
            cx, cy = 100 + 2 * number % (WIDTH - 200), 240 + 100 * np.sin(number / 20)
            picture[(x - cx) ** 2 + (y - cy) ** 2 < 3600] = (220, 60, number % 256)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), "rgb24")))
        output.mux(stream.encode(None))


def naive(path: Path, indices: Iterable[int]) -> list[int]:
    """A seek for each frame, then decoding up to it: right for a constant rate that starts at 0."""
    sums = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        for index in indices:
            wanted = round(Fraction(index, FPS) / stream.time_base)
            container.seek(wanted, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts >= wanted)
            sums.append(int(frame.to_ndarray(format="rgb24")[::16, ::16].sum()))
    return sums


def naive_forward(path: Path, indices: Iterable[int]) -> list[int]:
    """Plain decoding from the beginning."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        return [int(f.to_ndarray(format="rgb24")[::16, ::16].sum()) for f in container.decode(video=0)]


def ours(path: Path, indices: Iterable[int]) -> list[int]:
    """`get_many` for a list, `iterate` for a range; opening included."""
    with open_frames(path) as source:
        if isinstance(indices, range):
            frames: Iterable[np.ndarray] = (
                frame for _, frame in source.iterate(indices.start, indices.stop, indices.step)
            )
        else:
            frames = source.get_many(list(indices))
        return [int(frame[::16, ::16].sum()) for frame in frames]


def seconds_of(read: Callable[[], list[int]]) -> tuple[float, list[int]]:
    best, result = float("inf"), []
    for _ in range(3):
        start = time.perf_counter()
        result = read()
        best = min(best, time.perf_counter() - start)
    return best, result


def resident_megabytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() // 2**20


def peak_memory_backward(path: Path) -> int:
    """Peak resident memory, in MB beyond what imports took, of a process that reads a clip backward."""
    done = subprocess.run([sys.executable, __file__, "--backward", str(path)], capture_output=True, check=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=300)
    parser.add_argument("--long", type=int, default=2000)
    parser.add_argument("--backward", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.backward:
        before = resident_megabytes()
        peak = 0
        with open_frames(arguments.backward) as source:
            for _ in source.iterate(step=-1):
                peak = max(peak, resident_megabytes())
        print(peak - before)
        return
    with tempfile.TemporaryDirectory() as folder:
        count = arguments.frames
        scattered = [int(i) for i in np.random.default_rng(0).permutation(count)[:12]]
        print(f"{count} frames of {HEIGHT} x {WIDTH}\nkey every  order          plain  open_frames  ratio")
        for key_every in (25, 250):
            path = Path(folder) / f"{key_every}.mp4"
            make_clip(path, count, key_every)
            cases = {
                "forward": (naive_forward, range(count)),
                "last 100 back": (naive, range(count - 1, count - 101, -1)),
                "12 scattered": (naive, scattered),
            }
            opening, _ = seconds_of(lambda p=path: ours(p, []))  # type: ignore[misc]
            print(f"{key_every:9d}  opening alone           {opening:6.2f} s")
            for name, (plain, indices) in cases.items():
                slow, expected = seconds_of(lambda p=path, i=indices, f=plain: f(p, i))  # type: ignore[misc]
                fast, result = seconds_of(lambda p=path, i=indices: ours(p, i))  # type: ignore[misc]
                assert result == expected, f"the frames differ: {name}"
                print(f"{key_every:9d}  {name:13s} {slow:6.2f} s     {fast:6.2f} s {slow / fast:6.2f}")
        short, long = Path(folder) / "short.mp4", Path(folder) / "long.mp4"
        make_clip(short, 200, 250)
        make_clip(long, arguments.long, 250)
        memory = [peak_memory_backward(path) for path in (short, long)]
        print(f"peak memory backward: 200 frames {memory[0]} MB, {arguments.long} frames {memory[1]} MB,", end=" ")
        print(f"ratio {memory[1] / memory[0]:.2f}")


if __name__ == "__main__":
    main()
