"""`visa data check | push | synthesize`: data sets, from a folder of your own to one on the Hub.

Parses arguments and prints; the work is done in `visa_hf.datasets_scripts`, which is loaded when a command runs.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa data` takes."""
    parser.description = "Check your own data, publish a data set, make a synthetic one."
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="find everything that is wrong with your own data",
        description="Read the JSONL files of a folder and all that they name, and print a line for each problem: "
        "file:line: what is wrong. The exit code is 1 if there is any, else 0.",
    )
    check.add_argument("folder", metavar="DIR", type=_path, help="folder with train.jsonl, valid.jsonl, ...")
    check.add_argument("--decode", action="store_true", help="decode every frame of every video, to find damage")
    check.add_argument("--preview", metavar="OUT.jpg", type=_path, help="draw some of the masks over their frames")
    check.add_argument("-q", "--quiet", action="store_true", help="print the problems alone")
    check.set_defaults(run=run_check)

    push = commands.add_parser(
        "push",
        help="publish a data set as Parquet files",
        description="Prepare a data set and write it as Parquet files, which plain `load_dataset` reads: to the Hub, "
        "to a folder, or both.",
    )
    push.add_argument("dataset", metavar="DATASET", help="revos, mevis, own_data, ...")
    push.add_argument("--data-dir", metavar="DIR", type=_path, required=True, help="folder that holds the data set")
    push.add_argument("--repo", metavar="USER/NAME", help="repository on the Hub")
    push.add_argument("--private", action="store_true", help="make the repository private; refuse a public one")
    push.add_argument("--output", metavar="FOLDER", type=_path, help="folder to write; it must not exist or be empty")
    push.add_argument(
        "--with-frames", action="store_true", help="put images and video files in as well, byte for byte"
    )
    push.add_argument("--license", metavar="ID", help="licence for the card, as the Hub names it: cc-by-4.0")
    push.add_argument("--source", metavar="TEXT", help="origin for the card: a URL, or words")
    push.add_argument("--on-error", choices=("raise", "skip"), default="raise", help="what to do about unusable rows")
    push.add_argument("--cache-dir", metavar="DIR", type=_path, help="where prepared rows are kept")
    push.add_argument("--workers", metavar="N", type=int, help="processes that prepare")
    push.set_defaults(run=run_push)

    synthesize = commands.add_parser(
        "synthesize",
        help="make a data set of moving shapes",
        description="Draw clips of moving shapes, with expressions and masks, in the on-disk format of ReVOS.",
    )
    synthesize.add_argument("output", metavar="OUT", type=_path, help="folder to write")
    synthesize.add_argument("--videos", metavar="N", type=int, default=100, help="for training (default: %(default)s)")
    synthesize.add_argument(
        "--valid-videos", metavar="N", type=int, default=20, help="for validation (default: %(default)s)"
    )
    synthesize.add_argument(
        "--unseen-videos", metavar="N", type=int, default=0, help="of compositions never trained on (default: 0)"
    )
    synthesize.add_argument(
        "--size", metavar="HxW", type=_size, help="height and width of the frames, in pixels (default: 128x128)"
    )
    synthesize.add_argument(
        "--frames", metavar="N-M", type=_range, help="least and most frames of a clip (default: 16-24)"
    )
    synthesize.add_argument(
        "--levels", metavar="N,N", type=_levels, help="kinds of clips, from 1 (easiest) to 3 (default: 1,2,3)"
    )
    synthesize.add_argument("--expressions", metavar="N", type=int, help="most sentences of a clip (default: 10)")
    synthesize.add_argument(
        "--idea-weights",
        metavar="IDEA=W,...",
        type=_weights,
        help="how often ideas of sentences are drawn against the others: place=3,size=2.5",
    )
    synthesize.add_argument(
        "--look-weight",
        metavar="W",
        type=float,
        help="how often sentences that name one property of looks more are drawn: 0.2 for plainer ones (default: 1)",
    )
    synthesize.add_argument("--seed", metavar="N", type=int, default=0, help="of all choices (default: %(default)s)")
    synthesize.add_argument("--workers", metavar="N", type=int, default=1, help="processes that draw")
    synthesize.set_defaults(run=run_synthesize)


def run_check(args: argparse.Namespace) -> int:
    """Do what `visa data check` was asked to; returns 1 if something is wrong with the data."""
    with _naming_the_extra():
        from visa_hf.datasets_scripts.own_data_check import check_preview_name, draw_preview, inspect_own_data

    if args.preview is not None:
        check_preview_name(args.preview)
    report = inspect_own_data(args.folder, decode=args.decode, progress=not args.quiet and sys.stderr.isatty())
    for problem in report.problems:
        print(problem)
    if not args.quiet:
        print(report.summary())
    if args.preview is not None:
        count = draw_preview(report, args.folder, args.preview)
        if not args.quiet:
            drawn = f"drew {count} masks in {args.preview}"
            print(drawn if count else "drew no preview: no line that is in order has a mask")
    return 1 if report.problems else 0


def run_push(args: argparse.Namespace) -> int:
    """Do what `visa data push` was asked to."""
    if args.repo is None and args.output is None:
        raise ValueError("Neither --repo nor --output is given. Say where to put the files.")
    if args.private and args.repo is None:
        raise ValueError("--private is for a repository. Give --repo USER/NAME as well.")
    with _naming_the_extra():
        from visa_hf.datasets_scripts.publish import export_dataset
        from visa_hf.datasets_scripts.publish_hub import check_login, push_folder

    if args.repo is not None:
        check_login(args.repo)
    with tempfile.TemporaryDirectory(prefix="visa-push-") as scratch:
        folder = export_dataset(
            args.dataset,
            args.data_dir,
            args.output or Path(scratch) / "dataset",
            with_frames=args.with_frames,
            licence=args.license,
            source=args.source,
            on_error=args.on_error,
            cache_dir=args.cache_dir,
            num_proc=args.workers,
        )
        if args.output is not None:
            print(f"wrote {folder}")
        if args.repo is not None:
            print(f"pushed {push_folder(folder, args.repo, private=args.private)}")
    return 0


def run_synthesize(args: argparse.Namespace) -> int:
    """Do what `visa data synthesize` was asked to."""
    with _naming_the_extra():
        from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset

    given = {
        "size": args.size,
        "num_frames": args.frames,
        "levels": args.levels,
        "num_expressions": args.expressions,
        "idea_weights": args.idea_weights,
        "look_weight": args.look_weight,
    }
    write_dataset(
        args.output,
        num_videos={"train": args.videos, "valid": args.valid_videos, "unseen": args.unseen_videos},
        seed=args.seed,
        options=ClipOptions(**{name: value for name, value in given.items() if value is not None}),
        num_proc=args.workers,
        show_progress=sys.stderr.isatty(),
    )
    print(f"wrote {args.output}")
    return 0


@contextmanager
def _naming_the_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if error.name != "datasets":
            raise
        raise ImportError("`visa data` needs the package `datasets`: `pip install visa-hf[data]`.") from error


def _levels(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(level) for level in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of levels; give numbers, like 1,2") from error


def _weights(text: str) -> dict[str, float]:
    weights: dict[str, float] = {}
    for part in text.split(","):
        idea, _, weight = part.partition("=")
        try:
            weights[idea.strip()] = float(weight)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{part!r} is no weight of an idea; give IDEA=W, like place=3") from error
    return weights


def _size(text: str) -> tuple[int, int]:
    height, by, width = text.partition("x")
    if not (by and height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give height x width, like 128x128")
    return int(height), int(width)


def _range(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    if not (least.isdecimal() and (most.isdecimal() or not dash)):
        raise argparse.ArgumentTypeError(f"{text!r} is no range; give least and most, like 16-24, or one number")
    return int(least), int(most or least)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)
