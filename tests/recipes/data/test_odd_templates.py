"""Chat templates of strangers: written or refused, never a traceback; test_data_chats.py has those that do not end."""

from __future__ import annotations

from datetime import datetime

import pytest

from conf.errors import RequestError
from recipes.data.chats import ChatError, Chats
from recipes.data.rows import Row

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


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_written_or_refused(name: str, chatting) -> None:
    row = Row("file:1", False, {"messages": [dict(role="user", content="a"), dict(role="assistant", content="b")]})
    try:
        ((found, _),) = chatting(ODD[name]).written([row])
        assert not isinstance(found, ChatError) or str(found)
    except RequestError as refused:
        assert str(refused)
