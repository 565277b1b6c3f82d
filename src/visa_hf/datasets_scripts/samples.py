"""Training samples: rows of a prepared data set -> a target frame, reference frames, sentences, answers and masks.

The published recipe (spec of VISA's training, https://huggingface.co/papers/2407.11325; image sets as in LISA,
https://huggingface.co/papers/2308.00692). A source draws from one data set, and everything that it draws comes from
the generator that it is given. Samples hold queries and the numbers of templates: prompts are the processor's.
"""

import logging
import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset

from visa_hf.datasets_scripts.annotations import AnnotationError
from visa_hf.datasets_scripts.features import TYPE_NO_OBJECT
from visa_hf.datasets_scripts.frame_store import FrameStore
from visa_hf.datasets_scripts.row_index import group_by_video, join_masks, require_annotated_frames
from visa_hf.datasets_scripts.sampling import SamplingRecipe, draw_frames, pad_to_square

# Pure text, and the only place that knows how many templates there are.
from visa_hf.modeling.prompts_visa import ANSWER_TEMPLATES, QUESTION_TEMPLATES, question_style
from visa_hf.rle import decode_mask

logger = logging.getLogger(__name__)

SEG = "[SEG]"


@dataclass(frozen=True)
class Conversation:
    """One question and its answer, about the frames of a sample.

    Attributes:
        query (`str`): the expression or question, without any template.
        answer (`str` or `None`): what to answer, with `[SEG]` where a mask is meant.
        answer_template (`int` or `None`): number of the published answer, instead of `answer`. One of both is set.
        template (`int`): number of the published question of its form.
        style (`str` or `None`): `"short"`, `"long"` or `"explanatory"`; `None` leaves it to the query's "?".
            `"conversation"` is about the frames, without a target; `"text"` is about no frame.
        history (`tuple[tuple[str, str], ...]`): questions and answers of earlier rounds.
        masks (`np.ndarray` of shape `(K, H, W)`, uint8, 0 or 1, or `None`): pixels of the target frame, one mask for
            each `[SEG]` of the answer; `None` where it has none.
        type_id (`int` or `None`): 0 referring, 1 reasoning, 2 no such object; `None` where that is unknown, as for a
            conversation that is not about an object, or if the target comes from another video.
    """

    query: str
    answer: str | None
    answer_template: int | None
    template: int = 0
    style: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    masks: np.ndarray | None = None
    type_id: int | None = None


@dataclass(frozen=True)
class Sample:
    """One training sample: some frames of a video and up to three conversations about them.

    Attributes:
        draw (`int`): its number.
        source (`str`): name of the source that it comes from.
        video_id (`str`): the video of the reference frames.
        target_idx (`int` or `None`): the target frame's index in the video; `None` if there is no target, or if it
            comes from another video.
        reference_idx (`tuple[int, ...]`): indices of the reference frames, ascending. They include the target's.
        target_frame (`np.ndarray` of shape `(H, W, 3)`, uint8, RGB, or `None`).
        reference_frames (`tuple[np.ndarray, ...]`): of the same form, in time order. A foreign target may have
            another size.
        conversations (`tuple[Conversation, ...]`).
        is_foreign_target (`bool`): the target frame comes from another video and all masks are empty.
        attempt (`int`): how many times the draw failed before, when unreadable frames are skipped.
        foreground (`np.ndarray` of shape `(H, W)`, uint8, 0 or 1, or `None`): all annotated objects of the target
            frame together; `None` if the source does not know them.
    """

    draw: int
    source: str
    video_id: str
    target_idx: int | None
    reference_idx: tuple[int, ...]
    target_frame: np.ndarray | None
    reference_frames: tuple[np.ndarray, ...]
    conversations: tuple[Conversation, ...]
    is_foreign_target: bool = False
    attempt: int = 0
    foreground: np.ndarray | None = None


class ExpressionSource:
    """Samples of a data set of expressions and masks.

    One video is drawn, then up to three of its expressions, then the frames (see [`draw_frames`]). What is said:

    - an expression stays as it is (or is lower-cased, if the recipe says so) and its form follows its "?";
    - with a column `is_sentence` (ReasonSeg), that chooses the form; a sentence stays as it is, a phrase becomes
      lower case;
    - with an `explanation` (ReasonSeg, or your own data), a share of the samples has no target and the explanation for
      its answer, and of the others a share has `[SEG]` and then the explanation, the query lower-cased;
    - with an `answer` of its own (your own data), that is the answer. Its only `[SEG]` means all objects of the
      expression; of several, each means one of them, in the order of `anno_ids`;
    - with a column `annotated` (your own data: which frames have masks), the target is one of the first expression's,
      and of the other expressions those stay for which it is known too.

    Args:
        name (`str`): goes into samples and errors.
        expressions (`datasets.Dataset`): a builder's config "expressions".
        masks (`datasets.Dataset`, *optional*): its config "masks", of the same split.
        root (`str` or `os.PathLike`): the folder that frames are relative to, the builder's `data_dir`.
        recipe ([`SamplingRecipe`], *optional*): the published one for videos by default.
        videos (`datasets.Dataset`, *optional*): its config "videos", for the foregrounds of samples.

    Attributes:
        expressions, masks (`datasets.Dataset`): the rows.
        store ([`FrameStore`]): the pictures.

    Raises:
        AnnotationError: rows do not fit together.
        FileNotFoundError: there is no such folder.
        ValueError: there are no masks although expressions mean objects, or no video is left.
    """

    def __init__(
        self,
        name: str,
        expressions: Dataset,
        masks: Dataset | None,
        root: str | os.PathLike[str],
        recipe: SamplingRecipe | None = None,
        *,
        videos: Dataset | None = None,
    ) -> None:
        self.name, self.recipe, self.store = name, recipe or SamplingRecipe(), FrameStore(root)
        self._videos, num_short = group_by_video(expressions, self.recipe.min_video_frames)
        _require_samples(name, len(self._videos), num_short, self.recipe)
        self._mask_rows = join_masks(expressions, masks)
        require_annotated_frames(expressions)
        self.expressions = expressions.with_format(None)
        # As Arrow, so that only the frame that is asked for becomes a Python object.
        self.masks = None if masks is None else masks.select_columns(["anno_id", "rle"]).with_format("arrow")
        self._foregrounds = None if videos is None else videos.select_columns(["foreground_rle"]).with_format("arrow")
        self._foreground_rows = {} if videos is None else {name: row for row, name in enumerate(videos["video_id"])}

    def __len__(self) -> int:
        return len(self._videos)

    def __repr__(self) -> str:
        return f"ExpressionSource({self.name!r}, {len(self)} videos, {len(self._videos.rows)} expressions)"

    def sample(self, rng: np.random.Generator, draw: int) -> Sample:
        """Draw a sample.

        Args:
            rng (`np.random.Generator`): source of every choice.
            draw (`int`): number to write into the sample.

        Raises:
            FrameError: a frame cannot be read.
            AnnotationError: a mask is damaged or does not fit its frame.
        """
        # 1) which video, expressions and frames
        video = int(rng.integers(len(self)))
        rows = self._draw_expressions(rng, video)
        frames = rows[0]["frames"]
        target_idx, reference_idx = draw_frames(rng, len(frames), self.recipe, rows[0].get("annotated"))
        rows = [row for row in rows if _is_known(row, target_idx)]
        other = self._draw_other_frame(rng, video)
        # 2) what is said
        form = "mask" if other else self._draw_answer_form(rng, rows)
        if form == "text":
            rows = [row for row in rows if _is_explained(row)]
        spoken = [self._draw_conversation(rng, row, form, is_foreign=bool(other)) for row in rows]
        # 3) the pictures, each once; the masks on the target
        shown = [frames[idx] for idx in reference_idx]
        if form != "text":
            shown.append(other or frames[target_idx])
        names = list(dict.fromkeys(shown))
        pictures = dict(zip(names, self.store.read(names), strict=True))
        references = tuple(pictures[frames[idx]] for idx in reference_idx)
        if form == "text":
            conversations = tuple(spoken)
            return Sample(draw, self.name, rows[0]["video_id"], None, reference_idx, None, references, conversations)
        target_name = other or frames[target_idx]
        target = pictures[target_name]
        return Sample(
            draw=draw,
            source=self.name,
            video_id=rows[0]["video_id"],
            target_idx=None if other else target_idx,
            reference_idx=reference_idx,
            target_frame=target,
            reference_frames=references,
            conversations=tuple(
                self._with_masks(conversation, row, None if other else target_idx, target.shape[:2])
                for conversation, row in zip(spoken, rows, strict=True)
            ),
            is_foreign_target=bool(other),
            foreground=None if other else self._foreground(rows[0], target_idx, target.shape[:2]),
        )

    def _draw_expressions(self, rng: np.random.Generator, video: int) -> list[dict[str, Any]]:
        """Return up to `expressions_per_video` rows of one video, each with its row number as `row`."""
        rows = self._videos[video]
        chosen = rng.choice(rows, min(self.recipe.expressions_per_video, len(rows)), replace=False)
        drawn = [{**self.expressions[int(row)], "row": int(row)} for row in chosen]
        for row in drawn[1:]:
            if row["frames"] != drawn[0]["frames"]:
                raise self._error(row, "Its frames are others than those of another expression of the same video.")
        return drawn

    def _draw_other_frame(self, rng: np.random.Generator, video: int) -> str | None:
        """Return a frame of another video, or `None` for most samples."""
        # All numbers are drawn in any case, so that options of one part do not move the others.
        is_foreign, other, position = rng.random() < self.recipe.foreign_probability, rng.random(), rng.random()
        if not is_foreign or len(self) == 1:
            return None
        number = int(other * (len(self) - 1))
        frames = self.expressions[int(self._videos[number + (number >= video)][0])]["frames"]
        return frames[int(position * len(frames))]

    def _draw_answer_form(self, rng: np.random.Generator, rows: list[dict[str, Any]]) -> str:
        """Return "text" (the explanation alone), "explained" (after [SEG]) or "mask", for all expressions alike."""
        is_text, is_explained = rng.random(2)
        if not any(_is_explained(row) for row in rows):
            return "mask"
        # Without references there would be nothing to talk about.
        if is_text < self.recipe.text_only_probability and self.recipe.min_reference_frames > 0:
            return "text"
        return "explained" if is_explained < self.recipe.explanation_probability else "mask"

    def _draw_conversation(
        self, rng: np.random.Generator, row: dict[str, Any], form: str, *, is_foreign: bool
    ) -> Conversation:
        """Return what is said about one expression, without masks as yet."""
        question_pick, answer_pick = rng.random(2)
        query, answer_template = row["expression"], int(answer_pick * len(ANSWER_TEMPLATES))
        if form == "text":
            return Conversation(query, row["explanation"], None, style="conversation")
        is_sentence = row.get("is_sentence")
        is_explained = form == "explained" and _is_explained(row)
        style = None
        if is_explained:
            style = "explanatory"
        elif is_sentence is not None:
            style = "long" if is_sentence else "short"
        if self.recipe.lower_case or is_explained or is_sentence is False:
            query = query.lower()
        template = int(question_pick * len(QUESTION_TEMPLATES[style or question_style(query)]))
        # An answer of its own tells of what is to be seen, which a foreign frame does not show, or of its absence.
        is_true_of_it = not is_foreign or row["type_id"] == TYPE_NO_OBJECT
        if row.get("answer") is not None and is_true_of_it:
            return Conversation(query, row["answer"], None, template, style)
        if is_explained:
            answer = f"{ANSWER_TEMPLATES[answer_template]} {row['explanation']}"
            return Conversation(query, answer, None, template, style)
        return Conversation(query, None, answer_template, template, style)

    def _with_masks(
        self, conversation: Conversation, row: dict[str, Any], frame_idx: int | None, size: tuple[int, int]
    ) -> Conversation:
        """Add the type and a mask for each `[SEG]` to a conversation; `frame_idx` is `None` for a foreign frame."""
        if frame_idx is not None:
            conversation = replace(conversation, type_id=row["type_id"])
        num_seg = 1 if conversation.answer is None else conversation.answer.count(SEG)
        if num_seg == 0:
            return conversation
        mask_rows = self._mask_rows[row["row"]]
        if num_seg > 1 and num_seg != len(mask_rows):
            raise self._error(
                row,
                f"Its answer has {num_seg} {SEG} but {len(mask_rows)} objects. Give one {SEG} for all, or one each.",
            )
        groups = [mask_rows] if num_seg == 1 else [mask_rows[idx : idx + 1] for idx in range(num_seg)]
        masks = np.zeros((num_seg, *size), dtype=np.uint8)
        if frame_idx is not None:
            for mask, group in zip(masks, groups, strict=True):
                for mask_row in group:
                    self._add_mask(mask, int(mask_row), row, frame_idx)
        return replace(conversation, masks=masks)

    def _add_mask(self, mask: np.ndarray, mask_row: int, row: dict[str, Any], frame_idx: int) -> None:
        """Draw one object's mask of one frame into `mask`, `(H, W)`."""
        assert self.masks is not None, "rows of masks come from the masks"
        table = self.masks[mask_row]
        name = f"The mask {table['anno_id'][0].as_py()!r}"
        found = self._decoded(name, table["rle"][0].values, row, frame_idx, mask.shape)
        if found is not None:
            mask |= found

    def _foreground(self, row: dict[str, Any], frame_idx: int, size: tuple[int, int]) -> np.ndarray | None:
        """Return all objects of a frame together, `(H, W)`; `None` if that is not known."""
        place = self._foreground_rows.get(row["video_id"])
        if place is None or self._foregrounds is None:
            return None
        rles = self._foregrounds[place]["foreground_rle"][0].values
        if rles is None or len(rles) == 0:  # not published for this video
            return None
        found = self._decoded("The foreground", rles, row, frame_idx, size)
        return np.zeros(size, dtype=np.uint8) if found is None else found.astype(np.uint8)

    def _decoded(
        self, name: str, rles: Any, row: dict[str, Any], frame_idx: int, size: tuple[int, ...]
    ) -> np.ndarray | None:
        """Decode one frame of an Arrow array of run lengths: `(H, W)`, bool; `None` where there is none."""
        if len(rles) != len(row["frames"]):
            raise self._error(row, f"{name} has {len(rles)} entries for {len(row['frames'])} frames.", frame_idx)
        rle = rles[frame_idx].as_py()
        if rle is None:
            return None
        if tuple(rle["size"]) != size:
            raise self._error(
                row, f"{name} has size {tuple(rle['size'])} (H, W), but the picture {tuple(size)}.", frame_idx
            )
        try:
            return decode_mask(rle)
        except (TypeError, ValueError) as error:
            raise self._error(row, f"{name} is damaged: {error}", frame_idx) from error

    def _error(self, row: dict[str, Any], message: str, frame_idx: int | None = None) -> AnnotationError:
        return AnnotationError.at(
            f"Source `{self.name}`: {message}",
            video=row["video_id"],
            expression=row["expression_id"],
            frame=None if frame_idx is None else row["frames"][frame_idx],
        )


class ConversationSource:
    """Samples of a data set of conversations: no target, no `[SEG]` and no mask.

    Each row is a sample. An image is shown as it is, a video by as many frames as there would be references; a row
    without frames is about none. The last answer is the one asked for, what went before is its history, unless the
    recipe keeps the last round alone.

    Args:
        name, root, recipe: as for [`ExpressionSource`].
        conversations (`datasets.Dataset`): a builder's config "conversations".

    Raises:
        AnnotationError: a row has no turns.
        FileNotFoundError: there is no such folder.
        ValueError: there are no rows.
    """

    def __init__(
        self, name: str, conversations: Dataset, root: str | os.PathLike[str], recipe: SamplingRecipe | None = None
    ) -> None:
        self.name, self.recipe, self.store = name, recipe or SamplingRecipe(), FrameStore(root)
        _require_samples(name, len(conversations), 0, self.recipe)
        self._conversations = conversations.with_format(None)

    def __len__(self) -> int:
        return len(self._conversations)

    def __repr__(self) -> str:
        return f"ConversationSource({self.name!r}, {len(self)} conversations)"

    def sample(self, rng: np.random.Generator, draw: int) -> Sample:
        """Draw a sample; as [`ExpressionSource.sample`]."""
        row = self._conversations[int(rng.integers(len(self)))]
        turns = [(turn["question"], turn["answer"]) for turn in row["turns"]]
        if not turns:
            raise AnnotationError.at(
                f"Source `{self.name}`: conversation {row['conversation_id']!r} has no turns.", video=row["video_id"]
            )
        frames = row["frames"]
        reference_idx: tuple[int, ...] = ()
        if frames:
            _, reference_idx = draw_frames(rng, len(frames), self.recipe)
        pictures = self.store.read([frames[idx] for idx in reference_idx])
        if self.recipe.pad_to_square:
            pictures = [pad_to_square(picture) for picture in pictures]
        query, answer = turns[-1]
        history = () if self.recipe.last_turn_only else tuple(turns[:-1])
        style = "conversation" if frames else "text"
        conversation = Conversation(query, answer, None, style=style, history=history)
        return Sample(draw, self.name, row["video_id"], None, reference_idx, None, tuple(pictures), (conversation,))


Source = ExpressionSource | ConversationSource


def _require_samples(name: str, count: int, num_short: int, recipe: SamplingRecipe) -> None:
    """Refuse a source that has nothing to draw from."""
    if num_short:
        logger.info(
            "Source `%s`: %d videos of fewer than %d frames are left out.", name, num_short, recipe.min_video_frames
        )
    if count == 0:
        left_out = (
            f": all its {num_short} videos have fewer than {recipe.min_video_frames} frames" if num_short else ""
        )
        raise ValueError(f"Source `{name}` has no rows to draw from{left_out}. Check its split and its folder.")


def _is_explained(row: dict[str, Any]) -> bool:
    """Whether there is an explanation to learn; an answer of its own goes first."""
    return bool(row.get("explanation")) and row.get("answer") is None


def _is_known(row: dict[str, Any], frame_idx: int) -> bool:
    """Whether a frame's mask is known; without a column `annotated` that of every frame is."""
    return row.get("annotated") is None or frame_idx in row["annotated"]
