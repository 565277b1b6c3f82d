"""Headers of image files: their size, upright.

The one rule for pictures that ask by EXIF to be turned or mirrored: a picture is what one sees, upright. Heights,
widths and masks are those of the upright picture, here and in `frame_store`.
"""

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile

from .annotations import AnnotationError

# What Pillow raises for files that are no pictures, or damaged ones.
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

_ORIENTATION = 0x0112
# The orientations that swap the axes.
_TURNED = (5, 6, 7, 8)
# Where a PNG says that it has an orientation; asking any other PNG for it would decode all of it.
_PNG_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


@contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[ImageFile.ImageFile]:
    """Open an image without its pixels; raises one of `PILLOW_ERRORS` if that cannot be done."""
    # Pillow warns of odd metadata that has no bearing on the pixels.
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        yield image


def orientation(image: ImageFile.ImageFile) -> int:
    """Return how a picture asks to be turned or mirrored, as EXIF numbers it; 1 for not at all."""
    if image.format == "PNG" and not _PNG_METADATA & image.info.keys():
        return 1
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(2, 9) else 1


def image_size(root: str | Path, frame: str, **where: Any) -> tuple[int, int]:
    """Read (H, W) of a picture, upright, from its header.

    Args:
        root (`str` or `Path`): the data folder.
        frame (`str`): path below it.
        where: `file`, `video`, `expression`: what an error names besides the frame.

    Raises:
        AnnotationError: the image is missing or cannot be read.
    """
    try:
        with open_image(os.path.join(root, frame)) as image:
            height, width = image.height, image.width
            is_turned = orientation(image) in _TURNED
    except FileNotFoundError as error:
        raise AnnotationError.at(f"there is no such image in {root}.", frame=frame, **where) from error
    except PILLOW_ERRORS as error:
        raise AnnotationError.at(f"the image cannot be read ({error}).", frame=frame, **where) from error
    return (width, height) if is_turned else (height, width)
