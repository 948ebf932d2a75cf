"""Tokenizers, and which tokens of a row are supervised."""

from __future__ import annotations

import re
import time

import pytest

from conf.errors import RequestError
from recipes.data import encode
from recipes.data.encode import Encoder, cut
from recipes.data.rows import Meter, Problems, Row
from recipes.data.tokenizer import (
    END_OF_TEXT,
    LONG,
    _without_long_words,
    load_tokenizer,
    token_bytes,
    tokenizer_digest,
    train_tokenizer,
)

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is the time?"},
    {"role": "assistant", "content": "It is noon."},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "hello"},
]


def encoded(tokenizer, *contents):
    """[(ids, supervised)] as lists."""
    columns = {name: name for name in contents[0]}
    problems = Problems()
    rows = [Row("f:1", False, content) for content in contents]
    result = Encoder(tokenizer, columns, "data").encode(rows, problems, Meter())
    problems.raise_any()
    return [(ids.tolist(), supervised.tolist()) for each in result for ids, supervised in each]


def learned(tokenizer, ids, supervised) -> str:
    return tokenizer.decode([token for token, kept in zip(ids, supervised, strict=True) if kept])


def llama_like():
    """Puts a space before a text and a begin token before that, like SentencePiece models do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(["the capital is [INST] what? [/INST] Paris\n Paris hello thanks"] * 9, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)


# Tokenizers


@pytest.mark.parametrize(
    "text", ["", " a  b\n\n\tc ", "naïve 日本語 🤖 \x00\x7f", "don't . , ' s", "\r\n", "#!/usr/bin\n"]
)
def test_trained_tokenizer_gives_every_text_back(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (END_OF_TEXT,) * 3
    assert tokenizer.unk_token is None and tokenizer.eos_token_id == 0


@pytest.mark.parametrize("text", [" a  b\n\n\tc ", "naïve 日本語 🤖", "the capital is Paris"])
def test_the_bytes_of_tokens_are_those_of_their_text(tokenizer, text):
    """What bits per byte are counted in."""
    assert token_bytes(tokenizer)[tokenizer(text)["input_ids"]].sum() == len(text.encode())
    assert token_bytes(tokenizer)[tokenizer.eos_token_id] == 0


def test_the_bytes_of_sentencepiece_tokens():
    tokenizer = llama_like()
    # The space that it puts before a text is one byte more; the begin token stands for none.
    assert token_bytes(tokenizer)[tokenizer("the capital is Paris")["input_ids"]].sum() == len(" the capital is Paris")


def test_training_is_deterministic_and_survives_saving(tmp_path):
    texts = [f"def f{i % 7}(x, y):\n    return x + {i}\n" for i in range(300)]
    first, second = train_tokenizer(texts, 400), train_tokenizer(iter(texts), 400)
    assert tokenizer_digest(first) == tokenizer_digest(second)
    assert tokenizer_digest(first) != tokenizer_digest(train_tokenizer(texts, 300))
    first.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(texts)["input_ids"] == first(texts)["input_ids"]
    assert loaded.decode(loaded("a , b .")["input_ids"]) == "a , b ."


def test_digest_ignores_the_latest_call(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == before


def test_vocabulary_is_at_most_what_was_asked():
    assert len(train_tokenizer(["ab"], 4096)) < 300
    with pytest.raises(RequestError, match=r"data.vocab_size=100.*256 bytes"):
        train_tokenizer(["ab"], 100)


def test_loading_says_what_is_missing(tmp_path):
    (tmp_path / "notes.txt").write_text("no tokenizer here")
    with pytest.raises(RequestError) as caught:
        load_tokenizer(str(tmp_path))
    assert "model.tokenizer=" in str(caught.value) and "notes.txt" in str(caught.value)


# Plain text


def test_plain_text_ends_once_and_is_all_supervised(tokenizer):
    for text in ("the dog", "the dog" + END_OF_TEXT):
        ((ids, supervised),) = encoded(tokenizer, {"text": text})
        assert ids == [*tokenizer("the dog")["input_ids"], 0] and all(supervised)


def test_begin_token_only_where_the_tokenizer_adds_one():
    tokenizer = llama_like()
    ((ids, _),) = encoded(tokenizer, {"text": "the capital"})
    assert ids[0] == 1 and ids[-1] == 2 and ids.count(1) == ids.count(2) == 1


@pytest.mark.parametrize("text", ["the capital", "<s>the capital", "<s><s>the capital"])
def test_a_text_that_begins_with_the_begin_token_does_not_get_two(text):
    tokenizer = llama_like()
    ((ids, _),) = encoded(tokenizer, {"text": text})
    ((alike, _),) = encoded(tokenizer, {"prompt": text, "completion": ""})
    assert ids == alike == encoded(tokenizer, {"text": "the capital"})[0][0] and ids.count(1) == 1


def test_long_texts_are_cut_for_encoding_without_a_trace(tokenizer, monkeypatch):
    text = "def f(x):\n    return x\n\n\nthe lazy dog\nfoo\n" * 40
    ((whole, _),) = encoded(tokenizer, {"text": text})
    monkeypatch.setattr(encode, "PIECE", 50)
    assert len(cut(text)) > 10 and "".join(cut(text)) == text
    ((pieces, _),) = encoded(tokenizer, {"text": text})
    assert pieces == whole


def test_no_end_token_is_refused(tokenizer):
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RequestError, match="end-of-text"):
        encoded(bare, {"text": "a"})


# Prompt and completion


def test_loss_is_on_the_completion_only(tokenizer):
    rows = [
        {"prompt": "the quick", "completion": " brown fox"},
        {"prompt": "the quick ", "completion": "brown"},
        {"prompt": "", "completion": "x"},
    ]
    for row, (ids, supervised) in zip(rows, encoded(tokenizer, *rows), strict=True):
        assert tokenizer.decode(ids) == row["prompt"] + row["completion"] + END_OF_TEXT
        assert learned(tokenizer, ids, supervised) == row["completion"] + END_OF_TEXT
        prompt = tokenizer(row["prompt"])["input_ids"]
        assert ids[: len(prompt)] == prompt and not any(supervised[: len(prompt)])  # what generation starts from


@pytest.mark.parametrize("completion", [" Paris", "Paris"])
def test_no_space_is_put_between_prompt_and_completion(completion):
    tokenizer = llama_like()
    ((ids, supervised),) = encoded(tokenizer, {"prompt": "the capital is", "completion": completion})
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the capital is" + completion
    prompt = tokenizer("the capital is")["input_ids"]
    assert ids[: len(prompt)] == prompt and supervised == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


# Chats


def test_loss_is_on_the_assistant_up_to_its_end_token(chat_tokenizer):
    ((ids, supervised),) = encoded(chat_tokenizer, {"messages": TALK})
    assert chat_tokenizer.decode(ids) == chat_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(chat_tokenizer, ids, supervised) == "It is noon.<|im_end|>hello<|im_end|>"


def test_generation_marks_of_the_template_are_followed(chat_tokenizer):
    body = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}"
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>" + body + "{{ m['content'] }}{% endif %}\n{% endfor %}"
    )
    ((ids, supervised),) = encoded(chat_tokenizer, {"messages": TALK})
    assert chat_tokenizer.decode(ids) == chat_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert learned(chat_tokenizer, ids, supervised) == "It is noon.hello"


def test_template_that_writes_the_last_turn_differently(chat_tokenizer):
    think = "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "{{ m['content'] }}", think + "{{ m['content'] }}"
    )
    found = encoded(chat_tokenizer, {"messages": TALK})
    answers = [learned(chat_tokenizer, *one) for one in found]
    assert answers == [f"<think></think>{text}<|im_end|>" for text in ("hello", "It is noon.")]


def test_chat_of_a_tokenizer_that_adds_spaces():
    tokenizer = llama_like()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "Paris"}] * 2
    ((ids, supervised),) = encoded(tokenizer, {"messages": talk})
    assert ids == tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    assert learned(tokenizer, ids, supervised).replace(" ", "") == "Paris</s>Paris</s>"


def test_template_without_prefixes_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}" + chat_tokenizer.chat_template
    with pytest.raises(RequestError) as caught:
        encoded(chat_tokenizer, {"messages": TALK})
    assert "f:1" in str(caught.value) and "prompt and completion" in str(caught.value)


def test_chat_that_the_template_refuses(chat_tokenizer):
    refuse = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must start with the user') }}{% endif %}"
    chat_tokenizer.chat_template = refuse + chat_tokenizer.chat_template
    with pytest.raises(RequestError, match=r"f:1: the chat template refuses this chat: must start with the user"):
        encoded(chat_tokenizer, {"messages": TALK})


def test_no_template_names_the_alternative(tokenizer):
    with pytest.raises(RequestError) as caught:
        encoded(tokenizer, {"messages": TALK})
    assert "data.messages=messages" in str(caught.value) and "data.prompt=" in str(caught.value)


@pytest.mark.parametrize("sign", ["x", " ", "字"])
def test_a_word_of_a_file_s_length_is_cut_where_it_is_learned_from(sign):
    """A tokenizer would take minutes for this one: the time of tokenizers 0.23 is the square of a word's length."""
    long = sign * 10 * LONG + "and the rest\n" * 9
    for text in (long, f"a few {sign} of {sign * (LONG - 1)} words " * 9, "", "short"):
        pieces = list(_without_long_words(text))
        assert "".join(pieces) == text and (len(pieces) > 1) == (text == long)
        assert max(map(len, re.findall(r"\S+|\s+", " ".join(pieces).strip())), default=0) < 2 * LONG
    began = time.process_time()
    trained = train_tokenizer([sign * 300_000, "the quick brown fox " * 20], 300)
    assert time.process_time() - began < 10
    assert trained.decode(trained(long)["input_ids"]) == long
