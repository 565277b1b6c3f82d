"""The page: well-formed, complete, with nothing from outside, and safe against what expressions may say."""

from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.worlds import expression_row, masks_row, revos_set, shifted, square, truths, write_predictions
from visa_hf.evaluation.benchmarks import BENCHMARKS, EvaluationSet
from visa_hf.evaluation.predictions import open_predictions
from visa_hf.evaluation.report import bar_chart, write_report
from visa_hf.evaluation.score import score_predictions

VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Checks that tags close in order; collects texts and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def world(tmp_path):
    evaluation_set = revos_set(tmp_path / "data")
    masks = shifted(truths(evaluation_set))
    masks["b", "1"] = [~mask for mask in masks["b", "1"]]
    write_predictions(tmp_path / "predictions", evaluation_set, masks)
    predictions = open_predictions(tmp_path / "predictions")
    return evaluation_set, predictions, score_predictions(evaluation_set, predictions)


def test_the_page_shows_table_plots_and_the_worst_clips_first(world, tmp_path):
    evaluation_set, predictions, result = world
    path = write_report(evaluation_set, predictions, result, tmp_path, num_clips=2, details={"model": "mine"})
    page = Page(path.read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    assert f"{result.table['overall']['J&F']:.2f}" in text
    assert "mine" in text
    assert {"0 to 10", "90 to 100"} <= set(page.texts)
    assert f"Robustness R: {result.robustness:.2f} (of expressions without an object)" in text
    assert "video b, expression 1, frames 0, 1" in text
    assert page.tags.count("svg") == 4
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert pictures == ["worst_00.jpg", "worst_01.jpg", "best_00.jpg", "best_01.jpg"]
    assert sorted(file.name for file in path.parent.iterdir()) == sorted([*pictures, "index.html"])
    named = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert named[0] == "what would you see first?"  # its masks are turned inside out
    # Three frames of the first video's best clip, side by side.
    assert Image.open(path.parent / "best_00.jpg").size in ((3 * 320 + 2 * 4, 240), (2 * 320 + 4, 240))


def test_nothing_comes_from_outside(world, tmp_path):
    evaluation_set, predictions, result = world
    path = write_report(evaluation_set, predictions, result, tmp_path)
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe"} & set(page.tags)
    urls = [value for _, name, value in page.attributes if name in ("src", "href") or "://" in (value or "")]
    assert all((path.parent / url).is_file() for url in urls if url != "http://www.w3.org/2000/svg")


def test_colours_say_what_is_right_too_much_and_missing(world, tmp_path):
    evaluation_set, predictions, result = world
    path = write_report(evaluation_set, predictions, result, tmp_path, num_clips=5)
    with Image.open(path.parent / "worst_00.jpg") as image:
        strip = np.asarray(image).astype(int)
    corner, centre = strip[5, 5], strip[100, 130]
    assert corner[0] > corner[2]  # predicted there, nothing true: vermilion
    assert centre[2] > centre[0]  # true there, not predicted: blue


def test_expressions_are_text_and_never_markup(tmp_path):
    text = '<script>alert("1")</script> & "quoted" \'too\''
    rows = [expression_row("v", "0", text, 0, ["k"], ["gone.jpg"])]
    evaluation_set = EvaluationSet(
        BENCHMARKS["mevis"], "valid_u", tmp_path, rows, [masks_row("v", "k", [square(1, 1)])]
    )
    write_predictions(tmp_path / "p", evaluation_set, truths(evaluation_set))
    predictions = open_predictions(tmp_path / "p")
    result = score_predictions(evaluation_set, predictions)
    page = Page(write_report(evaluation_set, predictions, result, tmp_path).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert text in page.texts


def test_problems_and_missing_masks_are_shown(world, tmp_path):
    evaluation_set, predictions, _ = world
    (predictions.folder / "a" / "0" / "00001.png").unlink()
    result = score_predictions(evaluation_set, predictions, missing="zero")
    page = write_report(evaluation_set, predictions, result, tmp_path).read_text(encoding="utf-8")
    assert "video `a`, expression `0`, frame `00001` is missing" in page


def test_an_earlier_report_is_replaced(world, tmp_path):
    evaluation_set, predictions, result = world
    write_report(evaluation_set, predictions, result, tmp_path, num_clips=2)
    path = write_report(evaluation_set, predictions, result, tmp_path, num_clips=0)
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    assert not list(tmp_path.glob(".*"))


def test_bars_are_as_long_as_their_values():
    chart = bar_chart("a < b", [("all", 100.0, 3), ("half", 50.0, 1)])
    assert 'width="300.0"' in chart
    assert 'width="150.0"' in chart
    assert "a &lt; b" in chart
    Page(chart)
