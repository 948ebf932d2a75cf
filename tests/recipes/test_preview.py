"""Rows as the model sees them: what is read, what is learned of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import PLAN, environment, run
from test_supervised import TEXTS, config, prepared
from test_what_models_say import translation

from conf.schema import BatchConfig, Config, DataConfig, ModelConfig
from recipes.causal_lm import CausalLM
from recipes.data.tokenizer import train_tokenizer
from recipes.preview import GREEN, LONGEST, PLAIN, Piece, Preview, pieces, rendered

WORDS = [{"tokens": ["Ann", "sleeps"], "tags": ["PER", "O"]} for _ in range(8)]
QUESTIONS = [
    {"question": "who?", "context": "it is Ann", "answers": {"text": ["Ann"] * (n > 3), "answer_start": [6] * (n > 3)}}
    for n in range(8)
]


def shown(recipe: Any, count: int = 8) -> str:
    return rendered(recipe.previews(count), colour=False)


def test_every_task_with_texts_says_what_is_learned(tmp_path: Path) -> None:
    text = shown(prepared(config(tmp_path, "sequence_classification", TEXTS)))
    assert "⟦" not in text and {f"learned: {row['label']}" in text for row in TEXTS} == {True}
    text = shown(prepared(config(tmp_path, "token_classification", WORDS)))
    assert "⟦" in text and " → PER⟧" in text and " → O⟧" in text
    text = shown(prepared(config(tmp_path, "question_answering", QUESTIONS)))
    assert "it is⟦ Ann⟧" in text and "→ no answer⟧" in text
    text = shown(prepared(translation(tmp_path)))
    assert "a cat" in text and "⟦un chat" in text and "<|endoftext|>⟧" in text
    text = shown(prepared(config(tmp_path, "regression", [{**row, "label": n / 2} for n, row in enumerate(TEXTS)])))
    assert "learned: 1.5" in text


def language_model(tmp_path: Path, rows: list[dict[str, str]], **keys: Any) -> CausalLM:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(kind="jsonl", path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"), **keys)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    recipe = CausalLM(Config(data=data, model=ModelConfig(type="llama", config=tiny), batch=BatchConfig(1, 1, 1)))
    recipe.prepare()
    return recipe


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_labels_of_the_next_token_are_shown_at_their_token(tmp_path: Path, packing: str) -> None:
    rows = [{"p": f"ask {n}", "c": f" say {n}"} for n in range(6)]
    text = shown(language_model(tmp_path, rows, prompt="p", completion="c", packing=packing))
    assert "ask 3⟦ say 3<|endoftext|>⟧" in text and text.count("⟦") == text.count("learned")


def test_padding_and_other_documents_are_not_shown(tmp_path: Path) -> None:
    recipe = language_model(tmp_path, [{"text": f"note {n}"} for n in range(6)])
    one, two = recipe.previews(2)
    assert "".join(piece.text for piece in one.pieces).count("<|endoftext|>") == 1 != len(one.pieces) == 2
    assert one.title.startswith("row 1") and two.title.startswith("row 2")


def test_stretches_keep_their_spaces_and_characters() -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    ids = tokenizer("日本 é a")["input_ids"]
    for border in range(len(ids) + 1):
        found = pieces(tokenizer, ids, [None] * border + [""] * (len(ids) - border))
        if "\ufffd" not in "".join(piece.text for piece in found):
            assert "".join(piece.text for piece in found) == "日本 é a"


def test_what_would_move_the_cursor_is_written_out() -> None:
    row = Preview("row 1", [Piece("a\x1b[2Jb"), Piece("yes", ""), Piece("x" * 5000), Piece("Ann", "PER")])
    text = rendered([row], colour=False)
    assert "a\\x1b[2Jb⟦yes⟧x" in text and "(4,400 characters)" in text and len(text) < 2 * LONGEST
    assert text.rstrip().endswith("⟦Ann → PER⟧")
    assert f"{GREEN}yes{PLAIN}" in rendered([row], colour=True) and "⟦yes⟧" not in rendered([row], colour=True)


def test_the_command_shows_chats(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"m": chat}) + "\n") * 6)
    tokenizer = train_tokenizer(["2+2? Four."], 300)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    command = [
        sys.executable, PLAN, "+recipe=finetune_causal_lm", "model=llama_tiny", "data=jsonl", "data.path=rows.jsonl",
        "data.messages=m", "model.tokenizer=tokenizer", "batch.global_size=2", "batch.micro_size=1",
        "data.seq_length=64", "show=tokens",
    ]  # fmt: skip
    done = run(command, tmp_path, environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "<user>2+2?<|endoftext|><assistant>⟦Four.<|endoftext|>⟧" in done.stdout
    wrong = run([*command, "data.chat_options={mood: merry}"], tmp_path, environment(tmp_path / "cache"))
    assert wrong.returncode == 2 and "asks for an answer with 'merry'" in wrong.stderr  # it reaches the template
    for more, rule in (("search=true", "shows rows, no plan"), ("show=token", "one of plan, tokens")):
        refusal = run([*command, more], tmp_path, environment(tmp_path / "cache"))
        assert refusal.returncode == 2 and rule in refusal.stderr
    refusal = run([sys.executable, PLAN, "+recipe=line", "show=tokens"], tmp_path, environment(tmp_path / "cache"))
    assert refusal.returncode == 2 and "have no tokens" in refusal.stderr
