"""Several processes that share a list of videos, and fingerprints of what they work on.

`torchrun` and `accelerate launch` start the processes; nobody serves them: who does what is computed by each of them
from what all see, and they meet where a step needs all of them.
"""

import atexit
import hashlib
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers.utils import is_av_available

from visa_hf.modeling.frame_source_visa import IMAGE_SUFFIXES, image_files_of

# Files that a model is made of, and how much of a file goes into its fingerprint.
_CHECKPOINT_SUFFIXES = (".json", ".safetensors", ".bin", ".model")
_SAMPLE_BYTES, _SAMPLES_PER_FILE = 4096, 256


class Processes:
    """The processes that share a run, as `torchrun` or `accelerate launch` started them; one, if nobody did.

    Args:
        device (`str`): `"auto"` or `"cuda"`, of which each process takes the one of its own number on its machine, or
            the device of all of them.

    Attributes:
        rank, count (`int`): number of this process, and how many there are.
        device (`str`): the device of this one.
    """

    def __init__(self, device: str = "auto") -> None:
        self._state: Any = None
        self.rank, self.count, self.device = 0, 1, device
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate.state import PartialState  # type: ignore[import-untyped]

            if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
                self.device = "cpu"
            has_own_gpu = self.device in ("auto", "cuda") and torch.cuda.is_available()
            is_first = not torch.distributed.is_initialized()
            # Without a GPU, accelerate takes each process for the only one, unless it is told that this is meant.
            # One may be busy for long after another has finished: waiting is no error.
            self._state = PartialState(cpu=not has_own_gpu, timeout=timedelta(days=30))
            self.rank, self.count = self._state.process_index, self._state.num_processes
            if is_first:
                # Not earlier: a group that was left cannot be joined again, and there may be another run.
                atexit.register(self.close)
            if has_own_gpu:
                self.device = str(self._state.device)

    def wait(self) -> None:
        """Wait until all processes have come here.

        Raises:
            RuntimeError: if one of them has ended.
        """
        if self._state is not None:
            try:
                self._state.wait_for_everyone()
            except RuntimeError as error:
                raise RuntimeError(
                    "Another process of this run has ended before its time; its own message says why. Start the same "
                    "command again: what is finished is kept."
                ) from error

    def close(self) -> None:
        """Leave the group for good; the end of the program does it, too."""
        if self._state is not None:
            self._state.destroy_process_group()


def launched_rank() -> int:
    """Return the number of this process among those that a launcher started, before they know of each other."""
    return int(os.environ.get("RANK", "0"))


def share_work(work: Mapping[str, int], count: int) -> list[list[str]]:
    """Divide what is to be done among processes so that each has about the same work: the same division everywhere.

    Args:
        work (`Mapping[str, int]`): names, and how much work each is.
        count (`int`): number of processes.

    Returns:
        `list[list[str]]`: the names of each process, in the order of `work`.
    """
    loads = [0] * count
    owner = {}
    for name in sorted(work, key=lambda name: (-work[name], name)):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += work[name]
    return [[name for name in work if owner[name] == rank] for rank in range(count)]


def checkpoint_fingerprint(model: str | os.PathLike[str]) -> str | None:
    """Return what identifies a checkpoint's files, wherever they lie: a hash of their names, sizes and samples.

    Large files are sampled: two sets of trained weights do not agree in any of so many places. `None` for a model that
    is no folder: a Hub id says by itself what is meant.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _CHECKPOINT_SUFFIXES and path.is_file():
            _add_file(digest, path, _SAMPLES_PER_FILE)
    return digest.hexdigest()[:16]


def video_fingerprint(path: Path) -> str:
    """Return what identifies a video, image or folder of frames, wherever it lies: names of frames, sizes, samples."""
    digest = hashlib.sha256()
    if path.is_dir():
        files, num_samples = image_files_of(path), 1
    else:
        files, num_samples = [path], 16
    for file in files:
        _add_file(digest, file, num_samples, with_name=path.is_dir())
    return digest.hexdigest()[:16]


def _add_file(digest: Any, path: Path, num_samples: int, with_name: bool = True) -> None:
    """Add a file's name, size and samples from all over it."""
    size = path.stat().st_size
    digest.update(f"{path.name if with_name else ''} {size}\n".encode())
    step = max(_SAMPLE_BYTES, size // num_samples)
    with path.open("rb") as file:
        for place in range(0, size, step):
            file.seek(place)
            digest.update(file.read(_SAMPLE_BYTES))


def estimate_frames(path: Path) -> int:
    """Return about how many frames a video has, as far as its header tells; 1 if it does not, and for an image."""
    if path.is_dir():
        return max(len(image_files_of(path)), 1)
    if path.suffix.lower() in IMAGE_SUFFIXES or not is_av_available():
        return 1
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return 1
            stream = container.streams.video[0]
            seconds = (container.duration or 0) / av.time_base
            return max(stream.frames, int(seconds * (stream.average_rate or 0)), 1)
    except av.error.FFmpegError:  # it will be said when it is its turn
        return 1
