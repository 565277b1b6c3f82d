"""A tiny world to measure on during a training, and a script that measures on it in each of several processes."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from tests.random_model import make_demo_model
from tests.trainer.training import tiny_processor
from visa_hf import VisaForVideoSegmentation
from visa_hf.datasets_scripts.mixture import TrainingSamples
from visa_hf.datasets_scripts.synthetic import ClipOptions, write_dataset
from visa_hf.datasets_scripts.training_sources import load_sources
from visa_hf.evaluation.benchmarks import open_benchmark
from visa_hf.trainer import TrainingOptions, VisaTrainer, VisaTrainingArguments, prepare_for_training
from visa_hf.trainer.clip_evaluation import ClipEvaluation
from visa_hf.trainer.recipe import EvaluationRecipe


def write_world(folder: Path) -> Path:
    """Three clips of four or five frames in ReVOS' layout."""
    options = ClipOptions(size=(48, 64), num_frames=(4, 5), num_expressions=8)
    write_dataset(folder, num_videos={"train": 1, "valid": 3}, options=options, show_progress=False)
    return folder


def speaking_model(*, with_tracker: bool = True) -> VisaForVideoSegmentation:
    """The demo model, which answers anything with a mask."""
    model, _ = make_demo_model()
    if not with_tracker:
        model.tracker = model.config.tracker_config = None
    return model


def make_trainer(
    model: torch.nn.Module,
    world: Path,
    cache: Path,
    output_dir: Path,
    *,
    num_samples: int = 5,
    num_clips: int = 5,
    **arguments: Any,
) -> VisaTrainer:
    args = VisaTrainingArguments(
        output_dir=str(output_dir),
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "num_train_epochs": 1,
            "save_strategy": "no",
            "num_overlays": 0,
            "per_device_eval_batch_size": 1,
            "logging_steps": 1,
            **arguments,
        },
    )
    recipe = EvaluationRecipe("revos", str(world), num_samples=num_samples, sampling={"max_reference_frames": 8})
    mixture = recipe.mixture()
    samples = TrainingSamples(load_sources(mixture, cache_dir=cache, with_foregrounds=True), mixture, 0, num_samples)
    clips = ClipEvaluation(open_benchmark("revos", world, "valid", cache_dir=cache), num_clips) if num_clips else None
    torch.manual_seed(0)  # of the adapter
    return VisaTrainer(
        prepare_for_training(model, TrainingOptions()),
        args,
        tiny_processor(),
        train_dataset=samples,
        eval_dataset=samples,
        clip_evaluation=clips,
    )


def measured(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that must not depend on who computes them."""
    others = ("loss", "runtime", "per_second", "epoch")
    return {name: value for name, value in metrics.items() if not name.endswith(others)}


if __name__ == "__main__":
    world, cache, base, out = map(Path, sys.argv[1:5])
    arguments = json.loads(sys.argv[5])
    trainer = make_trainer(VisaForVideoSegmentation.from_pretrained(base), world, cache, out, **arguments)
    if trainer.args.max_steps > 0:
        trainer.train()
    metrics = trainer.evaluate()
    (out / f"metrics-{trainer.args.process_index}.json").write_text(json.dumps(metrics))
