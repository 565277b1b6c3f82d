"""Draw what the bundled model makes of the demo clip: a row of frames for each sentence (docs/demo.jpg).

python examples/demo_picture.py docs/demo.jpg
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visa_hf import segment
from visa_hf.bundled import BUNDLED_CLIP
from visa_hf.modeling.frame_source_visa import open_frames
from visa_hf.rendering import contact_sheet

# Those of `make demo`.
QUERIES = ("the green shape", "the shape that would need the least paint", "the green shape moving right")
COLUMNS = 6
LINE = 22  # pixels of a line of text


def main() -> None:
    """Read the arguments and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    args = parser.parse_args()
    source = open_frames(str(BUNDLED_CLIP))
    times = np.linspace(0, len(source) - 1, COLUMNS).round().astype(int)
    frames = [source[int(time)] for time in times]
    rows = []
    for query, result in zip(QUERIES, segment(str(BUNDLED_CLIP), list(QUERIES)), strict=True):
        row = contact_sheet(frames, [result.masks[time][None] for time in times], columns=COLUMNS)
        canvas = Image.new("RGB", (row.shape[1], row.shape[0] + LINE), "white")
        canvas.paste(Image.fromarray(row), (0, LINE))
        text = f"“{query}”    {result.answer}"
        ImageDraw.Draw(canvas).text((4, 2), text, fill="black", font=ImageFont.load_default(size=16))
        rows.append(np.asarray(canvas))
    Image.fromarray(np.concatenate(rows)).save(args.output, quality=88)


if __name__ == "__main__":
    main()
