"""Queries about one video: what is asked is checked, answered, and kept in the session with its masks.

`VisaAskingMixin` gives the model `add_query` and `add_queries`. How queries are answered together is in
video_answering_visa.py; how their masks are carried through the video, in video_tracking_visa.py.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .frame_samplers_visa import FrameSampler
from .mask_scores_visa import mask_scores
from .outputs_visa import FrameSelection
from .prompts_visa import PromptStyle
from .session_requests_visa import (
    QueryRequest,
    as_request,
    asked_style,
    check_target,
    check_words,
    given_masks,
    sampled_frames,
    sampler_of,
    selected_frames,
)
from .text_guided_sampling_visa import VisaFrameSampler
from .video_answering_visa import Answer, Question, VisaAnsweringMixin
from .video_session_visa import VisaVideoSession


class VisaAskingMixin(VisaAnsweringMixin):
    """The verbs of asking, for the model."""

    def add_query(
        self: Any,
        session: VisaVideoSession,
        query: str | None = None,
        *,
        target_frame: int | None = None,
        reference_frames: Sequence[int] | None = None,
        num_reference_frames: int | None = None,
        reference_strategy: str | None = None,
        answer: str | None = None,
        first_mask: Tensor | np.ndarray | None = None,
        sampler: FrameSampler | str | None = None,
        explain: bool = False,
        style: PromptStyle | None = None,
        **generate_kwargs: Any,
    ) -> int:
        """Ask a query about the session's video, and keep its masks on the target frame.

        Before or during propagation: what is yielded from then on has the query's masks, the same as if it had been
        added before. In a stream the current frame is the target.

        Args:
            session (`VisaVideoSession`): the video.
            query (`str`, *optional*): what to segment. With a `first_mask` it is only a name.
            target_frame (`int`, *optional*): frame that is segmented by the model; the middle one by default, the
                first one with a `first_mask`.
            reference_frames (`Sequence[int]`, *optional*): frames that the model sees besides; chosen by the
                configuration's sampler by default.
            num_reference_frames (`int`, *optional*): how many the sampler chooses; the configuration's by default.
            reference_strategy (`str`, *optional*): how it chooses, as of `select_frames`; the configuration's by
                default.
            answer (`str`, *optional*): what the model says, as "It is [SEG]."; it is then not asked for an answer of
                its own, as in the released evaluation.
            first_mask (`torch.Tensor` or `np.ndarray` of shape `(H, W)` or `(K, H, W)`, bool or two values of which
                one is 0, *optional*): masks of K objects on the target frame, which must not overlap. The language
                model is then not asked.
            sampler (*optional*): chooses the target frame, and references unless they are named: a callable
                `sampler(view, query)` that is given a [`VideoView`] and returns a [`FrameSelection`], or `"visa"`, the
                model itself (`VisaFrameSampler`); the session's by default, which a `target_frame` overrules.
            explain (`bool`, defaults to `False`): ask for a reason beside the mask, in the published words; what the
                model says is the query's `answer`. Reasons are longer than plain answers: mind `max_new_tokens`.
            style (`str`, *optional*): form of the question: `"short"`, which suits a noun phrase, `"long"`, which
                suits a whole sentence, or `"explanatory"`, the same as `explain`. By default `"long"` for a query
                that ends in "?", else `"short"`.
            generate_kwargs: for `generate_masks` (`max_new_tokens`, `do_sample`, ...); greedy decoding by default.

        Returns:
            `int`: the query's number in the session.

        Raises:
            ValueError: for frames outside the video, a query or mask that cannot be used, or a tracker that is needed
                but missing.
            TypeError: for a query that is no string, or a frame that is no whole number.
            RuntimeError: if the model computes numbers that are not finite; in a stream, before its first frame and
                after its end.
        """
        request = QueryRequest(
            query,
            target_frame,
            reference_frames,
            num_reference_frames,
            reference_strategy,
            answer,
            first_mask,
            sampler,
            asked_style(style, explain),
        )
        return self._add_requests(session, [request], generate_kwargs)[0]

    def add_queries(
        self: Any,
        session: VisaVideoSession,
        queries: Sequence[str | dict[str, Any]],
        *,
        target_frame: int | None = None,
        reference_frames: Sequence[int] | None = None,
        num_reference_frames: int | None = None,
        reference_strategy: str | None = None,
        answer: str | None = None,
        sampler: FrameSampler | str | None = None,
        explain: bool = False,
        style: PromptStyle | None = None,
        **generate_kwargs: Any,
    ) -> list[int]:
        """Ask several queries together: the same as `add_query` one after the other, at less cost.

        Queries that see the same frames are answered in groups of `session.max_queries_per_batch`.

        Args:
            session (`VisaVideoSession`): the video.
            queries (sequence of `str` or `dict`): what to segment; a dictionary has arguments of `add_query`, which
                count more than those below; one with `explain` or `style` says by these alone how it is asked.
            target_frame, reference_frames, num_reference_frames, reference_strategy, answer, sampler, explain, style:
                for all queries.
            generate_kwargs: for `generate_masks`. Anything but greedy decoding answers the queries one by one.

        Returns:
            `list[int]`: the queries' numbers in the session, in their order.

        Raises:
            ValueError, TypeError, RuntimeError: as `add_query`; then no query was added.
        """
        if isinstance(queries, str) or not isinstance(queries, Iterable):
            raise TypeError(f"`queries` is {queries!r} but must be a list. For one query there is `add_query`.")
        common = {
            "target_frame": target_frame,
            "reference_frames": reference_frames,
            "num_reference_frames": num_reference_frames,
            "reference_strategy": reference_strategy,
            "answer": answer,
            "sampler": sampler,
            "style": asked_style(style, explain),
        }
        return self._add_requests(session, [as_request(query, common) for query in queries], generate_kwargs)

    @torch.no_grad()
    def _add_requests(
        self: Any, session: VisaVideoSession, requests: Sequence[QueryRequest], generate_kwargs: dict[str, Any]
    ) -> list[int]:
        # 1) Check everything, before anything is computed.
        if session.is_streaming:
            _check_stream(session)
        defaults = {
            "default_number": self.config.num_reference_frames,
            "strategy": self.config.reference_strategy,
        }
        samplers, unsampled = [], []
        for request in requests:
            check_words(session, request)
            samplers.append(sampler_of(session, request))
            unsampled.append(selected_frames(session, request, **defaults))
        masks = [
            None if request.first_mask is None else given_masks(request.first_mask, session.height, session.width)
            for request in requests
        ]

        # 2) Choose frames; a sampler may look at the video.
        selections: list[FrameSelection] = []
        anchor = session.anchor_frame
        for request, sampler, selection in zip(requests, samplers, unsampled, strict=True):
            if sampler is not None:
                chooser = VisaFrameSampler(self) if sampler == "visa" else sampler
                selection = sampled_frames(session, request, chooser, selection, anchor, **defaults)
            check_target(session, self.tracker, selection, anchor)
            anchor = selection.target_idx if anchor is None else anchor
            selections.append(selection)

        # 3) Ask.
        asked = [position for position, given in enumerate(masks) if given is None]
        questions = [
            Question(
                requests[position].query or "",
                selections[position],
                requests[position].answer,
                requests[position].style,
            )
            for position in asked
        ]
        answers = dict(zip(asked, self._answer(session, questions, generate_kwargs), strict=True))

        # 4) Add, all or none.
        results: list[dict[str, Any]] = []
        for position, (request, selection, given) in enumerate(zip(requests, selections, masks, strict=True)):
            if given is not None:
                text, scores, target_masks, probs = "", (1.0,) * len(given), given, given.float()
            else:
                answer = answers[position]
                _check_finite(answer)
                text, scores = answer.text, answer.scores
                target_masks = masks_from_logits(answer.mask_logits, session.threshold)
                probs = answer.mask_logits.sigmoid()
            results.append(
                {
                    "query": request.query or "",
                    "answer": text,
                    "frame_selection": selection,
                    "target_masks": target_masks,
                    "target_probs": probs if session.want_probs else None,
                    "target_frame_scores": mask_scores(target_masks, probs),
                    "scores": scores,
                }
            )
        return [session.append_query(**result) for result in results]


def masks_from_logits(mask_logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the masks of one query's objects on the target frame: a pixel belongs to one object at most.

    Args:
        mask_logits (`torch.Tensor` of shape `(K, H, W)`): any real values.
        threshold (`float`, defaults to 0.5): probability in (0, 1) above which a pixel belongs to an object. Where
            several objects claim it, the one with the largest logit has it.

    Returns:
        `torch.Tensor` of shape `(K, H, W)`, bool.
    """
    masks = mask_logits > math.log(threshold / (1 - threshold))  # 0.0 at the default
    if len(masks) < 2:
        return masks
    objects = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks & (mask_logits.argmax(dim=0) == objects)


def _check_finite(answer: Answer) -> None:
    """Refuse an answer in numbers that are none: its masks would be empty, and look like an answer."""
    if not (answer.mask_logits.isfinite().all() and all(map(math.isfinite, answer.scores))):
        raise RuntimeError(
            "The model gave NaN or infinite numbers instead of masks, as happens where float16 overflows or weights "
            "are damaged. Load it in another number format: try float32 or bfloat16 (`dtype`)."
        )


def _check_stream(session: Any) -> None:
    """Refuse a query before the first frame of a stream, and after its end."""
    if session.source.is_finished:
        raise RuntimeError(
            f"The stream was finished after {session.source.num_frames} frames: there is nothing left to track in. "
            "Open another session."
        )
    if not session.source.num_frames:
        raise RuntimeError(
            "The stream has no frame yet. Give `model.step` the first one, then add the query: the current frame is "
            "its target."
        )
