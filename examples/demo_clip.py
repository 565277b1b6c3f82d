"""Write the clip of `make demo`: moving shapes of the synthetic world, drawn larger than what the model learnt from.

    python examples/demo_clip.py src/visa_hf/assets/clip.mp4

The scene belongs to the split "valid" of a seed of its own: no training has shown it. Of the first nine it was picked
because the bundled model gets the three sentences of the demo right.
"""

import argparse
import sys
from pathlib import Path

import av
import numpy as np

from visa_hf.datasets_scripts.synthetic import ClipOptions, SyntheticClip, make_clip

SEED, INDEX = 2026, 2
FRAMES_PER_SECOND = 12
OPTIONS = ClipOptions(size=(256, 256), num_frames=(36, 36), levels=(1,), num_expressions=12)


def demo_clip(index: int = INDEX) -> SyntheticClip:
    """Return the clip, with its true masks and what may be said about it."""
    return make_clip(SEED, index, split="valid", options=OPTIONS)


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write frames (T, H, W, 3), uint8, as H.264."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "16", "preset": "veryslow"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    """Read the arguments, write the clip, and print what may be said about it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--index", type=int, default=INDEX, help="another clip of the same seed")
    args = parser.parse_args()
    clip = demo_clip(args.index)
    write_video(args.output, clip.frames)
    for expression in clip.expressions:
        sys.stdout.write(f"type {expression.type_id}: {expression.text} -> {expression.answer}\n")


if __name__ == "__main__":
    main()
