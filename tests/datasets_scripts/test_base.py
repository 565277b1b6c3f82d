"""What all builders share, shown on the smallest one: its rows are the lines of a file, some of which may be bad."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import pytest

from visa_hf import datasets_scripts
from visa_hf.datasets_scripts import AnnotationError, VisaBuilderConfig, VisaDatasetBuilder


class LinesBuilder(VisaDatasetBuilder):
    SHORT_NAME = "lines"
    LAYOUT = "  lines.txt, without the word bad"
    BUILDER_CONFIGS = [VisaBuilderConfig(name="expressions")]
    DEFAULT_CONFIG_NAME = "expressions"

    def annotation_files(self) -> Sequence[Path]:
        return [self.root / "lines.txt"]

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features({"text": datasets.Value("string")}))

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        (file,) = self.require("lines.txt")
        lines = file.read_text().splitlines()
        return [
            datasets.SplitGenerator(name=name, gen_kwargs={"lines": [line for line in lines if line.startswith(name)]})
            for name in ("train", "valid")
        ]

    def _generate_examples(self, lines: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
        for line in lines:
            if "bad" in line:
                self.skip_or_raise(AnnotationError.at(f"{line!r} is bad.", file="lines.txt"))
                continue
            yield line, {"text": line}


class OtherBuilder(LinesBuilder):
    pass


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    (root / "lines.txt").write_text("train 1\ntrain 2 bad\ntrain 3\nvalid 1\n")
    return root


def test_a_bad_row_raises_its_own_error(root: Path, tmp_path: Path) -> None:
    for num_proc in (None, 2):
        with pytest.raises(AnnotationError, match="^lines.txt: 'train 2 bad' is bad.$"):
            LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache").download_and_prepare(num_proc=num_proc)


def test_another_error_stays_what_it_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LinesBuilder, lines: list[str]) -> Iterator[Any]:
        yield 1 / 0

    monkeypatch.setattr(LinesBuilder, "_generate_examples", fail)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache").download_and_prepare()


@pytest.mark.parametrize("num_proc", [None, 2])
def test_skipped_rows_are_told_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, num_proc: int | None
) -> None:
    bad = "".join(f"train bad {number}\n" for number in range(7))
    (root / "lines.txt").write_text(f"train 1\n{bad}train 3\nvalid 1\n")
    builder = LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache", on_error="skip")
    with caplog.at_level(logging.WARNING, logger="visa_hf"):
        builder.download_and_prepare(num_proc=num_proc)
    assert builder.as_dataset(split="train")["text"] == ["train 1", "train 3"]
    told = [record.getMessage() for record in caplog.records if record.name == "visa_hf.datasets_scripts.base"]
    assert len(told) == 1
    assert told[0].startswith("LinesBuilder: 7 rows were left out") and told[0].endswith("... and 2 more")
    assert told[0].count("\nlines.txt: 'train bad") == 5


def test_streaming_does_not_tell_of_thousands(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "lines.txt").write_text("".join(f"train bad {number}\n" for number in range(20)) + "train 1\n")
    builder = LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache", on_error="skip")
    with caplog.at_level(logging.WARNING, logger="visa_hf"):
        assert len(list(builder.as_streaming_dataset(split="train"))) == 1
    assert len(caplog.records) == 6
    assert "more rows are left out" in caplog.text


def test_a_split_without_rows_is_left_out(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "lines.txt").write_text("train 1\nvalid bad\n")
    builder = LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache", on_error="skip")
    with caplog.at_level(logging.WARNING, logger="visa_hf"):
        builder.download_and_prepare()
    assert list(builder.as_dataset()) == ["train"]
    assert "the split `valid` has no rows and is left out" in caplog.text
    (root / "lines.txt").write_text("valid bad\n")
    with pytest.raises(AnnotationError, match="there are no rows of `expressions`. 1 rows were left out(.|\n)*is bad"):
        LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache", on_error="skip").download_and_prepare()


def test_the_cache_knows_class_folder_file_and_options(root: Path, tmp_path: Path) -> None:
    def place(cls: type[VisaDatasetBuilder] = LinesBuilder, folder: Any = root, **kwargs: Any) -> str:
        return str(cls(data_dir=folder, cache_dir=tmp_path / "cache", **kwargs).cache_dir)

    first = place()
    assert place(folder=f"{root}/../{root.name}/") == first
    assert place(folder=os.path.relpath(root)) == first
    assert place(on_error="raise") == first, "the default, given or not"
    others = [place(OtherBuilder), place(on_error="skip")]
    (root / "lines.txt").write_text("train 9\n")
    others.append(place())
    assert len({first, *others}) == 4


def test_require_names_what_is_missing(root: Path, tmp_path: Path) -> None:
    builder = LinesBuilder(data_dir=root, cache_dir=tmp_path / "cache")
    assert builder.require("lines.txt") == [root / "lines.txt"]
    with pytest.raises(FileNotFoundError, match=r"a.txt, b not found in .*data. This is needed:\n  lines.txt"):
        builder.require("a.txt", "lines.txt", "b")


def test_a_file_is_no_data_folder(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="LinesBuilder: there is no folder .*lines.txt"):
        LinesBuilder(data_dir=root / "lines.txt")


def test_every_name_has_a_place_and_nothing_is_imported_before_it_is_used() -> None:
    assert set(datasets_scripts.__all__) == set(datasets_scripts._LAZY)
    assert set(datasets_scripts.__all__) <= set(dir(datasets_scripts))
    for name in datasets_scripts.__all__:
        assert find_spec(datasets_scripts._LAZY[name]) is not None, name
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = datasets_scripts.Nothing
    program = "import sys, visa_hf.datasets_scripts; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
