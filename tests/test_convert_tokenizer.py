"""A Llama tokenizer model becomes ours: the published ids, exactly, also after saving and loading."""

import builtins
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from visa_hf.convert import _TOKENIZER_PROBES, convert_tokenizer

REFERENCE = Path(__file__).parent / "reference" / "tokenizer"
BUNDLED = Path(__file__).parents[1] / "src" / "visa_hf" / "assets" / "tokenizer"
PUBLISHED = json.loads((REFERENCE / "prompts.json").read_text(encoding="utf-8"))
SEG, IMAGE = 1200, 1201


@pytest.fixture(scope="module")
def converted():
    return convert_tokenizer(REFERENCE / "tokenizer.model")


@pytest.fixture(scope="module", params=["converted", "reloaded", "bundled"])
def tokenizer(request, converted, tmp_path_factory):
    if request.param == "converted":
        return converted
    if request.param == "bundled":
        return AutoTokenizer.from_pretrained(BUNDLED)
    folder = tmp_path_factory.mktemp("tokenizer")
    converted.save_pretrained(folder)
    # Twice: what is written by a loaded tokenizer must be right too.
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "again")
    return AutoTokenizer.from_pretrained(folder / "again")


def with_published_image_id(ids):
    return [PUBLISHED["image_token_id"] if token == IMAGE else token for token in ids]


@pytest.mark.parametrize("case", PUBLISHED["cases"], ids=range(len(PUBLISHED["cases"])))
def test_published_prompts_have_their_published_ids(tokenizer, case):
    assert with_published_image_id(tokenizer(case["prompt"])["input_ids"]) == case["input_ids"]


def test_published_prompts_in_one_batch_are_padded_as_published(tokenizer):
    batch = tokenizer([case["prompt"] for case in PUBLISHED["cases"]], padding=True, padding_side="right")
    assert [with_published_image_id(row) for row in batch["input_ids"]] == PUBLISHED["batch"]["input_ids"]
    assert batch["attention_mask"] == PUBLISHED["batch"]["attention_mask"]


def test_added_tokens_have_the_ids_after_the_pieces(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["[SEG]", "<image>"]) == [SEG, IMAGE]
    assert len(tokenizer) == 1202
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", PUBLISHED["pad_token_id"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_seg_is_one_token_wherever_it_stands(tokenizer):
    for text in ("[SEG]", " [SEG] ", "It is [SEG].", "a[SEG]b", "[SEG][SEG]", "(  [SEG]  )"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(SEG) == text.count("[SEG]"), text
    # It swallows the blanks beside it, and what follows begins with a blank piece of its own.
    assert tokenizer("is  [SEG]  .")["input_ids"] == tokenizer("is[SEG].")["input_ids"]
    blank = tokenizer.convert_tokens_to_ids("\u2581")
    assert tokenizer("[SEG].", add_special_tokens=False)["input_ids"][:2] == [SEG, blank]


def test_texts_of_all_kinds_are_cut_as_sentencepiece_does(tokenizer):
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(REFERENCE / "tokenizer.model"))
    texts = [
        *_TOKENIZER_PROBES,
        *(case["prompt"].split("<image>")[-1].split("[SEG]")[0].strip() for case in PUBLISHED["cases"]),
        *(case["expression"] for case in PUBLISHED["cases"]),
        "x" * 300,
        " ",
        "   ",
        "\n",
        "a\tb\r\nc\x00d\u00a0e\u3000f",
    ]
    for text in texts:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == pieces.encode(text), text


def test_answers_are_decoded_with_seg_and_without_special_tokens(tokenizer):
    ids = tokenizer("Sure, it is [SEG].</s>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "Sure,itis[SEG]."
    assert tokenizer.decode(tokenizer("été 中文")["input_ids"], skip_special_tokens=True) == "été 中文"


def test_a_folder_stands_for_the_model_in_it(tmp_path):
    shutil.copy(REFERENCE / "tokenizer.model", tmp_path)
    assert convert_tokenizer(str(tmp_path)).get_vocab() == convert_tokenizer(REFERENCE / "tokenizer.model").get_vocab()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.model` does not exist\. Give the `tokenizer\.model`"):
        convert_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff not a model" * 50], ids=["empty", "json", "noise"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a SentencePiece model|has no .* piece"):
        convert_tokenizer(tmp_path / "tokenizer.model")


def train(folder, **options):
    """Train a small SentencePiece model on the published prompts and return its path."""
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(case["prompt"] for case in PUBLISHED["cases"]),
        model_prefix=str(folder / "small"),
        minloglevel=2,
        **options,
    )
    return folder / "small.model"


LLAMA_STYLE = {
    "model_type": "bpe",
    "vocab_size": 420,
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
}


def test_another_model_of_the_same_style_is_converted_exactly(tmp_path):
    path = train(tmp_path, **LLAMA_STYLE)
    sentencepiece = pytest.importorskip("sentencepiece")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = convert_tokenizer(path)
    for case in PUBLISHED["cases"]:
        assert tokenizer(case["question"].split("<image>")[0])["input_ids"] == [
            1,
            *pieces.encode(case["question"].split("<image>")[0]),
        ]
    assert tokenizer.convert_tokens_to_ids(["[SEG]", "<image>"]) == [420, 421]


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 390},
        {"normalization_rule_name": "nmt_nfkc_cf"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_converted_exactly_is_refused(tmp_path, options):
    path = train(tmp_path, **{**LLAMA_STYLE, **options})
    with pytest.raises(
        ValueError, match=r"cannot be converted: for .* gives .* and SentencePiece .* BPE, no text norm"
    ):
        convert_tokenizer(path)


def test_a_model_that_has_seg_already_is_refused(tmp_path):
    path = train(tmp_path, **LLAMA_STYLE, user_defined_symbols=["[SEG]"])
    with pytest.raises(ValueError, match=r"`\[SEG\]` and `<image>` have ids \[3, 420\] .* are needed\. Give the lang"):
        convert_tokenizer(path)


def test_a_model_without_an_end_token_is_refused(tmp_path):
    path = train(tmp_path, **LLAMA_STYLE, eos_id=-1)
    with pytest.raises(ValueError, match=r"has no eos piece\. Give the `tokenizer\.model` of a Llama"):
        convert_tokenizer(path)


def test_without_sentencepiece_the_error_says_what_to_install(monkeypatch):
    plain_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ModuleNotFoundError("No module named 'sentencepiece'")
        return plain_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install visa-hf\[convert\]"):
        convert_tokenizer(REFERENCE / "tokenizer.model")
