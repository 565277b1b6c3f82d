"""Make the bundled tokenizer of trainings from nothing.

It is of Llama's kind, with 1,200 pieces, in which the words of the synthetic world are whole.

    python examples/synthetic_tokenizer.py FOLDER

Any text can still be written, from letters, parts of words and bytes. The same folder comes out every time.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from visa_hf.datasets_scripts.synthetic import ClipOptions, make_clip
from visa_hf.datasets_scripts.synthetic_scene import LEVELS
from visa_hf.modeling.prompts_visa import (
    ANSWER_TEMPLATES,
    FRAME_QUESTION,
    QUESTION_TEMPLATES,
    SYSTEM_PROMPT,
    build_questions,
)

NUM_PIECES = 1200
_SPECIAL = ("<unk>", "<s>", "</s>")
_CLIPS_PER_LEVEL = 150
# The prompts are in every conversation.
_PROMPT_WEIGHT = 50


def texts() -> Counter[str]:
    """Texts that the tokenizer is made for, each with its weight."""
    found: Counter[str] = Counter()
    for level in LEVELS:
        for num_frames in ((1, 1), (12, 16)):
            options = ClipOptions(levels=(level,), num_frames=num_frames, num_expressions=20)
            for index in range(_CLIPS_PER_LEVEL):
                for expression in make_clip(1, index, options=options).expressions:
                    found[expression.text] += 1
                    # What an answer begins with is made of the words of sentences.
                    found[expression.told] += 1
    prompts = [SYSTEM_PROMPT, *ANSWER_TEMPLATES, FRAME_QUESTION, "USER: a ASSISTANT: a", "0% 10% 100%"]
    for style, templates in QUESTION_TEMPLATES.items():
        for template in range(len(templates)):
            prompts += build_questions("a", style, template, 12)  # type: ignore[arg-type]
    found.update(dict.fromkeys(prompts, _PROMPT_WEIGHT))
    return found


def train() -> Tokenizer:
    """Learn the pieces, and return the tokenizer without special tokens of VISA."""
    words: Counter[str] = Counter()
    for text, weight in texts().items():
        for word in re.findall(r" ?[A-Za-z]+", " " + re.sub(r"\[SEG\]|<image>", " ", text)):
            words[word] += weight
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "removed")
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_PIECES,
        special_tokens=[*_SPECIAL, *bytes_],
        initial_alphabet=["▁", *map(chr, range(33, 127))],
        show_progress=False,
    )
    # Each word counts at least as much as it takes to become one piece.
    lines = [f"{word}\n" * min(20, 5 + weight) for word, weight in sorted(words.items())]
    tokenizer.train_from_iterator(lines, trainer)
    # What was special for the trainer alone becomes plain pieces again.
    plain = json.loads(tokenizer.to_str())
    plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] in _SPECIAL]
    plain["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(plain))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def main() -> None:
    """Train the tokenizer and save it to the folder that is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    fast = PreTrainedTokenizerFast(
        tokenizer_object=train(), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.add_tokens([AddedToken("[SEG]", lstrip=True, rstrip=True, normalized=False)])
    fast.add_special_tokens({"additional_special_tokens": [AddedToken("<image>", normalized=False)]})
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
