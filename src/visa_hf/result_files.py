"""The files of one video's results: masks, an overlay, a line for each query; and the folder that appears whole.

What the files look like is decided in `rendering`; which video is asked what, by those who call this.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import is_av_available

from visa_hf.inference import make_results, pack_frame, progress_bar
from visa_hf.modeling.frame_source_visa import image_files_of
from visa_hf.modeling.outputs_visa import PackedFrame, VideoFrameOutput, VideoSegmentation
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
OVERLAY, PREDICTIONS = "overlay.mp4", "predictions.jsonl"
# All that is written for a video; replacing an earlier result touches nothing else.
OUTPUT_NAMES = (OVERLAY, "Annotations", "Probabilities", "Cutouts", PREDICTIONS)


@dataclass(frozen=True)
class Contents:
    """What is written beside the masks.

    Args:
        overlay (`bool`): a video with the masks drawn over it.
        soft (`bool`): probabilities, as grey PNGs.
        cutout (`bool`): the object on a transparent background.
    """

    overlay: bool = True
    soft: bool = False
    cutout: bool = False

    def check(self) -> None:
        """Refuse what cannot be written here.

        Raises:
            ImportError: for an overlay without PyAV.
        """
        if self.overlay and not is_av_available():
            raise ImportError(
                "Writing overlay.mp4 needs PyAV: `pip install av`, or leave it out with `overlay=False` "
                "(--no-overlay)."
            )


def segment_to_folder(
    folder: Path,
    model: Any,
    session: VisaVideoSession,
    queries: Sequence[dict[str, Any]],
    *,
    contents: Contents,
    expression_ids: Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> list[VideoSegmentation]:
    """Ask queries about a video, track the answers, and write each frame's files as it comes.

    Args:
        folder (`Path`): where to write; it exists.
        model, session: a loaded model, and the video opened with its processor.
        queries (`Sequence[dict]`): arguments of `add_query`.
        contents ([`Contents`]): what to write.
        expression_ids (`Sequence[str]`, *optional*): how the queries are called in the files; by default by their
            numbers, from 0.
        max_new_tokens (`int`, *optional*): length limit of an answer.
        progress (`bool`, defaults to `False`): show a progress bar on stderr.

    Returns:
        `list[VideoSegmentation]`: the result of each query.

    Raises:
        ValueError, TypeError, RuntimeError, OSError: if a query cannot be asked, or something not be read or written.
    """
    names = [str(number) for number in range(len(queries))] if expression_ids is None else expression_ids
    limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    query_ids = model.add_queries(session, queries, **limit)
    with progress_bar(session, progress) as on_frame:
        outputs = model.propagate_in_video_iterator(session, on_frame=on_frame)
        frames = list(_written(folder, session, outputs, contents, dict(zip(query_ids, names, strict=True))))
    results = make_results(session, frames)
    write_json_lines(folder / PREDICTIONS, map(prediction_row, names, results))
    return results


def _written(
    folder: Path,
    session: VisaVideoSession,
    outputs: Iterator[VideoFrameOutput],
    contents: Contents,
    expression_ids: dict[int, str],
) -> Iterator[PackedFrame]:
    """Write the files of each frame; yield the packed masks of those that were tracked."""
    video = safe_name(session.source.name)
    names = frame_names(session.source)
    with ExitStack() as stack:
        overlay = stack.enter_context(_overlay_writer(folder / OVERLAY, session)) if contents.overlay else None
        shown = np.zeros((0, session.height, session.width), dtype=bool)
        tracked = set(session.frame_indices)
        pictures = overlay is not None or contents.cutout
        for frame_idx, frame in _frames(session, pictures):
            if frame_idx in tracked:
                output = next(outputs)
                for query_id, masks in zip(output.query_ids, output.masks, strict=True):
                    mask = masks.any(dim=0).numpy()
                    place = Path(video, expression_ids[query_id], f"{names[frame_idx]}.png")
                    save_palette_png(_made(folder / "Annotations" / place), mask.astype(np.uint8))
                    if contents.cutout:
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


def prediction_row(expression_id: str, result: VideoSegmentation) -> dict[str, Any]:
    """Return one line of predictions.jsonl.

    By the number of the frame, `frame_scores` holds the score of each object, and `masks` the union of the objects.
    """
    return {
        "video": result.video,
        "expression_id": expression_id,
        "query": result.query,
        "answer": result.answer,
        "target_frame": result.frame_selection.target_idx,
        "reference_frames": list(result.frame_selection.reference_idx),
        "scores": list(result.scores),
        "frame_scores": {
            str(frame_idx): list(scores)
            for frame_idx, scores in zip(result.frame_indices, result.frame_scores, strict=True)
        },
        "masks": {
            str(frame_idx): encode_mask(result.mask_of(position))
            for position, frame_idx in enumerate(result.frame_indices)
        },
    }


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
    if foreign and not (out / PREDICTIONS).is_file():
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


def _made(path: Path) -> Path:
    """Make the folder that `path` lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def safe_name(name: str) -> str:
    """Return a video's name as that of a folder: "..", for one, would lead elsewhere."""
    return name if name.strip(".") else "video"
