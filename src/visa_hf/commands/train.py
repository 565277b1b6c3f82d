"""`visa train RECIPE -o OUT`: a training as a recipe says it, alone or under a launcher."""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa train` takes."""
    parser.description = "Train or fine-tune as a recipe says. A training that was stopped goes on where it was."
    parser.epilog = (
        "Several processes: `torchrun --nproc_per_node=8 --no-python visa train RECIPE -o OUT`, and likewise "
        "`accelerate launch` and `deepspeed`. OUT holds recipe.yaml, checkpoint-N folders, logs for TensorBoard, and "
        "at the end `final`: an adapter, which `visa merge` folds into a model, or a whole model."
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
    # Given by the launcher of DeepSpeed; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
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
    from visa_hf.trainer.recipe import read_recipe

    recipe = read_recipe(args.recipe, args.override)
    if args.dry_run:
        from visa_hf.trainer.plan import make_plan
        from visa_hf.trainer.run import model_config

        world_size = args.processes or int(os.environ.get("WORLD_SIZE", "1"))
        print(make_plan(recipe, model_config(recipe), world_size))
        return 0
    if args.output is None:
        raise ValueError("No output folder is given. Say where the training is kept: -o OUT.")
    from visa_hf.trainer.run import run_recipe

    final = run_recipe(recipe, args.output)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"wrote {final}")
    return 0
