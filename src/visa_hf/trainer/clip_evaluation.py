"""Whole clips measured during a training, the real way: the model answers by itself, its masks are tracked and scored.

A fixed choice of a data set's expressions, predicted with what `visa evaluate` predicts with and scored with what it
scores with. Processes share videos; the masks of one video are held at a time. Nothing is written.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from visa_hf.evaluation.benchmarks import EvaluationSet, Expression
from visa_hf.evaluation.metrics import NO_OBJECT
from visa_hf.evaluation.predict import PredictionOptions, predict_target, predict_video
from visa_hf.evaluation.predictions import Problem
from visa_hf.evaluation.score import make_result, score_video
from visa_hf.evaluation.tables import ExpressionScore
from visa_hf.processes import share_work
from visa_hf.trainer.evaluation import metric_name


class ClipEvaluation:
    """A fixed choice of expressions that a model in training is measured on.

    With a tracker all frames are scored, without one the target frame alone: the middle one, or the one next to it
    that is annotated.

    Args:
        evaluation_set ([`EvaluationSet`]): with true masks.
        num_clips (`int`): how many of its expressions; all, if there are not so many. Types share them equally, as
            far as each has enough. A larger number keeps those of a smaller one.
        seed (`int`, defaults to 0): another one chooses others.
        options ([`PredictionOptions`], *optional*): how to predict.

    Raises:
        ValueError: for a number below 1, a set without true masks, or a chosen expression without an annotated frame.
        FileNotFoundError: if a frame of a chosen video is not there: better now than at the first evaluation.
    """

    def __init__(
        self,
        evaluation_set: EvaluationSet,
        num_clips: int,
        *,
        seed: int = 0,
        options: PredictionOptions | None = None,
    ) -> None:
        if num_clips < 1:
            raise ValueError(f"`num_clips` is {num_clips} but must be at least 1.")
        if not evaluation_set.has_masks:
            raise ValueError(
                f"The split `{evaluation_set.split}` of `{evaluation_set.benchmark.name}` has no public masks, so "
                "nothing can be measured on it. Take one that has them."
            )
        self.questions = evaluation_set.subset(choose_expressions(evaluation_set, num_clips, seed))
        _check_readable(self.questions)
        self.options = options or PredictionOptions()

    def score(self, model: Any, processor: Any, rank: int = 0, world_size: int = 1) -> list[ExpressionScore]:
        """Predict and score this process' share of the videos.

        Args:
            model (`VisaForVideoSegmentation`): in evaluation mode.
            processor ([`VisaProcessor`]): of the model.
            rank, world_size (`int`): this process, and how many there are.

        Raises:
            ValueError, FileNotFoundError, RuntimeError: naming the video, if it cannot be read or predicted.
        """
        work = {video: len(group) * len(group[0].frames) for video, group in self.questions.videos.items()}
        scores: list[ExpressionScore] = []
        with _own_forward(model):
            for video in share_work(work, world_size)[rank]:
                questions, predictions = self._predict(model, processor, video)
                scores += score_video(questions, predictions, video)[0]
        return scores

    def metrics(self, scores: Sequence[ExpressionScore]) -> dict[str, float]:
        """Make the table of `visa evaluate` of the scores of all processes, in any order.

        Returns:
            `dict` of figures in [0, 1] (a hundredth of the table's): `referring_J`, `overall_JF`, `no_object_R`, ...;
            `no_object_empty`, the share of expressions without an object of which no frame got a mask; and
            `num_expressions`.
        """
        order = {id_of(expression): place for place, expression in enumerate(self.questions.expressions)}
        ordered = sorted(scores, key=lambda score: order[id_of(score.expression)])
        result = make_result(self.questions, ordered)
        metrics = {
            metric_name(row, figure): value / 100
            for row, figures in result.table.items()
            for figure, value in figures.items()
            if figure != "num_expressions"
        }
        # J of a frame without an object is 1 for no mask, and 0 for any.
        empty = [score.clip.J == 1 for score in ordered if score.clip and score.expression.type_id == NO_OBJECT]
        if empty:
            metrics["no_object_empty"] = sum(empty) / len(empty)
        return {**metrics, "num_expressions": len(ordered)}

    def _predict(self, model: Any, processor: Any, video: str) -> tuple[EvaluationSet, "_Held"]:
        """Predict one video; returns the questions, about the frames that can be scored, and the masks."""
        expressions = self.questions.videos[video]
        if model.tracker is not None or len(expressions[0].frames) == 1:
            results = predict_video(model, processor, self.questions, video, self.options)
            found = [result.mask_of for result in results]
            return self.questions, _Held(dict(zip(map(id_of, expressions), found, strict=True)))
        asked, masks = [], []
        for expression in expressions:
            middle = len(expression.frames) // 2
            target = min(expression.scored_frames, key=lambda frame: (abs(frame - middle), frame))
            asked.append(replace(expression, annotated=(target,)))
            masks.append(predict_target(model, processor, self.questions, expression, target, self.options))
        held = {id_of(each): partial(_same, mask) for each, mask in zip(asked, masks, strict=True)}
        return self.questions.subset(asked), _Held(held)


def choose_expressions(evaluation_set: EvaluationSet, number: int, seed: int = 0) -> list[Expression]:
    """Choose expressions: always the same ones of a set, whatever the order of its rows, a type at a time.

    Args:
        evaluation_set ([`EvaluationSet`]): from which.
        number (`int`): how many, at most.
        seed (`int`, defaults to 0): another one chooses others.

    Returns:
        The expressions, in the order of the set.
    """

    def lot(expression: Expression) -> bytes:
        return hashlib.sha256(repr((seed, *id_of(expression))).encode()).digest()

    waiting: dict[int, list[Expression]] = {}
    for expression in sorted(evaluation_set.expressions, key=lot, reverse=True):
        waiting.setdefault(expression.type_id, []).append(expression)
    chosen: set[tuple[str, str]] = set()
    while len(chosen) < number and any(waiting.values()):
        for type_id in sorted(waiting):
            if waiting[type_id] and len(chosen) < number:
                chosen.add(id_of(waiting[type_id].pop()))
    return [expression for expression in evaluation_set.expressions if id_of(expression) in chosen]


def id_of(expression: Expression) -> tuple[str, str]:
    """Return what tells an expression from all others of its set."""
    return expression.video, expression.expression_id


def check_weights_are_whole() -> None:
    """Refuse to measure whole clips where each process holds a part of every weight only.

    Raises:
        ValueError: if DeepSpeed's ZeRO-3 is on.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "Whole clips (`num_clips`) are to be measured during a training with DeepSpeed's ZeRO-3, whose processes "
            "have to run every module together, but answers and videos differ in length. Use ZeRO-2 (`deepspeed: "
            "zero2`), or leave `num_clips` out and measure checkpoints with `visa evaluate`."
        )


def _check_readable(questions: EvaluationSet) -> None:
    """Refuse what could not be measured, hours later."""
    for expressions in questions.videos.values():
        for expression in expressions:
            if not expression.scored_frames:
                raise ValueError(
                    f"No frame of {expression.place} is annotated, so nothing can be measured. Leave it out."
                )
        for file in dict.fromkeys(name.rpartition("#")[0] or name for name in expressions[0].frames):
            if not (questions.root / file).is_file():
                raise FileNotFoundError(
                    f"The frames of {expressions[0].place}, which is to be measured during the training, are not all "
                    f"there: `{questions.root / file}` is missing. Complete the data set."
                )


@dataclass(frozen=True)
class _Held:
    """Predicted masks of one video: for each expression what returns the mask of a frame, `(H, W)`, bool."""

    mask_of: Mapping[tuple[str, str], Callable[[int], np.ndarray]]

    def check(self, evaluation_set: EvaluationSet) -> list[Problem]:
        """Find nothing wrong: they are what was asked for."""
        return []

    def read(self, expression: Expression) -> Any:
        """Return the masks of the frames that are scored, by the frames' numbers."""
        mask_of = self.mask_of[id_of(expression)]
        return {frame: mask_of(frame) for frame in expression.scored_frames}


def _same(mask: np.ndarray, _frame: int) -> np.ndarray:
    return mask


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Let the model have the `forward` of its class: what a training has put over it cannot generate."""
    put_over = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if put_over is not None:
            vars(model)["forward"] = put_over
