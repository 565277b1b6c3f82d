"""`visa segment VIDEO "QUERY" ["QUERY" ...] -o OUT`: masks of what sentences mean, for every frame of a video.

Parses arguments and writes what `visa_hf.inference` finds. The output folder appears complete at the end, or not at
all.
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import is_av_available
from transformers.utils import logging as transformers_logging

from visa_hf.inference import (
    DEFAULT_MAX_FRAMES,
    DTYPES,
    PackedFrame,
    check_before_loading,
    load_model,
    make_results,
    pack_frame,
    progress_bar,
    resolve_device,
)
from visa_hf.modeling.frame_samplers_visa import PercentagesFrameSampler
from visa_hf.modeling.frame_source_visa import image_files_of
from visa_hf.modeling.outputs_visa import VideoFrameOutput, VideoSegmentation
from visa_hf.modeling.video_session_visa import VisaVideoSession
from visa_hf.rendering import (
    VideoWriter,
    overlay_masks,
    save_cutout_png,
    save_palette_png,
    save_probability_png,
    write_json_lines,
)
from visa_hf.rle import encode_mask

# Frames without a rate of their own are shown so many a second in the overlay.
DEFAULT_FPS = 25
# All that `visa segment` writes; `--overwrite` replaces these and touches nothing else.
OUTPUT_NAMES = ("overlay.mp4", "Annotations", "Probabilities", "Cutouts", "predictions.jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what `visa segment` takes."""
    parser.description = "Write the masks of what each sentence means, for every frame of a video."
    parser.epilog = (
        "OUT holds overlay.mp4, Annotations/VIDEO/NUMBER/FRAME.png (palette; 1 where the object is) for each "
        "query by its number from 0, predictions.jsonl (answers, chosen frames, run-length masks), and with --soft "
        "and --cutout folders like Annotations."
    )
    parser.add_argument("video", metavar="VIDEO", help="video file, image, or folder of frames")
    parser.add_argument("queries", metavar="QUERY", nargs="*", help="what to segment; several give several results")
    parser.add_argument("-o", "--output", metavar="OUT", type=_path, required=True, help="folder to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier result in OUT, and nothing else that is there"
    )
    parser.add_argument(
        "--model", help="folder or Hub id of a checkpoint (default: a random demo, which means nothing)"
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
        `int`: the exit code, 0.

    Raises:
        ValueError, TypeError, ImportError, OSError: if something cannot be read, done or written.
    """
    began = time.monotonic()
    # 1) All that can fail without a model.
    if not args.queries and args.first_mask is None:
        raise ValueError("No QUERY and no --first-mask is given. Say what to segment.")
    if not args.no_overlay and not is_av_available():
        raise ImportError("Writing overlay.mp4 needs PyAV: `pip install av`, or leave it out with --no-overlay.")
    if not args.video or "://" in args.video:
        raise ValueError(f"`{args.video}` is no file or folder. Give the path of a video; download it first.")
    resolve_device(args.device)
    first_mask = None if args.first_mask is None else read_mask(args.first_mask)
    sampler: Any = "visa" if args.sampler == "visa" else None
    if args.percentages is not None:
        sampler = PercentagesFrameSampler(args.percentages)
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
                sampler=sampler,
            )
        )
        asked: dict[str, Any] = {
            "target_frame": args.target_frame,
            "reference_frames": args.reference_frames,
            "num_reference_frames": args.num_reference_frames,
            "first_mask": first_mask,
        }
        check_before_loading(session, args.queries, **asked)
        # 2) The model answers on the target frame.
        transformers_logging.disable_progress_bar()
        model, session.processor = load_model(args.model, device=args.device, dtype=args.dtype)
        limit = {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}
        model.add_queries(session, [{"query": query, **asked} for query in args.queries or [None]], **limit)
        # 3) Its masks are tracked, and each frame is written as it comes.
        is_bar_shown = not args.quiet and sys.stderr.isatty()
        with progress_bar(session, is_bar_shown) as on_frame:
            outputs = model.propagate_in_video_iterator(session, on_frame=on_frame)
            frames = list(_written(folder, session, outputs, args))
        results = make_results(session, frames)
        write_json_lines(folder / "predictions.jsonl", map(prediction_row, range(len(results)), results))
    if not args.quiet:
        for number, result in enumerate(results):
            print(summary_line(number, result))
        print(f"wrote {args.output} in {time.monotonic() - began:.1f} s")
    return 0


def _written(
    folder: Path, session: VisaVideoSession, outputs: Iterator[VideoFrameOutput], args: argparse.Namespace
) -> Iterator[PackedFrame]:
    """Write the files of each frame; yield the packed masks of those that were tracked."""
    video = _safe_name(session.source.name)
    names = frame_names(session.source)
    with ExitStack() as stack:
        overlay = None if args.no_overlay else stack.enter_context(_overlay_writer(folder / "overlay.mp4", session))
        shown = np.zeros((0, session.height, session.width), dtype=bool)
        tracked = set(session.frame_indices)
        pictures = overlay is not None or args.cutout
        for frame_idx, frame in _frames(session, pictures):
            if frame_idx in tracked:
                output = next(outputs)
                for query_id, masks in zip(output.query_ids, output.masks, strict=True):
                    mask = masks.any(dim=0).numpy()
                    place = Path(video, str(query_id), f"{names[frame_idx]}.png")
                    save_palette_png(_made(folder / "Annotations" / place), mask.astype(np.uint8))
                    if args.cutout:
                        save_cutout_png(_made(folder / "Cutouts" / place), frame, mask)
                    if output.mask_probs is not None:
                        # Objects of one query exclude each other, so their probabilities add up.
                        probs = output.mask_probs[query_id].sum(dim=0).clamp(max=1).numpy()
                        save_probability_png(_made(folder / "Probabilities" / place), probs)
                shown = torch.cat(output.masks).numpy()
                yield pack_frame(output)
            if overlay is not None:
                overlay.write(overlay_masks(frame, shown))


def _frames(session: VisaVideoSession, pictures: bool) -> Iterator[tuple[int, Any]]:
    """Number and picture of each frame of the session's part; only numbers if no picture is needed."""
    if pictures:
        yield from session.source.iterate(session.first_frame, session.stop_frame)
    else:
        yield from ((frame_idx, None) for frame_idx in range(session.first_frame, session.stop_frame))


def _overlay_writer(path: Path, session: VisaVideoSession) -> VideoWriter:
    """Open the overlay with the timing and the sound of the session's part of the video."""
    source = session.source
    is_part = session.stop_frame - session.first_frame < source.num_frames
    part = source.window(session.first_frame, session.stop_frame) if is_part else source
    timing: dict[str, Any] = {"fps": DEFAULT_FPS} if part.timestamps is None else {"timestamps": part.timestamps}
    sound: dict[str, Any] = {}
    if part.has_audio:
        sound = {"audio_from": part.path, "audio_range": part.time_range if is_part else None}
    return VideoWriter(path, height=session.height, width=session.width, **timing, **sound)


def frame_names(source: Any) -> list[str]:
    """Return what the files of each frame are called: the images' own names for a folder, else numbers of five digits.

    Args:
        source (`FrameSource`): the whole video.
    """
    names = [f"{frame_idx:05d}" for frame_idx in range(source.num_frames)]
    if source.path is not None and source.path.is_dir():
        own = [file.stem for file in image_files_of(source.path)[: source.num_frames]]
        # Images that differ in their suffix alone would overwrite each other's results.
        names = own if len(set(own)) == len(own) else names
    return names


def prediction_row(expression_id: int, result: VideoSegmentation) -> dict[str, Any]:
    """Return one line of predictions.jsonl; `masks` holds the union of the objects of each frame, by its number."""
    return {
        "video": result.video,
        "expression_id": str(expression_id),
        "query": result.query,
        "answer": result.answer,
        "target_frame": result.frame_selection.target_idx,
        "reference_frames": list(result.frame_selection.reference_idx),
        "scores": list(result.scores),
        "masks": {
            str(frame_idx): encode_mask(result.mask_of(position))
            for position, frame_idx in enumerate(result.frame_indices)
        },
    }


def summary_line(number: int, result: VideoSegmentation) -> str:
    """Return what a user wants to know of one result, in one line."""
    areas = [result.mask_of(position).mean() for position in range(len(result))]
    found = "nothing to segment" if result.num_objects == 0 else f"{np.mean(areas):.1%} of the pixels"
    said = f" -> {result.answer!r}" if result.answer else ""
    present = sum(area > 0 for area in areas)
    return f"[{number}] {result.query!r}{said}: {found}, seen in {present} of {len(result)} frames"


def read_mask(path: Path) -> np.ndarray:
    """Read masks from an image.

    Args:
        path (`Path`): a palette image, in which each colour but number 0 (background) and 255 (void, in the field's
            data sets) is an object; an image with transparency, whose opaque part is the object; or one of two values,
            of which one is black.

    Returns:
        `np.ndarray` of shape `(K, H, W)`, bool.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no image, or none of these.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "P":
                labels = np.asarray(image)
                objects = [label for label in np.unique(labels) if label not in (0, 255)]
                return np.stack([labels == label for label in objects]) if objects else np.zeros_like(labels)[None] > 0
            if image.has_transparency_data:
                return np.asarray(image.convert("RGBA"))[None, :, :, 3] > 127
            values = np.asarray(image.convert("L"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no mask at `{path}`.") from error
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"The mask `{path}` is not an image that can be read. Give a PNG.") from error
    grey_levels = np.unique(values[values > 0])
    if len(grey_levels) > 1:
        raise ValueError(
            f"The mask `{path}` has {len(grey_levels)} grey levels beside black, so it is not clear what belongs to "
            "the object. Give a black and white PNG, or a palette PNG with a colour for each object."
        )
    return values[None] > 0


@contextmanager
def output_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Lend a temporary folder, which becomes `out` at the end, or vanishes if anything fails.

    Args:
        out (`Path`): folder that must not exist, or be empty, or, with `overwrite`, may hold an earlier result, whose
            files (`OUTPUT_NAMES`) are replaced.
        overwrite (`bool`): see there.

    Raises:
        OSError: if the folder exists and is not empty, is no folder, or cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"The output `{out}` is a file. Give a folder.")
    if out.is_symlink() and not out.exists():
        raise FileExistsError(f"The output `{out}` is a link to nothing. Give a folder.")
    is_there = out.is_dir()
    if is_there and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"The output folder `{out}` is not empty. Give another one, or --overwrite.")
    foreign = [name for name in OUTPUT_NAMES if (out / name).exists()]
    if foreign and not (out / "predictions.jsonl").is_file():
        # A data set keeps its true masks in a folder called Annotations.
        raise FileExistsError(
            f"The output folder `{out}` holds {', '.join(foreign)} but no predictions.jsonl, so these are no earlier "
            "result, and --overwrite would destroy them. Give another folder."
        )
    # Inside the folder, or else beside the first missing one on the way to it: always on the disk of the results, so
    # that renaming is enough at the end.
    target = Path(os.path.abspath(out))
    parent = target if is_there else next(folder for folder in target.parents if folder.exists())
    staging = parent / f".visa-{os.getpid()}.partial"
    try:
        staging.mkdir()
    except OSError as error:
        raise OSError(error.errno, f"The output folder `{out}` cannot be written: {error.strerror}") from error
    try:
        yield staging
        if is_there:
            _replace_results(staging, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            staging.replace(target)
    except KeyboardInterrupt as interruption:
        raise KeyboardInterrupt(f"Nothing was written to `{out}`.") from interruption
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_results(staging: Path, out: Path) -> None:
    """Move the new results into `out`, and earlier ones to where `staging` vanishes; all of them or none."""
    earlier = staging / ".earlier"
    earlier.mkdir()
    moves = [(out / name, earlier / name) for name in OUTPUT_NAMES if (out / name).exists()]
    moves += [(staging / name, out / name) for name in OUTPUT_NAMES if (staging / name).exists()]
    try:
        for source, target in moves:
            source.replace(target)
    except BaseException:
        for source, target in reversed(moves):
            if not source.exists() and target.exists():
                target.replace(source)
        raise


def _path(text: str) -> Path:
    """Read a path; an empty one would mean the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def _made(path: Path) -> Path:
    """Make the folder that `path` lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _safe_name(name: str) -> str:
    """Return a video's name as that of a folder: "..", for one, would lead elsewhere."""
    return name if name.strip(".") else "video"


def _numbers(text: str) -> list[int]:
    """Read "0,5,9"; an empty text is an empty list."""
    try:
        return [int(number) for number in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of frame numbers like 0,5,9") from error
