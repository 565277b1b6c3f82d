"""Tiny trainings, in this process or one of several: `torchrun ... training.py SETTINGS.json`, one or a list of them.

Settings are arguments of `make_trainer`, or `{"visa": [...]}`: words of a command.

Samples differ on purpose in how many tokens are learnt and how many masks there are. What was logged, and the
gradients of the first step, are returned or written to `<output_dir>/result-<rank>.*`.
"""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

import visa_hf
from visa_hf import VisaConfig, VisaForVideoSegmentation, VisaProcessor, cli
from visa_hf.datasets_scripts.samples import Conversation, Sample
from visa_hf.trainer import TrainingOptions, VisaTrainer, VisaTrainingArguments, prepare_for_training
from visa_hf.trainer.lora import plain_name

BUNDLED_TOKENIZER = Path(visa_hf.__file__).parent / "assets" / "tokenizer"
# A recipe for `visa train`.
TINY_RECIPE = Path(__file__).with_name("tiny.yaml")
_WORDS = "the small red round thing that moves slowly to the left of the big blue square and then comes back".split()


class TinySamples(Dataset):
    """Samples of random pixels; `kinds` are repeated: "masks", "one", "foreign", "no_seg", "frames", "text"."""

    def __init__(self, num_samples: int, kinds: tuple[str, ...], size: tuple[int, int] = (24, 32)) -> None:
        self.num_samples, self.kinds, self.size = num_samples, kinds, size
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, draw: int) -> Sample:
        self.asked.append(draw)
        rng = np.random.default_rng([7, draw])
        kind = self.kinds[draw % len(self.kinds)]
        height, width = self.size

        def frame(rows: int = height) -> np.ndarray:
            return rng.integers(0, 256, (rows, width, 3), dtype=np.uint8)

        def conversation(num_masks: int, rows: int = height, num_words: int = 2, **others: Any) -> Conversation:
            start = int(rng.integers(0, 8))
            text = " ".join(_WORDS[start : start + num_words])
            answer = f"It is {text}" + "".join(" and [SEG]" for _ in range(num_masks)) + "."
            masks = (rng.random((num_masks, rows, width)) > 0.6).astype(np.uint8) if num_masks else None
            return Conversation(query=f"the {text}", answer=answer, answer_template=None, masks=masks, **others)

        references = (frame(), frame())[: 1 + draw % 2]
        target: np.ndarray | None = frame()
        is_foreign = False
        if kind == "masks":
            conversations = (conversation(1, num_words=1), conversation(3, num_words=9))
        elif kind == "one":
            conversations = (conversation(1),)
        elif kind == "foreign":
            target, is_foreign = frame(height + 8), True
            conversations = (conversation(1, rows=height + 8),)
        elif kind == "no_seg":
            conversations = (conversation(0, num_words=6),)
        elif kind == "frames":
            target = None
            conversations = (conversation(0, style="conversation", history=(("Who?", "Nobody."),)),)
        else:
            target, references = None, ()
            conversations = (conversation(0, style="text", num_words=12),)
        return Sample(
            draw=draw,
            source=kind,
            video_id=f"v{draw}",
            target_idx=0 if target is not None and not is_foreign else None,
            reference_idx=tuple(range(len(references))),
            target_frame=target,
            reference_frames=references,
            conversations=conversations,
            is_foreign_target=is_foreign,
        )


def tiny_config(**overrides: Any) -> VisaConfig:
    return VisaConfig.tiny(**{"tracker_config": None, **overrides})


def tiny_model(**overrides: Any) -> VisaForVideoSegmentation:
    torch.manual_seed(0)
    model = VisaForVideoSegmentation(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(0)
    # As freshly initialised, all outputs look alike, and so do right and wrong gradients.
    with torch.no_grad():
        for parameter in (*model.model.parameters(), model.lm_head.weight):
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return model


def tiny_processor() -> VisaProcessor:
    return VisaProcessor.from_config(tiny_config(), AutoTokenizer.from_pretrained(BUNDLED_TOKENIZER))


def prepared_model(options: dict[str, Any], base: str | Path | None = None, **overrides: Any) -> torch.nn.Module:
    """A model to train, of the folder `base` or new.

    Its adapter is the same in every process and nowhere zero, as half of the gradients would be.
    """
    model = tiny_model(**overrides) if base is None else VisaForVideoSegmentation.from_pretrained(base)
    prepared = prepare_for_training(model, TrainingOptions(**options))
    adapter = [parameter for name, parameter in prepared.named_parameters() if ".lora_" in name]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), _whole(adapter):
        for parameter in adapter:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return prepared


def _whole(parameters: list[torch.nn.Parameter]) -> Any:
    """Context in which parameters that ZeRO-3 has split are whole."""
    if not is_deepspeed_zero3_enabled():
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


class GradientsOfFirstStep(TrainerCallback):
    """Keeps the gradients that the first optimiser step is given; `None` where there is none."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor | None] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.gradients:
            for name, parameter in kwargs["model"].named_parameters():
                if parameter.requires_grad:
                    gradient = parameter.grad
                    self.gradients[plain_name(name)] = None if gradient is None else gradient.detach().clone()


def make_trainer(
    output_dir: str | Path,
    *,
    num_samples: int = 4,
    kinds: tuple[str, ...] = ("masks", "text", "one", "no_seg"),
    options: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    model: torch.nn.Module | None = None,
    base: str | Path | None = None,
    eval_samples: int = 0,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> VisaTrainer:
    # Before the model: ZeRO-3 changes how models are made.
    args = VisaTrainingArguments(
        output_dir=str(output_dir),
        **{
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "max_grad_norm": 0.0,
            "dataloader_pin_memory": False,
            "seed": 3,
            **arguments,
        },
    )
    model = model or prepared_model({"lora_dropout": 0.0} if options is None else options, base, **(config or {}))
    return VisaTrainer(
        model=model,
        args=args,
        processing_class=tiny_processor(),
        train_dataset=TinySamples(num_samples, tuple(kinds)),
        eval_dataset=TinySamples(eval_samples, ("masks", "text", "one", "foreign")) if eval_samples else None,
        callbacks=callbacks,
    )


def logged(trainer: VisaTrainer, *names: str) -> list[tuple[float, ...]]:
    """What was logged with each loss."""
    return [tuple(row[name] for name in names) for row in trainer.state.log_history if "loss" in row]


def visa_train(out: str | Path, world: str | Path, cache: str | Path, **values: Any) -> list[str]:
    """Words of `visa train` of the tiny recipe on the clips of `world`, with `values`: `a__b` for `a.b`."""
    given = {"data__folders__revos": world, "data__cache_dir": cache, **values}
    overrides = [f"{name.replace('__', '.')}={value}" for name, value in given.items()]
    return ["train", str(TINY_RECIPE), "-o", str(out), *(word for one in overrides for word in ("--override", one))]


def run(settings: dict[str, Any]) -> None:
    """Train as `settings` say and write down what happened."""
    if "visa" in settings:
        assert cli.main(settings["visa"]) == 0
        return
    resume = settings.pop("resume", None)
    gradients = GradientsOfFirstStep()
    trainer = make_trainer(callbacks=[gradients], **settings)
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "world_size": trainer.args.world_size,
        "log": trainer.state.log_history,
        "asked": trainer.train_dataset.asked,
        "metrics": trainer.evaluate() if settings.get("eval_samples") else None,
    }
    rank = trainer.args.process_index
    folder = Path(settings["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"result-{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    found = {name: value for name, value in gradients.gradients.items() if value is not None}
    # ZeRO keeps gradients elsewhere.
    save_file(found, folder / f"gradients-{rank}.safetensors")


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for settings in given if isinstance(given, list) else [given]:
        run(settings)
        # The configuration of ZeRO-3 counts as long as somebody holds it.
        gc.collect()
