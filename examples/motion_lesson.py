"""A lesson in motion: the visual tokens of a moving thing are to tell where it goes.

    python examples/motion_lesson.py MODEL OUT [--with-prompt]

MODEL is a checkpoint of the synthetic world whose visual tokens tell where things are (after
`visa train tiny_synthetic_words`). From the text of answers alone, its language model did not find out in hundreds of
steps that a place can be compared between frames. Here it reads visual tokens of four frames and a target, and a head
of its own asks each thing's tokens on the target frame for its motion: left, right, up, down or none. The tower stays
as it is, so each frame is encoded once: 400 steps take minutes.

Without `--with-prompt` nothing comes before the visual tokens, and the head is thrown away. With it the language
model reads the words of a prompt first, and what tells the motions apart in the head becomes what tells their words
apart in the language model's head, whose rows for "left" and "right" had become nearly the same.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from visa_hf import VisaForVideoSegmentation, VisaProcessor
from visa_hf.datasets_scripts.synthetic import ClipOptions, make_clip
from visa_hf.modeling.visual_tokens_visa import merge_visual_tokens
from visa_hf.trainer.visual_words import patch_shares, token_shares

MOTIONS = ("left", "right", "up", "down", "standing")
NUM_FRAMES, NUM_REFERENCES = 8, 4
BATCH_SIZE, WARMUP = 16, 50


class Lesson(NamedTuple):
    """Visual tokens of a clip's frames (8, L, C), how much of them K things are (8, K, L), and how these move (K,)."""

    tokens: Tensor
    shares: Tensor
    motions: Tensor


def main() -> None:
    """Read the arguments, teach, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--clips", type=int, default=1200)
    parser.add_argument("--held-out", type=int, default=150, help="first clips, which are asked for but not taught")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=9, help="of the clips")
    parser.add_argument("--with-prompt", action="store_true", help="read a prompt first, and keep the head")
    args = parser.parse_args()
    if not 0 < args.held_out < args.clips:
        parser.error(f"--held-out is {args.held_out}; it must be positive and leave some of the {args.clips} clips.")
    # Also of weights in half precision, such as those of the package.
    model = VisaForVideoSegmentation.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = VisaProcessor.from_pretrained(args.model)
    options = ClipOptions(size=(128, 128), num_frames=(12, 16), levels=(1,), num_expressions=12)
    made = (_lesson(model, processor, args.seed, index, options) for index in tqdm(range(args.clips), "clips"))
    lessons = [lesson for lesson in made if lesson is not None]
    prompt = _prompt(model, processor) if args.with_prompt else torch.zeros(0, model.config.text_config.hidden_size)
    head = teach(model, lessons, prompt, args.held_out, args.steps, args.learning_rate)
    if args.with_prompt:
        keep_head(model, processor, head)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    sys.stdout.write(f"wrote {args.out}\n")


@torch.no_grad()
def _lesson(
    model: VisaForVideoSegmentation, processor: VisaProcessor, seed: int, index: int, options: ClipOptions
) -> Lesson | None:
    """Encode frames of a clip; `None` if no answer tells the motion of a single thing."""
    clip = make_clip(seed, index, split="train", options=options)
    frames = np.linspace(0, len(clip.frames) - 1, NUM_FRAMES).round().astype(int)
    motions = {}
    for expression in clip.expressions:
        # What is asked for comes first, and may name the place of a thing: "the shape furthest to the left".
        said = expression.told.removesuffix(" [SEG].").split()
        if len(expression.objects) == 1:
            for word in set(MOTIONS) & set(said):
                motions[expression.objects[0]] = MOTIONS.index(word)
    if not motions:
        return None
    things = sorted(motions)
    pixel_values = processor.image_processor(images=[clip.frames[t] for t in frames], return_tensors="pt")
    patches = model.get_image_features(pixel_values["pixel_values"]).last_hidden_state
    side = round(patches.shape[1] ** 0.5)
    masks = torch.from_numpy(clip.masks[things][:, frames].astype(np.uint8))  # (K, 8, H, W)
    shares = torch.cat([patch_shares(masks[:, t], processor.image_processor, side) for t in range(NUM_FRAMES)])
    owners = [t for t in range(NUM_FRAMES) for _ in things]
    tokens = merge_visual_tokens(patches, model.config.merge_sizes, model.config.merge_neighbors)
    covered = token_shares(model.config, patches, shares, owners).view(NUM_FRAMES, len(things), -1)
    return Lesson(tokens, covered, torch.tensor([motions[thing] for thing in things]))


def _prompt(model: VisaForVideoSegmentation, processor: VisaProcessor) -> Tensor:
    """Embed what comes before the first visual token of a conversation: (P, D)."""
    frame = np.zeros((128, 128, 3), np.uint8)
    input_ids = processor(frame, query="the shape")["input_ids"][0]
    first = int((input_ids == model.config.image_token_id).nonzero()[0])
    return model.get_input_embeddings()(input_ids[:first]).detach()


def teach(
    model: VisaForVideoSegmentation,
    lessons: list[Lesson],
    prompt: Tensor,
    num_held_out: int,
    num_steps: int,
    learning_rate: float,
) -> torch.nn.Linear:
    """Train language model and projector; what held-out clips are answered is written every hundred steps."""
    language_model, projector = model.model.language_model, model.model.mm_projector
    torch.manual_seed(0)
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(MOTIONS))
    parameters = [*language_model.parameters(), *projector.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def ask(chosen: list[Lesson], generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, whether the answer is right, and the motion of each thing."""
        rows, shares = [], []
        for lesson in chosen:
            # One frame of each quarter, in time order, then the target.
            quarter = NUM_FRAMES // NUM_REFERENCES
            picks = [
                quarter * k + int(torch.randint(quarter, (1,), generator=generator)) for k in range(NUM_REFERENCES)
            ]
            picks.append(int(torch.randint(NUM_FRAMES, (1,), generator=generator)))
            rows.append(torch.cat([prompt, projector(lesson.tokens[picks].flatten(0, 1))]))
            shares.append(lesson.shares[picks[-1]])
        states = language_model(inputs_embeds=torch.stack(rows), use_cache=False).last_hidden_state
        scores = head(states[:, -shares[0].shape[1] :]).log_softmax(dim=-1)
        weights = [share.square() / share.square().sum(dim=1, keepdim=True).clamp(min=1e-6) for share in shares]
        told = torch.cat([weight @ score for weight, score in zip(weights, scores, strict=True)])
        motions = torch.cat([lesson.motions for lesson in chosen])
        return -told.gather(1, motions[:, None])[:, 0], told.argmax(dim=1) == motions, motions

    generator = torch.Generator().manual_seed(0)
    for step in tqdm(range(num_steps), "steps"):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / WARMUP)
        numbers = torch.randint(num_held_out, len(lessons), (BATCH_SIZE,), generator=generator).tolist()
        loss = ask([lessons[number] for number in numbers], generator)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            with torch.no_grad():
                losses, is_right, motions = ask(lessons[:num_held_out], torch.Generator().manual_seed(1))
            is_moving = motions < MOTIONS.index("standing")
            tqdm.write(
                f"step {step + 1}: loss {loss.item():.3f}; held out: {losses.mean():.3f}, moving ones right "
                f"{is_right[is_moving].float().mean():.0%}, standing ones {is_right[~is_moving].float().mean():.0%}"
            )
    return head


@torch.no_grad()
def keep_head(model: VisaForVideoSegmentation, processor: VisaProcessor, head: torch.nn.Linear) -> None:
    """Tell the words of motion apart, in the language model's head, by what tells motions apart in `head`."""
    token_of = {word: processor.tokenizer.convert_tokens_to_ids(f"▁{word}") for word in (*MOTIONS, "moving")}
    weight = model.lm_head.weight
    directions = [token_of[word] for word in MOTIONS[:-1]]
    common = head.weight[:-1].mean(dim=0)
    weight[directions] = weight[directions].mean(dim=0) + head.weight[:-1] - common
    moving, standing = token_of["moving"], token_of["standing"]
    middle, half = weight[[moving, standing]].mean(dim=0), (common - head.weight[-1]) / 2
    weight[moving], weight[standing] = middle + half, middle - half


if __name__ == "__main__":
    main()
