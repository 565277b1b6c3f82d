"""Many videos and queries: each video's results in a folder of its own, in a run that can be interrupted and shared.

What the folder of a run looks like, and what of it is computed again, is in `segment_folder`; what may be asked, in
`segment_requests`. Several processes divide the videos among them before they begin; which of them computes a video
has no bearing on its files.
"""

import errno
import gc
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FunctionType
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from visa_hf.inference import DEFAULT_MAX_FRAMES, load_model, resolve_device, resolve_dtype
from visa_hf.modeling.frame_samplers_visa import FrameSampler, PercentagesFrameSampler
from visa_hf.modeling.session_requests_visa import whole_number
from visa_hf.modeling.video_session_visa import VisaVideoSession
from visa_hf.processes import Processes, checkpoint_fingerprint, estimate_frames, share_work
from visa_hf.result_files import Contents, read_mask, segment_to_folder
from visa_hf.segment_folder import (
    Job,
    VideoResult,
    clear_leftovers,
    file_hash,
    find_finished,
    make_output,
    note_failure,
    plan_jobs,
    remove_if_nothing_is_there,
    result_of,
    video_folder,
    write_failures,
    write_index,
)
from visa_hf.segment_requests import RequestedQuery, read_requests

# What a video can cause. Anything else is a defect of ours, and ends the run.
_FAILURES_OF_VIDEOS = (ValueError, RuntimeError, OSError, MemoryError)
# What no other video would fare better with.
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class _Options:
    """How all videos are segmented; see `segment_videos`."""

    threshold: float
    every: int
    max_frames: int | None
    allow_truncated: bool
    max_new_tokens: int | None
    sampler: Any
    contents: Contents


def segment_videos(
    requests: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    processor: Any | None = None,
    target_frame: int | None = None,
    reference_frames: Sequence[int] | None = None,
    num_reference_frames: int | None = None,
    sampler: FrameSampler | Literal["visa"] | None = None,
    explain: bool = False,
    threshold: float = 0.5,
    start: float | str | None = None,
    end: float | str | None = None,
    every: int = 1,
    max_frames: int | None = DEFAULT_MAX_FRAMES,
    fps: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    allow_truncated: bool = False,
    max_new_tokens: int | None = None,
    overlay: bool = True,
    soft: bool = False,
    cutout: bool = False,
    overwrite: bool = False,
    on_error: Literal["skip", "stop"] = "skip",
    progress: bool = False,
) -> list[VideoResult]:
    """Find what sentences mean in many videos, and write a folder of results for each video.

    The model is loaded once, all queries on a video share a session, and nothing is kept of a finished video. The same
    call again computes what is left. Started by `accelerate launch` or `torchrun`, each process takes its share.

    Args:
        requests: path of a JSONL or CSV file, or a list of dictionaries with the same columns: `video` (relative to
            the file's folder) and `query`, or `queries`; and, if wanted, `expression_id`, `target_frame`,
            `reference_frames`, `num_reference_frames`, `first_mask` (a path), `explain`, `start`, `end`, `fps`, which
            count more than the arguments of the same name. Rows about the same part of a video belong together.
        output (`str` or `os.PathLike`): folder to write. `output/<folder>` is named after the video, with a number if
            several have the same name; `output/videos.jsonl` says which is whose.
        model, processor, target_frame, reference_frames, num_reference_frames, sampler, explain, threshold, start,
            end, every, max_frames, device, dtype, allow_truncated, max_new_tokens: as of `segment`.
        fps (`float`, *optional*): frames per second of folders and images; for video files it is ignored.
        overlay, soft, cutout (`bool`): write a video with the masks drawn over it, probabilities as grey PNGs, the
            object on a transparent background.
        overwrite (`bool`, defaults to `False`): compute results again that are there, but were made from other
            requests or settings. Without it they are an error.
        on_error (`str`, defaults to `"skip"`): go on with the other videos if one cannot be segmented, or `"stop"`.
        progress (`bool`, defaults to `False`): show progress on stderr, of the first process' share.

    Returns:
        `list[VideoResult]`: what became of each video, in the order of the requests; in processes other than the
        first one, of their shares alone. Failures are in it, and raise nothing.

    Raises:
        RequestsError: a `ValueError` that names all rows that cannot be used.
        FileExistsError: if `output` holds something else.
        ValueError, TypeError, FileNotFoundError, ImportError, OSError, RuntimeError: if an option or the model cannot
            be used, results are there that were made otherwise, or nothing can be written; with `on_error="stop"`, if
            a video fails.
    """
    # 1) All that can fail without a model.
    if on_error not in ("skip", "stop"):
        raise ValueError(f'`on_error` is {on_error!r} but must be "skip" or "stop".')
    contents = Contents(overlay, soft, cutout)
    contents.check()
    options = _Options(threshold, every, max_frames, allow_truncated, max_new_tokens, sampler, contents)
    _check_options(options)
    resolve_device(device)
    videos = read_requests(
        requests,
        target_frame=target_frame,
        reference_frames=reference_frames,
        num_reference_frames=num_reference_frames,
        explain=explain,
        start=start,
        end=end,
        fps=fps,
    )
    out = Path(output)
    jobs = plan_jobs(videos, out, _settings(options, model, dtype))
    finished = find_finished(jobs, out, overwrite)
    # 2) Who computes what: decided from what all processes see before any of them goes on.
    processes = Processes("auto" if device is None else str(device))
    made: list[Path] = []
    try:
        made = make_output(out)
        if processes.rank == 0:
            clear_leftovers(out)
            write_index(out, jobs)
        processes.wait()
        share = _share(jobs, finished, processes)
        # 3) Video by video.
        if share:
            is_loaded = not (model is None or isinstance(model, str | os.PathLike))
            chosen = device if is_loaded and device is None else processes.device
            network, its_processor = load_model(model, processor, device=chosen, dtype=dtype)
            is_shown = progress and processes.rank == 0
            _segment_share(share, network, its_processor, options, processes.rank, on_error, is_shown)
        # 4) All together.
        processes.wait()
        mine = jobs if processes.rank == 0 else share
        results = [result_of(job, is_new=job.folder not in finished) for job in mine]
        if processes.rank == 0:
            write_failures(out, jobs, results)
    except BaseException as error:
        if processes.count == 1:  # others may be about to finish a video
            remove_if_nothing_is_there(out, jobs, made)
        if isinstance(error, KeyboardInterrupt):
            how = f"Finished videos are in `{out}`; the same command goes on with the others."
            raise KeyboardInterrupt(how) from None
        raise
    return results


def _check_options(options: _Options) -> None:
    """Refuse options that no video could be opened with, by opening one of a single pixel."""
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is {options.max_new_tokens} but must be at least 1.")
    pixel = np.zeros((1, 1, 1, 3), dtype=np.uint8)
    VisaVideoSession(
        pixel,
        None,
        every=options.every,
        threshold=options.threshold,
        sampler=options.sampler,
        # It has one frame more than some may want.
        max_frames=None if options.max_frames is None else max(1, whole_number("max_frames", options.max_frames)),
    ).close()


def _settings(options: _Options, model: Any, dtype: Any) -> dict[str, Any]:
    """Return what decides about the results of all videos, as request.json holds it."""
    torch_dtype = resolve_dtype(dtype)
    name, fingerprint = None, None
    if isinstance(model, str | os.PathLike):
        name, fingerprint = os.fspath(model), checkpoint_fingerprint(model)
    elif model is not None:
        name = model.config.name_or_path or "a loaded model"
    return {
        "model": name,
        "model_fingerprint": fingerprint,
        "dtype": None if torch_dtype is None else str(torch_dtype).removeprefix("torch."),
        "threshold": float(options.threshold),
        "every": int(options.every),
        "allow_truncated": options.allow_truncated,
        "max_new_tokens": options.max_new_tokens,
        "sampler": _sampler_name(options.sampler),
        "contents": asdict(options.contents),
    }


def _sampler_name(sampler: Any) -> str | None:
    """Return what stands for a sampler: what a function does cannot be compared."""
    if sampler is None or isinstance(sampler, str):
        return sampler
    if isinstance(sampler, PercentagesFrameSampler):
        return f"percentages {file_hash(sampler.path)}"
    return sampler.__qualname__ if isinstance(sampler, FunctionType) else type(sampler).__qualname__


def _share(jobs: Sequence[Job], finished: set[Path], processes: Processes) -> list[Job]:
    """Return the videos that this process computes: about as many frames, times queries, as the others."""
    left = {job.folder.name: job for job in jobs if job.folder not in finished}
    work = dict.fromkeys(left, 1)
    if processes.count > 1:
        work = {name: estimate_frames(job.request.path) * len(job.request.queries) for name, job in left.items()}
    return [left[name] for name in share_work(work, processes.count)[processes.rank]]


def _segment_share(
    share: Sequence[Job], model: Any, processor: Any, options: _Options, rank: int, on_error: str, is_shown: bool
) -> None:
    """Segment the videos of this process one after the other."""
    with tqdm(total=len(share), unit="video", desc="segmenting", disable=not is_shown, leave=False) as bar:
        for job in share:
            failure = None
            try:
                with video_folder(job, rank) as staging:
                    _segment_one(job, staging, model, processor, options, is_shown)
            except _FAILURES_OF_VIDEOS as error:
                if isinstance(error, OSError) and error.errno in _FULL_DISK:
                    raise
                if on_error == "stop":
                    kind = next(kind for kind in _FAILURES_OF_VIDEOS if isinstance(error, kind))
                    raise kind(f"The video `{job.request.video}` cannot be segmented: {_text_of(error)}") from error
                failure = _text_of(error)
            if failure is not None:
                # Outside of the handler, where the error no longer holds on to what was computed.
                note_failure(job, failure)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            bar.update()


def _segment_one(job: Job, staging: Path, model: Any, processor: Any, options: _Options, is_shown: bool) -> None:
    """Write all files of one video."""
    request = job.request
    with VisaVideoSession(
        request.path,
        processor,
        start=request.start,
        end=request.end,
        fps=request.fps,
        every=options.every,
        max_frames=options.max_frames,
        threshold=options.threshold,
        want_probs=options.contents.soft,
        allow_truncated=options.allow_truncated,
        sampler=options.sampler,
    ) as session:
        segment_to_folder(
            staging,
            model,
            session,
            [_arguments(query) for query in request.queries],
            contents=options.contents,
            expression_ids=[query.expression_id for query in request.queries],
            max_new_tokens=options.max_new_tokens,
            progress=is_shown,
        )


def _arguments(query: RequestedQuery) -> dict[str, Any]:
    """Return a query as `add_query` takes it."""
    arguments = asdict(query)
    del arguments["expression_id"]
    if query.first_mask is not None:
        arguments["first_mask"] = read_mask(query.first_mask)
    return arguments


def _text_of(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
