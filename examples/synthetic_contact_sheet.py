"""Draw clips of the synthetic world with what is said about them: one row a sentence, its objects marked.

python examples/synthetic_contact_sheet.py sheet.png --seed 0 --first 0 --clips 3 --level 3
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw

from visa_hf.datasets_scripts.synthetic import SPLITS, ClipOptions, SyntheticClip, make_clip
from visa_hf.rendering import contact_sheet

COLUMNS = 8
LINE = 16  # pixels of a line of text


def draw_clip(clip: SyntheticClip, num_expressions: int) -> np.ndarray:
    """Return an RGB picture: for each sentence a line of text and some frames with its masks."""
    times = np.linspace(0, len(clip.frames) - 1, COLUMNS).round().astype(int)
    rows = []
    for expression in clip.expressions[:num_expressions]:
        masks = clip.masks[list(expression.objects)][:, times].transpose(1, 0, 2, 3)  # (columns, objects, H, W)
        row = contact_sheet(list(clip.frames[times]), list(masks), columns=COLUMNS)
        canvas = Image.new("RGB", (row.shape[1], row.shape[0] + LINE), "white")
        canvas.paste(Image.fromarray(row), (0, LINE))
        text = f"{clip.name}  type {expression.type_id}, {expression.idea}:  {expression.text}   [{expression.answer}]"
        ImageDraw.Draw(canvas).text((2, 1), text, fill="black")
        rows.append(np.asarray(canvas))
    return np.concatenate(rows)


def main() -> None:
    """Write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--clips", type=int, default=3)
    parser.add_argument("--expressions", type=int, default=3)
    parser.add_argument("--level", type=int, default=3)
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    options = ClipOptions(
        size=(args.side, args.side), num_frames=(args.frames, args.frames), levels=(args.level,), num_expressions=12
    )
    clips = [
        make_clip(args.seed, index, split=args.split, options=options)
        for index in range(args.first, args.first + args.clips)
    ]
    Image.fromarray(np.concatenate([draw_clip(clip, args.expressions) for clip in clips])).save(args.output)


if __name__ == "__main__":
    main()
