"""Checkpoints that are whole or not there: a marker written last, and the adapter folded into a plain model.

A training may be killed at any moment, also while it writes. A checkpoint counts only with its marker, which lists
every file and its size; it is written when all processes have written theirs. What a checkpoint holds is
transformers' and PEFT's business (`VisaTrainer` saves through them).
"""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available

from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.trainer.lora import quiet_peft

logger = logging.getLogger(__name__)

COMPLETION_MARKER = "checkpoint_complete.json"
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_Path = str | os.PathLike[str]


def mark_complete(folder: _Path) -> None:
    """Write the marker of a checkpoint: from now on it counts. To be called when nothing more will be written.

    Args:
        folder (path): the checkpoint.
    """
    folder = Path(folder)
    files = {}
    for path in _files(folder):
        # On the disk before the marker is: a power cut forgets what was last written, in any order.
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    temporary = folder / f"{COMPLETION_MARKER}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"files": dict(sorted(files.items()))}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / COMPLETION_MARKER)


def find_fault(folder: _Path) -> str | None:
    """Return what is wrong with a checkpoint, or `None` if it was written to its end and is whole.

    Args:
        folder (path): the checkpoint.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        expected = json.loads((folder / COMPLETION_MARKER).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no `{COMPLETION_MARKER}`: writing it was not finished"
    except (ValueError, KeyError, TypeError):
        return f"its `{COMPLETION_MARKER}` cannot be read"
    for name, size in expected.items():
        try:
            found = (folder / name).stat().st_size
        except FileNotFoundError:  # perhaps this moment: a training that runs deletes its older checkpoints
            return f"its file `{name}` is missing"
        if found != size:
            return f"its file `{name}` has {found} bytes instead of {size}"
    return None


def require_complete(folder: _Path) -> None:
    """Refuse a checkpoint that is not whole.

    Raises:
        ValueError: saying what is wrong with it.
    """
    fault = find_fault(folder)
    if fault is not None:
        raise ValueError(
            f"The checkpoint `{os.fspath(folder)}` cannot be used: {fault}. Take an earlier one, or leave the choice "
            "to `resume_from_checkpoint=True`."
        )


def find_last_checkpoint(output_dir: _Path) -> str | None:
    """Return the newest whole checkpoint of a training, `None` if there is none. Others are warned about.

    Args:
        output_dir (path): folder of the training, with its `checkpoint-N` folders.
    """
    for folder in reversed(_checkpoints(output_dir)):
        fault = find_fault(folder)
        if fault is None:
            return str(folder)
        logger.warning("Passing over the checkpoint `%s`: %s.", folder, fault)
    return None


def clear_checkpoint(folder: _Path) -> None:
    """Remove what an earlier run left in a checkpoint's place, its marker first."""
    folder = Path(folder)
    # Killed on the way, what is left does not count.
    (folder / COMPLETION_MARKER).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)


def rotate_checkpoints(output_dir: _Path, limit: int | None, best: str | None = None) -> None:
    """Keep the newest `limit` whole checkpoints and the best one; delete the others.

    The newest whole one stays whatever happens, and half-written ones newer than it may be somebody's who is still
    writing.

    Args:
        output_dir (path): folder of the training.
        limit (`int`, *optional*): how many to keep; all with `None` or 0.
        best (`str`, *optional*): a checkpoint to keep besides.
    """
    if not limit or limit < 0:
        return
    folders = _checkpoints(output_dir)
    whole = [folder for folder in folders if find_fault(folder) is None]
    if not whole:
        return
    kept = whole[-limit:]
    for folder in folders[: folders.index(whole[-1])]:
        if folder not in kept and (best is None or folder.resolve() != Path(best).resolve()):
            clear_checkpoint(folder)


def merge_adapter(
    folder: _Path, output: _Path, *, base: _Path | None = None, dtype: torch.dtype | None = None
) -> None:
    """Fold the adapter of a training into its base model and save a plain folder for `from_pretrained`.

    Args:
        folder (path): a checkpoint or final folder that holds `adapter_config.json`.
        output (path): folder to make; it appears when it is complete.
        base (path or name on the Hub, *optional*): the model that was trained; by default the one that the adapter
            names. A base that was trained in 4 bits is loaded, and merged, in its stored precision.
        dtype (`torch.dtype`, *optional*): precision to merge and save in; by default the base's own.

    Raises:
        FileNotFoundError: if there is no adapter, or its base is not where it was.
        ValueError: if the checkpoint is not whole, names no base, or the output exists already.
        ImportError: if PEFT is missing.
    """
    if not is_peft_available():
        raise ImportError('Adapters need PEFT, which is not installed: `pip install "visa-hf[train]"`.')
    from peft import PeftConfig, PeftModel

    folder, output = Path(folder), Path(output)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"`{folder}` holds no `adapter_config.json`, so no adapter was saved there. Give the folder of a LoRA "
            "training or one of its checkpoints."
        )
    if _CHECKPOINT.fullmatch(folder.name):
        require_complete(folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`{output}` exists already and is not empty. Give another folder, or remove it.")
    named = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    # A training from nothing keeps its base beside its checkpoints, wherever they are moved to.
    beside = folder.resolve().parent / Path(named or "").name
    has_moved = bool(named) and os.path.isabs(str(named)) and not os.path.isdir(str(named)) and beside.is_dir()
    source = os.fspath(base) if base is not None else str(beside) if has_moved else named
    if not source:
        raise ValueError(f"The adapter in `{folder}` does not name the model that was trained. Give it as `base`.")
    if os.path.isabs(source) and not os.path.isdir(source):
        raise FileNotFoundError(f"The base model `{source}` is not there. Give where it is now as `base`.")
    model = VisaForVideoSegmentation.from_pretrained(source, dtype="auto" if dtype is None else dtype)
    with quiet_peft():
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    merged = adapted.merge_and_unload()
    has_processor = (folder / "processor_config.json").is_file()
    processor = VisaProcessor.from_pretrained(str(folder) if has_processor else source)

    temporary = output.parent / f".{output.name}.{os.getpid()}.tmp"
    try:
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _checkpoints(output_dir: _Path) -> list[Path]:
    """Checkpoints of a training, whole or not, the oldest first."""
    if not os.path.isdir(output_dir):
        return []
    found = [(_CHECKPOINT.fullmatch(path.name), path) for path in Path(output_dir).iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match is not None)]


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(COMPLETION_MARKER)]
