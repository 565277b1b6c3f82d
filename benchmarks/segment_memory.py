"""Peak memory of `segment` on a long clip against a short one: it must not grow with the length of the video.

    python benchmarks/segment_memory.py [--short 200] [--long 2000]

Each clip is segmented in a process of its own, with a random model that answers anything with a mask, and the peak of
its resident memory is read from the operating system. What may grow are the packed masks and the times of the frames.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

HEIGHT, WIDTH = 240, 432


def write_clip(path: Path, num_frames: int) -> None:
    """A textured disk that moves over a textured ground, H.264 at 25 frames per second."""
    random = np.random.default_rng(0)
    ground = random.integers(0, 160, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(num_frames):
            centre = WIDTH / 2 + 120 * np.sin(number / 40)
            disk = (y - HEIGHT / 2) ** 2 + (x - centre) ** 2 < 50**2
            frame = np.where(disk[..., None], 255 - ground // 2, ground)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def segment_once(path: str) -> None:
    """Segment a clip and print the peak of this process's memory in MiB, the seconds taken, and the masks' bytes."""
    from tests.random_model import make_demo_model
    from visa_hf import segment

    model, processor = make_demo_model()
    began = time.monotonic()
    result = segment(path, "the disk", model=model, processor=processor)
    seconds = time.monotonic() - began
    packed = sum(len(mask.data) for masks in result.object_masks for mask in masks)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds, packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", type=int, default=200, help="frames of the short clip")
    parser.add_argument("--long", type=int, default=2000, help="frames of the long clip")
    parser.add_argument("--clip", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clip:
        segment_once(args.clip)
        return
    peaks = []
    print(f"{'frames':>7} {'peak MiB':>9} {'seconds':>8} {'packed masks KiB':>17}")
    with tempfile.TemporaryDirectory() as folder:
        for num_frames in (args.short, args.long):
            clip = Path(folder) / f"{num_frames}.mp4"
            write_clip(clip, num_frames)
            run = [sys.executable, __file__, "--clip", str(clip)]
            done = subprocess.run(run, capture_output=True, text=True, check=True)
            peak, seconds, packed = (float(word) for word in done.stdout.split())
            print(f"{num_frames:7d} {peak:9.0f} {seconds:8.1f} {packed / 1024:17.0f}")
            peaks.append(peak)
    print(f"ratio of the peaks: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
