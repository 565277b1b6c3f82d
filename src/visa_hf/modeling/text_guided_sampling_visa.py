"""The text-guided frame sampler: a language model that sees the video says at which percentage of it to look.

VISA, https://huggingface.co/papers/2407.11325, section 3.2, with the published question. There the answers of a second
model are sampled, parsed and averaged. Ours are scored by default: the probability of each of the eleven answers, and
their exact mean, from one reading of the prompt. Any chat model of transformers can be asked, or VISA's own. Letters:
N texts of A tokens behind one prompt of S tokens, V words.
"""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .frame_samplers_visa import VideoView
from .inputs_visa import check_text
from .outputs_visa import FrameSelection
from .prefix_cache_visa import SharedPrefix, can_be_shared, make_prefix
from .prompts_visa import frame_question

logger = logging.getLogger(__name__)

# The answers that the published question offers, and the share of the video that each means.
PERCENTAGES = tuple(f"{percent}%" for percent in range(0, 101, 10))
SHARES = tuple(percent / 100 for percent in range(0, 101, 10))
# What is assumed when no answer can be understood, as published.
UNKNOWN_SHARE = 0.5

AnswerMode = Literal["scored", "sampled"]
# Takes texts, (N, A), int64, and returns the logits of each of their tokens and of the next one, (N, A + 1, V).
ReadAnswers = Callable[[Tensor], Tensor]

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = {word: 10 * n for n, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_NUMBER_WORDS = {
    **{word: n for n, word in enumerate(_UNITS)},
    **_TENS,
    **{f"{tens} {unit}": number + n for tens, number in _TENS.items() for n, unit in enumerate(_UNITS[1:10], 1)},
    **dict.fromkeys(("hundred", "one hundred", "a hundred"), 100),
}
_WORDS = "|".join(word.replace(" ", "[- ]") for word in sorted(_NUMBER_WORDS, key=len, reverse=True))
_NUMBER = rf"(?<!\d)(?<!\d[.,])(?P<number>\d+(?:[.,]\d+)?|(?<![\w-])(?:{_WORDS}))"
_PERCENT = _NUMBER + r"(?:th)?[\s-]*(?:%|\N{FULLWIDTH PERCENT SIGN}|per\s?cent)"
_FROM_END = re.compile(rf"\b(?:last|final)\s+{_PERCENT}")
_FROM_START = re.compile(_PERCENT)
# Without a percent sign only the whole text can be trusted: "3 dogs" is no percentage, nor is "the center" of a frame.
_BARE_NUMBER = re.compile(r"(?:[^\d]*\b(?:answer|mark|percentage)\b[^\d]*?)?(?P<number>\d+(?:[.,]\d+)?)\W*")
_PLACE = (
    r"\W*(?:(?:at|in|near|around|towards?|from)\s+)?(?:the\s+)?(?:very\s+)?(?:{})"
    r"(?:\s+(?:point|mark|through))?(?:\s+(?:of\s+)?the\s+video)?\W*"
)
_PLACES = (
    (re.compile(_PLACE.format("middle|midpoint|halfway|half-way")), 0.5),
    (re.compile(_PLACE.format("beginning|start|first frame")), 0.0),
    (re.compile(_PLACE.format("end|last frame")), 1.0),
)


def parse_percentage(text: str) -> float | None:
    """Return the share of a video, in [0, 1], that an answer names; `None` if it names none.

    "70%", "70 %", "70.5 percent", "seventy per cent" are 0.7 or so; "the last 10%" is 0.9. Of several percentages the
    smallest one but 0% counts, and one from the end before all others: what the published list of answers finds first.
    Without a percentage, what is nothing but a number ("70", "The answer is 0.7") or a place ("in the middle").
    What lies outside 0 to 100 is no percentage.
    """
    text = " ".join(text.lower().split())
    from_end = _percents_in(_FROM_END, text)
    if from_end:
        return (100 - min(from_end)) / 100
    percents = _percents_in(_FROM_START, text)
    if percents:
        return min((percent for percent in percents if percent), default=0.0) / 100
    bare = _BARE_NUMBER.fullmatch(text)
    if bare:
        number = float(bare["number"].replace(",", "."))
        # "0.7" is a share, "7" and "70" are percentages.
        share = number if number <= 1 and not bare["number"].isdigit() else number / 100
        return share if share <= 1 else None
    return next((share for pattern, share in _PLACES if pattern.fullmatch(text)), None)


def _percents_in(pattern: re.Pattern[str], text: str) -> list[float]:
    """Return the percentages, from 0 to 100, that a pattern finds."""
    found = []
    for match in pattern.finditer(text):
        word = match["number"].replace("-", " ")
        found.append(float(word.replace(",", ".")) if word[0].isdigit() else float(_NUMBER_WORDS[word]))
    return [percent for percent in found if percent <= 100]


# --- Reading answers ---


def answer_log_probs(read: ReadAnswers, answers: Sequence[Tensor]) -> Tensor:
    """Return the log-probability of each text: N tensors (A_n,), int64 -> (N,), float32, CPU. One batch."""
    tokens = pad_sequence(list(answers), batch_first=True)  # padding comes behind, and no token sees it
    log_probs = read(tokens[:, :-1]).float().log_softmax(dim=-1).cpu()  # (N, A, V)
    taken = log_probs.gather(2, tokens[:, :, None])[:, :, 0]  # (N, A)
    lengths = torch.tensor([len(answer) for answer in answers])
    return taken.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], 0.0).sum(dim=1)


def sample_answers(
    read: ReadAnswers,
    num_answers: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    end_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Draw answers token by token, without their ends; the same seed draws the same ones.

    Raises:
        RuntimeError: if a probability is NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(num_answers, 0, dtype=torch.int64)
    is_open = torch.ones(num_answers, dtype=torch.bool)
    ends = torch.tensor(list(end_ids), dtype=torch.int64)
    lengths = torch.zeros(num_answers, dtype=torch.int64)
    while tokens.shape[1] < max_new_tokens and is_open.any():
        # An answer is short beside its prompt: it is read again for each token, and no cache need grow.
        probs = (read(tokens)[:, -1].float().cpu() / temperature).softmax(dim=-1)  # (N, V)
        _check_finite(probs)
        ordered, words = probs.sort(dim=-1, descending=True)
        is_tail = ordered.cumsum(dim=-1) - ordered >= top_p
        drawn = torch.multinomial(ordered.masked_fill(is_tail, 0.0), 1, generator=generator)
        tokens = torch.cat([tokens, words.gather(1, drawn)], dim=1)
        is_open &= ~torch.isin(tokens[:, -1], ends)
        lengths += is_open
    return [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise RuntimeError(
            "The language model gave NaN or infinite numbers for the answers. Load it in another number format: try "
            "float32 or bfloat16 (`dtype`)."
        )


def answer_ids(tokenizer: Any, prompt: str, answers: Sequence[str]) -> list[Tensor]:
    """Return the tokens of texts that follow a prompt: N tensors (A_n,), int64."""
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    rows = []
    for answer in answers:
        ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
        if ids[: len(start)] != start or len(ids) == len(start):
            # The answer's first letter melts into the prompt: generated text never does.
            ids = start + tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append(torch.tensor(ids[len(start) :]))
    return rows


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How a language model's answer is found; the numbers are the published ones.

    Args:
        mode (`str`, defaults to `"scored"`): the exact mean of the eleven answers' probabilities, or with `"sampled"`
            the mean of answers drawn and parsed.
        num_frames (`int`, defaults to 12): frames shown to the model, at equal distances.
        batch_size (`int`, defaults to 11): answers read together. Meanwhile each needs a copy of the prompt's keys and
            values: at 7B about 0.5 MB a token.
        num_answers (`int`, defaults to 10), temperature (`float`, defaults to 0.6), top_p (`float`, defaults to 0.9),
            seed (`int`, defaults to 0), max_new_tokens (`int`, defaults to 32): of sampling.

    Raises:
        ValueError: for an unknown mode, or a number outside its range.
    """

    mode: AnswerMode = "scored"
    num_frames: int = 12
    batch_size: int = 11
    num_answers: int = 10
    temperature: float = 0.6
    top_p: float = 0.9
    seed: int = 0
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.mode not in ("scored", "sampled"):
            raise ValueError(f'`mode` is {self.mode!r} but must be "scored" or "sampled".')
        for name in ("num_frames", "batch_size", "num_answers", "max_new_tokens"):
            if vars(self)[name] < 1:
                raise ValueError(f"`{name}` is {vars(self)[name]} but must be at least 1.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` is {self.temperature} but must be above 0.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p} but must be above 0 and at most 1.")


def _select(
    view: VideoView,
    query: str,
    options: AnswerOptions,
    model: Any,
    tokenizer: Any,
    read_all: ReadAnswers,
    answers: Sequence[Tensor],
) -> FrameSelection:
    """Choose the frame at the mean of the answers that a model gives."""

    def read(tokens: Tensor) -> Tensor:
        return torch.cat([read_all(part) for part in tokens.split(options.batch_size)])

    if options.mode == "scored":
        log_probs = answer_log_probs(read, answers).double()
        _check_finite(log_probs)
        probs = log_probs.softmax(dim=0)  # (11,)
        share = min(max(float(probs @ torch.tensor(SHARES, dtype=torch.float64)), 0.0), 1.0)
        scores = tuple((view.at_share(each), float(prob)) for each, prob in zip(SHARES, probs, strict=True))
        nearest = float(probs[round(10 * share)])
        return view.select(view.at_share(share), f"text-guided: {100 * share:.0f}% (p={nearest:.2f})", scores)
    drawn = sample_answers(
        read,
        options.num_answers,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        end_ids=_end_ids(model, tokenizer),
        max_new_tokens=options.max_new_tokens,
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
    shares = [named for text in texts if (named := parse_percentage(text)) is not None]
    if not shares:
        logger.warning(
            "None of %d answers about %r names a percentage, the first being %r: the middle of the video is taken. "
            "Ask another model, or score the answers (`mode`).",
            len(texts),
            query,
            texts[0][:80],
        )
        return view.select(view.at_share(UNKNOWN_SHARE), f"text-guided: no answer of {len(texts)} names a percentage")
    share = float(np.mean(shares))
    scores = tuple((view.at_share(each), shares.count(each) / len(shares)) for each in sorted(set(shares)))
    reason = f"text-guided: {100 * share:.0f}% (mean of {len(shares)} of {len(texts)} answers)"
    return view.select(view.at_share(share), reason, scores)


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer, as the model's own generation knows them; chat models have several."""
    known = model.generation_config.eos_token_id
    ends = list(known) if isinstance(known, list | tuple) else [known]
    return [end for end in {*ends, tokenizer.eos_token_id} if end is not None]


def _question(query: str) -> str:
    # As in VISA: without the final question mark.
    return frame_question(query.strip().removesuffix("?"))


# --- A chat model of transformers ---


class ChatFrameSampler:
    """A chat model of transformers that sees several images, asked where in the video to look.

    Args:
        model (`PreTrainedModel`): `AutoModelForImageTextToText`, in eval mode.
        processor (`ProcessorMixin`): its processor, with a chat template.
        as_video (`bool`, defaults to `False`): show the frames as one video instead of as images, if the processor has
            a video processor. Frame rates are not told.
        options: fields of [`AnswerOptions`].

    Raises:
        ValueError: for a processor without a chat template, and as [`AnswerOptions`].
        TypeError: for an option that does not exist.
    """

    def __init__(self, model: Any, processor: Any, *, as_video: bool = False, **options: Any) -> None:
        if processor.chat_template is None:
            raise ValueError(
                "The `processor` has no chat template. Use a chat model, with the processor saved with it."
            )
        self.model, self.processor, self.as_video = model, processor, as_video
        self.options = AnswerOptions(**options)

    @torch.no_grad()
    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the frame at the mean of the model's answers.

        Raises:
            RuntimeError: if the model gives NaN or infinite numbers.
        """
        frames = view.frames(view.spread(self.options.num_frames))
        shown: list[dict[str, Any]] = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        if self.as_video:
            shown = [{"type": "video", "video": np.stack(frames)}]
        messages = [{"role": "user", "content": [*shown, {"type": "text", "text": _question(query)}]}]
        template = self.processor.apply_chat_template
        prompt = template(messages, add_generation_prompt=True, tokenize=False)
        inputs = template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, self.model.dtype)  # integers stay integers
        tokenizer = self.processor.tokenizer
        answers = answer_ids(tokenizer, prompt, self._answers_behind(messages, prompt))
        return _select(view, query, self.options, self.model, tokenizer, self._reader(dict(inputs)), answers)

    def _answers_behind(self, messages: list[dict[str, Any]], prompt: str) -> list[str]:
        """Return the eleven answers as the template writes them behind the prompt: after a blank, or none."""
        gap = "" if prompt[-1:].isspace() or not prompt else " "
        said = {"role": "assistant", "content": [{"type": "text", "text": PERCENTAGES[0]}]}
        whole = self.processor.apply_chat_template([*messages, said], tokenize=False)
        behind = whole.removeprefix(prompt)
        if behind != whole and PERCENTAGES[0] in behind:
            before = behind[: behind.index(PERCENTAGES[0])]
            gap = before if not before.strip() else gap
        return [gap + answer for answer in PERCENTAGES]

    def _reader(self, inputs: dict[str, Any]) -> ReadAnswers:
        """Read the prompt once, and return what reads answers behind it."""
        model, ids = self.model, inputs["input_ids"]  # (1, S)
        keep = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        output = model(**inputs, use_cache=True, **keep)
        # Without padding there need be no mask behind the prompt, from which some models count positions of their own.
        is_whole = bool(inputs.get("attention_mask", ids.new_ones(1)).all())
        if not (is_whole and can_be_shared(output.past_key_values)):
            return lambda tokens: _read_plainly(model, inputs, tokens)
        first = output.logits[:, -1:]  # (1, 1, V)
        prefix = make_prefix(ids[0], output.past_key_values, None, None)

        def read(tokens: Tensor) -> Tensor:
            num_texts, length = tokens.shape
            if not length:
                return first.expand(num_texts, -1, -1)
            behind = model(
                input_ids=tokens.to(ids.device),
                past_key_values=prefix.for_prompts(num_texts),
                use_cache=True,
            ).logits
            return torch.cat([first.expand(num_texts, -1, -1), behind], dim=1)

        return read


def _read_plainly(model: Any, inputs: dict[str, Any], tokens: Tensor) -> Tensor:
    """Logits of texts (N, A) and of the next token, (N, A + 1, V), each read with the whole prompt (1, S)."""
    ids = inputs["input_ids"]
    rows = []
    for row in tokens.to(ids.device)[:, None]:
        longer = {
            # Masks go on as ones, kinds of tokens as 0, which is text.
            name: torch.cat([value, torch.full_like(row, int(name == "attention_mask"), dtype=value.dtype)], dim=1)
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.shape == ids.shape
        }
        longer["input_ids"] = torch.cat([ids, row], dim=1)
        rows.append(model(**{**inputs, **longer}, use_cache=False).logits[:, ids.shape[1] - 1 :])
    return torch.cat(rows)


# --- VISA's own language model ---


class VisaFrameSampler:
    """VISA's own language model, asked where in the video to look: no second model. Needs a session.

    It sees frames of the whole part, none of them a target, and the question after them, as in the conversations of
    its training. Their visual tokens, and the language model's keys and values of them, are kept in the session and
    serve all queries. Nothing is published about how well it answers: VISA asked LLaMA-VID.

    Args:
        model (`VisaForVideoSegmentation`): the model.
        options: fields of [`AnswerOptions`].

    Raises:
        ValueError, TypeError: as [`AnswerOptions`].
    """

    def __init__(self, model: Any, **options: Any) -> None:
        self.model = model
        self.options = AnswerOptions(**options)

    @torch.no_grad()
    def __call__(self, view: VideoView, query: str) -> FrameSelection:
        """Choose the frame at the mean of the model's answers.

        Raises:
            RuntimeError: without a session, and if the model gives NaN or infinite numbers.
            ValueError: if the query cannot be used, or the prompt is too long for the model.
        """
        session = view.session
        if session is None:
            raise RuntimeError("The sampler needs a session. Give it to `add_query`, or to `init_video_session`.")
        session.cache.serve(self.model)
        processor, frames = session.processor, view.spread(self.options.num_frames)
        text = processor.build_prompt(_question(query), num_reference_frames=len(frames), style="conversation")
        row = torch.tensor(processor.tokenizer(text)["input_ids"])
        row = row.repeat_interleave(torch.where(row == processor.image_token_id, processor.num_visual_tokens, 1))
        answers = answer_ids(processor.tokenizer, text, [f" {answer}" for answer in PERCENTAGES])
        longest = max(len(answer) for answer in answers) if self.options.mode == "scored" else 0
        num_tokens = len(row) + max(longest, self.options.max_new_tokens if self.options.mode == "sampled" else 0)
        ones = torch.ones(1, num_tokens, dtype=torch.int64)
        check_text(self.model.config, ones, ones, None, None)
        read = self._reader(session, frames, row)
        return _select(view, query, self.options, self.model, processor.tokenizer, read, answers)

    def _reader(self, session: Any, frames: tuple[int, ...], row: Tensor) -> ReadAnswers:
        """Read the prompt (S,) once, its frames once for the session, and return what reads answers behind it."""
        model = self.model
        features = model._image_features(session, frames)  # (F, L, D)
        base: SharedPrefix | None = None
        if session.cache.prefixes.max_items:
            end = int((row == model.config.image_token_id).nonzero()[-1]) + 1
            base = model._read_prefix(session, (frames, "conversation"), row[:end], features, None)
        device = model._input_device(row)
        start = 0 if base is None else len(base.input_ids)
        output = self._run(
            row[None, start:].to(device),
            start,
            None if base is None else base.for_prompts(1),
            features if base is None else None,
        )
        if not can_be_shared(output.past_key_values):
            return lambda tokens: torch.cat([self._read_plainly(row, each, features) for each in tokens])
        first = self._logits(output.last_hidden_state[:, -1:])  # (1, 1, V)
        prefix = make_prefix(row, output.past_key_values, None, None)

        def read(tokens: Tensor) -> Tensor:
            num_texts, length = tokens.shape
            if not length:
                return first.expand(num_texts, -1, -1)
            states = self._run(tokens.to(device), len(row), prefix.for_prompts(num_texts), None).last_hidden_state
            return torch.cat([first.expand(num_texts, -1, -1), self._logits(states)], dim=1)

        return read

    def _run(self, input_ids: Tensor, start: int, past_key_values: Any, features: Tensor | None) -> Any:
        """Run the language model over tokens (N, A) whose first one has position `start`."""
        frames = None if features is None else {"image": BaseModelOutputWithPooling(pooler_output=features)}
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        return self.model.model(
            input_ids=input_ids,
            position_ids=positions.expand(len(input_ids), -1),
            past_key_values=past_key_values,
            mm_encoder_outputs=frames,
            use_cache=True,
        )

    def _read_plainly(self, row: Tensor, tokens: Tensor, features: Tensor) -> Tensor:
        """Logits of one text (A,) and of the next token, (1, A + 1, V), read with the whole prompt (S,)."""
        ids = torch.cat([row, tokens])[None].to(self.model._input_device(row))
        return self._logits(self._run(ids, 0, None, features).last_hidden_state[:, len(row) - 1 :])

    def _logits(self, states: Tensor) -> Tensor:
        """Scores of the next word, (N, A, D) -> (N, A, V); a frame is none."""
        logits = self.model.lm_head(states).float()
        image_token_id = self.model.config.image_token_id
        if image_token_id < logits.shape[-1]:
            logits[..., image_token_id] = -torch.inf
        return logits
