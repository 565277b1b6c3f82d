"""What all builders share: the data folder, the cache, rows that are left out.

A builder reads a folder as its authors publish it, on this machine, and makes rows as `features` describes them.
The cache of a prepared set is found by the state of its annotation files, so that changed files are read again.
Nothing is downloaded, and no image or video is copied or encoded anew.
"""

import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from .annotations import AnnotationError, fingerprint

logger = logging.getLogger(__name__)

# How many of the rows that are left out a warning shows.
_NUM_SHOWN = 5


@dataclass
class VisaBuilderConfig(datasets.BuilderConfig):
    """Which rows a builder makes (`name`), and what it does about a row that cannot be used.

    Args:
        on_error: `"raise"` an `AnnotationError`, or `"skip"` the row, count it and say so at the end.
    """

    on_error: str = "raise"


class VisaDatasetBuilder(datasets.GeneratorBasedBuilder):
    """Base of all builders.

    A subclass gives `SHORT_NAME`, `LAYOUT`, `BUILDER_CONFIGS`, `DEFAULT_CONFIG_NAME`, `annotation_files`, `_info`,
    `_split_generators` and `_generate_examples`; it hands every row that it cannot make to `skip_or_raise`.

    Args:
        data_dir (`str` or `Path`): the folder that holds the data set.
        config_name (`str`, *optional*): which rows; the first listed by default.
        **kwargs: as for any builder: `cache_dir`, and the fields of the configuration, such as `on_error`.

    Raises:
        ValueError: no `data_dir`, or an option that there is not.
        FileNotFoundError: there is no such folder.
    """

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = VisaBuilderConfig

    SHORT_NAME = ""
    """What the rows' `dataset` column says."""

    LAYOUT = ""
    """The files and folders that are needed, for error messages."""

    def __init__(
        self,
        config_name: str | None = None,
        data_dir: str | Path | None = None,
        cache_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if data_dir is None:
            raise ValueError(f"{name} needs `data_dir`, the folder that holds:\n{self.LAYOUT}")
        self.root = Path(os.path.abspath(os.path.expanduser(data_dir)))
        """The data folder; frames are relative to it."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"{name}: there is no folder {self.root}. It is needed, with:\n{self.LAYOUT}")
        self._skip_report: str | None = None
        self._num_told = 0
        if kwargs.get("on_error") == "raise":
            del kwargs["on_error"]  # the default: it shall not make a cache of its own
        kwargs.setdefault("dataset_name", name.lower())
        state = fingerprint(self.annotation_files(), root=self.root, image_folders=self.image_folders())
        kwargs.setdefault("hash", state)
        super().__init__(
            config_name=config_name,
            data_dir=str(self.root),
            cache_dir=None if cache_dir is None else str(cache_dir),
            **kwargs,
        )
        # Not in the configuration's own `__post_init__`, after which `datasets` sets the fields that were given.
        if self.config.on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` is {self.config.on_error!r}; "raise" or "skip" is needed.')

    def annotation_files(self) -> Sequence[Path]:
        """Return every file (or folder of files) that rows are made of, images of frames apart.

        A change of any of them makes a new cache. Files that may be missing belong in it too: that they come is a
        change.
        """
        raise TypeError(f"{type(self).__name__} must define `annotation_files`.")

    def image_folders(self) -> Sequence[Path]:
        """Return the folders of the frames. An image that comes or goes in one of them makes a new cache as well."""
        return []

    def require(self, *paths: str) -> list[Path]:
        """Return files and folders of the data folder that must be there, given relative to it.

        Raises:
            FileNotFoundError: one of them is missing; the text shows the layout that is needed.
        """
        missing = [path for path in paths if not (self.root / path).exists()]
        if missing:
            raise FileNotFoundError(
                f"{type(self).__name__}: {', '.join(missing)} not found in {self.root}. This is needed:\n{self.LAYOUT}"
            )
        return [self.root / path for path in paths]

    def skip_or_raise(self, error: AnnotationError) -> None:
        """Deal with a row that cannot be made, as the configuration's `on_error` says.

        Raises:
            AnnotationError: `on_error` is "raise".
        """
        if self.config.on_error == "raise":
            raise error
        if self._skip_report is not None:
            # Each process appends to a file of its own: workers have no other way to tell the one that started them.
            path = os.path.join(self._skip_report, str(os.getpid()))
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as report:
                report.write(" ".join(str(error).splitlines()) + "\n")
            return
        self._num_told += 1  # while streaming there is no end at which to tell all
        if self._num_told <= _NUM_SHOWN:
            logger.warning("%s: a row is left out: %s", type(self).__name__, error)
        elif self._num_told == _NUM_SHOWN + 1:
            logger.warning("%s: more rows are left out; they are not told one by one.", type(self).__name__)

    def _prepare_split_single(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        # `datasets` hides every error behind one of its own, and its cause is lost between processes.
        try:
            yield from super()._prepare_split_single(*args, **kwargs)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, AnnotationError):
                raise error.__cause__ from None
            raise

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="visa-skipped-") as folder:
            self._skip_report = folder
            try:
                super()._download_and_prepare(*args, **kwargs)
            finally:
                self._skip_report = None
            skipped = [line for file in sorted(Path(folder).iterdir()) for line in _lines(file)]
        if skipped:
            logger.warning("%s: %s", type(self).__name__, _told(skipped))
        self._forget_empty_splits(skipped)

    def _forget_empty_splits(self, skipped: Sequence[str]) -> None:
        """Leave out splits without rows: `datasets` could not open them, nor all splits together."""
        splits = self.info.splits
        for name in [name for name, split in splits.items() if split.num_examples == 0]:
            del splits[name]
            logger.warning("%s: the split `%s` has no rows and is left out.", type(self).__name__, name)
        if not splits:
            reason = f" {_told(skipped)}" if skipped else ""
            raise AnnotationError.at(f"there are no rows of `{self.config.name}`.{reason}", file=self.root)


def _told(skipped: Sequence[str]) -> str:
    """Say how many rows were left out, and why the first ones were."""
    shown = "\n".join(skipped[:_NUM_SHOWN])
    more = f"\n... and {len(skipped) - _NUM_SHOWN} more" if len(skipped) > _NUM_SHOWN else ""
    return f"{len(skipped)} rows were left out because they cannot be used:\n{shown}{more}"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
