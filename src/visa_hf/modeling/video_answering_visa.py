"""Questions about frames of one video, answered together: whatever depends on frames alone is computed once.

Visual tokens are made once for each frame and SAM's features once for each target frame; the language model reads the
frames of questions that see the same ones once, and answers these questions in groups. With `mode="published"` nothing
of that is done: it is VISA's released evaluation (https://huggingface.co/papers/2407.11325), step by step, to
reproduce its numbers and to compare with. Who may ask what is checked in video_asking_visa.py, which calls this.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .frame_sampling_visa import stride_references
from .inputs_visa import check_text
from .outputs_visa import FrameSelection
from .prefix_cache_visa import SharedPrefix, can_be_shared, make_prefix, pad_behind, positions_of, shared_length
from .prompts_visa import ANSWER_TEMPLATES, PromptStyle
from .video_session_visa import VisaVideoSession

# Frames that the visual tower encodes together.
_TOWER_BATCH = 16
# How an answer may be decoded if it is to be the same in a batch, behind a shared prefix and alone.
_BEAMS = {"num_beams", "early_stopping", "length_penalty"}
_PLAIN_ARGUMENTS = {"max_new_tokens", "min_new_tokens", "do_sample", "eos_token_id"} | _BEAMS
# Settings of a checkpoint's own generation that change nothing about that, besides those of beams.
_HARMLESS_SETTINGS = {
    "_from_model_config",
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}
_DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Question:
    """A sentence about some frames; with an `answer`, that one is read instead of generating one.

    Its `style` is the form of the prompt, which is the sentence's own by default.
    """

    query: str
    frame_selection: FrameSelection
    answer: str | None = None
    style: PromptStyle | None = None


@dataclass(frozen=True)
class Answer:
    """Text, and for each [SEG] in it mask logits on the target frame, (K, H, W), float32, CPU, and SAM's score."""

    text: str
    mask_logits: Tensor
    scores: tuple[float, ...]


class VisaAnsweringMixin:
    """How the model answers questions of a session; the verbs are those of `VisaAskingMixin`."""

    def _answer(
        self: Any, session: VisaVideoSession, questions: Sequence[Question], generate_kwargs: dict[str, Any]
    ) -> list[Answer]:
        """Answer questions, those about the same frames together; the answers are in the order of the questions."""
        if session.mode == "published":
            return [self._answer_as_published(session, question) for question in questions]
        session.cache.serve(self)
        order = range(len(questions))
        is_plain = self._is_plain(generate_kwargs)
        targets: dict[tuple[int, ...], set[int]] = {}
        groups: dict[Any, list[int]] = {}
        for position, question in enumerate(questions):
            selection = question.frame_selection
            targets.setdefault(selection.reference_idx, set()).add(selection.target_idx)
            key: Any = selection.reference_idx, selection.target_idx, question.answer is None
            groups.setdefault(key if is_plain or question.answer is not None else position, []).append(position)
        # Sampled answers are drawn in the order given. Any others are sorted, so that what is kept is met again soon.
        in_order = sorted(groups, key=str) if is_plain else list(groups)
        answers: dict[int, Answer] = {}
        for key in in_order:
            group = [questions[position] for position in groups[key]]
            shares_references = len(targets[group[0].frame_selection.reference_idx]) > 1
            found = self._answer_about(session, group, generate_kwargs, shares_references=shares_references)
            answers.update(zip(groups[key], found, strict=True))
        return [answers[position] for position in order]

    def _is_plain(self: Any, generate_kwargs: dict[str, Any]) -> bool:
        """Whether answers do not depend on what is answered beside them: greedy or by beams, without penalties."""
        settings = self.generation_config.to_diff_dict()
        is_known = generate_kwargs.keys() <= _PLAIN_ARGUMENTS and settings.keys() <= _HARMLESS_SETTINGS | _BEAMS
        return is_known and settings.get("use_cache", True) and not generate_kwargs.get("do_sample")

    def _answer_about(
        self: Any,
        session: VisaVideoSession,
        questions: Sequence[Question],
        generate_kwargs: dict[str, Any],
        *,
        shares_references: bool,
    ) -> list[Answer]:
        """Answer questions about the same frames, all of them with given answers or none."""
        # 1) The prompts, and what they must not exceed.
        selection, processor = questions[0].frame_selection, session.processor
        num_references = len(selection.reference_idx)
        rows = [prompt_ids(processor, each.query, num_references, each.answer, each.style) for each in questions]
        longest = max(map(len, rows))
        ones = torch.ones(1, longest, dtype=torch.int64)
        check_text(self.config, ones, ones, None, None)

        # 2) What depends on the frames alone.
        frames = (*selection.reference_idx, selection.target_idx)
        image_features = self._image_features(session, frames)
        sam_features = self._sam_features(session, selection.target_idx, questions[0].query)
        is_plain = questions[0].answer is not None or self._is_plain(generate_kwargs)
        prefix = None
        if is_plain and session.cache.prefixes.max_items:
            prefix = self._prefix(session, selection, rows, image_features, shares_references)
        num_shared = 0 if prefix is None else len(prefix.input_ids)

        # 3) The questions, in groups. One that leaves others less room for their answers is asked alone.
        size = session.max_queries_per_batch if is_plain else 1
        if questions[0].answer is None:
            size = max(size // self._generation_setting("num_beams", generate_kwargs), 1)
        room = self.config.text_config.max_position_embeddings - longest
        if questions[0].answer is None and generate_kwargs.get("max_new_tokens", _DEFAULT_NEW_TOKENS) > room:
            size = 1
        targets = {
            "num_frames": [len(frames)],
            "sam_features": sam_features[None],
            "original_sizes": [(session.height, session.width)],
            "reshaped_input_sizes": [session.cache.reshaped_size],
        }
        answers: list[Answer] = []
        for start in range(0, len(rows), size):
            part = questions[start : start + size]
            input_ids, attention_mask = pad_behind(
                rows[start : start + size], num_shared, processor.tokenizer.pad_token_id
            )
            about: dict[str, Any] = {**targets, "conversation_to_video": [0] * len(part)}
            past = None if prefix is None else prefix.for_prompts(len(part))
            if part[0].answer is None:
                output = self.generate_masks(
                    input_ids,
                    attention_mask,
                    image_features=image_features,
                    past_key_values=past,
                    **about,
                    **generate_kwargs,
                )
                texts = processor.batch_decode(output.answer_ids)
            else:
                if past is None:
                    features = image_features.repeat(len(part), 1, 1)
                    about["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
                device = self._input_device(input_ids)
                output = self(
                    input_ids=input_ids[:, num_shared:].to(device),
                    attention_mask=attention_mask.to(device),
                    position_ids=positions_of(attention_mask)[:, num_shared:].to(device),
                    past_key_values=past,
                    logits_to_keep=1,
                    **about,
                )
                texts = [question.answer or "" for question in part]
            for n, text in enumerate(texts[: len(part)]):
                answers.append(_as_answer(text, output.mask_logits[n], output.iou_scores[n]))
        return answers

    def _input_device(self: Any, input_ids: Tensor) -> torch.device:
        """Where the language model's input belongs; offloaded models move it by themselves."""
        return input_ids.device if self.device.type == "meta" else self.device

    def _image_features(self: Any, session: VisaVideoSession, frames: Sequence[int]) -> Tensor:
        """Visual tokens of frames, (F, L, D), each computed once."""
        cache = session.cache
        tokens = {idx: known for idx in frames if (known := cache.frames.get(idx)) is not None}
        missing = sorted({*frames} - tokens.keys())
        for start in range(0, len(missing), _TOWER_BATCH):
            part = missing[start : start + _TOWER_BATCH]
            # The layout is named: a frame 3 pixels high looks like channels first.
            pixels = session.processor.image_processor(
                session.source.get_many(part),
                input_data_format=ChannelDimension.LAST,
                do_convert_rgb=False,
                return_tensors="pt",
            )["pixel_values"]
            for idx, features in zip(part, self.get_image_features(pixels).pooler_output, strict=True):
                tokens[idx] = cache.stored(features)
                cache.frames.put(idx, tokens[idx])
        return torch.stack([tokens[idx] for idx in frames])

    def _sam_features(self: Any, session: VisaVideoSession, target_idx: int, query: str) -> Tensor:
        """SAM's features of a target frame, (C, h, w), computed once."""
        cache = session.cache
        features = cache.targets.get(target_idx)
        if features is None or cache.reshaped_size is None:
            (target,) = session.source.get_many([target_idx])
            inputs = session.processor(target_frame=target, reference_frames=[], query=query)
            cache.reshaped_size = tuple(inputs["reshaped_input_sizes"][0].tolist())
            features = cache.stored(self.get_sam_features(inputs["sam_pixel_values"])[0])
            cache.targets.put(target_idx, features)
        return features

    def _prefix(
        self: Any,
        session: VisaVideoSession,
        selection: FrameSelection,
        rows: Sequence[Tensor],
        image_features: Tensor,
        shares_references: bool,
    ) -> SharedPrefix | None:
        """Keys and values of the tokens that the prompts share, read once; `None` if they cannot be shared.

        The references come first, so that what was read of them serves other targets too.
        """
        length = shared_length(rows, self.config.image_token_id)
        if not length:
            return None
        references, row = selection.reference_idx, rows[0]
        base = None
        if references and (shares_references or session.cache.prefixes.get((references, None)) is not None):
            num_tokens = len(references) * image_features.shape[1]
            end = int((row == self.config.image_token_id).nonzero()[num_tokens - 1]) + 1
            base = self._read_prefix(session, (references, None), row[:end], image_features[:-1], None)
        return self._read_prefix(session, (references, selection.target_idx), row[:length], image_features, base)

    def _read_prefix(
        self: Any,
        session: VisaVideoSession,
        key: tuple[Any, Any],
        input_ids: Tensor,
        image_features: Tensor,
        base: SharedPrefix | None,
    ) -> SharedPrefix | None:
        """Keys and values of `input_ids`, (P,), kept or read behind those of `base`."""
        cache = session.cache
        known = cache.prefixes.get(key)
        if known is not None and torch.equal(known.input_ids, input_ids):
            return known
        start = 0 if base is None else len(base.input_ids)
        num_images = int((input_ids[start:] == self.config.image_token_id).sum()) // image_features.shape[1]
        device = self._input_device(input_ids)
        past_key_values = self.model(
            input_ids=input_ids[None, start:].to(device),
            position_ids=torch.arange(start, len(input_ids), device=device)[None],
            past_key_values=None if base is None else base.for_prompts(1),
            mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=image_features[-num_images:])},
            use_cache=True,
        ).past_key_values
        if not can_be_shared(past_key_values):
            return None
        prefix = make_prefix(input_ids, past_key_values, cache.device, cache.dtype)
        cache.prefixes.put(key, prefix)
        return prefix

    def _answer_as_published(self: Any, session: VisaVideoSession, question: Question) -> Answer:
        """Go through all frames of the video as the released evaluation does, and use the mask of one of them."""
        # As in VISA: every frame is a target in its turn, each with references of its own.
        first, stop = session.first_frame, session.stop_frame
        selection = question.frame_selection
        answer = question.answer or ANSWER_TEMPLATES[0]
        found: Answer | None = None
        for target_idx in range(first, stop):
            references = tuple(first + idx for idx in stride_references(stop - first, target_idx - first))
            if target_idx == selection.target_idx:
                references = selection.reference_idx
            *reference_frames, target = session.source.get_many([*references, target_idx])
            inputs = session.processor(
                target_frame=target,
                reference_frames=reference_frames,
                query=question.query,
                answer=answer,
                normalize_query=True,
                style=question.style,
            )
            del inputs["labels"]
            output = self(**inputs.to(self._input_device(inputs["input_ids"])))
            if target_idx == selection.target_idx:
                found = _as_answer(answer, output.mask_logits[0], output.iou_scores[0])
        assert found is not None  # the target lies in the part
        return found


def prompt_ids(
    processor: Any, query: str, num_references: int, answer: str | None = None, style: PromptStyle | None = None
) -> Tensor:
    """Return what the processor makes of a query about a target and its references, without their pixels.

    Args:
        processor (`VisaProcessor`): knows prompts and tokens.
        query (`str`): lower-cased and its white space folded, as in the published inference.
        num_references (`int`): frames beside the target.
        answer (`str`, *optional*): follows the prompt, with the token that ends it.
        style (`str`, *optional*): form of the prompt, as of `build_prompt`.

    Returns:
        `torch.Tensor` of shape `(S,)`, int64: each frame is `num_visual_tokens` ids.

    Raises:
        ValueError: if the query cannot be used, or is too long for the model.
    """
    text = processor.build_prompt(
        query,
        num_reference_frames=num_references,
        answer=answer,
        normalize_query=True,
        style=style,
    )
    row = torch.tensor(processor.tokenizer(text)["input_ids"])
    is_image = row == processor.image_token_id
    row = row.repeat_interleave(torch.where(is_image, processor.num_visual_tokens, 1))
    limit = processor.tokenizer.model_max_length
    if len(row) > limit:
        num_frames, num_text = int(is_image.sum()), int((~is_image).sum())
        raise ValueError(
            f"The query {_shortened(query)} makes {len(row)} tokens ({num_frames} frames of "
            f"{processor.num_visual_tokens} visual tokens, {num_text} of text) but {limit} fit into the model's "
            "context. Shorten it, or let the model look at fewer reference frames."
        )
    return row


def _shortened(query: str) -> str:
    return repr(query if len(query) <= 60 else f"{query[:60]}...")


def _as_answer(text: str, mask_logits: Tensor, scores: Tensor) -> Answer:
    return Answer(text, mask_logits.float().cpu(), tuple(scores.tolist()))
