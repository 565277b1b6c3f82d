"""Put a trained VISA and its tracker into the package, as the model that is used when none is given.

    python examples/bundle_model.py VISA TRACKER --log words=WORDS/checkpoint-2500
    python examples/bundle_model.py VISA --add-log next=NEXT/checkpoint-2500

VISA and TRACKER are `final` folders, or checkpoints, of `visa train`; without TRACKER, VISA keeps the one it has, as
after a training that began with the bundled model. Weights are rounded to float16. Answers are searched with as many
beams as `--num-beams` says, or as VISA's own settings do. The code that a folder for the Hub carries is left out,
since the package has it; the model card stays as it is. What the trainings logged is read from their last checkpoints
and kept in training_log.jsonl: that of `--log` instead of what is there, that of `--add-log` behind it.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from visa_hf.bundled import BUNDLED_MODEL
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.trainer.tracker_run import replace_tracker

# Of config files: where a Hub repository's code would be.
_CODE = ("auto_map", "custom_pipelines")
_LARGEST = 16 * 2**20


def main() -> None:
    """Read the arguments and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("visa", metavar="VISA", type=Path)
    parser.add_argument("tracker", metavar="TRACKER", type=Path, nargs="?")
    logs = parser.add_mutually_exclusive_group()
    logs.add_argument("--log", metavar="NAME=CHECKPOINT", nargs="*", default=[])
    logs.add_argument("--add-log", metavar="NAME=CHECKPOINT", nargs="*", default=[])
    parser.add_argument("--num-beams", type=int)
    args = parser.parse_args()
    if args.num_beams is not None and args.num_beams < 1:
        parser.error(f"--num-beams is {args.num_beams} but must be at least 1.")
    log = [row for given in (*args.log, *args.add_log) for row in _logged(*given.split("=", 1))]
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "made"
        if args.tracker is None:
            _rounded(args.visa, made)
        else:
            replace_tracker(args.visa, args.tracker, made, dtype=torch.float16)
        for code in made.glob("*.py"):
            code.unlink()
        for file in made.glob("*config.json"):
            file.write_text(json.dumps(_without_code(json.loads(file.read_text())), indent=2) + "\n")
        if args.num_beams is not None:
            settings = made / "generation_config.json"
            content = {**json.loads(settings.read_text()), "num_beams": args.num_beams}
            settings.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        size = sum(file.stat().st_size for file in made.iterdir())
        if size > _LARGEST:
            raise SystemExit(f"The folder takes {size / 2**20:.1f} MiB, but a package should carry 16 at most.")
        BUNDLED_MODEL.mkdir(parents=True, exist_ok=True)
        for file in made.iterdir():
            shutil.copyfile(file, BUNDLED_MODEL / file.name)
    if log:
        with open(BUNDLED_MODEL / "training_log.jsonl", "a" if args.add_log else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in log)
    sys.stdout.write(f"wrote {BUNDLED_MODEL}, {size / 2**20:.1f} MiB\n")


def _rounded(visa: Path, made: Path) -> None:
    """Save a VISA with the tracker that it has, in float16."""
    model = VisaForVideoSegmentation.from_pretrained(visa, dtype=torch.float16)
    if model.tracker is None:
        raise SystemExit(f"`{visa}` has no tracker. Give the folder of one as well.")
    model.save_pretrained(made)
    VisaProcessor.from_pretrained(visa).save_pretrained(made)


def _logged(name: str, checkpoint: str) -> list[dict[str, Any]]:
    """Return what a training has logged up to a checkpoint, in order."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return [{"training": name, **row} for row in state["log_history"]]


def _without_code(content: Any) -> Any:
    """Leave out, at every depth, where the code is."""
    if not isinstance(content, dict):
        return content
    return {name: _without_code(value) for name, value in content.items() if name not in _CODE}


if __name__ == "__main__":
    main()
