"""Frames, a query and, for training, its answer and masks -> the tensors of `VisaForVideoSegmentation`, and back.

Prompts, labels and pixels are those of the published system (VISA, https://huggingface.co/papers/2407.11325), token by
token; the checks are ours. It neither chooses frames (frame_sampling_visa.py) nor reads videos (frame_source_visa.py).
What it is given is checked in processing_inputs_visa.py. It is long because its arguments need their documentation.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, CLIPImageProcessorPil, ProcessorMixin, SamImageProcessorPil
from transformers.image_utils import ChannelDimension

from .mask_sizes_visa import upscale_mask_logits
from .processing_inputs_visa import (
    Frame,
    answers_of,
    as_videos,
    history_of,
    mask_labels_of,
    match_conversations,
    one_answer,
    per_conversation,
)
from .prompts_visa import (
    CHAT_TEMPLATE,
    PromptStyle,
    build_conversation,
    build_questions,
    fold_query,
    question_style,
)
from .video_session_visa import VisaVideoSession, is_blank

IGNORED_LABEL = -100
_PUBLISHED_IMAGE, _PUBLISHED_SEG = "<image>", "[SEG]"


class VisaProcessor(ProcessorMixin):
    r"""Prepares inputs of [`VisaForVideoSegmentation`] and reads its outputs.

    Args:
        image_processor (`CLIPImageProcessorPil`): pixels for the visual tower.
        tokenizer (`PreTrainedTokenizerFast`): knows `seg_token` and `image_token` as added tokens and has a padding
            token. `visa_hf.convert.convert_tokenizer` makes one of a Llama `tokenizer.model`.
        sam_image_processor (`SamImageProcessorPil`): pixels for SAM.
        num_visual_tokens (`int`, defaults to 112): ids that stand for one frame.
        image_token (`str`, defaults to `"<image>"`): the token that these ids are of.
        seg_token (`str`, defaults to `"[SEG]"`): the token that becomes a mask.
        chat_template (`str`, *optional*): template of `apply_chat_template`; by default the published conversation.

    The PIL variants of the image processors are used on every machine, also where torchvision is installed: their
    pixels are the published ones.

    Raises:
        ValueError: if the tokenizer lacks what is needed, or SAM's sizes contradict each other.
    """

    sam_image_processor: Any

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        sam_image_processor: Any = None,
        num_visual_tokens: int = 112,
        image_token: str = "<image>",
        seg_token: str = "[SEG]",
        chat_template: str | None = None,
    ) -> None:
        if num_visual_tokens < 1:
            raise ValueError(f"`num_visual_tokens` is {num_visual_tokens} but must be at least 1.")
        self.num_visual_tokens = num_visual_tokens
        self.image_token = image_token
        self.seg_token = seg_token
        super().__init__(
            _with_pil_backend(image_processor, CLIPImageProcessorPil),
            tokenizer,
            _with_pil_backend(sam_image_processor, SamImageProcessorPil),
            chat_template=chat_template or CHAT_TEMPLATE,
        )
        added = tokenizer.get_added_vocab()
        self.image_token_id = _added_token_id(added, image_token, "image_token")
        self.seg_token_id = _added_token_id(added, seg_token, "seg_token")
        for name in ("pad_token", "eos_token"):
            if tokenizer.special_tokens_map.get(name) is None:
                raise ValueError(f"The tokenizer has no `{name}`. Set one; published checkpoints pad with `<unk>`.")
        self._added_texts = sorted({*added, _PUBLISHED_IMAGE, _PUBLISHED_SEG})
        self._sam_size = _padded_side(self.sam_image_processor)

    @classmethod
    def from_config(
        cls, config: Any, tokenizer: Any, *, clip_resize: Literal["crop", "squash"] = "crop"
    ) -> "VisaProcessor":
        """Build the processor that fits a model.

        Args:
            config (`VisaConfig`): gives the image sizes, the visual tokens of a frame and the model's context, which
                becomes the longest conversation (`tokenizer.model_max_length`).
            tokenizer (`PreTrainedTokenizerFast`): its `[SEG]` and `<image>` must have the ids of `config`. Its
                `model_max_length` is set.
            clip_resize (`str`, defaults to `"crop"`): what the visual tower sees of a frame that is not square:
                `"crop"`, the middle of it, as the checkpoints' preprocessor says; `"squash"`, all of it, resized to a
                square, as the paper's text says.

        Raises:
            ValueError: if the ids differ, or there is no such `clip_resize`.
        """
        side = config.vision_config.image_size
        sam_side = config.sam_config.vision_config.image_size
        if clip_resize not in ("crop", "squash"):
            raise ValueError(f'`clip_resize` is {clip_resize!r} but must be "crop" or "squash".')
        if clip_resize == "crop":
            clip = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        else:
            clip = CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False)
        sam = SamImageProcessorPil(
            size={"longest_edge": sam_side},
            pad_size={"height": sam_side, "width": sam_side},
            mask_size={"longest_edge": sam_side // 4},
            mask_pad_size={"height": sam_side // 4, "width": sam_side // 4},
        )
        processor = cls(clip, tokenizer, sam, num_visual_tokens=config.num_visual_tokens)
        for name in ("seg_token_id", "image_token_id"):
            ours, wanted = getattr(processor, name), getattr(config, name)
            if ours != wanted:
                raise ValueError(
                    f"`{name}` is {ours} in the tokenizer but {wanted} in the configuration. Use the tokenizer that "
                    f"the model was trained with, or set `{name}` of the configuration."
                )
        tokenizer.model_max_length = config.text_config.max_position_embeddings
        return processor

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved in processor_config.json."""
        saved = super().to_dict()
        # By its PIL name it loads as it is everywhere; by the general name transformers warns without torchvision.
        saved["sam_image_processor"]["image_processor_type"] = type(self.sam_image_processor).__name__
        return saved

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that `__call__` may return."""
        return [
            "input_ids",
            "attention_mask",
            "labels",
            "pixel_values",
            "num_frames",
            "conversation_to_video",
            "sam_pixel_values",
            "original_sizes",
            "reshaped_input_sizes",
            "mask_labels",
        ]

    # Prompts

    def build_prompt(
        self,
        query: str,
        template: int = 0,
        *,
        num_reference_frames: int = 12,
        answer: str | None = None,
        answer_template: int | None = None,
        style: PromptStyle | None = None,
        normalize_query: bool = False,
        history: Sequence[tuple[str, str]] = (),
    ) -> str:
        """Return the conversation as published, each frame still one `<image>`.

        Args:
            query (`str`): what to find. Blanks around it are dropped, those inside stay.
            template (`int`, defaults to 0): which published question of the form, from 0.
            num_reference_frames (`int`, defaults to 12): frames beside the target. With 0 their place stays empty:
                nothing is published for that case.
            answer (`str`, *optional*): what the model is to learn to say; without it the prompt ends where the answer
                is to come.
            answer_template (`int`, *optional*): the published answer of that number, instead of `answer`.
            style (`str`, *optional*): `"short"`, `"long"` or `"explanatory"`; by default `"long"` for a query that
                ends in "?", else `"short"`. `"conversation"` is the query after all frames (`num_reference_frames`),
                none of which is a target. `"text"` is the query alone, about no frame.
            normalize_query (`bool`, defaults to `False`): lower-case the query and fold its white space, as the
                published inference does.
            history (list of pairs of `str`, *optional*): earlier rounds, each a question and its answer, as they are.
                The frames' places come before the first question.

        Raises:
            ValueError: if the query is empty or holds the text of a special token, the answer holds one other than
                `[SEG]`, or there is no such template or style.
            TypeError: if the query or the answer is not a string.
        """
        rounds = self._conversation(
            query,
            template,
            num_reference_frames=num_reference_frames,
            answer=one_answer(answer, answer_template),
            style=style,
            normalize_query=normalize_query,
            history=history_of(history, 1, is_single=True)[0],
        )
        return "".join(prompt + ending for prompt, ending in rounds)

    def _conversation(
        self,
        query: str,
        template: int,
        *,
        num_reference_frames: int,
        answer: str | None,
        style: PromptStyle | None,
        normalize_query: bool,
        history: Sequence[tuple[str, str]] = (),
    ) -> list[tuple[str, str]]:
        """Return per round the prompt up to "ASSISTANT:", and what follows it: the answer and its end, or nothing."""
        if num_reference_frames < 0:
            raise ValueError(f"`num_reference_frames` is {num_reference_frames} but must be at least 0.")
        self._check_text(query, "query", self._added_texts)
        if normalize_query:
            query = fold_query(query)
            # Lower-casing may have made one: "</S>".
            self._check_text(query, "query", self._added_texts)
        for question, _ in history:
            self._check_text(question, "history", self._added_texts)
        answers = [*(earlier for _, earlier in history), answer]
        allowed = (self.seg_token, _PUBLISHED_SEG)
        for text, name in zip(answers, [*["history"] * len(history), "answer"], strict=True):
            if text is not None or name == "history":
                self._check_text(text, name, [token for token in self._added_texts if token not in allowed])
        questions = build_questions(
            query,
            style or question_style(query),
            template,
            num_reference_frames,
            [question for question, _ in history],
        )
        # Only now: what was given cannot hold the mark.
        return build_conversation(
            [question.replace(_PUBLISHED_IMAGE, self.image_token) for question in questions],
            [None if text is None else text.replace(_PUBLISHED_SEG, self.seg_token) for text in answers],
            end=self.tokenizer.eos_token,
        )

    def _check_text(self, text: Any, name: str, forbidden: Sequence[str]) -> None:
        """Refuse a text that is empty, cannot be encoded, or would be read as something else than text."""
        if not isinstance(text, str):
            raise TypeError(f"`{name}` is a {type(text).__name__} but must be a string.")
        if is_blank(text):
            raise ValueError(f"`{name}` is empty ({text!r}). Say in words what is meant.")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"`{name}` {text!r} is not valid Unicode: it holds half a character. Decode it as UTF-8.")
        found = [token for token in forbidden if token in text]
        if found:
            raise ValueError(
                f"`{name}` {text!r} holds {', '.join(f'`{token}`' for token in found)}, which the model reads as a "
                "special token. Remove it."
            )

    # Inputs

    def __call__(
        self,
        target_frame: Frame | Sequence[Frame | None] | None = None,
        reference_frames: Sequence[Any] | np.ndarray | None = None,
        query: str | Sequence[str] | None = None,
        answer: str | Sequence[str] | None = None,
        masks: Any = None,
        *,
        conversation_to_video: Sequence[int] | None = None,
        template: int | Sequence[int] = 0,
        answer_template: int | Sequence[int] | None = None,
        style: PromptStyle | Sequence[PromptStyle | None] | None = None,
        normalize_query: bool | None = None,
        history: Sequence[Any] | None = None,
        mixed_sizes: bool = False,
        max_length: int | None = None,
        padding: bool = True,
        padding_side: Literal["left", "right"] | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Make the model's tensors for N conversations over B videos.

        A video is its target frame and its reference frames. Give one target frame with a list of references, or a
        list of B target frames with a list of B such lists. An image is a one-frame video, as in training: without
        `reference_frames` (or with `None` for that video) the target is also the only reference. A video without a
        target (`None`) has only references, and its conversations are of the style `"conversation"`.

        Args:
            target_frame (`np.ndarray` of shape `(H, W, 3)`, uint8, RGB, or `PIL.Image.Image`, or a list of them): the
                frame to segment of each video, `None` for none. Leave it out for conversations about no video.
            reference_frames (list of frames, or array of shape `(R, H, W, 3)`, or a list of B of these): the frames
                around it, in time order, of one size, that of the target. `[]` gives none, which is not an image.
            query (`str` or list of N): what to find.
            answer (`str` or list of N, *optional*): the answers to learn; adds `labels`.
            masks (array or tensor of shape `(K, H, W)`, 0 or 1, or a list of N, *optional*): for each `[SEG]` of the
                answer, in order, the object in the target frame. `None` in the list where there is no `[SEG]`.
            conversation_to_video (list of N `int`, *optional*): which video each conversation is about, -1 for none.
                By default all are about the only video, or each about its own.
            template, answer_template, style: as in `build_prompt`, one for all conversations or a list of N. There is
                no choice of `template` and `style` for a conversation about no video.
            normalize_query (`bool`, *optional*): lower-case queries and fold their white space; by default `True`
                for queries about a target without answers, else `False`.
            history (list of pairs of `str`, or a list of N of these, *optional*): earlier rounds of the conversation,
                each a question and its answer; with answers, they are learnt too. `None` in the list for none.
            mixed_sizes (`bool`, defaults to `False`): let a target have another size than its references, as when it
                is taken from another video to teach that nothing is there.
            max_length (`int`, *optional*): longest conversation in tokens; by default the model's context
                (`tokenizer.model_max_length`).
            padding (`bool`, defaults to `True`): make conversations equally long.
            padding_side (`str`, *optional*): by default `"left"` without answers, as generation needs, else `"right"`.
            return_tensors (`str`, defaults to `"pt"`): only `"pt"` exists.

        Returns:
            `BatchFeature` with, F being all frames and S the longest conversation:

            - `input_ids`, `attention_mask` (int64, `(N, S)`): each frame is `num_visual_tokens` ids of `<image>`.
            - `labels` (int64, `(N, S)`; with answers): -100 up to "ASSISTANT:" and in the padding.
            - `pixel_values` (float32, `(F, 3, h, w)`): per video the references, then the target.
            - `num_frames` (int64, `(B,)`), `conversation_to_video` (int64, `(N,)`).
            - `sam_pixel_values` (float32, `(B, 3, s, s)`): target frames, in the upper left of the square.
            - `original_sizes`, `reshaped_input_sizes` (int64, `(B, 2)`): (H, W) in pixels of the target frames, and of
              the resized ones inside the square; 0 for a video without a target.
            - `mask_labels` (with masks; list of N, float32, `(K, H, W)`).

        Raises:
            ValueError: for frames, texts, masks or numbers that do not fit together, and for a conversation that is
                longer than the model's context.
            TypeError: for something that is not a frame or not a string.
        """
        if return_tensors != "pt":
            raise ValueError(f'`return_tensors` is {return_tensors!r} but only "pt" exists.')
        videos, has_target = as_videos(target_frame, reference_frames, mixed_sizes)
        queries: list[Any] = list(query) if isinstance(query, list | tuple) else [query]
        if not queries or query is None:
            raise ValueError("`query` is missing. Say what to find: a string, or one string per conversation.")
        to_video = match_conversations(conversation_to_video, len(queries), len(videos))
        answers = answers_of(answer, answer_template, len(queries))
        styles = per_conversation(style, len(queries), "style")
        for idx, video in enumerate(to_video):
            self._check_style(idx, styles[idx], None if video < 0 else has_target[video])
        # Frames beside the target; of a conversation, all.
        counts = [
            len(videos[video]) - (styles[idx] != "conversation") if video >= 0 else None
            for idx, video in enumerate(to_video)
        ]
        conversations = self._conversations(
            queries,
            answers,
            counts,
            templates=per_conversation(template, len(queries), "template"),
            styles=styles,
            normalize_query=normalize_query,
            histories=history_of(history, len(queries), is_single=isinstance(query, str)),
        )
        data: dict[str, Any] = {}
        data |= self._encode_conversations(conversations, max_length, answers is not None, padding, padding_side)
        num_segs = (data["input_ids"] == self.seg_token_id).sum(dim=1).tolist()
        for idx, video in enumerate(to_video):
            if video >= 0 and not has_target[video] and num_segs[idx]:
                raise ValueError(
                    f"Conversation {idx} has {num_segs[idx]} `[SEG]` but its video has no `target_frame`. Give the "
                    "frame to segment, or take the `[SEG]` out."
                )
        data |= self._encode_frames(videos, has_target)
        data["conversation_to_video"] = torch.tensor(to_video)
        if masks is not None:
            sizes = [videos[idx][-1].shape[:2] if idx >= 0 and has_target[idx] else (0, 0) for idx in to_video]
            known = num_segs if answers is not None else None
            data["mask_labels"] = mask_labels_of(masks, known, sizes, is_single=isinstance(query, str))
        return BatchFeature(data=data)

    def _check_style(self, idx: int, style: PromptStyle | None, has_target: bool | None) -> None:
        """Refuse a form of question that does not suit its video; `has_target` is `None` where there is no video."""
        if has_target is None and style not in (None, "text"):
            raise ValueError(f'Conversation {idx} has `style` "{style}" but is about no video. Give it a video.')
        if has_target is not None and style == "text":
            raise ValueError(
                f'Conversation {idx} has `style` "text" but is about a video. Give -1 in `conversation_to_video`.'
            )
        if has_target is False and style != "conversation":
            raise ValueError(
                f"`reference_frames` is given without `target_frame` for conversation {idx}. Say which frame to "
                'segment, or give it the `style` "conversation".'
            )

    def _conversations(
        self,
        queries: list[str],
        answers: list[str] | None,
        num_references: list[int | None],
        *,
        templates: list[int],
        styles: list[PromptStyle | None],
        normalize_query: bool | None,
        histories: list[list[tuple[str, str]]],
    ) -> list[list[tuple[str, str]]]:
        """Return each conversation's rounds; `num_references` is `None` where there is no video."""
        conversations = []
        for idx, (query, count, style) in enumerate(zip(queries, num_references, styles, strict=True)):
            # The published inference about videos did so. Free conversation and what is about no video is left as is.
            is_published = answers is None and count is not None and style != "conversation"
            conversations.append(
                self._conversation(
                    query,
                    0 if count is None or style == "conversation" else templates[idx],
                    num_reference_frames=count or 0,
                    answer=answers[idx] if answers is not None else None,
                    style="text" if count is None else style,
                    normalize_query=is_published if normalize_query is None else normalize_query,
                    history=histories[idx],
                )
            )
        return conversations

    def _encode_conversations(
        self,
        conversations: list[list[tuple[str, str]]],
        max_length: int | None,
        has_answers: bool,
        padding: bool,
        padding_side: str | None,
    ) -> dict[str, Tensor]:
        """Tokenise, expand each frame's token, and pad: `input_ids`, `attention_mask`, perhaps `labels`."""
        side = padding_side or ("right" if has_answers else "left")
        if side not in ("left", "right"):
            raise ValueError(f'`padding_side` is {side!r} but must be "left" or "right".')
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        rows, label_rows = [], []
        for idx, rounds in enumerate(conversations):
            full, learnt = self._encode_rounds(idx, rounds)
            row = self._expand(full)
            self._check_length(row, limit, idx)
            labels = torch.full_like(row, IGNORED_LABEL)
            for start, end in learnt:
                labels[len(self._expand(full[:start])) : len(self._expand(full[:end]))] = torch.tensor(full[start:end])
            rows.append(row)
            label_rows.append(labels)
        lengths = sorted({len(row) for row in rows})
        if not padding and len(lengths) > 1:
            raise ValueError(
                f"Conversations have {lengths} tokens: `padding=False` needs equal lengths. Leave it out."
            )
        pad = partial(pad_sequence, batch_first=True, padding_side=side)
        encoded = {
            "input_ids": pad(rows, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(row) for row in rows], padding_value=0),
        }
        return encoded | {"labels": pad(label_rows, padding_value=IGNORED_LABEL)} if has_answers else encoded

    def _encode_rounds(self, idx: int, rounds: list[tuple[str, str]]) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a conversation, and where in them each answer begins and ends."""
        texts, text = [], ""
        for part in (part for both in rounds for part in both):
            text += part
            texts.append(text)
        ids = self.tokenizer(texts)["input_ids"]
        full, prompts, endings = ids[-1], ids[::2], ids[1::2]
        if any(prompt[-1] == self.tokenizer.eos_token_id for prompt in prompts) or any(
            full[: len(start)] != start for start in ids
        ):
            raise ValueError(
                f"The tokenizer ends the prompt of conversation {idx} with its own end token, or cuts it in "
                "another way when the answer follows. Use a tokenizer made by `convert_tokenizer`."
            )
        return full, [(len(prompt), len(ending)) for prompt, ending in zip(prompts, endings, strict=True)]

    def _expand(self, ids: list[int]) -> Tensor:
        """Return `ids` with each frame's id repeated once per visual token."""
        row = torch.tensor(ids)
        return row.repeat_interleave(torch.where(row == self.image_token_id, self.num_visual_tokens, 1))

    def _check_length(self, row: Tensor, limit: int, idx: int) -> None:
        """Refuse a conversation that the model's context cannot hold, and say what would fit."""
        if len(row) <= limit:
            return
        num_visual = int((row == self.image_token_id).sum())
        num_text = len(row) - num_visual
        fits = max(limit - num_text, 0) // self.num_visual_tokens
        if num_visual and fits:
            advice = f"Shorten the text, or use at most {fits} frames with it."
        else:
            advice = f"Shorten the text by at least {len(row) - limit} tokens."
        raise ValueError(
            f"Conversation {idx} has {len(row)} tokens ({num_visual // self.num_visual_tokens} frames of "
            f"{self.num_visual_tokens} visual tokens, {num_text} of text) but {limit} fit into the model's context. "
            f"{advice}"
        )

    def _encode_frames(self, videos: list[list[np.ndarray]], has_target: list[bool]) -> dict[str, Tensor]:
        """Return the pixels for the visual tower and for SAM, and the sizes."""
        frames = [frame for video in videos for frame in video]
        targets = [video[-1] for video, is_target in zip(videos, has_target, strict=True) if is_target]
        num_frames = torch.tensor([len(video) for video in videos], dtype=torch.int64)
        # Without a frame or a target, the same tensors: a training loop needs no case of its own.
        clip = self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size
        data = {
            "pixel_values": torch.zeros(0, 3, clip.height, clip.width),
            "num_frames": num_frames,
            "sam_pixel_values": torch.zeros(len(videos), 3, self._sam_size, self._sam_size),
            "original_sizes": torch.zeros(len(videos), 2, dtype=torch.int64),
            "reshaped_input_sizes": torch.zeros(len(videos), 2, dtype=torch.int64),
        }
        # The layout is named: a frame 3 pixels high looks like channels first.
        as_given = {"input_data_format": ChannelDimension.LAST, "do_convert_rgb": False, "return_tensors": "pt"}
        if frames:
            data["pixel_values"] = self.image_processor(frames, **as_given)["pixel_values"]
        if targets:
            for target in targets:
                self._check_shape_for_sam(target)
            sam = self.sam_image_processor(targets, **as_given)
            rows = torch.tensor(has_target)
            data["sam_pixel_values"][rows] = sam["pixel_values"]
            data["original_sizes"][rows] = sam["original_sizes"]
            data["reshaped_input_sizes"][rows] = sam["reshaped_input_sizes"]
        return data

    def _check_shape_for_sam(self, frame: np.ndarray) -> None:
        """Refuse a frame so narrow that nothing is left of it when its longest side fits SAM."""
        height, width = frame.shape[:2]
        if min(height, width) * self._sam_size < 0.5 * max(height, width):
            raise ValueError(
                f"A target frame has {height} x {width} pixels; resized to {self._sam_size} on its longest side it is "
                f"less than half a pixel wide. Sides may differ by at most {2 * self._sam_size} times: crop it."
            )

    # Outputs

    def post_process_masks(
        self,
        mask_logits: Tensor | Sequence[Tensor],
        original_sizes: Tensor | Sequence[tuple[int, int]],
        reshaped_input_sizes: Tensor | Sequence[tuple[int, int]] | None = None,
        *,
        conversation_to_video: Tensor | Sequence[int] | None = None,
        threshold: float = 0.5,
    ) -> list[Tensor]:
        """Turn mask logits into masks in pixels of the target frames.

        Args:
            mask_logits (list of N tensors of shape `(K, h, w)`, or one such tensor): SAM's own `low_res_mask_logits`
                together with `reshaped_input_sizes`, or `mask_logits`, already at the size of the frame, without.
            original_sizes, reshaped_input_sizes (`torch.Tensor` of shape `(B, 2)`): as the processor returned them.
            conversation_to_video (`torch.Tensor` of shape `(N,)`, *optional*): as the processor returned it; by
                default conversation i is about video i, or all are about the only one.
            threshold (`float`, defaults to 0.5): probability, in (0, 1), above which a pixel belongs to the object.

        Returns:
            list of N `torch.Tensor` of shape `(K, H, W)`, bool.

        Raises:
            ValueError: if sizes or numbers do not fit, or the threshold is not between 0 and 1.
        """
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` is {threshold} but must be a probability between 0 and 1, both left out.")
        logits = [mask_logits] if isinstance(mask_logits, Tensor) else list(mask_logits)
        to_video = match_conversations(conversation_to_video, len(logits), len(original_sizes))
        masks = []
        for idx, video in enumerate(to_video):
            if video < 0:
                masks.append(logits[idx].new_zeros((0, 0, 0), dtype=torch.bool))
                continue
            height, width = (int(side) for side in original_sizes[video])
            at_frame_size = logits[idx]
            if reshaped_input_sizes is not None:
                reshaped = (int(reshaped_input_sizes[video][0]), int(reshaped_input_sizes[video][1]))
                at_frame_size = upscale_mask_logits(logits[idx], self._sam_size, reshaped, (height, width))
            if tuple(at_frame_size.shape[1:]) != (height, width):
                raise ValueError(
                    f"`mask_logits[{idx}]` has shape {tuple(logits[idx].shape)} but the frame has {height} x {width} "
                    "pixels. Give `reshaped_input_sizes` too if these are `low_res_mask_logits`."
                )
            masks.append(at_frame_size > np.log(threshold / (1 - threshold)))
        return masks

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Return the text of each sequence of ids.

        Args:
            sequences (list of N sequences of ids, or `torch.LongTensor` of shape `(N, S)`): generated answers.
            skip_special_tokens (`bool`, defaults to `True`): leave out padding, `</s>` and frames. `[SEG]` stays.
            kwargs: handed on to the tokenizer.
        """
        texts = self.tokenizer.batch_decode(
            [_as_ids(ids) for ids in sequences], skip_special_tokens=skip_special_tokens, **kwargs
        )
        return [_tidy(text, self.seg_token) for text in texts]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Return the text of one sequence of ids; see `batch_decode`."""
        return self.batch_decode([token_ids], skip_special_tokens=skip_special_tokens, **kwargs)[0]

    # Videos

    def init_video_session(self, video: Any = None, **kwargs: Any) -> VisaVideoSession:
        """Open a video to ask about: see [`VisaVideoSession`], which takes the same arguments."""
        return VisaVideoSession(video=video, processor=self, **kwargs)


# Construction


def _with_pil_backend(given: Any, pil_class: type) -> Any:
    """Return the image processor `given`, remade with PIL where it runs on torchvision."""
    # Whether a saved folder is loaded with PIL or torchvision depends on what is installed; results must not.
    return given if given is None or given.backend == "pil" else pil_class(**given.to_dict())


def _added_token_id(added: dict[str, int], token: str, argument: str) -> int:
    """Return the id of `token`, converted, never tokenised; it must be one token of its own."""
    if token not in added:
        raise ValueError(
            f"`{argument}` {token!r} is not one known token of the tokenizer, which added {sorted(added)}. Add it as "
            "one token, with the id that the model was trained with, or load the tokenizer saved with the model."
        )
    return added[token]


def _padded_side(sam_image_processor: Any) -> int:
    """Return the side of the square that SAM sees."""
    longest, padded = sam_image_processor.size.longest_edge, sam_image_processor.pad_size
    if not longest == padded.height == padded.width:
        raise ValueError(
            f"`sam_image_processor` resizes the longest side to {longest} and pads to {padded.height} x "
            f"{padded.width}. All three must be equal."
        )
    return int(longest)


# Text of answers


def _as_ids(sequence: Any) -> list[int]:
    return sequence.tolist() if isinstance(sequence, Tensor | np.ndarray) else list(sequence)


def _tidy(text: str, seg_token: str) -> str:
    """Put the blanks around `seg_token` that the tokenizer swallows: "It is[SEG] ." -> "It is [SEG]."."""
    first, *rest = (part.strip() for part in text.split(seg_token))
    tidy = first
    for part in rest:
        gap = "" if not part or part[0] in ".,;:!?)" else " "
        tidy = f"{tidy} {seg_token}{gap}{part}"
    return tidy.strip()
