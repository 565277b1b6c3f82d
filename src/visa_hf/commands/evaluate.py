"""`visa evaluate`: predict a benchmark, or take predictions from a folder, and score them.

Parses arguments and prints; the work is done in `visa_hf.evaluation`. Several processes share the predictions when
`torchrun` or `accelerate launch` starts the command; the first of them scores.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

DATASETS = (
    "revos",
    "mevis",
    "ref_youtube_vos",
    "ref_davis17",
    "reason_seg",
    "refcoco",
    "refcoco+",
    "refcocog",
    "own_data",
    "synthetic",
)
SAMPLERS = ("middle", "first", "last", "visa", "oracle")
# Scoring so few expressions takes less time than starting processes for it.
_FEW_EXPRESSIONS, _MAX_WORKERS = 300, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa evaluate` takes."""
    parser.description = "Predict the masks of a data set and score them, or score a folder of predictions."
    parser.epilog = (
        "OUT holds Annotations/VIDEO/EXPRESSION/FRAME.png, predictions.jsonl, scores.json, scores.csv and "
        "report/index.html; for splits that a server scores, submission.zip in place of scores. Start the same "
        "command again to continue an interrupted run. On several GPUs or machines: `torchrun --nproc-per-node N -m "
        "visa_hf evaluate ...`, or `accelerate launch -m visa_hf evaluate ...`."
    )
    parser.add_argument("--model", metavar="M", help="folder or Hub id of a checkpoint")
    parser.add_argument(
        "--predictions", metavar="FOLDER", type=Path, help="score these instead: PNGs, or a predictions.jsonl"
    )
    parser.add_argument("--dataset", required=True, choices=DATASETS, help="what to measure on")
    parser.add_argument("--data-dir", metavar="D", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--split", required=True, help="valid, valid_u, val, ...: as the data set calls it")
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="folder to write")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first N videos")
    parser.add_argument("--cache-dir", metavar="DIR", type=Path, help="where prepared data sets are kept")
    parser.add_argument("-q", "--quiet", action="store_true", help="show no progress")

    predicting = parser.add_argument_group("predicting")
    predicting.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    predicting.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="number format (default: that of the checkpoint)"
    )
    predicting.add_argument(
        "--threshold", metavar="P", type=float, default=0.5, help="probability on the target frame (default: 0.5)"
    )
    chosen = predicting.add_mutually_exclusive_group()
    chosen.add_argument(
        "--sampler",
        choices=SAMPLERS,
        default="middle",
        help="who chooses the target frame: the middle one (default), the first or the last one; visa: the "
        "checkpoint's language model, asked where in the video the thing is best seen; oracle: the frame in which "
        "most of the true mask is seen, to know how much the choice costs",
    )
    chosen.add_argument(
        "--percentages",
        metavar="JSON",
        type=Path,
        help="take target frames from a file instead: where in the video, in percent, by video and expression",
    )
    predicting.add_argument(
        "--num-reference-frames",
        metavar="N",
        type=int,
        help="how many frames the model sees besides; 0 for none (default: as the checkpoint says)",
    )
    predicting.add_argument(
        "--mode",
        choices=("shared", "published"),
        default="shared",
        help="published: follow VISA's released evaluation step by step, which asks on every frame",
    )
    predicting.add_argument("--max-new-tokens", metavar="N", type=int, help="length limit of an answer")

    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--missing",
        choices=("error", "zero"),
        default="error",
        help="missing or damaged predictions: refuse them (default), or count them as zero",
    )
    scoring.add_argument(
        "--published-compat", action="store_true", help="A and R as VISA's released tool computed them"
    )
    scoring.add_argument("--num-workers", metavar="N", type=int, help="processes to score in (default: by itself)")
    scoring.add_argument("--num-clips", metavar="N", type=int, default=12, help="worst and best clips in the report")
    scoring.add_argument("--no-report", action="store_true", help="write no report")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what `visa evaluate` was asked to.

    Args:
        args (`argparse.Namespace`): the parsed arguments.

    Returns:
        `int`: the exit code, 0.

    Raises:
        ValueError, TypeError, ImportError, OSError, RuntimeError: if something cannot be read, done or written.
    """
    if (args.model is None) == (args.predictions is None):
        raise ValueError("Give either --model, to predict and score, or --predictions, to score what is there.")
    if not 0 < args.threshold < 1:
        raise ValueError(f"--threshold is {args.threshold} but must lie between 0 and 1.")
    if args.num_clips < 0 or (args.num_workers or 0) < 0:
        raise ValueError("--num-clips and --num-workers must be 0 or more.")
    from visa_hf.evaluation.benchmarks import open_benchmark
    from visa_hf.evaluation.predictions import open_predictions

    is_shown = not args.quiet and sys.stderr.isatty()
    _silence(is_shown)

    def open_set() -> Any:
        return open_benchmark(args.dataset, args.data_dir, args.split, cache_dir=args.cache_dir, limit=args.limit)

    if args.model is None:
        if args.output.exists() and not args.output.is_dir():
            raise FileExistsError(f"The output `{args.output}` is a file. Give a folder.")
        predictions = open_predictions(args.predictions)
        evaluation_set = open_set()
        args.output.mkdir(parents=True, exist_ok=True)
    else:
        evaluation_set, path = _predict(args, open_set, is_shown)
        if path is None:
            return 0
        predictions = open_predictions(path)
    if args.split in evaluation_set.benchmark.server_splits:
        _submit(args, evaluation_set, predictions, is_shown)
    else:
        _score(args, evaluation_set, predictions, is_shown)
    return 0


def _predict(args: argparse.Namespace, open_set: Callable[[], Any], is_shown: bool) -> tuple[Any, Path | None]:
    """Predict this process' share; the path of all predictions in the first process, else `None`."""
    from visa_hf.evaluation.predict import predict
    from visa_hf.processes import Processes

    processes = Processes(args.device)
    try:
        if processes.rank == 0:  # prepares the rows, which the others then find
            evaluation_set = open_set()
        processes.wait()
        if processes.rank != 0:
            evaluation_set = open_set()
        with _progress("predicting", "video", is_shown and processes.rank == 0) as bar:

            def on_video(_video: str, number: int, total: int) -> None:
                bar.total, bar.n = total, number
                bar.refresh()

            path = predict(
                evaluation_set,
                args.output,
                args.model,
                processes=processes,
                dtype=args.dtype,
                options=_options(args),
                on_video=on_video,
            )
        return evaluation_set, path
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"The same command continues the run in `{args.output}`.") from None
    finally:
        processes.close()


def _options(args: argparse.Namespace) -> Any:
    """Return how to predict."""
    from visa_hf.evaluation.predict import PredictionOptions

    return PredictionOptions(
        threshold=args.threshold,
        num_reference_frames=args.num_reference_frames,
        max_new_tokens=args.max_new_tokens,
        mode=args.mode,
        sampler=args.sampler,
        percentages=None if args.percentages is None else str(args.percentages),
    )


def _submit(args: argparse.Namespace, evaluation_set: Any, predictions: Any, is_shown: bool) -> None:
    """Write the zip for the server."""
    from visa_hf.evaluation.submission import SUBMISSION_FILE, write_submission

    path = args.output / SUBMISSION_FILE
    with _progress("zipping", "video", is_shown, len(evaluation_set.videos)) as bar:
        write_submission(evaluation_set, predictions, path, on_video=lambda _: bar.update() and None)
    print(f"The split {args.split} of {args.dataset} is scored by its server. Upload {path}, which was checked.")


def _score(args: argparse.Namespace, evaluation_set: Any, predictions: Any, is_shown: bool) -> None:
    """Score, write and print."""
    from visa_hf.evaluation.predictions import describe_problems
    from visa_hf.evaluation.report import write_report
    from visa_hf.evaluation.score import score_predictions, write_scores

    num_workers = args.num_workers
    if num_workers is None:
        is_small = len(evaluation_set.expressions) < _FEW_EXPRESSIONS
        num_workers = 0 if is_small else min(os.cpu_count() or 1, _MAX_WORKERS)
    with _progress("scoring", "video", is_shown, len(evaluation_set.videos)) as bar:
        result = score_predictions(
            evaluation_set,
            predictions,
            missing=args.missing,
            published_compat=args.published_compat,
            num_workers=num_workers,
            on_video=lambda _: bar.update() and None,
        )
    details: dict[str, Any] = {"predictions": str(args.predictions)}
    if args.model is not None:
        details = {"model": args.model, **asdict(_options(args))}
    write_scores(result, args.output, details)
    if not args.no_report:
        given = {name: value for name, value in details.items() if value is not None}
        write_report(evaluation_set, predictions, result, args.output, num_clips=args.num_clips, details=given)
    if result.problems:
        print(
            f"visa: warning: counted as zero, or ignored where not asked for: {describe_problems(result.problems)}",
            file=sys.stderr,
        )
    print(score_table(result))
    if args.model is not None:
        print(_choice_of_frames(args))
    page = "" if args.no_report else " and report/index.html"
    print(f"wrote scores.json, scores.csv{page} to {args.output}")


def _choice_of_frames(args: argparse.Namespace) -> str:
    """Say which frames the model saw."""
    if args.mode == "published":
        number = "as published"
    else:
        number = "as the checkpoint says" if args.num_reference_frames is None else str(args.num_reference_frames)
    return f"target frames: {args.percentages or args.sampler}; reference frames: {number}"


def score_table(result: Any) -> str:
    """Return the scores as lines of text, in percent.

    Args:
        result (`EvaluationResult`): the scores.
    """
    main = "cIoU" if "cIoU" in next(iter(result.table.values())) else "J&F"
    figures = [name for name in next(iter(result.table.values())) if name != "num_expressions"]
    lines = [f"{'':12}{'expressions':>12}" + "".join(f"{name:>8}" for name in figures) + f"   95% of {main}"]
    for row, values in result.table.items():
        cells = "".join(f"{values[name]:8.2f}" for name in figures)
        interval = result.intervals.get(row, {}).get(main)
        ends = "" if interval is None else f"   {interval[0]:.1f} to {interval[1]:.1f}"
        lines.append(f"{row:12}{int(values['num_expressions']):12d}{cells}{ends}")
    if result.robustness is not None:
        lines.append(f"robustness R {result.robustness:.2f}")
    return "\n".join(lines)


@contextmanager
def _progress(what: str, unit: str, is_shown: bool, total: int | None = None) -> Iterator[Any]:
    """Show a progress bar on stderr."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=what, unit=unit, disable=not is_shown, leave=False) as bar:
        yield bar


def _silence(is_shown: bool) -> None:
    """Turn the progress bars of the libraries off: they say nothing about the progress here."""
    from transformers.utils import is_datasets_available
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if not is_shown and is_datasets_available():
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
