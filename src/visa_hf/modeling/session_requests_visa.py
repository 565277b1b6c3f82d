"""What is asked of a video session, checked before anything is computed.

A request names a sentence or a mask, and perhaps frames; here it becomes a [`FrameSelection`] inside the session's
part of the video, or an error that says what does not fit. No model is needed for any of it.
"""

import dataclasses
import operator
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .frame_samplers_visa import FrameSampler, VideoView, sample_frames
from .frame_sampling_visa import select_frames
from .outputs_visa import FrameSelection
from .prompts_visa import PromptStyle

# The forms of a question about a target frame.
_ASKED_STYLES = ("short", "long", "explanatory")


@dataclass(frozen=True)
class QueryRequest:
    """One query and how to answer it; the arguments of `add_query`, which describes them."""

    query: str | None = None
    target_frame: int | None = None
    reference_frames: Sequence[int] | None = None
    num_reference_frames: int | None = None
    reference_strategy: str | None = None
    answer: str | None = None
    first_mask: Tensor | np.ndarray | None = None
    sampler: FrameSampler | str | None = None
    style: PromptStyle | None = None

    @property
    def has_mask(self) -> bool:
        """Whether the model need not be asked."""
        return self.first_mask is not None


def as_request(query: Any, common: Mapping[str, Any]) -> QueryRequest:
    """Return one query of `add_queries`, a string or a dictionary of arguments, over what is common to all.

    Raises:
        TypeError: for something else.
        ValueError: for an argument that does not exist.
    """
    if isinstance(query, str):
        query = {"query": query}
    if not isinstance(query, Mapping):
        raise TypeError(
            f"A query is a {type(query).__name__} but must be a string, or a dictionary of the arguments of "
            "`add_query`."
        )
    names = [*(item.name for item in dataclasses.fields(QueryRequest)), "explain"]
    for name in query:
        if name not in names:
            nearest = get_close_matches(str(name), names, n=1, cutoff=0)
            raise ValueError(f"A query has no argument {name!r}. Did you mean `{nearest[0]}`?")
    own = dict(query)
    if "style" in own or "explain" in own:
        own["style"] = asked_style(own.get("style"), own.pop("explain", False))
    return QueryRequest(**{**common, **own})


def asked_style(style: Any, explain: Any) -> PromptStyle | None:
    """Return the form of a question, of `style` and `explain` as `add_query` takes them; `None` for the query's own.

    Raises:
        TypeError: for an `explain` that is neither `True` nor `False`.
        ValueError: for a style that does not ask about a target frame, or that `explain` contradicts.
    """
    if not isinstance(explain, bool):
        raise TypeError(f"`explain` is {explain!r} but must be `True` or `False`.")
    if style is not None and style not in _ASKED_STYLES:
        raise ValueError(f"`style` is {style!r} but must be one of {', '.join(map(repr, _ASKED_STYLES))}.")
    if not explain:
        return style
    if style not in (None, "explanatory"):
        raise ValueError(
            f"`style` is {style!r} and `explain` is `True`, which asks in a style of its own. Leave one of them out."
        )
    return "explanatory"


def check_query(
    session: Any,
    query: str | None = None,
    *,
    target_frame: int | None = None,
    reference_frames: Sequence[int] | None = None,
    num_reference_frames: int | None = None,
    first_mask: Tensor | np.ndarray | None = None,
    explain: bool = False,
) -> None:
    """Refuse what `add_query` would refuse, as far as that can be known without a model.

    Args: as of `VisaAskingMixin.add_query`. The session is left as it is.

    Raises:
        ValueError, TypeError: as `add_query` does.
    """
    request = QueryRequest(
        query,
        target_frame,
        reference_frames,
        num_reference_frames,
        first_mask=first_mask,
        style=asked_style(None, explain),
    )
    check_words(session, request)
    selected_frames(session, request)
    if first_mask is not None:
        given_masks(first_mask, session.height, session.width)


def is_blank(text: str) -> bool:
    """Tell whether a text shows nothing: it is empty, or all blanks, control characters or invisible ones."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp", "Zs") for character in text)


def check_words(session: Any, request: QueryRequest) -> None:
    """Refuse a query that is no text, or says nothing; beside a mask it is a name, and may be empty."""
    query = request.query
    if request.has_mask and request.style is not None:
        given = "`explain`" if request.style == "explanatory" else "A `style`"
        raise ValueError(
            f"{given} and a `first_mask` are given, but with a mask the model is not asked. Leave one of the two out."
        )
    if session.mode == "published" and request.style == "explanatory" and request.answer is None:
        raise ValueError(
            '`explain` is given, but with `mode="published"` the model is given its answer, which explains nothing. '
            "Leave one of the two out."
        )
    if request.has_mask and request.answer is not None:
        raise ValueError(
            "An `answer` and a `first_mask` are given, but with a mask nothing is answered. Leave one out."
        )
    if query is None:
        if not request.has_mask:
            raise ValueError("Neither `query` nor `first_mask` is given. Say what to segment, or give its mask.")
        return
    if not isinstance(query, str):
        raise TypeError(f"`query` is a {type(query).__name__} but must be a string.")
    if not request.has_mask and is_blank(query):
        raise ValueError(f"`query` is empty ({query!r}). Say in words what is meant.")


def whole_number(name: str, value: Any) -> int:
    """Return `value` as an int after refusing what is no whole number."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise TypeError(f"`{name}` is {value!r} but must be a whole number.") from error


def selected_frames(
    session: Any, request: QueryRequest, *, default_number: int = 12, strategy: str = "global_local"
) -> FrameSelection:
    """Check the frames that a query names, and choose the others inside the session's part of the video."""
    part: dict[str, Any] = {"start": session.first_frame, "stop": session.stop_frame}
    target, references, number = request.target_frame, request.reference_frames, request.num_reference_frames
    if target is not None:
        target = whole_number("target_frame", target)
    chosen = (references, number, request.reference_strategy)
    if request.has_mask and any(value is not None for value in chosen):
        raise ValueError(
            "Reference frames and a `first_mask` are given, but with a mask the model is not asked, and looks at no "
            "reference. Leave one of the two out."
        )
    if references is not None and number is not None:
        raise ValueError(
            f"`reference_frames` and `num_reference_frames` ({number}) are both given, but the number is for "
            "references that are chosen automatically. Leave one of the two out."
        )
    if references is not None and request.reference_strategy is not None:
        raise ValueError(
            f"`reference_frames` and `reference_strategy` ({request.reference_strategy!r}) are both given, but the "
            "strategy is for references that are chosen automatically. Leave one of the two out."
        )
    if session.is_streaming:
        target = _current_frame(session, target)
    if request.has_mask:
        target = session.first_frame if target is None else target
        selection = select_frames(session.source.num_frames, target_frame=target, reference_frames=(), **part)
        return dataclasses.replace(selection, reason="a given mask")
    if references is not None:
        if not isinstance(references, Iterable):
            raise TypeError(f"`reference_frames` is {references!r} but must be a list of frame numbers.")
        references = [whole_number("reference_frames", idx) for idx in references]
    if number is not None:
        default_number = whole_number("num_reference_frames", number)
    strategy = request.reference_strategy or strategy
    if session.mode == "published" and references is None:
        if number is not None:
            raise ValueError(
                f'`num_reference_frames` is {number}, but with `mode="published"` the length of the video decides '
                "how many there are. Leave it out."
            )
        strategy = "stride"
    selection = select_frames(
        session.source.num_frames,
        target_frame=target,
        reference_frames=references,
        num_reference_frames=default_number,
        strategy=strategy,
        **part,
    )
    if not session.is_streaming:
        return selection
    return _held_frames(session, selection, is_given=references is not None)


def check_sampler(sampler: Any) -> None:
    """Refuse what is neither a sampler, nor the name of one, nor `None`."""
    if not (sampler is None or sampler == "visa" or callable(sampler)):
        raise TypeError(
            f'`sampler` is {sampler!r} but must be "visa", or a callable `sampler(view, query)` that returns a '
            "`FrameSelection`."
        )


def sampler_of(session: Any, request: QueryRequest) -> Any:
    """Return the sampler that chooses the target of a query: its own, or else the session's; `None` for none.

    Raises:
        TypeError: if it is no sampler.
        ValueError: if the query has a sampler of its own, but also a target or a mask, or is asked in a stream.
    """
    check_sampler(request.sampler)
    if request.sampler is None:
        has_target = request.has_mask or request.target_frame is not None
        return None if has_target else session.sampler
    if session.is_streaming:
        raise ValueError(
            "A `sampler` is given, but in a stream a query is about the current frame. Leave the sampler out."
        )
    if request.has_mask or request.target_frame is not None:
        given = "first_mask" if request.has_mask else "target_frame"
        raise ValueError(
            f"A `sampler` and a `{given}` are both given, but the sampler chooses the target frame. Leave one out."
        )
    return request.sampler


def sampled_frames(
    session: Any,
    request: QueryRequest,
    sampler: FrameSampler,
    unsampled: FrameSelection,
    anchor: int | None,
    *,
    default_number: int,
    strategy: str,
) -> FrameSelection:
    """Let a sampler choose the target of a query, and references unless the query names them.

    `unsampled` is what `selected_frames` returned for the query; `anchor` is as of `check_target`.
    """
    first, stop = session.first_frame, session.stop_frame
    number = request.num_reference_frames
    start = first if anchor is None else first + (anchor - first) % session.every
    view = VideoView(
        session.source,
        first,
        stop,
        num_reference_frames=default_number if number is None else whole_number("num_reference_frames", number),
        strategy="stride" if session.mode == "published" else request.reference_strategy or strategy,
        targets=range(first, stop) if anchor is None else range(start, stop, session.every),
        session=session,
    )
    selection = sample_frames(sampler, view, request.query or "")
    if request.reference_frames is None:
        return selection
    return dataclasses.replace(selection, reference_idx=unsampled.reference_idx)


def _current_frame(session: Any, target: int | None) -> int:
    """Return the frame of a stream that a query is about: the latest, which alone can still be segmented."""
    current = session.source.num_frames - 1
    if target not in (None, current):
        raise ValueError(
            f"`target_frame` is {target} but in a stream a query is about the current frame, {current}. Leave it out."
        )
    return current


def _held_frames(session: Any, selection: FrameSelection, *, is_given: bool) -> FrameSelection:
    """Replace references of a stream that are not held any more by the nearest that are; refuse given ones."""
    held = session.source.held_frames
    gone = [idx for idx in selection.reference_idx if idx not in held]
    if not gone:
        return selection
    if is_given:
        raise ValueError(
            f"`reference_frames` names frame {gone[0]}, which the stream does not hold any more: it holds "
            f"{len(held)} (`max_cached_frames`). Give frames of `session.source.held_frames`."
        )
    nearest = {min(held, key=lambda other: (abs(other - idx), other)) for idx in selection.reference_idx}
    return dataclasses.replace(selection, reference_idx=tuple(sorted(nearest)))


def check_target(session: Any, tracker: Any, selection: FrameSelection, anchor: int | None) -> None:
    """Refuse a target that the session's other queries cannot share, and tracking without a tracker.

    `anchor` is the target of the session's first query, if there is one.
    """
    if session.every > 1 and anchor is not None and (selection.target_idx - anchor) % session.every:
        raise ValueError(
            f"The target frame {selection.target_idx} is not among the tracked frames, which are every "
            f"{session.every} frames around frame {anchor}, the target of the session's first query. Give one of "
            "those, or open another session."
        )
    num_frames = session.stop_frame - session.first_frame
    if tracker is None and (num_frames > 1 or session.is_streaming):
        frames = "comes as a stream" if session.is_streaming else f"has {num_frames} frames to carry masks through"
        raise ValueError(
            f"The model has no tracker, but the video {frames}. Load a checkpoint with a `tracker_config`, or give a "
            "single frame."
        )


def given_masks(first_mask: Tensor | np.ndarray, height: int, width: int) -> Tensor:
    """Check masks given by a user: (H, W) or (K, H, W) of two values -> (K, H, W), bool, CPU."""
    values = first_mask.detach().cpu().numpy() if isinstance(first_mask, Tensor) else np.asarray(first_mask)
    if values.ndim not in (2, 3) or values.shape[-2:] != (height, width):
        raise ValueError(
            f"`first_mask` has shape {values.shape} but the frames are {height} x {width} pixels (height x width). "
            f"Give a mask of shape ({height}, {width}), or (K, {height}, {width}) for K objects."
        )
    masks = values.reshape(-1, height, width) != 0
    if not len(masks):
        raise ValueError("`first_mask` holds no mask. Give at least one, which may be empty.")
    distinct = np.unique(values[values != 0])
    if len(distinct) > 1 or not (distinct > 0).all():
        raise ValueError(
            f"`first_mask` has the values {', '.join(map(str, distinct[:4]))} beside 0, but one positive value is "
            "needed. Give one bool mask per object."
        )
    if (masks.sum(axis=0) > 1).any():
        raise ValueError("The masks of `first_mask` overlap, but a pixel can belong to one object only.")
    return torch.from_numpy(masks)
