"""The `evaluate` module: loaded from its folder without a network, all forms of rows, several processes, a trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from visa_hf.evaluation import REVOS_METRIC, score_clip, sum_objects, summarize_revos
from visa_hf.rle import decode_mask

pytest.importorskip("evaluate")

from visa_hf.evaluation.revos_metric.revos_metric import RevosMetric  # noqa: E402

REFERENCE = Path(__file__).parents[1] / "reference" / "metrics"
CLIPS = json.loads((REFERENCE / "revos_metrics.json").read_text())
PREDICTIONS = [clip["pred"] for clip in CLIPS]
REFERENCES = [clip["gt"] for clip in CLIPS]
FOREGROUNDS = [clip["foreground"] for clip in CLIPS]
TYPE_IDS = [index % 3 for index in range(len(CLIPS))]
ALL = {"predictions": PREDICTIONS, "references": REFERENCES, "foregrounds": FOREGROUNDS, "type_ids": TYPE_IDS}


@pytest.fixture
def metric(tmp_path: Path) -> RevosMetric:
    return RevosMetric(cache_dir=str(tmp_path))


def test_results_are_those_of_the_measures(metric: RevosMetric) -> None:
    results = metric.compute(**ALL)
    scores = [score_clip(*row) for row in zip(PREDICTIONS, REFERENCES, FOREGROUNDS, strict=True)]
    summary = summarize_revos(scores, TYPE_IDS)
    assert results and summary.overall and summary.referring and summary.no_object
    assert results["J&F"] == summary.overall.JF
    assert results["referring_F"] == summary.referring.F
    assert results["no_object_R"] == results["robustness"] == summary.robustness
    assert results["num_expressions"] == 16 and results["no_object_num_expressions"] == 8
    means = [np.round(100 * np.mean(clip["J"]), 2) for clip in CLIPS]
    assert results["referring_J"] == pytest.approx(np.mean(means[::3]), abs=1e-9)


def test_all_forms_of_rows_give_the_same(metric: RevosMetric) -> None:
    expected = metric.compute(**ALL)
    masks = [[np.stack([decode_mask(rle) for rle in row]) for row in rows] for rows in (PREDICTIONS, REFERENCES)]
    columns = [
        [{"size": row[0]["size"], "counts": [rle["counts"] for rle in row]} for row in rows]
        for rows in (PREDICTIONS, REFERENCES)
    ]
    for predictions, references in (masks, columns, (masks[0], columns[1])):
        assert metric.compute(**{**ALL, "predictions": predictions, "references": references}) == expected
    for pred, true, foreground, type_id in zip(*ALL.values(), strict=True):
        metric.add(prediction=pred, reference=true, foreground=foreground, type_id=type_id)
    assert metric.compute() == expected
    for start in range(0, len(CLIPS), 5):
        metric.add_batch(**{name: column[start : start + 5] for name, column in ALL.items()})
    assert metric.compute() == expected


def test_absent_masks_are_allowed_anywhere(metric: RevosMetric) -> None:
    rle = CLIPS[0]["gt"][0]
    size = rle["size"]
    rows: list[Any] = [
        [None, None],
        [None, rle],
        {"size": size, "counts": ["", ""]},
        {"size": size, "counts": ["", rle["counts"]]},
    ]
    results = metric.compute(predictions=rows, references=rows)
    assert results == {"J": 100, "F": 100, "J&F": 100, "A": 100, "num_expressions": 4}
    results = metric.compute(predictions=[[None, rle]], references=[{"size": size, "counts": ["", ""]}])
    assert results and results["J"] == 50


def test_published_compat_is_a_configuration(tmp_path: Path) -> None:
    clips = json.loads((REFERENCE / "revos_compat.json").read_text())
    metric = RevosMetric("published_compat", cache_dir=str(tmp_path))
    results = metric.compute(
        predictions=[clip["pred"] for clip in clips],
        references=[sum_objects(clip["objects"], tuple(clip["pred"][0]["size"])) for clip in clips],
        foregrounds=[clip["foreground"] for clip in clips],
        type_ids=[index % 2 for index in range(len(clips))],
    )
    assert results
    for letter in "AR":
        means = [np.round(100 * np.mean(clip[letter]), 2) for clip in clips]
        assert results[letter] == pytest.approx((np.mean(means[::2]) + np.mean(means[1::2])) / 2, abs=1e-9)
    assert results["robustness"] == results["R"]
    with pytest.raises(ValueError, match=r"no configuration 'bogus'.*\['default', 'published_compat'\]"):
        RevosMetric("bogus", cache_dir=str(tmp_path))


def test_a_refused_row_leaves_what_was_added_before(metric: RevosMetric) -> None:
    mask = np.ones((2, 4, 5), dtype=np.uint8)
    metric.add(prediction=mask, reference=mask)
    with pytest.raises(ValueError, match="masks are 0/1"):
        metric.add_batch(predictions=[mask, mask * 255], references=[mask, mask])
    results = metric.compute()
    assert results and results["num_expressions"] == 1


def test_wrong_calls_say_what_is_needed(metric: RevosMetric) -> None:
    mask = np.ones((2, 4, 5), dtype=bool)
    with pytest.raises(ValueError, match="No rows were added"):
        metric.compute()
    with pytest.raises(ValueError, match="need both `predictions` and `references`"):
        metric.compute(predictions=[mask])
    with pytest.raises(ValueError, match="Numbers of rows differ: {'predictions': 2, 'references': 1}"):
        metric.add_batch(predictions=[mask, mask], references=[mask])
    with pytest.raises(ValueError, match=r"`type_ids` holds \[7\]"):
        metric.add(prediction=mask, reference=mask, type_id=7)
    metric.add(prediction=mask, reference=mask, type_id=1)
    metric.add(prediction=mask, reference=mask)
    with pytest.raises(ValueError, match="1 of 2 rows have no `type_id`"):
        metric.compute()


PROCESS = """
import json, sys, evaluate
folder, path, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
clips = json.load(open(path))
results = []
for share in sys.argv[4:]:
    metric = evaluate.load(folder, num_process=2, process_id=rank, experiment_id=f"experiment {len(results)}")
    start, end = map(int, share.split(":"))
    for i, clip in list(enumerate(clips))[start:end]:
        metric.add(prediction=clip["pred"], reference=clip["gt"], foreground=clip["foreground"], type_id=i % 3)
    results.append(metric.compute())
alone = evaluate.load(folder, keep_in_memory=True)
results.append(alone.compute(predictions=[clips[0]["pred"]], references=[clips[0]["gt"]]))
print(json.dumps(results))
"""


def test_two_processes_that_load_the_folder_offline_give_what_one_gives(tmp_path: Path, metric: RevosMetric) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    golden = str(REFERENCE / "revos_metrics.json")
    # All rows on the first process; uneven shares, the first rows on the second process.
    shares = [("0:24", "5:24"), ("24:24", "0:5")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, REVOS_METRIC, golden, str(rank), *share],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, share in enumerate(shares)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    first, second = (json.loads(output.splitlines()[-1]) for output, _ in outputs)
    expected = metric.compute(**ALL)
    alone = metric.compute(predictions=PREDICTIONS[:1], references=REFERENCES[:1])
    assert first == [expected, expected, alone]
    assert second == [None, None, alone]


def test_compute_metrics_takes_masks_in_one_go_or_batch_by_batch(metric: RevosMetric) -> None:
    pred, true = np.random.default_rng(0).random((2, 6, 20, 30)) < 0.5
    expected = metric.compute(predictions=pred, references=true)
    assert metric.compute_metrics(EvalPrediction(pred, true)) == expected
    tensors = torch.from_numpy(pred), torch.from_numpy(true)
    assert metric.compute_metrics(EvalPrediction(tensors[0][:4], tensors[1][:4]), compute_result=False) == {}
    assert metric.compute_metrics(EvalPrediction(tensors[0][4:], tensors[1][4:]), compute_result=True) == expected


class Threshold(torch.nn.Module):
    """A model whose output is the mask of all pixels above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * pixels).mean(), "masks": pixels > 0}


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_a_trainer_evaluates_with_it(tmp_path: Path, metric: RevosMetric, batch_eval_metrics: bool) -> None:
    pixels = torch.randn(5, 16, 20, generator=torch.Generator().manual_seed(0))
    rows = [{"pixels": image, "labels": image > 0.2} for image in pixels]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        per_device_eval_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        batch_eval_metrics=batch_eval_metrics,
    )
    trainer = Trainer(Threshold(), arguments, eval_dataset=rows, compute_metrics=metric.compute_metrics)  # type: ignore[arg-type]
    results = trainer.evaluate()
    expected = metric.compute(predictions=pixels > 0, references=pixels > 0.2)
    assert expected and 0 < expected["J"] < 100
    assert {name: results[f"eval_{name}"] for name in expected} == expected
