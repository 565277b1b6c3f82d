"""A lesson in looks: the visual tower is to tell colour, form and texture of the shapes that it sees.

    python examples/looks_lesson.py MODEL OUT

MODEL is a checkpoint of the synthetic world. Its tower learns colours and textures soon, forms slowly: a patch shows
but a corner or an edge. Here nothing else is trained and no answer is read, so a step costs half of one of
`visa train tiny_synthetic_words`: pictures are drawn once and kept, each time turned or mirrored anew (a circle stays
a circle), and each shape is asked for the words of its looks alone. Groups and layout count as they do there
(src/visa_hf/trainer/visual_words.py), so that the patches of a shape stay together.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from visa_hf import VisaForVideoSegmentation, VisaProcessor
from visa_hf.datasets_scripts.synthetic import ClipOptions, make_clip
from visa_hf.datasets_scripts.synthetic_scene import ATTRIBUTES
from visa_hf.trainer.visual_words import grouping_loss, layout_loss, patch_groups, patch_shares

BATCH_SIZE, WARMUP = 16, 50
# Smaller ones, such as what another shape leaves to be seen, cannot be told.
_LEAST_PIXELS = 60


class Picture(NamedTuple):
    """A picture (H, W, 3), masks of its K shapes (K, H, W), and the number of each word of their looks (K, 3)."""

    frame: np.ndarray
    masks: Tensor
    looks: Tensor


def main() -> None:
    """Read the arguments, teach, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--pictures", type=int, default=6000)
    parser.add_argument("--held-out", type=int, default=400, help="first pictures, which are asked for but not taught")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=77, help="of the pictures")
    args = parser.parse_args()
    if not 0 < args.held_out < args.pictures:
        parser.error(
            f"--held-out is {args.held_out}; it must be positive and leave some of the {args.pictures} pictures."
        )
    # Also of weights in half precision, such as those of the package.
    model = VisaForVideoSegmentation.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = VisaProcessor.from_pretrained(args.model)
    options = ClipOptions(size=(128, 128), num_frames=(1, 1), levels=(1,), num_expressions=1)
    made = (_picture(args.seed, index, options) for index in tqdm(range(args.pictures), "pictures"))
    pictures = [picture for picture in made if len(picture.looks)]
    teach(model, processor, pictures, args.held_out, args.steps, args.learning_rate)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    sys.stdout.write(f"wrote {args.out}\n")


def _picture(seed: int, index: int, options: ClipOptions) -> Picture:
    clip = make_clip(seed, index, split="train", options=options)
    masks = clip.masks[:, 0]
    seen = [number for number, mask in enumerate(masks) if mask.sum() >= _LEAST_PIXELS]
    looks = [
        [words.index(getattr(clip.objects[number], name)) for name, words in ATTRIBUTES.items()] for number in seen
    ]
    return Picture(clip.frames[0], torch.from_numpy(masks[seen]), torch.tensor(looks).reshape(-1, len(ATTRIBUTES)))


def teach(
    model: VisaForVideoSegmentation,
    processor: VisaProcessor,
    pictures: list[Picture],
    num_held_out: int,
    num_steps: int,
    learning_rate: float,
) -> dict[str, float]:
    """Train tower and projector; return how many shapes of held-out pictures are told by colour, form, texture."""
    network = model.model
    side = round(model.config.num_patches**0.5)
    rows = {
        name: [processor.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in words]
        for name, words in ATTRIBUTES.items()
    }
    torch.manual_seed(0)
    parameters = [*network.vision_tower.parameters(), *network.mm_projector.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * np.cos(np.pi * step / num_steps))
    )

    def ask(chosen: list[Picture], generator: np.random.Generator | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and whether each shape is told right, by attribute."""
        turned = [_turned(picture, generator) for picture in chosen]
        pixels = processor.image_processor(images=[picture.frame for picture in turned], return_tensors="pt")
        patches = network.get_image_features(pixels["pixel_values"]).last_hidden_state
        features, layouts = [], []
        for picture, states in zip(turned, patches, strict=True):
            shares = patch_shares(picture.masks, processor.image_processor, side)
            groups = patch_groups(shares, side)
            layouts.append(grouping_loss(states, groups) + layout_loss(states, groups, side))
            features.append((shares / shares.sum(dim=1, keepdim=True)) @ states)
        scores = model.lm_head(network.mm_projector(torch.cat(features)))
        looks = torch.cat([picture.looks for picture in turned])
        loss, is_right = torch.stack(layouts).mean(), {}
        for column, (name, words) in enumerate(rows.items()):
            # Among the words of colours, which colour is it?
            loss = loss + F.cross_entropy(scores[:, words], looks[:, column])
            is_right[name] = scores[:, words].argmax(dim=1) == looks[:, column]
        return loss, is_right

    @torch.no_grad()
    def held_out() -> dict[str, float]:
        answers = [
            ask(pictures[first : min(first + 50, num_held_out)], None)[1] for first in range(0, num_held_out, 50)
        ]
        return {name: torch.cat([answer[name] for answer in answers]).float().mean().item() for name in rows}

    generator = np.random.default_rng(0)
    for step in tqdm(range(num_steps), "steps"):
        numbers = generator.integers(num_held_out, len(pictures), BATCH_SIZE)
        loss, _ = ask([pictures[number] for number in numbers], generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 250 == 0:
            told = ", ".join(f"{name} {share:.1%}" for name, share in held_out().items())
            tqdm.write(f"step {step + 1}: loss {loss.item():.3f}; held out: {told}")
    return held_out()


def _turned(picture: Picture, generator: np.random.Generator | None) -> Picture:
    """Mirror and turn a picture at random, so that all eight ways are as likely."""
    if generator is None:
        return picture
    frame, masks = picture.frame, picture.masks
    flips = generator.random(3) < 0.5
    for axis in (0, 1):
        if flips[axis]:
            frame, masks = np.flip(frame, axis), masks.flip(1 + axis)
    if flips[2]:
        frame, masks = frame.swapaxes(0, 1), masks.transpose(1, 2)
    return Picture(np.ascontiguousarray(frame), masks, picture.looks)


if __name__ == "__main__":
    main()
