"""`visa segment`: masks of what sentences mean, for every frame of a video, or of many.

Parses arguments and prints. One video's results are written by `visa_hf.result_files`: the output folder appears
complete at the end, or not at all. Many videos are in the hands of `visa_hf.segment_many`.
"""

import argparse
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from visa_hf.inference import DEFAULT_MAX_FRAMES, DTYPES, check_before_loading, load_model, resolve_device
from visa_hf.modeling.frame_samplers_visa import PercentagesFrameSampler
from visa_hf.modeling.outputs_visa import VideoSegmentation
from visa_hf.modeling.video_session_visa import VisaVideoSession
from visa_hf.processes import launched_rank
from visa_hf.result_files import OUTPUT_NAMES, Contents, output_folder, read_mask, segment_to_folder
from visa_hf.segment_folder import FAILED, INDEX, VideoResult
from visa_hf.segment_many import segment_videos
from visa_hf.segment_requests import RequestsError

# Of many videos that failed, so many are listed; a file has them all.
_MAX_LISTED = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa segment` takes."""
    parser.description = "Write the masks of what each sentence means, for every frame of a video, or of many."
    parser.epilog = (
        "OUT holds overlay.mp4, Annotations/VIDEO/NUMBER/FRAME.png (palette; 1 where the object is) for each "
        "query by its number from 0, predictions.jsonl (answers, chosen frames, run-length masks), and with --soft "
        "and --cutout folders like Annotations. With --requests, OUT holds such a folder for each video, "
        f"{INDEX}, which says which is whose, and {FAILED} if videos failed. Start the same command again to go on "
        "with an interrupted run. On several GPUs or machines: `accelerate launch -m visa_hf segment --requests ...`, "
        "or `torchrun --nproc-per-node N -m visa_hf segment --requests ...`."
    )
    parser.add_argument("video", metavar="VIDEO", nargs="?", help="video file, image, or folder of frames")
    parser.add_argument("queries", metavar="QUERY", nargs="*", help="what to segment; several give several results")
    parser.add_argument(
        "--requests",
        metavar="FILE",
        type=_path,
        help="many videos instead: a .jsonl or .csv file whose rows have `video` (relative to the file's folder) and "
        "`query`, and may have expression_id, target_frame, reference_frames, num_reference_frames, first_mask, "
        "explain, start, end and fps, which count more than the options",
    )
    parser.add_argument(
        "--on-error",
        choices=("skip", "stop"),
        default="skip",
        help="with --requests, if a video cannot be segmented: go on with the others (default), or stop",
    )
    parser.add_argument("-o", "--output", metavar="OUT", type=_path, required=True, help="folder to write")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier result in OUT, and nothing else that is there; with --requests, results of other "
        "requests or settings",
    )
    parser.add_argument(
        "--model", help="folder or Hub id of a checkpoint (default: the bundled one, for drawn shapes)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="number format (default: that of the checkpoint)")

    frames = parser.add_argument_group("frames")
    frames.add_argument("--start", metavar="T", help="begin at this time: seconds, or a frame number like 120f")
    frames.add_argument("--end", metavar="T", help="end before this time")
    frames.add_argument("--every", metavar="N", type=int, default=1, help="track each N-th frame only")
    frames.add_argument(
        "--max-frames",
        metavar="N",
        type=int,
        default=DEFAULT_MAX_FRAMES,
        help="refuse to track more frames (default: %(default)s)",
    )
    frames.add_argument(
        "--target-frame", metavar="N", type=int, help="frame that the model segments (default: middle)"
    )
    chosen = frames.add_mutually_exclusive_group()
    chosen.add_argument(
        "--sampler",
        choices=("middle", "visa"),
        default="middle",
        help="who chooses the target frame: the middle one (default), or the checkpoint's language model, asked where "
        "in the video the thing is best seen",
    )
    chosen.add_argument(
        "--percentages",
        metavar="JSON",
        type=_path,
        help="take target frames from a file instead: where in the video, in percent, by video and query",
    )
    frames.add_argument("--reference-frames", metavar="N,N,...", type=_numbers, help="further frames that it sees")
    frames.add_argument("--num-reference-frames", metavar="N", type=int, help="how many are chosen automatically")
    frames.add_argument(
        "--first-mask",
        metavar="PNG",
        type=_path,
        help="mask on the target frame (default then: the first one) to track instead of asking the model: a "
        "palette image with a colour for each object, a black and white one, or one with a transparent background",
    )
    frames.add_argument("--fps", type=float, help="frames per second of a folder of frames")
    frames.add_argument(
        "--allow-truncated", action="store_true", help="use the frames before the damage of a damaged video"
    )

    answers = parser.add_argument_group("answers and masks")
    answers.add_argument(
        "--threshold",
        metavar="P",
        type=float,
        default=0.5,
        help="probability on the target frame (default: %(default)s)",
    )
    answers.add_argument(
        "--explain", action="store_true", help="ask for a reason too: the answer is in predictions.jsonl"
    )
    answers.add_argument("--max-new-tokens", metavar="N", type=int, help="length limit of an answer")
    answers.add_argument("--soft", action="store_true", help="write probabilities too, as grey PNGs")
    answers.add_argument("--cutout", action="store_true", help="write the object on a transparent background too")
    answers.add_argument("--no-overlay", action="store_true", help="write no overlay.mp4")
    answers.add_argument("-q", "--quiet", action="store_true", help="show neither progress nor summary")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what `visa segment` was asked to.

    Args:
        args (`argparse.Namespace`): the parsed arguments.

    Returns:
        `int`: the exit code: 0; with many videos 1 if some failed, 2 if rows cannot be used.

    Raises:
        ValueError, TypeError, ImportError, OSError, RuntimeError: if something cannot be read, done or written.
    """
    transformers_logging.disable_progress_bar()
    if args.requests is not None:
        return _run_many(args)
    began = time.monotonic()
    # 1) All that can fail without a model.
    if args.video is None:
        raise ValueError("No VIDEO is given. Give one with a QUERY, or --requests with a file of both.")
    if not args.queries and args.first_mask is None:
        raise ValueError("No QUERY and no --first-mask is given. Say what to segment.")
    contents = Contents(not args.no_overlay, args.soft, args.cutout)
    contents.check()
    if not args.video or "://" in args.video:
        raise ValueError(f"`{args.video}` is no file or folder. Give the path of a video; download it first.")
    resolve_device(args.device)
    first_mask = None if args.first_mask is None else read_mask(args.first_mask)
    replaced = [Path(os.path.realpath(args.output / name)) for name in OUTPUT_NAMES]
    video = Path(os.path.realpath(args.video))
    if any(video == place or place in video.parents for place in replaced):
        raise ValueError(f"`{args.video}` is part of the result in `{args.output}`. Give another output folder.")
    with ExitStack() as stack:
        folder = stack.enter_context(output_folder(args.output, args.overwrite))
        session = stack.enter_context(
            VisaVideoSession(
                args.video,
                None,
                start=args.start,
                end=args.end,
                every=args.every,
                max_frames=args.max_frames,
                threshold=args.threshold,
                want_probs=args.soft,
                fps=args.fps,
                allow_truncated=args.allow_truncated,
                sampler=_sampler(args),
            )
        )
        asked: dict[str, Any] = {
            "target_frame": args.target_frame,
            "reference_frames": args.reference_frames,
            "num_reference_frames": args.num_reference_frames,
            "first_mask": first_mask,
            "explain": args.explain,
        }
        check_before_loading(session, args.queries, **asked)
        # 2) The model answers on the target frame; its masks are tracked, and each frame is written as it comes.
        model, session.processor = load_model(args.model, device=args.device, dtype=args.dtype)
        results = segment_to_folder(
            folder,
            model,
            session,
            [{"query": query, **asked} for query in args.queries or [None]],
            contents=contents,
            max_new_tokens=args.max_new_tokens,
            progress=_is_progress_shown(args),
        )
    if not args.quiet:
        for number, result in enumerate(results):
            print(summary_line(number, result))
        print(f"wrote {args.output} in {time.monotonic() - began:.1f} s")
    return 0


def _run_many(args: argparse.Namespace) -> int:
    """Segment the videos of a file, or this process' share of them."""
    began = time.monotonic()
    if args.video is not None:
        raise ValueError(f"Both a VIDEO, {args.video!r}, and --requests are given. Leave one out.")
    if args.first_mask is not None:
        raise ValueError("--first-mask is for one video. Give the column `first_mask` in the file of --requests.")
    try:
        results = segment_videos(
            args.requests,
            args.output,
            model=args.model,
            target_frame=args.target_frame,
            reference_frames=args.reference_frames,
            num_reference_frames=args.num_reference_frames,
            sampler=_sampler(args),
            explain=args.explain,
            threshold=args.threshold,
            start=args.start,
            end=args.end,
            every=args.every,
            max_frames=args.max_frames,
            fps=args.fps,
            device=args.device,
            dtype=args.dtype,
            allow_truncated=args.allow_truncated,
            max_new_tokens=args.max_new_tokens,
            overlay=not args.no_overlay,
            soft=args.soft,
            cutout=args.cutout,
            overwrite=args.overwrite,
            on_error=args.on_error,
            progress=_is_progress_shown(args),
        )
    except RequestsError as error:
        if launched_rank() == 0:  # all processes read the same file
            print(f"visa: error: {error}", file=sys.stderr)
        return 2
    if launched_rank() != 0:
        return 0
    failed = [result for result in results if result.error is not None]
    if not args.quiet:
        print(many_summary(results, args.output, time.monotonic() - began))
    for result in failed[:_MAX_LISTED]:
        print(f"visa: failed: {result.video}: {result.error}", file=sys.stderr)
    if len(failed) > _MAX_LISTED:
        print(f"visa: failed: {len(failed) - _MAX_LISTED} more, see {args.output / FAILED}", file=sys.stderr)
    return 1 if failed else 0


def _sampler(args: argparse.Namespace) -> Any:
    """Return the sampler that the options name."""
    if args.percentages is not None:
        return PercentagesFrameSampler(args.percentages)
    return "visa" if args.sampler == "visa" else None


def _is_progress_shown(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()


def many_summary(results: list[VideoResult], out: Path, seconds: float) -> str:
    """Return what a user wants to know of a run over many videos, in one line."""
    new = [result for result in results if result.is_new and result.error is None]
    num_failed = sum(result.error is not None for result in results)
    num_queries = sum(result.num_queries for result in new)
    queries = "1 query" if num_queries == 1 else f"{num_queries} queries"
    parts = [f"{len(new)} of {len(results)} videos ({queries}) to {out}"]
    num_earlier = len(results) - len(new) - num_failed
    parts += [f"{num_earlier} were there already"] if num_earlier else []
    parts += [f"{num_failed} failed"] if num_failed else []
    return f"wrote {', '.join(parts)} in {seconds:.1f} s"


def summary_line(number: int, result: VideoSegmentation) -> str:
    """Return what a user wants to know of one result, in one line."""
    areas = [result.mask_of(position).mean() for position in range(len(result))]
    found = "nothing to segment" if result.num_objects == 0 else f"{np.mean(areas):.1%} of the pixels"
    said = f" -> {result.answer!r}" if result.answer else ""
    present = sum(area > 0 for area in areas)
    return f"[{number}] {result.query!r}{said}: {found}, seen in {present} of {len(result)} frames"


def _path(text: str) -> Path:
    """Read a path; an empty one would mean the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def _numbers(text: str) -> list[int]:
    """Read "0,5,9"; an empty text is an empty list."""
    try:
        return [int(number) for number in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of frame numbers like 0,5,9") from error
