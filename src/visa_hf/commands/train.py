"""`visa train RECIPE -o OUT`: a training as a recipe says it, alone or under a launcher."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa train` takes."""
    parser.description = "Train or fine-tune as a recipe says. A training that was stopped goes on where it was."
    parser.epilog = (
        "Several processes: `torchrun --nproc_per_node=8 --no-python visa train RECIPE -o OUT`, and likewise "
        "`accelerate launch -m visa_hf train` and `deepspeed --no_local_rank --module visa_hf train`. OUT holds "
        "recipe.yaml, checkpoint-N folders, logs for TensorBoard, and at the end `final`: an adapter, which `visa "
        "merge` folds into a model, a whole model, or a tracker, which `visa merge --tracker` puts into a model."
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a bundled recipe such as visa_7b")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, help="folder of the training")
    parser.add_argument(
        "--override",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="replace a value of the recipe, such as arguments.learning_rate=1e-4; may be repeated",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what the training would be, and stop")
    parser.add_argument(
        "--processes", metavar="N", type=int, help="processes of the plan that --dry-run prints (default: 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what `visa train` was asked to.

    Args:
        args (`argparse.Namespace`): the parsed arguments.

    Returns:
        `int`: the exit code, 0.

    Raises:
        ValueError, OSError, ImportError: the recipe, its data or its model cannot be used.
    """
    _quieten()
    from visa_hf.trainer.tracker_recipe import is_tracker_recipe

    plan, train = (_tracker if is_tracker_recipe(args.recipe, args.override) else _visa)(args)
    if args.dry_run:
        world_size = int(os.environ.get("WORLD_SIZE", "1")) if args.processes is None else args.processes
        if world_size < 1:
            raise ValueError(f"--processes is {world_size} but must be at least 1.")
        print(plan(world_size))
        return 0
    if args.output is None:
        raise ValueError("No output folder is given. Say where the training is kept: -o OUT.")
    try:
        final = train(args.output)
    except KeyboardInterrupt:
        from visa_hf.trainer.checkpoints import find_last_checkpoint

        last = find_last_checkpoint(args.output)
        where = "begins again: there is no whole checkpoint yet" if last is None else f"goes on from `{last}`"
        raise KeyboardInterrupt(f"The same command {where}.") from None
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"wrote {final}")
    return 0


def _visa(args: argparse.Namespace) -> tuple[Callable[[int], object], Callable[[Path], Path]]:
    """Return what makes the plan of a VISA's recipe, and what trains."""
    from visa_hf.trainer.plan import make_plan
    from visa_hf.trainer.recipe import read_recipe
    from visa_hf.trainer.run import model_config, run_recipe

    recipe = read_recipe(args.recipe, args.override)
    return lambda world_size: make_plan(recipe, model_config(recipe), world_size), partial(run_recipe, recipe)


def _tracker(args: argparse.Namespace) -> tuple[Callable[[int], object], Callable[[Path], Path]]:
    """Return what makes the plan of a tracker's recipe, and what trains."""
    from visa_hf.trainer.tracker_recipe import read_tracker_recipe
    from visa_hf.trainer.tracker_run import make_tracker_plan, run_tracker_recipe

    recipe = read_tracker_recipe(args.recipe, args.override)
    return partial(make_tracker_plan, recipe), partial(run_tracker_recipe, recipe)


def _quieten() -> None:
    """Leave out what tells a user nothing: warnings that are not about the user's doing, progress bars in a file."""
    # DeepSpeed 0.19 calls what PyTorch 2.13 calls by new names.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not sys.stderr.isatty():
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
