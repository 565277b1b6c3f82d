"""Training from nothing on synthetic clips: samples per second, where the time goes, and whether loading keeps up.

A data set is made in a temporary folder, a model of the recipe's sizes is trained on it for some steps in this
process, and a table is printed: sampling and collating, each part's forward, backward, optimiser. Then the same
batches are loaded by a DataLoader with 0, 1 and 2 workers, alone and while the model trains: loading is the
bottleneck if steps wait for it. Peak memory is that of this process, its workers apart.

    OMP_NUM_THREADS=1 python benchmarks/training_throughput.py [RECIPE] [--steps 10] [--override NAME=VALUE ...]
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import unwrap_peft_model

from visa_hf.datasets_scripts.mixture import TrainingSamples
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset
from visa_hf.datasets_scripts.training_sources import load_sources
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.trainer import VisaDataCollator, prepare_for_training
from visa_hf.trainer.recipe import Recipe, read_recipe
from visa_hf.trainer.run import load_tokenizer, model_config

# Part of the forward pass -> its module. What is left are masks at the frame's size, losses and glue.
PARTS = {
    "visual tower": "model.vision_tower",
    "language model": "model.language_model",
    "scores of tokens": "lm_head",
    "SAM encoder": "model.sam.vision_encoder",
    "SAM decoder": "model.sam.mask_decoder",
}


class Clock:
    """Adds up seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def watch(self, name: str, module: nn.Module) -> None:
        """Measure each call of a module."""
        started: list[float] = []
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))

        def stop(*_: Any) -> None:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started.pop()

        module.register_forward_hook(stop)


def make_parts(recipe: Recipe) -> tuple[nn.Module, VisaDataCollator, TrainingSamples]:
    """Return what the recipe trains, with random weights, and all of its samples."""
    config = model_config(recipe)
    torch.manual_seed(0)
    model = VisaForVideoSegmentation(config)
    processor = VisaProcessor.from_config(config, load_tokenizer(recipe))
    sources = load_sources(recipe.data.mixture, recipe.data.folders, cache_dir=recipe.data.cache_dir)
    samples = TrainingSamples(sources, recipe.data.mixture, 0, recipe.schedule.num_draws)
    return prepare_for_training(model, recipe.trained).train(), VisaDataCollator(processor), samples


def make_step(model: nn.Module, clock: Clock) -> Callable[[dict[str, Any]], None]:
    """Return a function that does an optimiser step on one batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(batch: dict[str, Any]) -> None:
        with clock.measure("forward"):
            loss = model(**batch, use_cache=False).loss
        with clock.measure("backward"):
            loss.backward()
        with clock.measure("optimiser"):
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def time_parts(recipe: Recipe, num_steps: int) -> None:
    model, collate, samples = make_parts(recipe)
    size = recipe.schedule.global_batch_size
    clock = Clock()
    base = unwrap_peft_model(model)
    for name, module in PARTS.items():
        clock.watch(name, base.get_submodule(module))
    step = make_step(model, clock)
    step(collate([samples[draw] for draw in range(size)]))  # warm up
    clock.seconds.clear()
    start = time.perf_counter()
    for number in range(1, num_steps + 1):
        with clock.measure("sampling"):
            drawn = [samples[number * size + place] for place in range(size)]
        with clock.measure("collating"):
            batch = collate(drawn)
        step(batch)
    total = time.perf_counter() - start
    seconds = clock.seconds
    forward = seconds.pop("forward")
    seconds["masks, losses, merging"] = forward - sum(seconds.get(name, 0.0) for name in PARTS)
    print(f"\n{num_steps * size / total:.1f} samples a second, {total / num_steps:.2f} s a step of {size} samples")
    for name in ("sampling", "collating", *PARTS, "masks, losses, merging", "backward", "optimiser"):
        print(f"  {name:<24} {1e3 * seconds[name] / num_steps:9.1f} ms {seconds[name] / total:7.1%}")


def time_loading(recipe: Recipe, num_steps: int) -> None:
    """Compare steps on a batch at hand with steps on batches from workers."""
    model, collate, samples = make_parts(recipe)
    size = recipe.schedule.global_batch_size
    step = make_step(model, Clock())
    batches = [collate([samples[n * size + place] for place in range(size)]) for n in range(num_steps + 1)]
    step(batches[0])
    start = time.perf_counter()
    for batch in batches[1:]:
        step(batch)
    alone = (time.perf_counter() - start) / num_steps
    print(f"\na step on batches at hand: {1e3 * alone:.0f} ms")
    for num_workers in (0, 1, 2):
        loader = DataLoader(samples, batch_size=size, collate_fn=collate, num_workers=num_workers)
        loading, _ = time_steps(loader, None, num_steps)
        together, waiting = time_steps(loader, step, num_steps)
        print(
            f"  {num_workers} workers: a batch every {1e3 * loading:6.0f} ms without training; a step takes "
            f"{1e3 * together:6.0f} ms ({together / alone:.2f} x), of which it waits {1e3 * waiting:.0f}"
        )


def time_steps(
    loader: DataLoader, step: Callable[[dict[str, Any]], None] | None, num_steps: int
) -> tuple[float, float]:
    """Return the mean seconds from one batch to the next, with or without a step, and those spent waiting for it."""
    batches = iter(loader)
    first = next(batches)
    if step is not None:
        step(first)
    waiting = 0.0
    start = time.perf_counter()
    for _ in range(num_steps):
        asked = time.perf_counter()
        batch = next(batches)
        waiting += time.perf_counter() - asked
        if step is not None:
            step(batch)
    total = time.perf_counter() - start
    return total / num_steps, waiting / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="tiny_synthetic")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--override", action="append", default=[])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "synthetic"
        write_dataset(folder, num_videos={"train": 32}, options=ClipOptions(num_frames=(6, 12)), show_progress=False)
        given = [f"data.folders.revos={folder}", f"data.cache_dir={scratch}/cache", *args.override]
        recipe = read_recipe(args.recipe, given)
        print(f"{recipe.path.stem}, {torch.get_num_threads()} threads")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        time_parts(recipe, args.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory {peak:.0f} MiB, of which {before:.0f} MiB before there was a model")
        time_loading(recipe, args.steps)


if __name__ == "__main__":
    main()
