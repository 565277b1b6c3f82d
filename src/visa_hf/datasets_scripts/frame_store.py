"""The pictures behind the frame names of a data set's rows, decoded one by one when a sample asks for them.

A frame is a path relative to the set's root: an image file, or `clip.mp4#17`, decoded frame 17 of a video file. Rows
never hold pixels and images are never re-encoded. Nothing is kept between two calls, no open file either, so that a
store can be pickled and goes through a fork. It neither resizes nor normalises: the processor does.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ImageOps

from visa_hf.datasets_scripts.annotations import check_relative
from visa_hf.datasets_scripts.image_files import PILLOW_ERRORS, open_image
from visa_hf.modeling.frame_source_visa import open_frames

_VIDEO_FRAME = re.compile(r"(.+)#([0-9]{1,9})")


class FrameError(ValueError):
    """A frame that cannot be read. The text names the file and the frame."""


class MissingFrameError(FrameError, FileNotFoundError):
    """A frame whose file does not exist."""


class FrameStore:
    """Frames below one folder, read by name.

    Args:
        root (`str` or `os.PathLike`): the folder that frame names are relative to, a builder's `data_dir`.

    Raises:
        FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        # Absolute, since a worker may have another working directory.
        self.root = Path(root).absolute()
        if not self.root.is_dir():
            raise FileNotFoundError(f"There is no folder `{self.root}`. Give the folder that the frames lie under.")

    def __repr__(self) -> str:
        return f"FrameStore({str(self.root)!r})"

    def read(self, frames: Sequence[str]) -> list[np.ndarray]:
        """Decode some frames, and no others but those that a video file needs to get there.

        A frame named twice is decoded once and given twice, as the same array.

        Args:
            frames (`Sequence[str]`): names relative to the root, in any order, of one or several files.

        Returns:
            `list[np.ndarray]`: in the order of `frames`, arrays of shape `(H, W, 3)`, RGB, uint8. An image is what
            Pillow's `convert("RGB")` gives. Images and videos are turned upright, as their file says.

        Raises:
            FrameError: a frame is damaged, is no picture of 8 bits, or lies beyond the end of its video.
            MissingFrameError: its file does not exist; also a `FileNotFoundError`.
            AnnotationError: a name is absolute or leads out of the root.
            ImportError: a frame lies in a video file and PyAV is not installed.
        """
        decoded: dict[str, np.ndarray] = {}
        in_videos: dict[str, list[str]] = {}
        for name in dict.fromkeys(frames):
            check_relative(name)
            match = _VIDEO_FRAME.fullmatch(name)
            if match is None:
                decoded[name] = _read_image(self.root / name, name)
            else:
                in_videos.setdefault(match[1], []).append(name)
        for file, names in in_videos.items():
            indices = [int(name.rpartition("#")[2]) for name in names]
            decoded.update(zip(names, _read_video(self.root / file, indices), strict=True))
        return [decoded[name] for name in frames]


def _read_image(path: Path, name: str) -> np.ndarray:
    """Return one image file as `(H, W, 3)` uint8."""
    try:
        with open_image(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise ValueError(f'its mode is "{image.mode}", and 8 bits per channel are needed')
            ImageOps.exif_transpose(image, in_place=True)
            # `convert` would copy what is RGB already.
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except FileNotFoundError as error:
        raise MissingFrameError(f"Frame `{name}` is missing: there is no file `{path}`.") from error
    except PILLOW_ERRORS as error:
        raise FrameError(f"Frame `{name}` of `{path}` cannot be read ({error}). Replace the file.") from error


def _read_video(path: Path, indices: list[int]) -> list[np.ndarray]:
    """Return some frames of one video file, each `(H, W, 3)` uint8."""
    if not path.is_file():
        raise MissingFrameError(f"Frame {indices[0]} of `{path}` is missing: there is no such file.")
    # Opened anew for every sample: a decoder that lives on would have threads that do not survive a fork.
    try:
        with open_frames(path, max_cached_frames=1) as source:
            beyond = [index for index in indices if index >= source.num_frames]
            if beyond:
                raise FrameError(
                    f"Frame {beyond[0]} of `{path}` is asked for, but the video has {source.num_frames} frames, "
                    "counted from 0. Correct the annotation or give the whole video."
                )
            return source.get_many(indices)
    except FrameError:
        raise
    except (OSError, ValueError) as error:
        shown = ", ".join(map(str, indices))
        raise FrameError(f"`{path}` cannot be read at frames {shown} ({error})") from error
