"""Zips for the servers: their bytes, and that everything a server would refuse is found before it does."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.worlds import SIZE, expression_row, square, write_frames, write_predictions
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet
from visa_hf.evaluation.predictions import open_predictions
from visa_hf.evaluation.submission import check_submission, write_submission


@pytest.fixture
def world(tmp_path):
    frames = write_frames(tmp_path / "data", "v", 2)
    rows = [expression_row("v", number, "it", 0, [], frames) for number in ("0", "1")]
    evaluation_set = EvaluationSet(BENCHMARKS["ref_youtube_vos"], "valid", tmp_path / "data", rows)
    masks = {("v", "0"): [square(2, 2), np.zeros(SIZE, bool)], ("v", "1"): [square(9, 9)] * 2}
    write_predictions(tmp_path / "out", evaluation_set, masks)
    return evaluation_set, masks, tmp_path


def test_the_zip_is_what_the_server_asks(world):
    evaluation_set, masks, folder = world
    write_submission(evaluation_set, open_predictions(folder / "out"), folder / "s.zip")
    with zipfile.ZipFile(folder / "s.zip") as archive:
        assert archive.namelist() == [
            f"Annotations/v/{number}/{frame}.png" for number in (0, 1) for frame in ("00000", "00001")
        ]
        for number, frame in ((0, 0), (0, 1), (1, 0)):
            with Image.open(io.BytesIO(archive.read(f"Annotations/v/{number}/{frame:05d}.png"))) as image:
                assert image.mode == "L"
                values = np.asarray(image)
            assert np.array_equal(values, masks["v", str(number)][frame] * np.uint8(255))
    assert check_submission(folder / "s.zip", evaluation_set) == []


def test_the_same_predictions_give_the_same_bytes(world):
    evaluation_set, masks, folder = world
    write_submission(evaluation_set, open_predictions(folder / "out"), folder / "one.zip")
    write_predictions(folder / "grey", evaluation_set, masks, "grey")
    write_submission(evaluation_set, open_predictions(folder / "grey"), folder / "two.zip")
    assert (folder / "one.zip").read_bytes() == (folder / "two.zip").read_bytes()


def test_mevis_wants_the_videos_at_the_top_of_the_zip(world):
    youtube, _, folder = world
    rows = [expression_row("v", number, "it", 0, [], list(youtube.videos["v"][0].frames)) for number in ("0", "1")]
    mevis = EvaluationSet(BENCHMARKS["mevis"], "valid", youtube.root, rows)
    write_submission(mevis, open_predictions(folder / "out"), folder / "s.zip")
    with zipfile.ZipFile(folder / "s.zip") as archive:
        assert archive.namelist()[0] == "v/0/00000.png"
    assert check_submission(folder / "s.zip", mevis) == []
    assert {problem.kind for problem in check_submission(folder / "s.zip", youtube)} == {"missing", "extra"}


@pytest.mark.parametrize("damage", ["missing", "unreadable"])
def test_nothing_is_written_from_incomplete_predictions(world, damage):
    evaluation_set, _, folder = world
    (folder / "s.zip").write_bytes(b"earlier")
    if damage == "missing":
        (folder / "out" / "v" / "1" / "00001.png").unlink()
    else:
        (folder / "out" / "v" / "1" / "00001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=f"not what the server asks.*{damage}"):
        write_submission(evaluation_set, open_predictions(folder / "out"), folder / "s.zip")
    assert (folder / "s.zip").read_bytes() == b"earlier"
    assert not list(folder.glob(".*partial"))


def png(values, mode=None):
    file = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (None, "missing", "`Annotations/v/0/00000.png` is missing"),
        (b"no picture", "unreadable", "it is no PNG"),
        (png(np.zeros((3, 3), np.uint8)), "size", "3 x 3 instead of 24 x 32"),
        (png(square(0, 0).astype(np.uint8)), "unreadable", "values up to 1"),
        (png(square(0, 0) * np.uint8(255), "P"), "unreadable", 'mode "P"'),
        (png(square(0, 0) * np.uint8(255), "RGB"), "unreadable", 'mode "RGB"'),
    ],
)
def test_an_entry_that_the_server_would_refuse_is_named(world, change, kind, message):
    evaluation_set, _, folder = world
    write_submission(evaluation_set, open_predictions(folder / "out"), folder / "s.zip")
    with zipfile.ZipFile(folder / "s.zip") as old, zipfile.ZipFile(folder / "t.zip", "w") as new:
        for name in old.namelist():
            data = change if name.endswith("0/00000.png") else old.read(name)
            if data is not None:
                new.writestr(name, data)
    problems = check_submission(folder / "t.zip", evaluation_set)
    assert [problem.kind for problem in problems] == [kind]
    assert message in str(problems[0])


def test_extra_and_double_entries_are_named(world):
    evaluation_set, _, folder = world
    write_submission(evaluation_set, open_predictions(folder / "out"), folder / "s.zip")
    with zipfile.ZipFile(folder / "s.zip", "a") as archive:
        archive.writestr("Annotations/v/0/00009.png", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("Annotations/v/0/00000.png", archive.read("Annotations/v/0/00000.png"))
    problems = check_submission(folder / "s.zip", evaluation_set)
    assert [(problem.kind, problem.where) for problem in problems] == [
        ("duplicate", "`Annotations/v/0/00000.png`"),
        ("extra", "`Annotations/v/0/00009.png`"),
    ]


def test_what_is_no_zip_is_refused(world):
    evaluation_set, _, folder = world
    (folder / "s.zip").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="is no zip that can be read"):
        check_submission(folder / "s.zip", evaluation_set)
    with pytest.raises(FileNotFoundError, match="There is no zip"):
        check_submission(folder / "absent.zip", evaluation_set)
