"""Chats as a model sees them: which template writes what, and which of it is learned."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from chat_templates import CHATML, GEMMA, LLAMA3, MARKED, MISTRAL, OPENS_THINKING, QWEN3, ZEPHYR

from conf.errors import RequestError
from recipes.data import bounded
from recipes.data.cache import prepare
from recipes.data.changes import lines
from recipes.data.encode import Encoder
from recipes.data.rows import Meter, Problems, Row, check_content

ASK, ANSWER, AGAIN = ({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Four."},
                      {"role": "user", "content": "3+3?"})  # fmt: skip
TWO = [ASK, ANSWER, AGAIN, {"role": "assistant", "content": "Six, 六."}]
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Köln"}'}}]}
RESULT = {"role": "tool", "content": "sun\n20°"}
TOOLS = [SYSTEM, ASK, CALL, RESULT, {"role": "assistant", "content": "Sun."}]
THOUGHT = [ASK, {**ANSWER, "content": "<think>\neasy\n</think>\n\nFour."}, AGAIN, {**ANSWER, "reasoning": "again"}]


@pytest.fixture
def chat(chat_tokenizer):
    """chat(template, messages, **more columns) → [(text, [what is learned of it])], reasons of changes."""
    chat_tokenizer.bos_token = "<s>"

    def chat(template: str, messages, options=None, **more):
        chat_tokenizer.chat_template = template
        content = {"messages": json.loads(json.dumps(messages))}
        if problems := check_content(content, "f:1", {"messages": "m"}):
            raise RequestError(problems)
        problems, meter = Problems(), Meter()
        rows = [Row("f:1", False, content | more)]
        (found,) = Encoder(chat_tokenizer, {"messages": "m"}, "data", options=options or {}).encode(
            rows, problems, meter
        )
        problems.raise_any()
        return [learned(chat_tokenizer, *one) for one in found], list(meter.changes)

    return chat


def learned(tokenizer, ids, supervised) -> tuple[str, list[str]]:
    runs, before = [], False
    for token, kept in zip(ids.tolist(), supervised.tolist(), strict=True):
        if kept:
            runs[len(runs) - (before and 1) :] = [(runs[-1] if before else []) + [token]]
        before = kept
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


def refused(chat, template, messages, options=None, **more) -> str:
    with pytest.raises(RequestError) as error:
        chat(template, messages, options, **more)
    return str(error.value)


# What is learned of which family


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, [SYSTEM, *TWO], ["Four.<|im_end|>", "Six, 六.<|im_end|>"]),
        (CHATML, [ASK, ANSWER, ANSWER], ["Four.<|im_end|>"] * 2),
        (CHATML, [*TWO, SYSTEM, AGAIN, ANSWER], ["Four.<|im_end|>", "Six, 六.<|im_end|>", "Four.<|im_end|>"]),
        (CHATML, [ANSWER, ASK, ANSWER], ["Four.<|im_end|>"] * 2),  # begins with the assistant
        (CHATML, [*TWO, ASK], ["Four.<|im_end|>", "Six, 六.<|im_end|>"]),  # ends with a question
        (LLAMA3, [SYSTEM, *TWO], ["Four.<|im_end|>", "Six, 六.<|im_end|>"]),
        (MISTRAL, TWO, [" Four.<|im_end|>", " Six, 六.<|im_end|>"]),
        (GEMMA, [SYSTEM, *TWO], ["Four.<end_of_turn>\n", "Six, 六.<end_of_turn>\n"]),
        (ZEPHYR, [SYSTEM, *TWO], ["Four.<|im_end|>", "Six, 六.<|im_end|>"]),
        (MARKED, [SYSTEM, *TWO], ["Four.<|im_end|>", "Six, 六.<|im_end|>"]),
        (MARKED, [ANSWER, ASK, ANSWER], ["Four.<|im_end|>"] * 2),  # transformers 5.23 takes all of it for generated
        (QWEN3, TWO[:2], ["<think>\n\n</think>\n\nFour.<|im_end|>"]),
    ],
)  # fmt: skip
def test_answers_are_learned_and_the_text_is_the_template_s(chat, chat_tokenizer, template, messages, expected):
    ((text, found),), _ = chat(template, messages)
    assert found == expected
    if template != LLAMA3:
        assert text == chat_tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL, GEMMA, ZEPHYR, MARKED, QWEN3])
def test_each_answer_stands_where_a_model_would_write_it(chat, chat_tokenizer, template):
    """The promise of all this: what is not learned before an answer is what generation starts from."""
    found, _ = chat(template, TWO)
    prompts = set()
    for text, answers in found:
        for answer in answers:
            at = text.index(answer)
            prompts.add(text[:at])
    for number in (1, 3):
        wanted = chat_tokenizer.apply_chat_template(TWO[:number], tokenize=False, add_generation_prompt=True)
        if template == ZEPHYR:
            wanted = wanted.rstrip("\n") + "\n"
        dated = re.sub(r"Date: .*", "Date: 26 Jul 2024", wanted)
        assert dated in prompts


def test_reasoning_that_later_turns_take_out_is_learned_where_it_is_written(chat):
    (last, first), changes = chat(QWEN3, THOUGHT)
    assert last[1] == ["<think>\nagain\n</think>\n\nFour.<|im_end|>"] and "easy" not in last[0]
    assert first[1] == ["<think>\neasy\n</think>\n\nFour.<|im_end|>"] and first[0].count("assistant") == 1
    assert changes == ["chats learned answer by answer, because the template writes earlier turns otherwise later on"]


def test_answers_before_and_behind_one_question_share_a_text(chat):
    """A tool's result does not end the turn, so its reasoning stays: one text for both."""
    (found,), _ = chat(QWEN3, [ASK, ANSWER, RESULT, ANSWER])
    assert len(found[1]) == 2


@pytest.mark.parametrize("template", [CHATML, MARKED, MISTRAL, QWEN3])
@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}])
def test_turns_that_are_not_to_be_learned_stay_in_the_text(chat, template, key):
    ((text, found),), _ = chat(template, [ASK, {**ANSWER, **key}, AGAIN, {"role": "assistant", "content": "Six."}])
    assert "Four." in text and len(found) == 1 and "Six." in found[0]


def test_weights_that_cannot_be_honoured_are_refused(chat):
    assert "must be 0 or 1" in refused(chat, CHATML, [ASK, {**ANSWER, "weight": 0.5}])
    assert "must be true or false" in refused(chat, CHATML, [ASK, {**ANSWER, "train": "no"}])
    assert "contradict" in refused(chat, CHATML, [ASK, {**ANSWER, "train": True, "weight": 0}])
    assert "f:1" in (said := refused(chat, CHATML, [{**ASK, "train": True}, ANSWER])) and "the user says" in said


def test_a_chat_of_which_nothing_is_learned_keeps_its_text(chat):
    ((text, found),), _ = chat(CHATML, [ASK, {**ANSWER, "weight": 0}])
    assert "Four." in text and found == []


# Tools


def test_tools_calls_and_results_reach_the_template(chat):
    ((text, found),), _ = chat(LLAMA3, TOOLS, tools=[TOOL])
    assert '"name": "weather"' in text.partition("2+2?")[0] and "sun\\n20°" in text
    assert found == ['{"name": "weather", "parameters": {"city": "Köln"}}<|im_end|>', "Sun.<|im_end|>"]


def test_all_forms_of_tools_are_one(chat):
    usual = chat(LLAMA3, TOOLS, tools=[TOOL])
    function, call = TOOL["function"], CALL["tool_calls"][0]["function"]
    forms = [
        (TOOLS, {"tools": json.dumps([TOOL])}),
        (TOOLS, {"tools": [json.dumps(TOOL)]}),
        (TOOLS, {"tools": [function]}),
        (TOOLS, {"functions": [function]}),
        ([SYSTEM, ASK, {"role": "assistant", "content": None, "function_call": call},
          {"role": "function", "content": RESULT["content"]}, TOOLS[-1]], {"functions": [function]}),
        ([SYSTEM, ASK, {"role": "assistant", "tool_calls": [call | {"arguments": {"city": "Köln"}}]}, *TOOLS[3:]],
         {"tools": [TOOL]}),
        (json.dumps(TOOLS), {"tools": [TOOL]}),
    ]  # fmt: skip
    for messages, more in forms:
        assert chat(LLAMA3, messages, **more) == usual


def test_what_is_wrong_with_tools_is_said(chat):
    call = CALL["tool_calls"][0]["function"]
    for messages, more, rule in (
        ([ASK, {**CALL, "tool_calls": [{"function": call | {"arguments": "{city:"}}]}], {}, "are a string, not an obj"),
        ([ASK, {**CALL, "tool_calls": [{"function": {"arguments": {}}}]}], {}, "has no name of a function"),
        ([ASK, {**CALL, "tool_calls": "weather"}], {}, "must be a list"),
        ([ASK, {**CALL, "function_call": call}], {}, "both 'tool_calls' and 'function_call'"),
        ([{**CALL, "role": "user"}, ANSWER], {}, "is of the user"),
        (TWO, {"tools": "weather"}, "column 'tools' must be a list of tools"),
        (TWO, {"tools": [{"weather": {}}]}, "tool 1 in column 'tools' has no name"),
        (TWO, {"tools": [TOOL], "functions": [TOOL]}, "both offer tools"),
    ):
        assert rule in refused(chat, LLAMA3, messages, **more), rule


def test_calls_that_the_template_does_not_write_are_refused(chat):
    """The turn would be learned as an empty one."""
    assert "does not write the call of 'weather'" in refused(chat, CHATML, TOOLS)


def test_nulls_that_a_table_fills_up_with_are_not_written(config, tmp_path, chat_tokenizer):
    import pyarrow
    import pyarrow.parquet

    other = {"role": "assistant", "tool_calls": [{"function": {"name": "time", "arguments": {"zone": "CET"}}}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Köln"}}}]}
    chats = [[ASK, one, RESULT, ANSWER] for one in (call, other)] * 3
    pyarrow.parquet.write_table(pyarrow.table({"m": chats, "tools": [[TOOL]] * 6}), tmp_path / "rows.parquet")
    chat_tokenizer.chat_template, chat_tokenizer.bos_token = LLAMA3, "<s>"
    prepared = prepare(config(kind="parquet", path=str(tmp_path), messages="m", seq_length=512), chat_tokenizer, seed=0)
    rows = prepared.train[0]
    text = "".join(chat_tokenizer.decode(rows.row(number)["input_ids"]) for number in range(len(rows)))
    assert '"parameters": {"zone": "CET"}}' in text and '"parameters": {"city": "Köln"}}' in text
    assert "null" not in text and "None" not in text


# Tokens at the borders


def test_no_token_lies_across_the_border_of_an_answer():
    """SentencePiece would write question and answer as one piece; generation starts from the question alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    model.train_from_iterator(["abcd", "ab", "\n"] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("abcd")["input_ids"]) == ["▁abcd"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    rows = [Row("f:1", False, {"messages": [{**ASK, "content": "ab"}, {**ANSWER, "content": "cd"}]})]
    ((found,),) = Encoder(tokenizer, {"messages": "m"}, "data").encode(rows, Problems(), Meter())
    assert tokenizer.convert_ids_to_tokens(found[0].tolist()) == ["▁ab", "cd", "</s>"]
    assert found[1].tolist() == [False, True, True]


def test_characters_of_several_bytes_at_the_borders(chat):
    messages = [{**ASK, "content": "é"}, {**ANSWER, "content": "日本"}]
    ((text, found),), _ = chat(CHATML.replace("\\n", "六"), messages)
    assert "é<|im_end|>" in text and found == ["日本<|im_end|>"]


# What no template says, or only some


def test_what_a_template_leaves_out_is_said(chat):
    assert chat(CHATML, TWO, tools=[TOOL])[1] == ["chats whose tools the template does not write"]
    silent = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    assert chat(silent, [SYSTEM, *TWO])[1] == ["chats of which the template leaves out something that the system says"]
    found = chat(CHATML, [{**ASK, "mood": "merry"}, {**ANSWER, "reasoning_content": "easy"}])[1]
    assert found == [
        "chats with 'mood' in messages, which the template does not read",
        "chats of which the template leaves out reasoning",
    ]


def test_an_empty_answer_is_not_learned_and_said(chat):
    ((_, found),), changes = chat(CHATML, [ASK, {**ANSWER, "content": " "}, AGAIN, ANSWER])
    assert found == ["Four.<|im_end|>"]
    assert changes == ["chats with empty turns of the assistant, which are not learned"]


def test_contents_in_parts(chat):
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert chat(CHATML, [{**ASK, "content": parts}, ANSWER]) == chat(CHATML, [ASK, ANSWER])
    only_parts = CHATML.replace("(m.content or '')", "(m.content | map(attribute='text') | join)")
    ((_, found),), changes = chat(only_parts, TWO)
    assert found == ["Four.<|im_end|>", "Six, 六.<|im_end|>"] and changes == []
    picture = [{"type": "image", "url": "a.png"}, *parts]
    assert "part 1 of message 1 is of type 'image'" in refused(chat, CHATML, [{**ASK, "content": picture}, ANSWER])


def test_roles_that_a_template_refuses(chat):
    assert "f:1: the chat template refuses this chat: roles must alternate" in refused(chat, MISTRAL, [SYSTEM, *TWO])


def test_a_prompt_that_is_not_how_answers_begin_is_refused(chat):
    said = refused(chat, OPENS_THINKING, TWO)
    assert "asks for an answer with '<think>\\n'" in said and "prompt and completion columns" in said
    ((_, found),), _ = chat(OPENS_THINKING, TWO, {"thinking": False})  # the advice works
    assert found == ["Four.<|im_end|>", "Six, 六.<|im_end|>"]


def test_options_that_no_template_reads_are_refused(chat):
    said = refused(chat, OPENS_THINKING, TWO, {"thinkin": False})
    assert "data.chat_options.thinkin=False: the chat template does not read it; it reads thinking" in said
    assert "data.chat_options.thinking=" in said
    assert "it reads no options" in refused(chat, MARKED, TWO, {"tokenize": True})


def test_an_answer_to_nothing_needs_a_prompt(chat):
    free = MISTRAL.replace("(m['role'] == 'user') != (loop.index0 % 2 == 0)", "false")
    assert "begins with the assistant" in (said := refused(chat, free, [ANSWER, *TWO])) and '"train": false' in said
    ((_, found),), _ = chat(free, [{**ANSWER, "train": False}, *TWO])  # the advice works
    assert len(found) == 2


def test_turns_with_several_marks_each(chat):
    """A turn that is not to be learned is found among them by what the conversation up to it has."""
    twice = MARKED.replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                           "{{ m.content }}{% endgeneration %}{{ ' ' }}{% generation %}{{ '<|im_end|>' }}"
                           "{% endgeneration %}")  # fmt: skip
    ((_, found),), _ = chat(twice, [ASK, ANSWER, AGAIN, {**ANSWER, "content": "Six.", "weight": 0}, AGAIN, ANSWER])
    assert found == ["Four.", "<|im_end|>"] * 2


def test_marks_that_do_not_stand_where_they_are_written_are_refused(chat):
    filtered = MARKED.replace("{% generation %}", "{% filter upper %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endfilter %}"
    )
    ((_, found),), _ = chat(filtered, TWO[:2])
    assert found == ["FOUR.<|IM_END|>"]  # a filter that leaves marks where they are does no harm
    reverse = filtered.replace("filter upper", "filter reverse")
    assert "marks of the template do not stand" in refused(chat, reverse, TWO[:2])


def test_white_space_around_marks_is_the_template_s(chat, chat_tokenizer):
    loose = "{% for m in messages %}\n<|im_start|>{{ m.role }}\n  {%- generation -%}\n  {{ m.content }}\n  {%- endgeneration %}\n<|im_end|>\n{% endfor %}"  # noqa: E501
    ((text, _),), _ = chat(loose, TWO)
    assert text == chat_tokenizer.apply_chat_template(TWO, tokenize=False)


def test_a_template_that_writes_nothing_is_refused(chat):
    assert "writes nothing of this chat" in refused(chat, "{% if false %}{{ messages }}{% endif %}", TWO)


def test_a_template_that_writes_by_chance_is_refused(chat):
    dice = "{{ range(100000) | random }}" + CHATML
    assert "differently each time" in refused(chat, dice, TWO)


def test_the_day_does_not_change_rows(write, config, chat_tokenizer):
    chat_tokenizer.chat_template, chat_tokenizer.bos_token = LLAMA3, "<s>"
    path = str(write("rows.jsonl", [{"m": TWO}] * 5))

    def text(**keys):
        data = config(kind="jsonl", path=path, messages="m", seq_length=256, **keys)
        prepared = prepare(data, chat_tokenizer, seed=0)
        return chat_tokenizer.decode(prepared.train[0].row(0)["input_ids"]), lines(prepared.report["changes"])

    found, said = text()
    assert "Today Date: 26 Jul 2024" in found and "data.chat_date=2024-07-26" in said[0]
    assert "Today Date: 01 Feb 2026" in text(chat_date="2026-02-01")[0]
    assert "Jul 2024" not in chat_tokenizer.apply_chat_template(TWO, tokenize=False)  # the clock is as it was


# Templates that are of no use


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for a in range(30000) %}{% for b in range(30000) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{{ 10 ** (10 ** 9) }}", "takes more than"),
        ("{{ 'x' * 10000000000 }}", "1 GiB of memory"),
        ("{{ '%1000000000d' % 1 }}", "1 GiB of memory"),
        ("{{ 'x'.ljust(100000000) }}", "writes 100,0"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself"),
    ],
)
@pytest.mark.parametrize("when", ["", "{% if messages | length > 1 %}"])
def test_a_template_ends(chat, monkeypatch, template, says, when):
    """Also one that only does it with some chat."""
    monkeypatch.setattr(bounded, "SECONDS", 0.3 if says.startswith("takes") else 5.0)
    monkeypatch.setattr(bounded, "MEMORY", 1 << 29 if says.startswith("1 GiB") else 1 << 30)
    said = refused(chat, CHATML + when + template + ("{% endif %}" if when else ""), TWO)
    assert said.startswith("error: chat_template of ") and says in said
    compiled = not template.startswith(("{{ (", "{{ 10"))
    assert ("with f:1" if when and compiled else "with a chat") in said


def test_work_that_is_bounded(monkeypatch):
    fork, children = os.fork, []
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    assert list(bounded.bounded(str, [])) == [] and list(bounded.bounded(lambda n: n + 1, [1, 2])) == [2, 3]
    begun = bounded.bounded(lambda n: n, range(10**6))
    assert next(begun) == 0
    begun.close()
    ended = bounded.bounded(lambda n: os.kill(os.getpid(), signal.SIGSEGV) if n else n, [0, 1])
    assert next(ended) == 0
    with pytest.raises(bounded.BoundError, match="SIGSEGV") as caught:
        next(ended)
    assert caught.value.number == 1
    for child in children:
        with pytest.raises(ChildProcessError):  # it has ended, and somebody waited for it
            os.waitpid(child, os.WNOHANG)
    assert len(children) == 4


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("Assistant", "assistant"), ("assistant ", "assistant"), ("bot", "assistant"), ("AI", "assistant"),
        ("model", "assistant"), ("gpt", "assistant"), ("asistant", "assistant"), ("human", "user"), ("User", "user"),
        ("SYSTEM", "system"), ("narrator", ""), ("observation", ""), ("ipython", ""), ("function", ""),
    ],
)  # fmt: skip
def test_a_role_that_is_meant_to_be_another(chat, role, meant):
    """Its turns would not be learned, or be written as no model has seen them."""
    messages = [ASK, ANSWER, {"role": role, "content": "Six."}]
    if not meant:
        assert chat(CHATML, messages)[0][0][1] == ["Four.<|im_end|>"]
        return
    said = refused(chat, CHATML, messages)
    assert f"f:1: message 3 is of role {role!r}" in said and f'try: "role": "{meant}"' in said
    own = CHATML + "{% if 'human' == 'model' %}{% endif %}"
    if role == "human":  # this template has them
        assert chat(own, messages)[0][0][1] == ["Four.<|im_end|>"]
    if role == "model":  # and would learn nothing of them
        assert "message 3" in refused(chat, own, messages)


def test_chats_of_which_nothing_is_learned_are_refused(write, config, chat_tokenizer):
    rows = [{"messages": [ASK, {"role": "narrator", "content": "Four."}]}] * 8
    data = config(kind="jsonl", path=str(write("r.jsonl", rows)), messages="messages", max_dropped=1)
    for limit, says in ((0.05, "8 of 8 rows are dropped"), (1, "no row of the train split has a supervised token")):
        data.max_dropped = limit
        with pytest.raises(RequestError, match=says):
            prepare(data, chat_tokenizer, seed=0)
