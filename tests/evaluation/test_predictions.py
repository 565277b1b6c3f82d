"""Reading predictions: every layout gives the same masks, and everything that is wrong has a name."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.worlds import SIZE, revos_set, shifted, square, truths, write_predictions
from visa_hf.evaluation.predictions import (
    Problem,
    describe_problems,
    open_predictions,
    read_mask_png,
)
from visa_hf.rle import encode_mask


@pytest.fixture
def world(tmp_path):
    evaluation_set = revos_set(tmp_path / "data")
    return evaluation_set, shifted(truths(evaluation_set))


def write_lines(path, evaluation_set, masks):
    rows = [
        {
            "video": expression.video,
            "expression_id": expression.expression_id,
            "masks": {
                str(number): encode_mask(mask)
                for number, mask in enumerate(masks[expression.video, expression.expression_id])
            },
        }
        for expression in evaluation_set.expressions
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_arrays(predictions, expression):
    frames = predictions.read(expression)
    assert not [frame for frame in frames if isinstance(frame, Problem)]
    return np.stack(frames)


@pytest.mark.parametrize("layout", ["ours", "published", "published without Annotations", "lines", "folder of lines"])
def test_every_layout_gives_the_same_masks(world, tmp_path, layout):
    evaluation_set, masks = world
    out = tmp_path / "out"
    if layout == "ours":
        write_predictions(out / "Annotations", evaluation_set, masks)
    elif layout == "published":
        write_predictions(out / "Annotations", evaluation_set, masks, "grey")
    elif layout == "published without Annotations":
        write_predictions(out, evaluation_set, masks, "grey")
    else:
        out.mkdir()
        write_lines(out / "predictions.jsonl", evaluation_set, masks)
    predictions = open_predictions(out / "predictions.jsonl" if layout == "lines" else out)
    assert predictions.check(evaluation_set) == []
    for expression in evaluation_set.expressions:
        expected = np.stack(masks[expression.video, expression.expression_id])
        assert np.array_equal(as_arrays(predictions, expression), expected)


def test_missing_and_extra_pngs_are_named(world, tmp_path):
    evaluation_set, masks = world
    out = tmp_path / "out"
    write_predictions(out, evaluation_set, masks)
    (out / "a" / "0" / "00001.png").unlink()
    for path in (out / "b" / "1").iterdir():
        path.unlink()
    (out / "a" / "0" / "00007.png").write_bytes(b"")
    (out / "a" / "9").mkdir()
    (out / "c").mkdir()
    (out / ".hidden").write_text("")
    problems = open_predictions(out).check(evaluation_set)
    assert {(problem.kind, problem.where) for problem in problems} == {
        ("missing", "video `a`, expression `0`, frame `00001`"),
        ("missing", "video `b`, expression `1`"),
        ("extra", f"`{out / 'a' / '0' / '00007.png'}`"),
        ("extra", f"`{out / 'a' / '9'}`"),
        ("extra", f"`{out / 'c'}`"),
    }


def test_damaged_pngs_and_other_sizes_are_named_when_read(world, tmp_path):
    evaluation_set, masks = world
    out = tmp_path / "out"
    write_predictions(out, evaluation_set, masks)
    whole = (out / "a" / "0" / "00000.png").read_bytes()
    (out / "a" / "0" / "00000.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (5, 4)).save(out / "a" / "0" / "00001.png")
    Image.new("RGB", (SIZE[1], SIZE[0])).save(out / "a" / "0" / "00002.png")
    frames = open_predictions(out).read(evaluation_set.expressions[0])
    assert [frame.kind for frame in frames] == ["unreadable", "size", "unreadable"]
    assert "4 x 5 (height x width) instead of 24 x 32" in str(frames[1])
    assert 'of mode "RGB"' in str(frames[2])


def test_a_grey_picture_is_no_mask(tmp_path):
    Image.fromarray(np.array([[0, 90, 255]], dtype=np.uint8)).save(tmp_path / "soft.png")
    with pytest.raises(ValueError, match="2 grey levels beside black"):
        read_mask_png(tmp_path / "soft.png")


@pytest.mark.parametrize("value", [1, 255])
def test_grey_and_palette_pngs_of_any_one_value_are_masks(tmp_path, value):
    mask = square(3, 3)
    values = mask.astype(np.uint8) * np.uint8(value)
    Image.fromarray(values).save(tmp_path / "grey.png")
    palette = Image.fromarray(values, mode="P")
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_mask_png(tmp_path / "grey.png"), mask)
    assert np.array_equal(read_mask_png(tmp_path / "palette.png"), mask)


def test_lines_that_are_missing_there_twice_or_not_asked_for_are_named(world, tmp_path):
    evaluation_set, masks = world
    path = tmp_path / "predictions.jsonl"
    write_lines(path, evaluation_set, masks)
    lines = path.read_text().splitlines(keepends=True)
    stranger = lines[0].replace('"a"', '"stranger"')
    path.write_text("".join([lines[0], *lines[2:], lines[3], stranger]))
    predictions = open_predictions(path)
    problems = predictions.check(evaluation_set)
    assert [(problem.kind, problem.where) for problem in problems] == [
        ("missing", "video `a`, expression `1`"),
        ("duplicate", "video `b`, expression `0`"),
        ("extra", "video `stranger`, expression `0`"),
    ]
    assert "lines 3 and 5" in str(problems[1])
    assert {frame.kind for frame in predictions.read(evaluation_set.expressions[3])} == {"duplicate"}


def test_damaged_run_lengths_and_other_sizes_in_lines_are_named(world, tmp_path):
    evaluation_set, masks = world
    path = tmp_path / "predictions.jsonl"
    rows = {"0": {"size": list(SIZE), "counts": "1"}, "1": encode_mask(square(0, 0, size=(9, 9)))}
    path.write_text(json.dumps({"video": "a", "expression_id": "0", "masks": rows}) + "\n")
    frames = open_predictions(path).read(evaluation_set.expressions[0])
    assert [frame.kind for frame in frames] == ["unreadable", "size", "missing"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("{broken", "Line 1 of .* is not JSON"), ('{"video": "a"}', "Line 1 of .* is no prediction")],
)
def test_a_line_that_is_no_prediction_is_refused(tmp_path, line, message):
    (tmp_path / "predictions.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        open_predictions(tmp_path)


def test_an_empty_or_absent_folder_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no predictions"):
        open_predictions(tmp_path)
    with pytest.raises(FileNotFoundError, match="There are no predictions at"):
        open_predictions(tmp_path / "nowhere")


def test_problems_are_listed_up_to_a_limit_and_counted(world):
    problems = [Problem("missing", f"frame {number}") for number in range(12)] + [Problem("extra", "`x`")]
    text = describe_problems(problems, limit=2)
    assert text == ("13 problems (12 missing, 1 not asked for): frame 0 is missing; frame 1 is missing; and 11 more.")
