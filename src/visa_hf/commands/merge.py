"""`visa merge FOLDER -o OUT`: what was trained put into its model, as a plain folder for `from_pretrained`."""

import argparse
from pathlib import Path

_DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa merge` takes."""
    parser.description = (
        "Fold the adapter of a training into the model that it was trained on, put a trained tracker into a model, or "
        "both."
    )
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        type=Path,
        help="`final` or a checkpoint-N of a LoRA training; with --tracker also a whole model",
    )
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="folder to make")
    parser.add_argument("--base", metavar="MODEL", help="the model that was trained, if it is not where it was")
    parser.add_argument("--tracker", metavar="FOLDER", type=Path, help="`final` of a tracker's training, to put in")
    parser.add_argument("--dtype", choices=_DTYPES, help="number format (default: that of the model)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what `visa merge` was asked to.

    Args:
        args (`argparse.Namespace`): the parsed arguments.

    Returns:
        `int`: the exit code, 0.

    Raises:
        ValueError, OSError, ImportError: the adapter or its model cannot be used.
    """
    import torch

    dtype = args.dtype and getattr(torch, args.dtype)
    if args.tracker is None:
        from visa_hf.trainer.checkpoints import merge_adapter

        merge_adapter(args.folder, args.output, base=args.base, dtype=dtype)
    else:
        from visa_hf.trainer.tracker_run import replace_tracker

        replace_tracker(args.folder, args.tracker, args.output, base=args.base, dtype=dtype)
    print(f"wrote {args.output}")
    return 0
