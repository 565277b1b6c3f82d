"""J, F, A and R of ReVOS as a module for `evaluate.load`, which reads this file from its folder or from a Space.

Rows are scored when they are added and only their scores are stored: a whole validation set fits, and with several
processes each scores its own share. The measures are those of `visa_hf.evaluation.metrics`; nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

# `evaluate` finds what has to be installed by looking at lines such as these: `import a, b` would not do.
import datasets
import evaluate

from visa_hf.evaluation.metrics import ClipScore, GroupScore, Masks, average_scores, score_clip, summarize_revos

DESCRIPTION = """
Region similarity J, boundary measure F, pixel accuracy A and robustness R of video masks, in percent, and their
averages over referring, reasoning and no-object expressions (ReVOS).
"""

INPUTS = """
Args:
    predictions (list of N rows): a row is one video with one expression: a mask `(H, W)` or a clip `(T, H, W)` of 0/1
        or bool; a list with a COCO run-length mask, an array or `None` (no mask) for each frame; or
        `{"size": [H, W], "counts": [str, ...]}` with `""` for no mask.
    references (list of N rows): the true masks, in the same forms.
    foregrounds (list of N rows, *optional*): all objects of the frames, in the same forms; without them R is left out.
    type_ids (list of N integers, *optional*): 0 referring, 1 reasoning, 2 no such object; without them there is one
        average over all rows.

The configuration "published_compat" gives A and R as the released tool of VISA computed them.
The stored features are the scores of each row, not its masks.
"""

CITATION = """
@inproceedings{yan2024visa,
  title={VISA: Reasoning Video Object Segmentation via Large Language Models},
  author={Yan, Cilin and Wang, Haochen and Yan, Shilin and Jiang, Xiaolong and Hu, Yao and Kang, Guoliang and
          Xie, Weidi and Gavves, Efstratios},
  booktitle={European Conference on Computer Vision},
  year={2024}
}
"""

CONFIGURATIONS = ("default", "published_compat")


class RevosMetric(evaluate.Metric):
    """ReVOS' measures; see the README in this folder for what goes in and what comes out."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGURATIONS:
            raise ValueError(f"There is no configuration {self.config_name!r}. Choose one of {list(CONFIGURATIONS)}.")
        number = datasets.Value("float64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"J": number, "F": number, "A": number, "R": number},
                    "references": {"type_id": datasets.Value("int64")},
                }
            ),
            reference_urls=["https://arxiv.org/abs/2407.11325"],
        )

    def add_batch(
        self,
        *,
        predictions: Sequence,
        references: Sequence,
        foregrounds: Sequence | None = None,
        type_ids: Sequence[int] | None = None,
    ) -> None:
        """Score N rows; nothing is kept if one of them is refused."""
        columns = {
            "predictions": predictions,
            "references": references,
            "foregrounds": foregrounds,
            "type_ids": type_ids,
        }
        lengths = {name: len(column) for name, column in columns.items() if column is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"Numbers of rows differ: {lengths}. Give one entry for each row.")
        num_rows = len(predictions)
        types = [None] * num_rows if type_ids is None else [int(type_id) for type_id in type_ids]
        unknown = sorted({type_id for type_id in types if type_id is not None} - {0, 1, 2})
        if unknown:
            raise ValueError(f"`type_ids` holds {unknown}. Give 0 (referring), 1 (reasoning) or 2 (no such object).")
        foreground_rows = [None] * num_rows if foregrounds is None else [_masks_of(row) for row in foregrounds]
        is_compat = self.config_name == "published_compat"
        scores = [
            score_clip(_masks_of(pred), _masks_of(true), foreground, published_compat=is_compat)
            for pred, true, foreground in zip(predictions, references, foreground_rows, strict=True)
        ]
        super().add_batch(
            predictions=[{"J": score.J, "F": score.F, "A": score.A, "R": score.R} for score in scores],
            references=[{"type_id": type_id} for type_id in types],
        )

    def add(
        self, *, prediction: Masks, reference: Masks, foreground: Masks | None = None, type_id: int | None = None
    ) -> None:
        """Score one row."""
        self.add_batch(
            predictions=[prediction],
            references=[reference],
            foregrounds=None if foreground is None else [foreground],
            type_ids=None if type_id is None else [type_id],
        )

    def compute(
        self,
        *,
        predictions: Sequence | None = None,
        references: Sequence | None = None,
        foregrounds: Sequence | None = None,
        type_ids: Sequence[int] | None = None,
    ) -> dict[str, float] | None:
        """Score the given rows, if any, and average over all that were added; `None` but on process 0."""
        if predictions is not None and references is not None:
            self.add_batch(predictions=predictions, references=references, foregrounds=foregrounds, type_ids=type_ids)
        elif any(column is not None for column in (predictions, references, foregrounds, type_ids)):
            raise ValueError("Rows need both `predictions` and `references`. Give both, or neither after `add_batch`.")
        if self.writer is None and self.num_process > 1:
            # A process without rows takes part all the same: process 0 waits for the file of each.
            super().add_batch(predictions=[], references=[])
        elif self.writer is None:
            raise ValueError("No rows were added. Call `add` or `add_batch` first, or give the rows to `compute`.")
        return super().compute()

    def compute_metrics(self, eval_prediction: Any, compute_result: bool = True) -> dict[str, float]:
        """Serve as `compute_metrics` of a `Trainer`, also with `batch_eval_metrics=True`.

        Args:
            eval_prediction (`transformers.EvalPrediction`): `predictions` and `label_ids` are 0/1 masks of shape
                `(N, H, W)` or `(N, T, H, W)`, or lists of rows.
            compute_result (`bool`): whether this is the last batch.

        Returns:
            The results; empty before the last batch.
        """
        self.add_batch(predictions=eval_prediction.predictions, references=eval_prediction.label_ids)
        return (self.compute() or {}) if compute_result else {}

    def _compute(self, *, predictions: list[dict], references: list[dict]) -> dict[str, float]:
        """Average the stored scores of all processes."""
        scores = [ClipScore(**row) for row in predictions]
        type_ids = [row["type_id"] for row in references]
        num_without_type = type_ids.count(None)
        if num_without_type == len(type_ids):
            return _named(average_scores(scores), "")
        if num_without_type:
            raise ValueError(
                f"{num_without_type} of {len(type_ids)} rows have no `type_id`. Give one for all rows or for none."
            )
        summary = summarize_revos(scores, type_ids, published_compat=self.config_name == "published_compat")
        results: dict[str, float] = {}
        for prefix, group in (
            ("", summary.overall),
            ("referring_", summary.referring),
            ("reasoning_", summary.reasoning),
            ("no_object_", summary.no_object),
        ):
            results |= _named(group, prefix) if group else {}
        return results if summary.robustness is None else results | {"robustness": summary.robustness}


def _masks_of(row: Any) -> Masks:
    """Return a row as `score_clip` takes it: columns of run-length masks become a list."""
    if isinstance(row, Mapping) and isinstance(row.get("counts"), list | tuple):
        return [{"size": list(row["size"]), "counts": counts} if counts else None for counts in row["counts"]]
    return row


def _named(group: GroupScore, prefix: str) -> dict[str, float]:
    values = {"J": group.J, "F": group.F, "J&F": group.JF, "A": group.A}
    if group.R is not None:
        values["R"] = group.R
    return {prefix + name: value for name, value in (values | {"num_expressions": group.num_expressions}).items()}
