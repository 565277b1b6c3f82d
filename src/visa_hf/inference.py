"""The easy door: a video and a sentence in, masks in every frame out.

`segment` opens the video, loads the model, asks it about a few frames and tracks its answer through the rest (VISA,
https://huggingface.co/papers/2407.11325, section 3); the steps are those of `VisaVideoSession`, which one can also
take by oneself. Masks are returned; files are written by the command line.
"""

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from visa_hf.bundled import BUNDLED_MODEL, BUNDLED_NOTICE
from visa_hf.modeling.frame_samplers_visa import FrameSampler
from visa_hf.modeling.modeling_visa import VisaForVideoSegmentation
from visa_hf.modeling.outputs_visa import PackedFrame, VideoFrameOutput, VideoSegmentation
from visa_hf.modeling.pipeline_visa import check_processor
from visa_hf.modeling.processing_visa import VisaProcessor
from visa_hf.modeling.video_session_visa import DEFAULT_MAX_FRAMES, VisaVideoSession, check_query, make_results

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
_PROCESSOR_FILES = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")
_HUB_TIMEOUT = 5.0  # seconds until the Hub counts as out of reach


def segment(
    video: Any,
    query: str | Sequence[str] | None = None,
    *,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    processor: Any | None = None,
    target_frame: int | None = None,
    reference_frames: Sequence[int] | None = None,
    num_reference_frames: int | None = None,
    first_mask: np.ndarray | torch.Tensor | None = None,
    sampler: FrameSampler | Literal["visa"] | None = None,
    explain: bool = False,
    threshold: float = 0.5,
    start: float | str | None = None,
    end: float | str | None = None,
    every: int = 1,
    max_frames: int | None = DEFAULT_MAX_FRAMES,
    fps: float | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    allow_truncated: bool = False,
    max_new_tokens: int | None = None,
    progress: bool = False,
) -> VideoSegmentation | list[VideoSegmentation]:
    """Find what a sentence means in a video, and return its mask in every frame.

    Args:
        video: path of a video file, of a folder of frames or of an image; a uint8 array or tensor of shape
            `(T, H, W, 3)`; or a list of images.
        query (`str` or `Sequence[str]`): what to segment. Several queries give a list of results, each the same as if
            asked alone. It may be left out with a `first_mask`.
        model (path, Hub id or `VisaForVideoSegmentation`, *optional*): the checkpoint. Without one the bundled
            model is used, which knows drawn shapes only. A loaded model is put into evaluation mode, and moved if
            `device` or `dtype` say so.
        processor (`VisaProcessor`, *optional*): the checkpoint's own by default.
        target_frame (`int`, *optional*): frame that the model segments, counted in the whole video; the middle one by
            default, the first one with a `first_mask`.
        reference_frames (`Sequence[int]`, *optional*): further frames that the model sees; by default chosen all over
            the video and around the target.
        num_reference_frames (`int`, *optional*): how many are chosen; the checkpoint's number, usually 12, by default.
        first_mask (array of shape `(H, W)` or `(K, H, W)`, *optional*): masks of K objects on the target frame, which
            are tracked instead of asking the model.
        sampler (callable or `"visa"`, *optional*): chooses the frames for each query, unless `target_frame` or a
            mask does; see `frame_samplers_visa.py`. `"visa"` asks the checkpoint's own language model where in the
            video the thing is best seen.
        explain (`bool`, defaults to `False`): ask for a reason beside the mask; what the model says is in `answer`.
            Reasons are longer than plain answers: mind `max_new_tokens`.
        threshold (`float`, defaults to 0.5): probability above which a pixel of the target frame is in the mask. In
            the other frames the tracker decides between the objects and the background.
        start, end (`float` or `str`, *optional*): part of the video to use, without its end: seconds, or frame numbers
            like `"120f"`.
        every (`int`, defaults to 1): track each N-th frame only; the target frame is always among them.
        max_frames (`int` or `None`, defaults to 10000): refuse to track more frames than this.
        fps (`float`, *optional*): frames per second of a folder, list or array.
        device (`str` or `torch.device`, *optional*): `"cpu"`, `"cuda"`, `"mps"`; by default the best there is, and for
            a loaded model the one it is on.
        dtype (`str` or `torch.dtype`, *optional*): `"float32"`, `"bfloat16"`, `"float16"`; the checkpoint's own by
            default.
        allow_truncated (`bool`, defaults to `False`): use the frames before the damage of a damaged video.
        max_new_tokens (`int`, *optional*): length limit of an answer; that of `generate_masks` by default.
        progress (`bool`, defaults to `False`): show a progress bar on stderr.

    Returns:
        [`VideoSegmentation`], or a list of them for several queries. An answer without a [SEG] has no object: nothing
        to segment is a normal result.

    Raises:
        ValueError, TypeError, FileNotFoundError, ImportError, RuntimeError: if the input cannot be used; the message
            says what to do.
    """
    queries = _as_queries(query)
    # The video first: loading a model takes longer than finding out that there is none.
    with VisaVideoSession(
        video,
        None,
        start=start,
        end=end,
        every=every,
        max_frames=max_frames,
        threshold=threshold,
        fps=fps,
        allow_truncated=allow_truncated,
        sampler=sampler,
    ) as session:
        asked: dict[str, Any] = {
            "target_frame": target_frame,
            "reference_frames": reference_frames,
            "num_reference_frames": num_reference_frames,
            "first_mask": first_mask,
            "explain": explain,
        }
        check_before_loading(session, queries, **asked)
        network, session.processor = load_model(model, processor, device=device, dtype=dtype)
        limit = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        network.add_queries(session, [{"query": sentence, **asked} for sentence in queries], **limit)
        with progress_bar(session, progress) as on_frame:
            frames = [pack_frame(output) for output in network.propagate_in_video_iterator(session, on_frame=on_frame)]
        results = make_results(session, frames)
    return results[0] if query is None or isinstance(query, str) else results


def check_before_loading(
    session: VisaVideoSession,
    queries: Sequence[str | None],
    *,
    target_frame: int | None = None,
    reference_frames: Sequence[int] | None = None,
    num_reference_frames: int | None = None,
    first_mask: np.ndarray | torch.Tensor | None = None,
    explain: bool = False,
) -> None:
    """Refuse what `add_query` would refuse, as far as that can be known without a model, which takes long to load.

    Args:
        session (`VisaVideoSession`): the video; it is left as it is.
        queries (`Sequence[str | None]`): the sentences; empty, or of `None`, for a `first_mask` without one.
        target_frame, reference_frames, num_reference_frames, first_mask, explain: as in `segment`.

    Raises:
        ValueError, TypeError: if a query, a frame or the mask cannot be used.
    """
    for query in queries or [None]:
        check_query(
            session,
            query,
            target_frame=target_frame,
            reference_frames=reference_frames,
            num_reference_frames=num_reference_frames,
            first_mask=first_mask,
            explain=explain,
        )


def load_model(
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    processor: Any | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> tuple[Any, Any]:
    """Load a model and its processor, ready to segment.

    Args:
        model: folder, Hub id, loaded model, or `None` for the bundled model, which is loaded as
            float32.
        processor (`VisaProcessor`, *optional*): the checkpoint's own by default.
        device, dtype: as in `segment`.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        OSError: if there is no such folder, if files are missing in it, or if the Hub cannot be reached, or has no
            such model, and there is no downloaded copy.
        RuntimeError: if weights are missing, damaged, or of other shapes than config.json says.
        TypeError: if `model` is none of the above.
        ValueError: if it is not of VISA, if model and processor do not fit together, or if the device or dtype is not
            available.
    """
    torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    loaded: Any
    if model is None:
        logger.warning(BUNDLED_NOTICE)
        # Its weights are kept in half precision to be small; it is quick enough to compute in single.
        loaded = _load_network(str(BUNDLED_MODEL), torch_dtype or torch.float32)
        processor = processor or _load_processor(str(BUNDLED_MODEL))
    elif isinstance(model, str | os.PathLike):
        name = _checked_checkpoint(model, needs_processor=processor is None)
        loaded = _load_network(name, "auto" if torch_dtype is None else torch_dtype)
        processor = processor or _load_processor(name)
    else:
        _check_is_visa(model)
        loaded, torch_device = model, model.device if device is None else torch_device
        processor = processor or _load_processor(str(model.config.name_or_path or ""))
    check_processor(loaded, processor)
    # Only where something changes: models spread over devices, or quantised, refuse to be moved.
    if loaded.device != torch_device:
        loaded = loaded.to(torch_device)
    if torch_dtype is not None and loaded.dtype != torch_dtype:
        loaded = loaded.to(torch_dtype)
    return loaded.eval(), processor


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """Return the device that is meant; `None` or `"auto"` mean the best there is.

    Raises:
        ValueError: for a device that does not exist, or is not available here.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device is None or device == "auto":
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if available[name]))
    refusal = f'`device` is {str(device)!r} but must be "cpu", "cuda", "mps" or "auto".'
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(refusal) from error
    if resolved.type not in available or (resolved.type == "cpu" and resolved.index is not None):
        raise ValueError(refusal)
    is_there = available[resolved.type]
    if is_there and resolved.index is not None:
        is_there = resolved.index < (torch.cuda.device_count() if resolved.type == "cuda" else 1)
    if not is_there:
        usable = ", ".join(name for name, is_usable in available.items() if is_usable)
        raise ValueError(
            f"`device` is {str(device)!r} but this machine, or this PyTorch, has none. Available: {usable}."
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype | None = None) -> torch.dtype | None:
    """Return the floating dtype that is meant; `None` means the checkpoint's own.

    Raises:
        ValueError: for any other name, and for a dtype that the model cannot compute in.
    """
    # Floating dtypes of one byte are for storage: nothing can be computed in them.
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"`dtype` is {dtype!r} but must be one of {', '.join(DTYPES)}.")
    return DTYPES[dtype]


@contextmanager
def progress_bar(session: VisaVideoSession, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Show the progress of a propagation on stderr; yields what to call after each frame."""
    with tqdm(total=session.num_steps, unit="frame", desc="tracking", disable=not is_shown, leave=False) as bar:
        yield lambda _: bar.update() and None


def pack_frame(output: VideoFrameOutput) -> PackedFrame:
    """Pack one frame's masks of all queries, and keep their scores."""
    return PackedFrame.pack(output)


def _as_queries(query: Any) -> list[str | None]:
    """Return the queries as a list, after refusing what is neither a string, nor a sequence of strings, nor `None`."""
    if query is None or isinstance(query, str):
        return [query]
    if isinstance(query, bytes) or not isinstance(query, Sequence):
        raise TypeError(f"`query` is a {type(query).__name__} but must be a string, or a list of strings.")
    for position, sentence in enumerate(query):
        if not isinstance(sentence, str):
            raise TypeError(f"`query[{position}]` is a {type(sentence).__name__} but must be a string.")
    if not query:
        raise ValueError("`query` is an empty list. Give at least one sentence.")
    return list(query)


def _check_is_visa(model: Any) -> None:
    """Refuse an object that is not a VISA model; one that is wrapped (PEFT) or loaded as remote code is."""
    try:
        model_type = model.config.model_type
    except AttributeError:
        model_type = None
    if model_type != "visa":
        raise TypeError(
            f"`model` is a {type(model).__name__}, which is no VISA model. Give a folder, a Hub id, or a "
            "`VisaForVideoSegmentation`."
        )


def _checked_checkpoint(model: str | os.PathLike[str], needs_processor: bool) -> str:
    """Return a checkpoint's folder or Hub id, after refusing one that does not exist or is not of VISA."""
    path = Path(model)
    if path.exists():
        _check_folder(path, needs_processor)
        return str(path)
    # The string as given: `Path` drops a leading "./", which says that a folder is meant.
    if isinstance(model, os.PathLike) or model.startswith(".") or path.is_absolute() or len(path.parts) != 2:
        raise FileNotFoundError(
            f"There is no model folder `{model}`. Give the folder of a checkpoint, or a Hub id like `name/model`."
        )
    reason = _why_not_on_hub(model)
    try:
        config = Path(hf_hub_download(model, "config.json", local_files_only=reason is not None))
    except (HTTPError, OSError) as error:
        raise OSError(
            f"The model `{model}` is neither a folder nor among the downloaded models, and "
            f"{reason or 'its download from the Hub failed'}. Check the name, or give the folder of a checkpoint."
        ) from error
    if reason is None:
        _check_config(config, model)
        return model
    # The copy in the cache is a folder like any other, and loading from it asks nobody.
    _check_folder(config.parent, needs_processor)
    return str(config.parent)


def _why_not_on_hub(name: str) -> str | None:
    """Return why a model cannot be had from the Hub, or `None` if it can: one short request, never repeated."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=_HUB_TIMEOUT)
    except HFValidationError as error:
        raise FileNotFoundError(f"There is no model folder `{name}`, and it is no Hub id either: {error}") from error
    except GatedRepoError:
        return "the Hub gives it only to those who were granted access and are logged in"
    except RepositoryNotFoundError:
        return "the Hub has no such model, or shows it only to those who are logged in"
    except RemoteEntryNotFoundError:
        return "on the Hub it has no config.json"
    except OfflineModeIsEnabled:
        return "the Hub is not asked because `HF_HUB_OFFLINE` is set"
    except (HTTPError, OSError) as error:
        return f"the Hub cannot be reached ({type(error).__name__})"
    return None


def _check_folder(folder: Path, needs_processor: bool) -> None:
    """Refuse a folder that is not a complete VISA checkpoint."""
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"`{folder}` is no model: it has no config.json. Give a folder that `save_pretrained` wrote."
        )
    _check_config(config, str(folder))
    if not any(True for pattern in _WEIGHT_PATTERNS for _ in folder.glob(pattern)):
        raise FileNotFoundError(
            f"The model folder `{folder}` has no weights ({' or '.join(_WEIGHT_PATTERNS)}). Copy or convert them "
            "again."
        )
    absent = [name for name in _PROCESSOR_FILES if not (folder / name).is_file()]
    if needs_processor and absent:
        raise FileNotFoundError(
            f"The model folder `{folder}` has no {', '.join(absent)}, which the processor is made of. Save the "
            "processor there too, with `save_pretrained`, or copy or convert the checkpoint again."
        )


def _check_config(config: Path, name: str) -> None:
    """Refuse a config.json of another model: read as VISA's it would stand for a full-size one of random weights."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"The config.json of `{name}` is not valid JSON ({error}). Copy or convert the checkpoint again."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"The config.json of `{name}` holds a {type(settings).__name__} but must hold a JSON object.")
    if settings.get("model_type") != "visa":
        raise ValueError(
            f"The config.json of `{name}` has the `model_type` {settings.get('model_type')!r} but 'visa' is needed. "
            "Give a VISA checkpoint; published weights are made one by `visa_hf.convert`."
        )


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _load_network(name: str, dtype: str | torch.dtype) -> Any:
    """Load the weights of a checkpoint, after which each one is where it belongs."""
    # What the report says in twenty lines, the errors say in one. A filter, and no other level: at WARNING and above
    # transformers also lists what tensor parallelism would leave whole.
    report_logger = logging.getLogger("transformers.modeling_utils")
    report_logger.addFilter(_is_error)
    damage = f"The weights in `{name}` are damaged or cut short ({{}}). Download or convert them again."
    try:
        # Other shapes are let through here, and refused below with their names.
        loaded, info = VisaForVideoSegmentation.from_pretrained(
            name, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except (SafetensorError, pickle.UnpicklingError, EOFError, json.JSONDecodeError) as error:
        raise RuntimeError(damage.format(str(error) or type(error).__name__)) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The weights in `{name}` are incomplete ({error}). Download or convert them again."
        ) from error
    except RuntimeError as error:
        # How PyTorch says that a file of its own is damaged.
        if "PytorchStreamReader" not in str(error):
            raise
        raise RuntimeError(damage.format("not a whole PyTorch file")) from error
    finally:
        report_logger.removeFilter(_is_error)
    misfits = sorted((key, tuple(saved), tuple(wanted)) for key, saved, wanted in info["mismatched_keys"])
    if misfits:
        key, saved, wanted = misfits[0]
        raise RuntimeError(
            f"{len(misfits)} of the weights in `{name}` have other shapes than its config.json asks for: {key} has "
            f"{saved} instead of {wanted}{', ...' if len(misfits) > 1 else ''}. Convert or download the checkpoint "
            "again, and do not mix files of two."
        )
    return loaded


def _load_processor(name: str) -> Any:
    """Load the processor that was saved with a checkpoint."""
    if not name:
        raise ValueError("The model was not loaded from a folder, so its processor is unknown. Give `processor`.")
    try:
        return VisaProcessor.from_pretrained(name)
    except (OSError, json.JSONDecodeError) as error:
        raise OSError(
            f"The processor in `{name}` cannot be read: {' '.join(str(error).split())} Copy or convert the checkpoint "
            "again, or give `processor`."
        ) from error
