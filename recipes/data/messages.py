"""The messages and tools of a chat as people have them, made what chat templates expect; what is wrong with them.

Templates of transformers expect `tool_calls` as `[{"type": "function", "function": {"name", "arguments": {…}}}]` and
tools as `[{"type": "function", "function": {"name", "description", "parameters"}}]`. Files also have arguments, tools
or the whole chat as JSON text, calls and tools without that frame, OpenAI's older `functions` and `function_call`, and
contents as lists of parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from conf.errors import Problem, did_you_mean
from recipes.data.values import kind_of, wrong_text

Message = dict[str, Any]
LEARNED = {"weight": (0, 1), "train": (False, True), "training": (False, True)}
"""Keys of a message that say whether it is learned → (no, yes)."""
TRAIN = "train"
"""The one of them that is left of a message that is not: False."""
TOOLS = ("tools", "functions")
"""Columns of a record, beside its chat, with the tools that the assistant was offered."""
CALL = '{"type": "function", "function": {"name": "…", "arguments": {…}}}'
ASSISTANT = "assistant"


def check_chat(content: dict[str, Any], where: str, columns: Mapping[str, str], nulls: bool = False) -> list[Problem]:
    """What is wrong with `content["messages"]`, which is afterwards what templates expect.

    nulls: the source fills up what a record does not have with nulls, as tables do, so that nulls say nothing.
    """
    messages = content["messages"] = _parsed(content["messages"])
    if not isinstance(messages, list):
        rule = f"column '{columns['messages']}' must be a list of messages, it is {kind_of(messages)}"
        return [Problem(where, "", rule)]
    problems: list[Problem] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            rule = f"message {number} must have a role and a content, it is {kind_of(message)}"
            problems.append(Problem(where, "", rule))
            continue
        given = without_nulls(message) if nulls else {key: value for key, value in message.items() if value is not None}
        wrong = _Wrong(where, number, message)
        messages[number - 1] = _message(given, wrong)
        problems += wrong.found
    return problems


def tools_of(content: Mapping[str, Any], where: str, nulls: bool = False) -> tuple[list[dict[str, Any]], list[Problem]]:
    """(the tools of a row, what is wrong with them)."""
    given = {name: value for name in TOOLS if (value := _parsed(content.get(name)))}
    if len(given) > 1:
        return [], [Problem(where, "", "columns 'tools' and 'functions' both offer tools", "one of them")]
    found: list[dict[str, Any]] = []
    for name, tools in given.items():
        if not isinstance(tools, list):
            return [], [Problem(where, "", f"column '{name}' must be a list of tools, it is {kind_of(tools)}")]
        for number, tool in enumerate(map(_parsed, tools), 1):
            framed = tool if isinstance(tool, dict) and "function" in tool else {"type": "function", "function": tool}
            function = framed["function"]
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                rule = f"tool {number} in column '{name}' has no name"
                nearest = '{"type": "function", "function": {"name": "…", "parameters": {…}}}'
                return [], [Problem(where, "", rule, nearest)]
            found.append(without_nulls(framed) if nulls else framed)
    return found, []


def without_nulls(value: Any) -> Any:
    """A value without the members of its objects, at any depth, that are null."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


class _Wrong:
    """Problems of one message. given: it as it is in the file."""

    def __init__(self, where: str, number: int, given: Message):
        self.where, self.number, self.given, self.found = where, number, given, list[Problem]()

    def add(self, rule: str, nearest: str = "") -> None:
        self.found.append(Problem(self.where, "", rule.replace("{}", f"message {self.number}", 1), nearest))


def _message(message: Message, wrong: _Wrong) -> Message:
    """One message as templates expect it."""
    role = message.get("role")
    if "role" not in message:
        nearest = did_you_mean("role", message) or ", ".join(map(str, message))
        wrong.add(f"{{}} has no 'role'; it has: {nearest or 'nothing'}", '{"role": "user", "content": "…"}')
    elif reason := wrong_text(role):
        wrong.add(f"'role' of {{}} {reason}")
    message = _calls(message, wrong)
    if role == "function":  # what OpenAI's older form calls the result of a tool
        message["role"] = "tool"
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], wrong)
    if "content" not in message:
        if "content" in wrong.given and "tool_calls" not in message:
            wrong.add("'content' of {} must be a string, it is null")
        elif "tool_calls" not in message:
            nearest = did_you_mean("content", wrong.given) or ", ".join(map(str, wrong.given))
            wrong.add(f"{{}} has no 'content'; it has: {nearest or 'nothing'}", '{"role": "user", "content": "…"}')
    elif message["content"] is not None and (reason := wrong_text(message["content"])):
        wrong.add(f"'content' of {{}} {reason}")
    return _learned(message, wrong)


def _joined(parts: list[Any], wrong: _Wrong) -> str | None:
    """The text of a content in parts; None (and a problem) where one is none."""
    texts = []
    for number, part in enumerate(parts, 1):
        if not isinstance(part, dict):
            wrong.add("'content' of {} must be a string, it is a list", '[{"type": "text", "text": "…"}] for parts')
            return None
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            rule = f"part {number} of {{}} is of type '{part.get('type')}'; language models here read text"
            wrong.add(rule, "rows of text alone")
            return None
        texts.append(part["text"])
    return "".join(texts)


def _learned(message: Message, wrong: _Wrong) -> Message:
    """Without the keys that say whether it is learned, but `train: False` where it is not."""
    said = set()
    for key, (no, yes) in LEARNED.items():
        if key not in message:
            continue
        value = message.pop(key)
        if isinstance(value, bool) != isinstance(no, bool) or value not in (no, yes):
            what = "0 or 1 (other weights are not read)" if key == "weight" else "true or false"
            wrong.add(f"'{key}' of {{}} must be {what}, it is {json.dumps(value)[:40]}", f'"{key}": {json.dumps(no)}')
        else:
            said.add(bool(value))
            if value and message.get("role") != ASSISTANT:
                rule = f"'{key}' of {{}} asks to learn what the {message.get('role')} says"
                wrong.add(rule, f"only messages of the assistant are learned: no '{key}' here")
    if len(said) > 1:
        wrong.add(f"{', '.join(key for key in LEARNED if key in wrong.given)} of {{}} contradict each other")
    return {**message, TRAIN: False} if said == {False} else message


def _calls(message: Message, wrong: _Wrong) -> Message:
    """With its `tool_calls`, or the older `function_call`, in the form of templates."""
    message = dict(message)
    old = _parsed(message.pop("function_call", None))
    calls = _parsed(message.pop("tool_calls", None))
    if old and calls:
        wrong.add("{} has both 'tool_calls' and 'function_call'", "one of them")
    calls = [old] if old else calls
    if not calls:
        return message
    if message.get("role") != ASSISTANT:
        wrong.add(f"{{}} calls tools, and is of the {message.get('role')}", '"role": "assistant"')
    if not isinstance(calls, list):
        wrong.add(f"'tool_calls' of {{}} must be a list, it is {kind_of(calls)}", f"[{CALL}]")
        return message
    message["tool_calls"] = []
    for call in map(_parsed, calls):
        framed = call if isinstance(call, dict) and "function" in call else {"type": "function", "function": call}
        function = framed["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            wrong.add("a call in 'tool_calls' of {} has no name of a function", CALL)
            continue
        arguments = function.get("arguments")
        read = _parsed(arguments) if arguments not in (None, "") else {}
        if not isinstance(read, dict):
            rule = (
                f"the arguments of '{function['name']}' in {{}} are {kind_of(read)}, not an object, or JSON text of one"
            )
            wrong.add(rule, CALL)
        message["tool_calls"].append({**framed, "function": {**function, "arguments": read}})
    return message


def _parsed(value: Any) -> Any:
    """What a JSON text says; any other value, and text that is no JSON, is itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
