"""Training from nothing on synthetic clips: samples per second, where time and memory go, whether loading keeps up.

A data set is made in a temporary folder, a model of the recipe's sizes is trained on it for some steps in this
process, and tables are printed. Time: every moment of a step belongs to one row, forward or backward. Backward, a part
begins when the gradient of its output is there and ends when that of its input is; a part whose input has none lasts
until the next one begins. Memory: weights, gradients with AdamW's state, and what a forward pass keeps for backward.
Then the same batches are loaded by a DataLoader with 0, 1 and 2 workers, alone and while the model trains: loading is
the bottleneck if steps wait for it. Peak memory is that of this process, its workers apart. Last, steps that read what
the conversations of a sample have in common once are compared with steps that read it for each of them.

    OMP_NUM_THREADS=1 python benchmarks/training_throughput.py [RECIPE] [--steps 10] [--override NAME=VALUE ...]
"""

import argparse
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
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

# Part -> its module. What is left are token merging, projectors, masks at the frame's size, losses and glue.
PARTS = {
    "visual tower": "model.vision_tower",
    "language model": "model.language_model",
    "scores of tokens": "lm_head",
    "SAM encoder": "model.sam.vision_encoder",
    "SAM decoder": "model.sam.mask_decoder",
}
REST = "everything else"
# Rows that do not go through the model.
OUTSIDE = ("sampling", "collating", "clipping, optimiser")
MIB = 2**20


class Stopwatch:
    """Gives each moment to one (row, column), the last that was switched to."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.current = (REST, "forward")
        self._since = time.perf_counter()

    def switch(self, row: str, column: str = "forward") -> None:
        now = time.perf_counter()
        self.seconds[self.current] += now - self._since
        self.current, self._since = (row, column), now

    def watch(self, part: str, module: nn.Module) -> None:
        """Switch to a part while a module runs, forward and backward."""
        inputs: list[list[Tensor]] = []

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.append(_with_gradient((args, kwargs)))
            self.switch(part)

        def end(_: nn.Module, args: Any, output: Any) -> None:
            for tensor in _with_gradient(output):
                tensor.register_hook(lambda _: self.switch(part, "backward"))
            if given := inputs.pop():
                register_multi_grad_hook(given, lambda _: self.switch(REST, "backward"))
            self.switch(REST)

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end)


def _with_gradient(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.requires_grad]


def make_parts(recipe: Recipe) -> tuple[nn.Module, VisaDataCollator, TrainingSamples]:
    """Return what the recipe trains, with random weights, and all of its samples."""
    config = model_config(recipe)
    torch.manual_seed(0)
    model = VisaForVideoSegmentation(config)
    processor = VisaProcessor.from_config(config, load_tokenizer(recipe))
    sources = load_sources(recipe.data.mixture, recipe.data.folders, cache_dir=recipe.data.cache_dir)
    samples = TrainingSamples(sources, recipe.data.mixture, 0, recipe.schedule.num_draws)
    return prepare_for_training(model, recipe.trained).train(), VisaDataCollator(processor), samples


def make_step(
    model: nn.Module, stopwatch: Stopwatch, *, packs_conversations: bool = True
) -> Callable[[dict[str, Any]], None]:
    """Return a function that does an optimiser step on one batch, as the trainer does."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(batch: dict[str, Any]) -> None:
        stopwatch.switch(REST)
        options = {"packs_conversations": packs_conversations, "skip_logits": True}
        loss = model(**batch, use_cache=False, **options).loss
        stopwatch.switch(REST, "backward")
        loss.backward()
        stopwatch.switch("clipping, optimiser")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_parts(recipe: Recipe, num_steps: int) -> None:
    """Print where the time of a step goes, and what each part keeps in memory."""
    model, collate, samples = make_parts(recipe)
    size = recipe.schedule.global_batch_size
    stopwatch = Stopwatch()
    base = unwrap_peft_model(model)
    for part, module in PARTS.items():
        stopwatch.watch(part, base.get_submodule(module))
    step = make_step(model, stopwatch)
    first = collate([samples[draw] for draw in range(size)])
    with kept_for_backward(model, stopwatch) as kept:
        step(first)  # warms up as well
    stopwatch.switch("sampling")
    stopwatch.seconds.clear()
    for number in range(1, num_steps + 1):
        stopwatch.switch("sampling")
        drawn = [samples[number * size + place] for place in range(size)]
        stopwatch.switch("collating")
        batch = collate(drawn)
        step(batch)
    stopwatch.switch(REST)
    print_times(stopwatch.seconds, num_steps, size)
    print_memory(base, first, kept)


@contextmanager
def kept_for_backward(model: nn.Module, stopwatch: Stopwatch) -> Iterator[dict[str, int]]:
    """Collect the bytes of the tensors, weights apart, that each part's forward passes keep for backward."""
    kept: dict[str, int] = defaultdict(int)
    counted = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            kept[stopwatch.current[0]] += storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def print_times(seconds: dict[tuple[str, str], float], num_steps: int, size: int) -> None:
    total = sum(seconds.values())
    print(
        f"\n{num_steps * size / total:.1f} samples a second, {1e3 * total / num_steps:.0f} ms a step of {size} samples"
    )
    print(f"  {'ms a step':<20} {'forward':>9} {'backward':>9} {'share':>8}")
    for row in ("sampling", "collating", *PARTS, REST, "clipping, optimiser"):
        forward, backward = (seconds.get((row, column), 0.0) for column in ("forward", "backward"))
        back = "" if row in OUTSIDE else f"{1e3 * backward / num_steps:.1f}"
        print(f"  {row:<20} {1e3 * forward / num_steps:9.1f} {back:>9} {(forward + backward) / total:8.1%}")


def print_memory(base: nn.Module, batch: dict[str, Any], kept: dict[str, int]) -> None:
    """Print bytes by part: of weights, of what training them takes, of what a forward pass keeps."""
    rows = {part: list(base.get_submodule(module).parameters()) for part, module in PARTS.items()}
    seen = {id(parameter) for parameters in rows.values() for parameter in parameters}
    rows[REST] = [parameter for parameter in base.parameters() if id(parameter) not in seen]
    print(f"\n  {'MiB':<20} {'weights':>9} {'training':>9} {'forward':>9}")
    for row, parameters in rows.items():
        weights = sum(parameter.nbytes for parameter in parameters)
        # A gradient and AdamW's two means.
        training = sum(3 * parameter.nbytes for parameter in parameters if parameter.requires_grad)
        print(f"  {row:<20} {weights / MIB:9.1f} {training / MIB:9.1f} {kept.get(row, 0) / MIB:9.1f}")
    data = sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    print(f"  {'a batch of data':<20} {data / MIB:29.1f}")


def time_loading(recipe: Recipe, num_steps: int) -> None:
    """Compare steps on a batch at hand with steps on batches from workers."""
    model, collate, samples = make_parts(recipe)
    size = recipe.schedule.global_batch_size
    step = make_step(model, Stopwatch())
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
            f"{1e3 * together:6.0f} ms ({together / alone:.2f} x), of which it waits {1e3 * waiting:.0f} "
            f"({waiting / together:.1%})"
        )


def compare_packing(recipe: Recipe, num_steps: int) -> None:
    """Compare steps with and without packed conversations, on the same batches, taking turns."""
    model, collate, samples = make_parts(recipe)
    size = recipe.schedule.global_batch_size
    seconds = {True: 0.0, False: 0.0}
    steps = {packs: make_step(model, Stopwatch(), packs_conversations=packs) for packs in seconds}
    for number in range(num_steps + 1):
        batch = collate([samples[number * size + place] for place in range(size)])
        for packs, step in steps.items():
            start = time.perf_counter()
            step(batch)
            seconds[packs] += (time.perf_counter() - start) * (number > 0)  # the first warms up
    packed, apart = (1e3 * seconds[packs] / num_steps for packs in (True, False))
    print(
        f"\na step with packed conversations {packed:.0f} ms, with one row for each {apart:.0f} ms: "
        f"{apart / packed:.2f} times as fast"
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
        given = [f"data.folders.synthetic={folder}", f"data.cache_dir={scratch}/cache", *args.override]
        recipe = read_recipe(args.recipe, given)
        print(f"{recipe.path.stem}, {torch.get_num_threads()} threads")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        measure_parts(recipe, args.steps)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"\npeak memory {peak:.0f} MiB, of which {before:.0f} MiB before there was a model")
        time_loading(recipe, args.steps)
        worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(f"peak memory of a worker {worker:.0f} MiB, with what it shares with this process")
        compare_packing(recipe, args.steps)


if __name__ == "__main__":
    main()
