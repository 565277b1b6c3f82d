"""Preparing a data set in a test, and expecting that it is refused."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError

from visa_hf.datasets_scripts.annotations import AnnotationError


def prepared(
    builder_class: type, config: str | None, root: Path, cache: Path, split: str = "train", **options: Any
) -> datasets.Dataset:
    builder = builder_class(config, data_dir=root, cache_dir=cache, **options)
    builder.download_and_prepare()
    return builder.as_dataset(split)


@contextmanager
def refused(match: str) -> Iterator[None]:
    """Expect an `AnnotationError` whose text is found by `match`, as it is or as the cause of another error."""
    with pytest.raises((AnnotationError, DatasetGenerationError)) as caught:
        yield
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, AnnotationError):
        error = error.__cause__
    assert error is not None, f"another error: {caught.value!r}"
    assert re.search(match, str(error)), str(error)
