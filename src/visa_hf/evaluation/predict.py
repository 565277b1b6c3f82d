"""Predictions on a benchmark: video by video, in one process or many, in a folder that survives interruptions.

`OUT/run.json` holds the settings; `OUT/Annotations/<video>/` and `OUT/parts/<video>.jsonl` appear whole when a video
is finished, in this order, and what has a part is never computed again. At the end the parts become
`OUT/predictions.jsonl`. Which process computes a video has no bearing on its masks. Scoring is done in `score`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np

import visa_hf

from ..datasets_scripts.frame_store import FrameStore
from ..inference import load_model, make_results, pack_frame, resolve_device
from ..modeling.frame_sampling_visa import select_frames
from ..modeling.frame_source_visa import FrameSource, open_frames
from ..modeling.outputs_visa import VideoSegmentation
from ..modeling.video_asking_visa import masks_from_logits
from ..modeling.video_session_visa import VisaVideoSession
from ..processes import Processes, checkpoint_fingerprint, share_work
from ..rendering import save_palette_png, write_json_lines
from ..rle import encode_mask
from .benchmarks import EvaluationSet, Expression
from .predictions import ANNOTATIONS, PREDICTIONS_FILE, write_whole
from .targets import TargetChoice

RUN_FILE, PARTS = "run.json", "parts"


@dataclass(frozen=True)
class PredictionOptions:
    """What may be chosen for predicting.

    Args:
        threshold (`float`): probability above which a pixel of the target frame is in the mask.
        num_reference_frames (`int`, *optional*): the checkpoint's number by default.
        max_new_tokens (`int`, *optional*): length limit of an answer; that of `generate_masks` by default.
        mode (`str`): `"shared"`, or `"published"` to follow VISA's released evaluation step by step.
        sampler (`str`): who chooses the target frames, one of `visa_hf.evaluation.targets.NAMES`.
        percentages (`str`, *optional*): a file of shares of the videos, which chooses them instead.
    """

    threshold: float = 0.5
    num_reference_frames: int | None = None
    max_new_tokens: int | None = None
    mode: Literal["shared", "published"] = "shared"
    sampler: str = "middle"
    percentages: str | None = None


def predict(
    evaluation_set: EvaluationSet,
    out: Path,
    model: str,
    *,
    processes: Processes | None = None,
    dtype: str | None = None,
    options: PredictionOptions = PredictionOptions(),
    load: Callable[..., tuple[Any, Any]] = load_model,
    on_video: Callable[[str, int, int], None] | None = None,
) -> Path | None:
    """Predict all expressions of a set, or those that an interrupted run has left.

    Args:
        evaluation_set ([`EvaluationSet`]): what is asked.
        out (`Path`): folder of the run: a new or empty one, or that of an earlier run with the same settings.
            Processes on several machines must see the same folder.
        model (`str`): folder or Hub id of a checkpoint.
        processes ([`Processes`], *optional*): those that share the run; this one alone by default.
        dtype (`str`, *optional*): number format; the checkpoint's own by default.
        options ([`PredictionOptions`]): how to predict.
        load (`Callable`): how the model is loaded: `load_model`.
        on_video (`Callable[[str, int, int], None]`, *optional*): called with a video's name, how many of this
            process' share are finished, and how many there are.

    Returns:
        Path of `predictions.jsonl` in the first process, `None` in the others.

    Raises:
        FileExistsError: if `out` holds something else.
        ValueError: if it holds a run with other settings, target frames cannot be chosen as `options` say, or a video
            cannot be predicted; the message names it.
        RuntimeError: if videos are missing at the end.
    """
    processes = processes or Processes()
    out = Path(out)
    # 1) The settings of an earlier run must be the same.
    targets = TargetChoice(evaluation_set, options.sampler, options.percentages)
    settings = {
        "model": str(model),
        "model_fingerprint": checkpoint_fingerprint(model),
        "device": resolve_device(processes.device).type,
        "dtype": dtype,
        "dataset": evaluation_set.benchmark.name,
        "split": evaluation_set.split,
        "num_videos": len(evaluation_set.videos),
        "dataset_fingerprint": evaluation_set.fingerprint(),
        **asdict(options),
        "percentages_fingerprint": None if options.percentages is None else _file_fingerprint(options.percentages),
    }
    if processes.rank == 0:
        _begin(out, settings)
    processes.wait()
    _check_run(out, settings)
    # 2) Who computes what: decided from what all processes see before any of them goes on.
    share = share_work(unfinished_videos(evaluation_set, out), processes.count)[processes.rank]
    processes.wait()
    # 3) Video by video.
    if share:
        network, processor = load(model, device=processes.device, dtype=dtype)
    for number, video in enumerate(share):
        with _video_folder(out, video) as staging:
            write = partial(_write_frame, staging, evaluation_set.videos[video])
            results = predict_video(
                network, processor, evaluation_set, video, options, targets=targets, on_frame=write
            )
        rows = map(prediction_row, evaluation_set.videos[video], results)
        write_json_lines(_part(out, video), rows)
        if on_video is not None:
            on_video(video, number + 1, len(share))
    # 4) All together.
    processes.wait()
    if processes.rank != 0:
        return None
    return _merge(evaluation_set, out)


def unfinished_videos(evaluation_set: EvaluationSet, out: Path) -> dict[str, int]:
    """Return the videos that are still to be predicted, and the work that each is: frames times expressions."""
    if (out / PREDICTIONS_FILE).is_file():  # made when all were finished
        return {}
    return {
        video: len(expressions) * len(expressions[0].frames)
        for video, expressions in evaluation_set.videos.items()
        if not _part(out, video).is_file()
    }


def _file_fingerprint(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def predict_video(
    model: Any,
    processor: Any,
    evaluation_set: EvaluationSet,
    video: str,
    options: PredictionOptions,
    *,
    targets: TargetChoice | None = None,
    on_frame: Callable[[int, list[np.ndarray]], None] | None = None,
) -> list[VideoSegmentation]:
    """Predict all expressions of one video in one session.

    Args:
        model, processor: as `load_model` returns them.
        evaluation_set ([`EvaluationSet`]): where the video is.
        video (`str`): its name.
        options ([`PredictionOptions`]): how to predict.
        targets ([`TargetChoice`], *optional*): what `options` say about target frames, made once for all videos.
        on_frame (`Callable[[int, list[np.ndarray]], None]`, *optional*): called with the number of each frame and its
            masks, one `(H, W)`, bool, for each expression, as soon as they are known.

    Returns:
        The [`VideoSegmentation`] of each expression.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: naming the video, if it cannot be read or an expression be asked.
    """
    expressions = evaluation_set.videos[video]
    targets = targets or TargetChoice(evaluation_set, options.sampler, options.percentages)
    with _naming(video):
        frames = frames_of(evaluation_set.root, expressions[0])
        with VisaVideoSession(frames, processor, threshold=options.threshold, mode=options.mode) as session:
            _check_frames(session.source, expressions[0])
            asked = [
                {"query": each.text, "style": _style(each), "sampler": targets.sampler_of(each)}
                for each in expressions
            ]
            model.add_queries(session, asked, num_reference_frames=options.num_reference_frames, **_limit(options))
            packed = []
            for output in model.propagate_in_video_iterator(session):
                if on_frame is not None:
                    on_frame(output.frame_idx, [masks.any(dim=0).numpy() for masks in output.masks])
                packed.append(pack_frame(output))
            return make_results(session, packed)


def predict_target(
    model: Any,
    processor: Any,
    evaluation_set: EvaluationSet,
    expression: Expression,
    target_frame: int,
    options: PredictionOptions,
) -> np.ndarray:
    """Predict the mask of one expression on one frame: all that a model without a tracker can do about a video.

    Args:
        model, processor, evaluation_set, options: as for [`predict_video`]; `sampler` and `mode` do not count.
        expression ([`Expression`]): of the set.
        target_frame (`int`): number of the frame.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool: all objects of the answer together, the same as in a session.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as [`predict_video`].
    """
    number = options.num_reference_frames
    with _naming(expression.video), open_frames(frames_of(evaluation_set.root, expression)) as source:
        _check_frames(source, expression)
        selection = select_frames(
            source.num_frames,
            target_frame=target_frame,
            num_reference_frames=model.config.num_reference_frames if number is None else number,
            strategy=model.config.reference_strategy,
        )
        *references, target = source.get_many([*selection.reference_idx, selection.target_idx])
        inputs = processor(
            target_frame=target,
            reference_frames=references,
            query=expression.text,
            style=_style(expression),
            normalize_query=True,
        )
        logits = model.generate_masks(**inputs, **_limit(options)).mask_logits[0].float().cpu()
        if not logits.isfinite().all():
            raise RuntimeError("The model gave NaN or infinite numbers instead of masks.")
        return masks_from_logits(logits, options.threshold).any(dim=0).numpy()


def _limit(options: PredictionOptions) -> dict[str, int]:
    return {} if options.max_new_tokens is None else {"max_new_tokens": options.max_new_tokens}


@contextmanager
def _naming(video: str) -> Iterator[None]:
    """Let errors name the video."""
    try:
        yield
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        kind = next(kind for kind in (FileNotFoundError, RuntimeError, ValueError) if isinstance(error, kind))
        raise kind(f"Video `{video}` cannot be predicted: {error}") from error


def frames_of(root: Path, expression: Expression) -> Any:
    """Return the frames of an expression's video as a session takes them: paths, as far as possible, else arrays."""
    names = expression.frames
    if len(names) > 1 and not any("#" in name for name in names):
        return [root / name for name in names]
    file = names[0].rpartition("#")[0]
    if len(names) > 1 and list(names) == [f"{file}#{number}" for number in range(len(names))]:
        with open_frames(root / file, max_cached_frames=1) as source:
            is_whole = source.num_frames == len(names)
        if is_whole:
            return root / file
    # Stored pixels, which masks are drawn on: an image's EXIF rotation does not count here.
    return FrameStore(root).read(names)


def prediction_row(expression: Expression, result: VideoSegmentation) -> dict[str, Any]:
    """Return one line of predictions.jsonl; `masks` holds the union of the objects of each frame, by its number."""
    return {
        "video": expression.video,
        "expression_id": expression.expression_id,
        "query": result.query,
        "answer": result.answer,
        "target_frame": result.frame_selection.target_idx,
        "reference_frames": list(result.frame_selection.reference_idx),
        "scores": list(result.scores),
        "masks": {str(frame): encode_mask(result.mask_of(frame)) for frame in range(len(result))},
    }


def _style(expression: Expression) -> Literal["short", "long"] | None:
    """Return the form of the prompt that the data set asks for: ReasonSeg says of every query which one it takes."""
    if expression.is_sentence is None:
        return None
    return "long" if expression.is_sentence else "short"


def _check_frames(source: FrameSource, expression: Expression) -> None:
    if source.num_frames != len(expression.frames):
        raise ValueError(
            f"it has {source.num_frames} frames but its expressions are about {len(expression.frames)}. "
            "Correct the annotations."
        )
    if (source.height, source.width) != (expression.height, expression.width):
        raise ValueError(
            f"its frames are {source.height} x {source.width} pixels (height x width), but the annotations say "
            f"{expression.height} x {expression.width}. Use the frames that the masks were drawn on."
        )


# The folder of a run


def _part(out: Path, video: str) -> Path:
    return out / PARTS / f"{quote(video, safe='')}.jsonl"


def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a new run, or check that it holds an earlier one with the same settings."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"The output `{out}` is a file. Give a folder.")
    has_results = (out / PREDICTIONS_FILE).is_file() or any((out / PARTS).glob("*.jsonl"))
    if (out / RUN_FILE).is_file():
        if has_results:
            _check_run(out, settings)
        else:  # a run that failed before its first video, perhaps because of its settings
            _write_run(out, settings)
    elif out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise FileExistsError(
            f"The output folder `{out}` is not empty and holds no run to continue (no {RUN_FILE}). Give another one."
        )
    else:
        out.mkdir(parents=True, exist_ok=True)
        _write_run(out, settings)
    (out / PARTS).mkdir(exist_ok=True)
    for left in out.glob(".*.partial"):  # what an interrupted run was writing
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _write_run(out: Path, settings: dict[str, Any]) -> None:
    """Write the settings; the version is for people to read and may differ when a run is continued."""
    write_whole(out / RUN_FILE, json.dumps({**settings, "visa_hf_version": visa_hf.__version__}, indent=2) + "\n")


def _check_run(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to continue a run whose settings were others."""
    try:
        earlier = dict(json.loads((out / RUN_FILE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{out / RUN_FILE}` cannot be read ({error}). Give another output folder.") from error
    differences = [
        f"`{name}` was {earlier.get(name)!r} and is {value!r}"
        for name, value in settings.items()
        if earlier.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"The folder `{out}` holds a run with other settings: {'; '.join(differences)}. Continue with the same "
            "ones, or give another folder."
        )


@contextmanager
def _video_folder(out: Path, video: str) -> Iterator[Path]:
    """Lend a temporary folder, which becomes that of the video's masks, or vanishes if anything fails."""
    staging = out / f".{quote(video, safe='')}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        target = out / ANNOTATIONS / video
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # of a run that was interrupted before the part was written
            shutil.rmtree(target)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_frame(staging: Path, expressions: Sequence[Expression], frame: int, masks: Sequence[np.ndarray]) -> None:
    """Write the masks of one frame, one for each expression."""
    for expression, mask in zip(expressions, masks, strict=True):
        folder = staging / expression.expression_id
        folder.mkdir(exist_ok=True)
        save_palette_png(folder / f"{expression.frame_names[frame]}.png", mask.astype(np.uint8))


def _merge(evaluation_set: EvaluationSet, out: Path) -> Path:
    """Make predictions.jsonl of the parts, in the order of the set."""
    merged = out / PREDICTIONS_FILE
    if not merged.is_file():
        absent = list(unfinished_videos(evaluation_set, out))
        if absent:
            raise RuntimeError(
                f"{len(absent)} videos are missing in `{out}` ({', '.join(absent[:5])}): processes on several "
                "machines must write to one and the same folder. Start again with the same settings to compute them."
            )
        temporary = out / f".{PREDICTIONS_FILE}.partial"
        with temporary.open("wb") as file:
            for video in evaluation_set.videos:
                file.write(_part(out, video).read_bytes())
        os.replace(temporary, merged)
    shutil.rmtree(out / PARTS, ignore_errors=True)
    return merged
