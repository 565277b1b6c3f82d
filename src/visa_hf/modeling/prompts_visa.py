"""What is said to the language model: the published templates, word by word.

Vicuna conversations, of one turn where a mask is asked for, as VISA was trained with
(https://huggingface.co/papers/2407.11325, prompts of the released code). Every string here is one that a checkpoint
has learnt: odd blanks are part of it. Pure text: nothing here knows a tokenizer.
"""

from collections.abc import Sequence
from typing import Literal

SYSTEM_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)

PromptStyle = Literal["short", "long", "explanatory", "text", "conversation"]

# What follows the frames, in the form that suits a noun phrase ("short"), a question ("long"), and either of them when
# the answer shall give a reason ("explanatory"). "text" is about no frame at all; "conversation" is free text about
# frames, none of which is a target.
QUESTION_TEMPLATES: dict[str, tuple[str, ...]] = {
    "short": (
        "What is {sent} in the Reference Video? Please respond with segmentation mask in the Target Image.",
        "What is {sent} in the Reference Video? Please output segmentation mask in the Target Image.",
        "Please find {sent} in the Reference Video and segment it in the Target Image.",
    ),
    "long": (
        "{sent} Please find it in the Reference Video and respond with segmentation mask in the Target Image.",
        "{sent} Please find it in the Reference Video and output segmentation mask in the Target Image.",
    ),
    "explanatory": (
        # As in VISA: no blank after the query in the first one.
        "{sent}Please output segmentation mask in the Target Image and explain why.",
        "{sent} Please output segmentation mask in the Target Image and explain the reason.",
        "{sent} Please output segmentation mask in the Target Image and give some explanation.",
    ),
    "text": ("{sent}",),
    "conversation": ("{sent}",),
}

ANSWER_TEMPLATES = (
    "It is [SEG].",
    "Sure, [SEG].",
    "Sure, it is [SEG].",
    "Sure, the segmentation result is [SEG].",
)

# Asked of the video language model that samples frames (paper, section 3.2); the line break and blanks are published.
FRAME_QUESTION = (
    "If I want to find '{sent}', which percentage mark of the video should I check?\n"
    "             Please choose one answer from 0%, 10%, 20%, 30%, 40%, 50%, 60%, 70%, 80%, 90%, and 100%."
)

# The same conversation for `apply_chat_template`: contents are strings, or lists of texts and images.
CHAT_TEMPLATE = (
    "{{ '" + SYSTEM_PROMPT.replace("'", "\\'") + "' }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only the roles `user` and `assistant` exist here.') }}"
    "{% endif %}"
    "{% if message['role'] == 'user' and not loop.first %}{{ eos_token + 'USER: ' }}"
    "{% elif message['role'] == 'user' %}{{ ' USER: ' }}"
    "{% else %}{{ ' ASSISTANT: ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if messages[-1]['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def fold_query(query: str) -> str:
    """Return `query` lower-cased, each run of white space one blank: what the published inference does."""
    return " ".join(query.lower().split())


def question_style(query: str) -> PromptStyle:
    """Return the form that suits `query`: `"long"` when it ends in "?", else `"short"`."""
    return "long" if query.strip().endswith("?") else "short"


def frames_prompt(num_reference_frames: int) -> str:
    """Return the lines that hold the frames' places: the references in time order, then the target."""
    references = ", ".join(f"({idx})<image>" for idx in range(num_reference_frames))
    return f"Reference Video: {references} \nTarget Image: <image> \n"


def build_questions(
    query: str,
    style: PromptStyle,
    template: int,
    num_reference_frames: int,
    earlier_questions: Sequence[str] = (),
) -> list[str]:
    """Return the user's turns: the frames' places before the first one, the instruction in the last one.

    Args:
        query (`str`): what to find; blanks around it are dropped, those inside stay.
        style (`str`): form of the instruction.
        template (`int`): which of the templates of that form, from 0.
        num_reference_frames (`int`): frames beside the target; 0 leaves their place empty. Of a `"conversation"`, all
            frames.
        earlier_questions (list of `str`): what was asked before, as it is but for blanks around it.

    Raises:
        ValueError: if there is no such style or template.
    """
    if style not in QUESTION_TEMPLATES:
        raise ValueError(f"`style` is {style!r} but must be one of {', '.join(map(repr, QUESTION_TEMPLATES))}.")
    templates = QUESTION_TEMPLATES[style]
    instruction = _pick(templates, template, "template", f"{style} questions").replace("{sent}", query.strip())
    questions = [*(question.strip() for question in earlier_questions), instruction]
    if style == "conversation":
        # As in LLaVA, whose data these conversations are: all frames, then one line break.
        questions[0] = "<image>" * num_reference_frames + "\n" + questions[0]
    elif style != "text":
        questions[0] = frames_prompt(num_reference_frames) + questions[0]
    return questions


def answer_from_template(answer_template: int) -> str:
    """Return the published answer number `answer_template`, each with one `[SEG]`."""
    return _pick(ANSWER_TEMPLATES, answer_template, "answer_template", "answers")


def build_conversation(
    questions: Sequence[str], answers: Sequence[str | None], *, end: str = "</s>"
) -> list[tuple[str, str]]:
    """Return each round of the text in two parts: up to "ASSISTANT:", and the answer with `end`, or nothing."""
    rounds = []
    for idx, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        lead = "" if idx else f"{SYSTEM_PROMPT} "
        ending = "" if answer is None else f" {answer.strip()}{end}"
        rounds.append((f"{lead}USER: {question} ASSISTANT:", ending))
    return rounds


def frame_question(expression: str) -> str:
    """Return the question that finds out where in the video `expression` is best seen."""
    return FRAME_QUESTION.replace("{sent}", expression)


def _pick(templates: tuple[str, ...], number: int, argument: str, what: str) -> str:
    """Return `templates[number]`, refusing what is out of range."""
    if not 0 <= number < len(templates):
        raise ValueError(
            f"`{argument}` is {number} but there are {len(templates)} templates for {what}: give 0 to "
            f"{len(templates) - 1}."
        )
    return templates[number]
