"""A page to look through: the table, scores by kind of expression, and the worst and best clips as pictures.

`report/index.html` and its pictures need nothing but a browser: no scripts, nothing from a network; plots are inline
SVG. Figures come from `score`; nothing is computed here but averages for the plots.
"""

import html
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..datasets_scripts.frame_store import FrameError, FrameStore
from ..rendering import overlay_masks
from ..rle import decode_mask
from .benchmarks import EvaluationSet, Expression
from .metrics import unite_objects
from .predictions import Predictions, Problem
from .score import EvaluationResult
from .tables import TYPE_NAMES, ExpressionScore

REPORT = "report"

# Bluish green, vermilion and sky blue of Okabe and Ito, told apart with every kind of colour vision.
_COLORS = {"right": (0, 158, 115), "predicted, not true": (213, 94, 0), "true, not predicted": (86, 180, 233)}
_FRAMES_SHOWN, _FRAME_WIDTH, _GAP = 5, 320, 4
_MAX_PROBLEMS = 100

_LENGTHS = ((5, "1 to 5 words"), (10, "6 to 10"), (15, "11 to 15"), (20, "16 to 20"), (math.inf, "more than 20"))
_SIZES = (
    (0.0, "no object"),
    (0.01, "up to 1% of the frame"),
    (0.05, "1 to 5%"),
    (0.2, "5 to 20%"),
    (1.0, "more than 20%"),
)

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1720px; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } small { color: #666 }
figure { margin: 1em 0 2em } img { max-width: 100% } figcaption b { font-size: 110% }
.plots { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 1em 2em }
.key { display: inline-block; width: .9em; height: .9em; margin: 0 .3em 0 1em }
"""


def write_report(
    evaluation_set: EvaluationSet,
    predictions: Predictions,
    result: EvaluationResult,
    out: Path,
    *,
    num_clips: int = 12,
    details: dict[str, Any] | None = None,
) -> Path:
    """Write the folder `report` in `out`.

    Args:
        evaluation_set ([`EvaluationSet`]), predictions ([`Predictions`]): what was scored.
        result ([`EvaluationResult`]): the scores.
        out (`Path`): an existing folder; an earlier report there is replaced.
        num_clips (`int`): how many of the worst clips, and of the best, are drawn.
        details (`dict`, *optional*): shown at the top, such as the name of the model.

    Returns:
        Path of the page.
    """
    staging = out / f".{REPORT}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        ranked = sorted(
            result.scores, key=lambda score: (score.value, score.expression.video, score.expression.expression_id)
        )
        worst = ranked[:num_clips]
        best = ranked[len(worst) :][::-1][:num_clips]
        sections = [_section("Worst", worst, evaluation_set, predictions, staging)]
        sections.append(_section("Best", best, evaluation_set, predictions, staging))
        page = _page(result, details or {}, sections)
        (staging / "index.html").write_text(page, encoding="utf-8")
        target = out / REPORT
        shutil.rmtree(target, ignore_errors=True)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target / "index.html"


def _page(result: EvaluationResult, details: dict[str, Any], sections: Sequence[str]) -> str:
    title = f"{result.benchmark}, {result.split}"
    facts = "".join(f"<br>{_text(name)}: {_text(value)}" for name, value in details.items())
    note = "<p>A and R are those of the released tool (published_compat).</p>" if result.published_compat else ""
    of_what = "of the row overall" if result.published_compat else "of expressions without an object"
    robustness = "" if result.robustness is None else f"<p>Robustness R: {result.robustness:.2f} ({of_what})</p>"
    num_videos = len({score.expression.video for score in result.scores})
    keys = "".join(
        f'<span class="key" style="background: rgb{color}"></span>{_text(name)}' for name, color in _COLORS.items()
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{_text(title)}</h1>",
            f"<p>{len(result.scores)} expressions of {num_videos} videos{facts}</p>",
            _score_table(result),
            "<small>In percent; small figures: 95% confidence interval, drawing videos anew. "
            "Every expression is in scores.csv.</small>",
            robustness,
            note,
            _problems(result.problems),
            "<h2>Where it is good and where not</h2>",
            '<div class="plots">',
            *_plots(result.scores),
            "</div>",
            f"<h2>Clips</h2>\n<p>{keys}</p>",
            *sections,
            "</body>\n</html>\n",
        ]
    )


def _score_table(result: EvaluationResult) -> str:
    figures = list(dict.fromkeys(name for row in result.table.values() for name in row))
    lines = [
        "<table>\n<tr><th></th>" + "".join(f"<th>{_text(name.replace('_', ' '))}</th>" for name in figures) + "</tr>"
    ]
    for row, values in result.table.items():
        cells = []
        for name in figures:
            interval = result.intervals.get(row, {}).get(name)
            shown = "" if name not in values else f"{values[name]:.2f}"
            if name == "num_expressions":
                shown = str(int(values[name]))
            if interval is not None:
                shown += f"<br><small>{interval[0]:.1f} to {interval[1]:.1f}</small>"
            cells.append(f"<td>{shown}</td>")
        lines.append(f"<tr><th>{_text(row)}</th>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems[:_MAX_PROBLEMS])
    more = f"<p>and {len(problems) - _MAX_PROBLEMS} more</p>" if len(problems) > _MAX_PROBLEMS else ""
    return f"<h2>Counted as zero, or ignored: {len(problems)}</h2>\n<ul>{items}</ul>{more}"


# Plots


def _plots(scores: Sequence[ExpressionScore]) -> list[str]:
    """Return charts of the mean score by type, length of the expression, and size of the object."""
    by_type: dict[str, list[float]] = {name: [] for name in TYPE_NAMES.values()}
    by_length: dict[str, list[float]] = {label: [] for _, label in _LENGTHS}
    by_size: dict[str, list[float]] = {label: [] for _, label in _SIZES}
    by_score: dict[str, list[float]] = {f"{10 * tenth} to {10 * tenth + 10}": [] for tenth in range(10)}
    for score in scores:
        by_type[TYPE_NAMES[score.expression.type_id]].append(score.value)
        by_length[_bin(len(score.expression.text.split()), _LENGTHS)].append(score.value)
        by_size[_bin(score.object_share, _SIZES)].append(score.value)
        by_score[list(by_score)[min(int(10 * score.value), 9)]].append(score.value)
    measure = "IoU" if scores[0].clip is None else "J&F"
    return [
        bar_chart(f"Mean {measure} by type of expression", _means(by_type)),
        bar_chart(f"Mean {measure} by length of the expression", _means(by_length)),
        bar_chart(f"Mean {measure} by size of the object", _means(by_size)),
        bar_chart(
            f"Share of expressions by {measure}",
            [(label, 100 * len(values) / len(scores), len(values)) for label, values in by_score.items()],
        ),
    ]


def _bin(value: float, bins: Sequence[tuple[float, str]]) -> str:
    return next(label for highest, label in bins if value <= highest)


def _means(groups: dict[str, list[float]]) -> list[tuple[str, float, int]]:
    return [(label, 100 * math.fsum(group) / len(group), len(group)) for label, group in groups.items() if group]


def bar_chart(title: str, bars: Sequence[tuple[str, float, int]]) -> str:
    """Draw horizontal bars as inline SVG.

    Args:
        title (`str`): above the chart.
        bars: label, value in [0, 100], and how many expressions it stands for.
    """
    row, left, width = 26, 160, 300
    height = 34 + row * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 130}" height="{height}" role="img">',
        f"<title>{_text(title)}</title>",
        f'<text x="0" y="16" font-size="15" font-weight="bold">{_text(title)}</text>',
    ]
    for number, (label, value, count) in enumerate(bars):
        top = 30 + row * number
        parts.append(f'<text x="{left - 8}" y="{top + 14}" font-size="13" text-anchor="end">{_text(label)}</text>')
        parts.append(f'<rect x="{left}" y="{top}" width="{width}" height="18" fill="#eee"/>')
        parts.append(
            f'<rect x="{left}" y="{top}" width="{width * value / 100:.1f}" height="18" fill="rgb(0,114,178)"/>'
        )
        parts.append(f'<text x="{left + width + 8}" y="{top + 14}" font-size="13">{value:.1f} (of {count})</text>')
    return "\n".join([*parts, "</svg>"])


# Pictures


def _section(
    name: str,
    scores: Sequence[ExpressionScore],
    evaluation_set: EvaluationSet,
    predictions: Predictions,
    folder: Path,
) -> str:
    """Draw some clips; return them as HTML."""
    figures = []
    for number, score in enumerate(scores):
        file = f"{name.lower()}_{number:02d}.jpg"
        expression = score.expression
        shown = _shown_frames(expression)
        Image.fromarray(_strip(evaluation_set, expression, predictions, shown)).save(folder / file, quality=88)
        frames = "" if len(expression.frames) == 1 else f", frames {', '.join(map(str, shown))}"
        figures.append(
            f'<figure><img src="{file}" alt="{_text(expression.text)}" loading="lazy"><figcaption>'
            f"<b>{_text(expression.text)}</b><br>{_text(_figures(score))} "
            f"<small>{TYPE_NAMES[expression.type_id]}; video {_text(expression.video)}, expression "
            f"{_text(expression.expression_id)}{frames}</small></figcaption></figure>"
        )
    return f"<h3>{name}</h3>\n" + "\n".join(figures) if figures else ""


def _figures(score: ExpressionScore) -> str:
    if score.clip is None:
        return f"IoU {100 * score.value:.1f}"
    clip = score.clip
    robustness = "" if clip.R is None else f", R {100 * clip.R:.1f}"
    return f"J&F {100 * clip.JF:.1f} (J {100 * clip.J:.1f}, F {100 * clip.F:.1f}), A {100 * clip.A:.1f}{robustness}"


def _shown_frames(expression: Expression) -> list[int]:
    """Return the numbers of some frames, from the first to the last that is scored."""
    scored = expression.scored_frames
    places = np.unique(np.linspace(0, len(scored) - 1, min(_FRAMES_SHOWN, len(scored))).round().astype(int))
    return [scored[place] for place in places]


def _strip(
    evaluation_set: EvaluationSet, expression: Expression, predictions: Predictions, shown: Sequence[int]
) -> np.ndarray:
    """Draw frames side by side with what is right, too much and missing: `(H, W, 3)`, uint8."""
    size = (expression.height, expression.width)
    predicted = predictions.read(expression)
    objects = evaluation_set.objects_of(expression)
    pictures = []
    for frame in shown:
        true = (
            unite_objects([clip[frame : frame + 1] for clip in objects], size)[0] if objects else np.zeros(size, bool)
        )
        given = predicted[frame]
        if isinstance(given, Problem):
            pred = np.zeros(size, dtype=bool)
        else:
            pred = given if isinstance(given, np.ndarray) else decode_mask(given)
        masks = np.stack([pred & true, pred & ~true, true & ~pred])
        drawn = overlay_masks(_picture(evaluation_set, expression, frame), masks, colors=list(_COLORS.values()))
        height = max(1, round(size[0] * _FRAME_WIDTH / size[1]))
        pictures.append(np.asarray(Image.fromarray(drawn).resize((_FRAME_WIDTH, height), Image.Resampling.LANCZOS)))
    gap = np.full((pictures[0].shape[0], _GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def _picture(evaluation_set: EvaluationSet, expression: Expression, frame: int) -> np.ndarray:
    """Return a frame; grey, if it cannot be read: masks can be scored, and looked at, without the pictures."""
    try:
        picture = FrameStore(evaluation_set.root).read([expression.frames[frame]])[0]
    except (FrameError, FileNotFoundError):
        picture = np.zeros((0, 0, 3), dtype=np.uint8)
    if picture.shape[:2] == (expression.height, expression.width):
        return picture
    return np.full((expression.height, expression.width, 3), 128, dtype=np.uint8)


def _text(value: Any) -> str:
    return html.escape(str(value))
