"""What the tests of `visa train` share: a few synthetic clips, and a cache of prepared rows."""

import pytest

from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "synthetic"
    options = ClipOptions(size=(48, 64), num_frames=(4, 5))
    write_dataset(folder, num_videos={"train": 3, "valid": 2}, options=options, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")
