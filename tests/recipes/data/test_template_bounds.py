"""Chat templates of strangers: refused soon, or written; never a traceback, a hang or gigabytes."""

from __future__ import annotations

import time
from datetime import datetime

import pytest
from conftest import CHATML

from conf.errors import RequestError
from recipes.data import bounded
from recipes.data.chats import ChatError, Chats
from recipes.data.rows import Row

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "nested loops": (ENDLESS, "takes more than 1 s"),
    "a long text": ("{{ 'x' * 10**10 }}", "needs more than 1 GiB"),
    "a list that grows": ("{% set a = [1] * 10**9 %}{{ a * 9 }}", "needs more than 1 GiB"),
    "parentheses": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    "a macro of itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
}
ODD = {
    "a huge range": "{% for a in range(10**12) %}x{% endfor %}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "no such filter": "{{ messages | nothing }}",
    "half a tag": "{% if messages",
    "nothing": "",
    "a division by nothing": "{{ 1 / 0 }}",
    "a message that is none": "{{ messages[99]['content'] }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "a change of the messages": "{% set _ = messages.append({}) %}{{ messages }}",
    "the end of a block": "{% endfor %}",
    "signs that are no text": "{{ messages[0]['content'] }}\x00\ufdd0",
    "a refusal": "{{ raise_exception('no') }}",
}


@pytest.fixture
def chatting(tokenizer):
    def chats(template: str) -> Chats:
        tokenizer.chat_template = template
        return Chats(tokenizer, datetime(2026, 1, 1), {})

    before = tokenizer.chat_template
    yield chats
    tokenizer.chat_template = before


@pytest.mark.parametrize("name", HOSTILE)
def test_what_takes_too_much_is_refused(name: str, chatting, monkeypatch: pytest.MonkeyPatch) -> None:
    template, rule = HOSTILE[name]
    if rule.startswith("takes"):
        monkeypatch.setattr(bounded, "SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(RequestError, match=rule):
        chatting(template)
    assert time.monotonic() - started < 30  # 5 s, on a machine that does other things


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_written_or_refused(name: str, chatting) -> None:
    row = Row("file:1", False, {"messages": [dict(role="user", content="a"), dict(role="assistant", content="b")]})
    try:
        ((found, _),) = chatting(ODD[name]).written([row])
        assert not isinstance(found, ChatError) or str(found)
    except RequestError as refused:
        assert str(refused)


def test_a_plain_template_is_no_trouble(chatting) -> None:
    row = Row("file:1", False, {"messages": [dict(role="user", content="a"), dict(role="assistant", content="b")]})
    (((text,), _),) = chatting(CHATML).written([row])
    assert [part for part, learned in text if learned] == ["b<|im_end|>\n"]
