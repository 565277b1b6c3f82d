"""The folder of a run over many videos: what is whose, what is finished, what failed.

`OUT/<folder>/` appears whole when its video is finished; its `request.json` says what was asked and how, so that a
later run knows whether it must be computed again. `OUT/videos.jsonl` says which folder is whose, and
`OUT/failed.jsonl`, if there is one, which videos failed and why. Nothing is computed here.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import visa_hf
from visa_hf.processes import video_fingerprint
from visa_hf.rendering import write_json_lines
from visa_hf.result_files import safe_name
from visa_hf.segment_requests import RequestedQuery, VideoRequest

INDEX, FAILED, REQUEST = "videos.jsonl", "failed.jsonl", "request.json"
_FAILURES = ".failures"
# Of many results or differences, an error names so many.
_MAX_NAMED = 5


@dataclass(frozen=True)
class VideoResult:
    """What became of one video.

    Args:
        video (`str`): its path, as it was asked for.
        folder (`Path`): where its files are; if it failed, where they would be.
        num_queries (`int`): how many queries were asked.
        error (`str`, *optional*): why it failed; `None` if it did not.
        is_new (`bool`): whether it was computed now, and not in an earlier run.
    """

    video: str
    folder: Path
    num_queries: int
    error: str | None = None
    is_new: bool = True


@dataclass(frozen=True)
class Job:
    """A video with its folder, and the settings that its result depends on."""

    request: VideoRequest
    folder: Path
    settings: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """Return what the result depends on, as request.json holds it, wherever the video lies."""
        request = self.request
        return {
            "video_fingerprint": video_fingerprint(request.path),
            "start": request.start,
            "end": request.end,
            "fps": request.fps,
            "queries": [_query_record(query) for query in request.queries],
            **self.settings,
        }


def file_hash(path: Path) -> str:
    """Return what identifies the bytes of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _query_record(query: RequestedQuery) -> dict[str, Any]:
    references = None if query.reference_frames is None else list(query.reference_frames)
    mask = None if query.first_mask is None else file_hash(query.first_mask)
    return {**asdict(query), "reference_frames": references, "first_mask": mask}


# Before anything is computed


def plan_jobs(videos: Sequence[VideoRequest], out: Path, settings: Mapping[str, Any]) -> list[Job]:
    """Give each video its folder: the one it had before, or else one named after it that no other has.

    Raises:
        FileExistsError: if `out` is no folder, or that of something else.
        ValueError: if a video lies in it, or its videos.jsonl is damaged.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"The output `{out}` is a file. Give a folder.")
    if out.is_symlink() and not out.exists():
        raise FileExistsError(f"The output `{out}` is a link to nothing. Give a folder.")
    names = {key: row["folder"] for key, row in _read_index(out).items()}
    taken = {name.casefold() for name in (INDEX, FAILED, *names.values())}
    wanted = {_wanted_name(video).casefold() for video in videos}
    jobs = []
    for video in videos:
        if Path(os.path.realpath(out)) in Path(os.path.realpath(video.path)).parents:
            raise ValueError(
                f"The video `{video.path}` lies in the output folder `{out}`. Give another output folder."
            )
        key = video.video, video.start, video.end
        if key not in names:
            first, number = _wanted_name(video), 1
            names[key] = first
            while names[key].casefold() in taken or (number > 1 and names[key].casefold() in wanted):
                number += 1
                names[key] = f"{first}-{number}"
            taken.add(names[key].casefold())
        jobs.append(Job(video, out / names[key], settings))
    return jobs


def find_finished(jobs: Sequence[Job], out: Path, overwrite: bool) -> set[Path]:
    """Return the folders that need not be computed.

    Raises:
        FileExistsError: if a folder holds something else than results.
        ValueError: if results are there that were made otherwise, unless they may be replaced.
    """
    finished, others = set(), []
    for job in jobs:
        if not os.path.lexists(job.folder):
            continue
        try:
            stored = dict(json.loads((job.folder / REQUEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FileExistsError(
                f"`{job.folder}` is in the way of the results of `{job.request.video}`, and holds none: there is no "
                f"{REQUEST} that can be read. Move it away, or give another output folder."
            ) from error
        differences = [
            _difference(name, stored.get(name), value)
            for name, value in job.record().items()
            if name not in stored or stored[name] != value
        ]
        if differences:
            others.append(f"{job.folder.name} ({', '.join(differences[:_MAX_NAMED])})")
        else:
            finished.add(job.folder)
    if others and not overwrite:
        more = f", and {len(others) - _MAX_NAMED} more" if len(others) > _MAX_NAMED else ""
        raise ValueError(
            f"The output folder `{out}` holds results of other requests or settings: "
            f"{', '.join(others[:_MAX_NAMED])}{more}. Give another folder, or `overwrite=True` (--overwrite) to "
            "compute these again."
        )
    return finished


def make_output(out: Path) -> list[Path]:
    """Make the output folder; return those that were not there, the deepest first."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(prefix=".probe-", dir=out))
    except OSError as error:
        raise OSError(error.errno, f"The output folder `{out}` cannot be written: {error.strerror}") from error
    return made


def clear_leftovers(out: Path) -> None:
    """Remove what an interrupted run was writing, and what it noted of failures."""
    for leftover in (*out.glob(".*.partial"), out / _FAILURES):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _wanted_name(video: VideoRequest) -> str:
    path = Path(os.path.abspath(video.path))
    # Names that begin with a dot are those of what is not finished.
    return safe_name((path.name if path.is_dir() else path.stem).lstrip("."))


def _difference(name: str, earlier: Any, value: Any) -> str:
    """Say what is different, with its values where they are short."""
    if name.endswith("_fingerprint"):
        return f"another {name.removesuffix('_fingerprint')}"
    if name in ("queries", "contents"):
        return f"other {name}"
    return f"`{name}` was {earlier!r} and is {value!r}"


# videos.jsonl

_Key = tuple[str, float | str | None, float | str | None]


def _read_index(out: Path) -> dict[_Key, dict[str, Any]]:
    """Return the rows of videos.jsonl, none for a new folder; refuse a folder of something else."""
    path = out / INDEX
    if not path.is_file():
        # Meanwhile another process may have written it.
        if out.is_dir() and any(not entry.name.startswith(".") and entry.name != INDEX for entry in out.iterdir()):
            raise FileExistsError(
                f"The output folder `{out}` is not empty and holds no run to continue (no {INDEX}). Give another one."
            )
        return {}
    rows = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                row = json.loads(line)
                if Path(row["folder"]).name != row["folder"] or row["folder"].startswith("."):
                    raise ValueError(f"{row['folder']!r} is no name of a folder")
                rows[row["video"], row["start"], row["end"]] = row
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"`{path}` is not what an earlier run wrote: {type(error).__name__}, {error}. Give another output folder."
        ) from error
    return rows


def write_index(out: Path, jobs: Sequence[Job]) -> None:
    """Write videos.jsonl: earlier videos, then new ones."""
    asked: dict[_Key, dict[str, Any]] = {}
    for job in jobs:
        request = job.request
        key = request.video, request.start, request.end
        asked[key] = {"folder": job.folder.name, **dict(zip(("video", "start", "end"), key, strict=True))}
    earlier = _read_index(out) if (out / INDEX).is_file() else {}
    kept = {key: row for key, row in earlier.items() if key in asked or (out / row["folder"]).exists()}
    write_json_lines(out / INDEX, {**kept, **asked}.values())


# Video by video


@contextmanager
def video_folder(job: Job, rank: int) -> Iterator[Path]:
    """Lend a temporary folder, which becomes that of the video, or vanishes if anything fails."""
    staging, earlier = (job.folder.with_name(f".{kind}-{rank}.partial") for kind in ("new", "earlier"))
    for leftover in (staging, earlier):
        shutil.rmtree(leftover, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        record = {"video": job.request.video, **job.record(), "visa_hf_version": visa_hf.__version__}
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (staging / REQUEST).write_text(text, encoding="utf-8")
        if job.folder.exists():
            os.replace(job.folder, earlier)
        os.replace(staging, job.folder)
    finally:
        if earlier.exists() and not job.folder.exists():
            os.replace(earlier, job.folder)
        for leftover in (staging, earlier):
            shutil.rmtree(leftover, ignore_errors=True)


def _failure_file(job: Job) -> Path:
    return job.folder.parent / _FAILURES / f"{quote(job.folder.name, safe='')}.json"


def note_failure(job: Job, error: str) -> None:
    """Leave word of a failure for the first process."""
    file = _failure_file(job)
    file.parent.mkdir(exist_ok=True)
    write_json_lines(file, [{"error": error}])


def result_of(job: Job, *, is_new: bool) -> VideoResult:
    """Look what became of a video, by whichever process."""
    error = None
    if is_new and _failure_file(job).is_file():
        error = json.loads(_failure_file(job).read_text(encoding="utf-8"))["error"]
    elif not (job.folder / REQUEST).is_file():
        error = (
            "The result is missing: processes on several machines must write to one and the same folder. Start again "
            "with the same settings to compute it."
        )
    return VideoResult(job.request.video, job.folder, len(job.request.queries), error, is_new)


def remove_if_nothing_is_there(out: Path, jobs: Sequence[Job], made: Sequence[Path]) -> None:
    """Undo the making of a folder that no video was finished in."""
    if made and not any(job.folder.exists() for job in jobs):
        for name in (INDEX, FAILED):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / _FAILURES, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # something else is in it
                folder.rmdir()


def write_failures(out: Path, jobs: Sequence[Job], results: Sequence[VideoResult]) -> None:
    """Write failed.jsonl, or remove an earlier one."""
    failed = [
        {"video": result.video, "folder": result.folder.name, "row": job.request.place, "error": result.error}
        for job, result in zip(jobs, results, strict=True)
        if result.error is not None
    ]
    if failed:
        write_json_lines(out / FAILED, failed)
    else:
        (out / FAILED).unlink(missing_ok=True)
    shutil.rmtree(out / _FAILURES, ignore_errors=True)
