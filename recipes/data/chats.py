"""A chat as the text that a model reads, and which of it the assistant has written.

A template writes a whole conversation; what a model sees before it answers is the conversation up to there, with the
prompt for an answer. The two differ in templates that write earlier turns otherwise once others follow (reasoning taken
out, a tool's result folded up). So each answer is found where the model would write it: in the conversation up to and
with it, behind the prompt (or between the `{% generation %}` marks of the template), and it is learned from a text only
if that text is the same, character by character, up to the end of the answer. Answers for which the whole conversation
is not are learned from a text of their own, which ends with them.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from conf.errors import Problem, RequestError, did_you_mean
from recipes.data.bounded import MEMORY, BoundError, bounded, step
from recipes.data.changes import CHANGED, CUT, Change
from recipes.data.messages import ASSISTANT, TRAIN, Message, tools_of
from recipes.data.rows import Meter, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Segments = list[tuple[str, bool]]
"""A text in parts: (text, whether the assistant has written it)."""
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Noncharacters of Unicode, which no text has: what stands for the marks of a template in its output."""
MARKS = re.compile(f"[{OPEN}{CLOSE}]")
TODAY = "strftime_now"
"""The function by which templates write today's date."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what the assistant thought; transformers gives it to templates by each of them."""
SPOKEN = ("content", "tool_calls", *REASONING)
GIVEN = {"messages", "raise_exception", "strftime_now", "namespace", "range", "dict"}
"""Names that templates have anyway."""
KNOWN = {"role", "tool_call_id", *SPOKEN}
"""Keys of a message that are looked for in what the template writes, or say nothing."""
WAYS_OUT = (
    "prompt and completion columns, data.chat_options (such as enable_thinking) if the template has such, or "
    "model.tokenizer=FOLDER with {% generation %} marks in its chat_template"
)
BROKEN: dict[type[Exception], str] = {
    MemoryError: f"needs more than {MEMORY >> 30} GiB of memory",
    RecursionError: "is nested too deeply, or calls itself", SyntaxError: "is nested too deeply",
}  # fmt: skip
"""What is raised by a template that can write no chat, or should not be let to, and what it is."""
BROKEN_TEMPLATE = "broken template"
LONGEST = 1 << 26
"""Characters that a template may write of one chat."""
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
MEANT = {
    "user": ("human",),
    ASSISTANT: ("bot", "chatbot", "ai", "model", "gpt", "chatgpt", "llm"),
}
"""Role → what other tools call it."""


class ChatError(Exception):
    """Why a chat cannot be learned. nearest: what would."""

    def __init__(self, rule: str, nearest: str = ""):
        super().__init__(rule)
        self.nearest = nearest


class BrokenTemplateError(Exception):
    """The template itself is of no use."""


@dataclass(frozen=True)
class Answer:
    """One turn of the assistant. text: the conversation up to and with it. spans: what of it a model writes."""

    text: str
    spans: list[tuple[int, int]]

    @property
    def stop(self) -> int:
        return self.spans[-1][1]


class Chats:
    """Writes chats with the template of a tokenizer. date: what templates are told that today is.

    options: what else they are told. nulls: as of `messages.check_chat`. Templates run within the bounds of
    `bounded.py`; RequestError names one that does not keep to them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, date: datetime, options: Mapping[str, Any], nulls: bool = False
    ):
        self.tokenizer, self.date, self.options, self.nulls = tokenizer, date, dict(options), nulls
        self.dated = False
        """Whether a template has asked for the date."""
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        self._ends = tuple({str(token) for token in added} | set(tokenizer.all_special_tokens) - {""})
        self._in_parts = False
        self._in_parts = self._bounded(lambda content: self._reads_parts(), [""], ["a chat"])[0]

    def written(self, rows: Sequence[Row]) -> list[tuple[list[Segments] | ChatError, list[Change]]]:
        """Of each row the texts from which its answers are learned, or why there are none; and what `texts` noted."""
        found = self._bounded(self._texts_and_changes, rows, [row.where for row in rows])
        return [
            (
                ChatError(*one["refused"])
                if "refused" in one
                else [[(*part,) for part in text] for text in one["texts"]],
                [Change(*change) for change in one["changes"]],
            )
            for one in found
        ]

    def _texts_and_changes(self, row: Row) -> dict[str, Any]:
        """What `written` says of a row, as JSON values."""
        meter = Meter()
        try:
            texts = self.texts(row, meter)
        except ChatError as error:
            return {"refused": [str(error), error.nearest], "changes": []}
        return {"texts": texts, "changes": [(one.what, one.effect, one.first) for one in meter.changes.values()]}

    def _bounded(self, work: Callable[[Any], Any], items: Sequence[Any], wheres: Sequence[str]) -> list[Any]:
        """What `work` makes of each item, where the template ends. wheres: what to call the items."""
        found: list[Any] = []

        def guarded(item: Any) -> Any:
            try:
                return work(item)
            except BrokenTemplateError as error:
                return {BROKEN_TEMPLATE: str(error)}

        try:
            for each in bounded(guarded, items):
                if isinstance(each, dict) and BROKEN_TEMPLATE in each:
                    raise BoundError(len(found), each[BROKEN_TEMPLATE])
                found.append(each)
        except BoundError as error:
            nearest = "model.tokenizer=FOLDER with another chat_template in it"
            where = f"chat_template of {self.tokenizer.name_or_path or 'the tokenizer'}"
            raise RequestError(Problem(where, "", f"{error}, with {wheres[error.number]}", nearest)) from None
        return found

    def texts(self, row: Row, meter: Meter) -> list[Segments]:
        """The texts from which the answers of a chat are learned, one for most templates.

        What the template leaves out or writes otherwise goes to `meter`. Raises ChatError.
        """
        tools, problems = tools_of(row.content, row.where, self.nulls)
        if problems:
            raise ChatError(problems[0].rule, problems[0].nearest)
        messages = [{key: value for key, value in one.items() if key != TRAIN} for one in row.content["messages"]]
        self._check_roles(messages, tools)
        self.dated = False
        whole, spans = self._render(messages, tools)
        if not whole:
            raise ChatError("the chat template writes nothing of this chat", WAYS_OUT)
        if self._render(messages, tools) != (whole, spans):
            raise ChatError("the chat template writes the same chat differently each time", WAYS_OUT)
        said = [
            number for number, message in enumerate(row.content["messages"])
            if message["role"] == ASSISTANT and message.get(TRAIN, True)
        ]  # fmt: skip
        learned = [number for number in said if not _is_empty(messages[number])]
        answers = [self._answer(messages, number, tools) for number in learned]
        documents = _laid_out(whole, answers)
        if len(learned) < len(said):
            meter.note(CUT, "chats with empty turns of the assistant, which are not learned", row.where)
        if len(documents) > 1:
            what = "chats learned answer by answer, because the template writes earlier turns otherwise later on"
            meter.note(CHANGED, what, row.where)
        written = [_bare(whole), *(_bare("".join(part for part, _ in one)) for one in documents[1:])]
        heard = [one for number, one in enumerate(messages) if one["role"] != ASSISTANT or number in learned]
        for what in self._left_out(heard, tools, written):
            meter.note(CHANGED, what, row.where)
        if self.dated:
            what = (
                f"chats whose template writes today's date, for which it was given data.chat_date={self.date:%Y-%m-%d}"
            )
            meter.note(CHANGED, what, row.where)
        return documents

    def _check_roles(self, messages: Sequence[Message], tools: list[Any]) -> None:
        """Raises ChatError for a role that is meant to be another one, which is learned, or known to the template."""
        template = self.tokenizer.get_chat_template(None, tools or None)
        for number, role in enumerate((message["role"] for message in messages), 1):
            meant = meant_role(role)
            if meant == ASSISTANT:
                rule = f"message {number} is of role {role!r}, and only what the {ASSISTANT} says is learned"
                raise ChatError(rule, f'"role": "{meant}"')
            if meant and not re.search(rf"""(['"]){re.escape(role)}\1""", template):
                raise ChatError(f"message {number} is of role {role!r}, which the template does not know",
                                f'"role": "{meant}"')  # fmt: skip

    def _answer(self, messages: Sequence[Message], number: int, tools: list[Any]) -> Answer:
        """The turn `number`, in the conversation up to it."""
        text, spans = self._render(messages[: number + 1], tools, number + 1)
        if spans is not None:
            spoken = any(message["role"] == ASSISTANT for message in messages[:number])
            earlier = self._render(messages[:number], tools, number)[1] if spoken else []
            spans = [(start, stop) for start, stop in spans[len(earlier or []) :] if stop > start]
            if not spans:
                rule = f"the template has {{% generation %}} marks, and none around message {number + 1}"
                raise ChatError(rule, "a template that marks all of what the assistant writes")
        else:
            before = self._render(messages[:number], tools, number, prompt=True)[0] if number else self._begin(text)
            if not text.startswith(before):
                at = next(n for n in range(len(before) + 1) if text[n : n + 1] != before[n : n + 1])
                rule = (
                    f"the template asks for an answer with {before[at:][:40]!r} where it writes this one, message "
                    f"{number + 1}, as {text[at:][:40]!r}: what a model has to write cannot be told from the rest"
                )
                raise ChatError(rule, WAYS_OUT)
            spans = [(len(before), self._end(text, len(before)))]
            if spans[0][1] <= len(before):
                raise ChatError(f"the template writes nothing for message {number + 1}, of the assistant", WAYS_OUT)
        self._check_written(messages[number], number, "".join(text[start:stop] for start, stop in spans))
        return Answer(text, spans)

    def _begin(self, text: str) -> str:
        """What stands before an answer that nothing was asked for."""
        probe = [{"role": "user", "content": self._content("probe")}]
        without, asking = (self._render(probe, [], prompt=prompt)[0] for prompt in (False, True))
        prompt = asking.removeprefix(without) if asking.startswith(without) else ""
        if not prompt or prompt not in text:
            rule = "the chat begins with the assistant, and the template does not say where its turn begins"
            raise ChatError(rule, f'a chat that begins with the user, "train": false for this turn, or {WAYS_OUT}')
        return text[: text.index(prompt) + len(prompt)]

    def _end(self, text: str, start: int) -> int:
        """Where a turn at the end of `text` ends: at the token that ends it, without what the template puts behind."""
        end = self.tokenizer.eos_token
        if end and (at := text.rfind(end, start)) >= 0:
            return at + len(end)
        turn = text[start:].rstrip()
        return start + len(turn) if turn.endswith(self._ends) else len(text)

    def _check_written(self, message: Message, number: int, written: str) -> None:
        """Raises ChatError where the template leaves out what tools the assistant calls."""
        for call in message.get("tool_calls", ()):
            if call["function"]["name"] not in written:
                rule = f"the template does not write the call of '{call['function']['name']}' in message {number + 1}"
                raise ChatError(rule, "model.tokenizer=FOLDER with a template for tool_calls, or rows without them")

    def _left_out(self, messages: Sequence[Message], tools: list[Any], written: Sequence[str]) -> Iterator[str]:
        """What of a chat no text has, in words. written: the texts, without white space."""
        if tools and not any(tool["function"]["name"] in written[0] for tool in tools):
            yield "chats whose tools the template does not write"
        template = self.tokenizer.get_chat_template(None, tools or None)
        for key in sorted({key for message in messages for key in message} - KNOWN):
            if key not in template:
                yield f"chats with '{key}' in messages, which the template does not read"
        for role in dict.fromkeys(message["role"] for message in messages):
            texts = [one.get("content") for one in messages if one["role"] == role]
            if any(text and not any(_stands_in(text, one) for one in written) for text in texts):
                yield f"chats of which the template leaves out something that the {role} says"
        reasons = [text for one in messages if (text := next((one[key] for key in REASONING if one.get(key)), None))]
        if any(isinstance(one, str) and not any(_stands_in(one, text) for text in written) for one in reasons):
            yield "chats of which the template leaves out reasoning"

    def _render(
        self, messages: Sequence[Message], tools: list[Any], upto: int = 0, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """(the text of messages, where the template marks what is generated; None where it has no marks).

        upto: how many messages of a chat these are, where they are not all.
        """
        given = [
            {**message, "content": self._content(message["content"])} if "content" in message else message
            for message in messages
        ]
        options: Any = {**self.options, "tokenize": False, "add_generation_prompt": prompt, "tools": tools or None}
        try:
            template = self.tokenizer.get_chat_template(None, tools or None)
            marked = _with_visible_marks(template)
            with self._today(template):
                step()
                text = str(self.tokenizer.apply_chat_template(given, chat_template=template, **options))
            if len(text) > LONGEST:
                raise BrokenTemplateError(f"writes {len(text):,} characters")
            if marked == template:
                return text, None
            with self._today(marked):
                step()
                other = str(self.tokenizer.apply_chat_template(given, chat_template=marked, **options))
        except BrokenTemplateError:
            raise
        except tuple(BROKEN) as error:
            raise BrokenTemplateError(next(rule for kind, rule in BROKEN.items() if isinstance(error, kind))) from error
        except Exception as error:  # templates are programs, and raise what programs raise
            which = f"its first {upto} messages" if upto else "this chat"
            raise ChatError(f"the chat template refuses {which}: {error}") from error
        spans = _spans(other)
        if spans is None or MARKS.sub("", other) != text:
            rule = "the {% generation %} marks of the template do not stand in the text as they are written"
            raise ChatError(rule, "marks in the template's own loop, around what the assistant writes, without filters")
        return text, spans

    @contextmanager
    def _today(self, template: str) -> Iterator[None]:
        """Templates are told `date` when they ask for today.

        transformers 5.23 gives them the clock, and makes data of everything that one might pass in its place; the
        compiled template, which it keeps, is where the function can be replaced.
        """
        if TODAY not in template:
            yield
            return
        from transformers.utils.chat_template_utils import _compile_jinja_template

        names = _compile_jinja_template(template).globals
        before = names[TODAY]
        names[TODAY] = self._date
        try:
            yield
        finally:
            names[TODAY] = before

    def _date(self, form: str) -> str:
        self.dated = True
        return self.date.strftime(form)

    def _content(self, text: Any) -> Any:
        """A content in the shape that the template reads."""
        return [{"type": "text", "text": text}] if self._in_parts and isinstance(text, str) else text

    def _reads_parts(self) -> bool:
        """Whether the template reads contents that are lists of parts, and no others."""
        return not self._writes("probe") and self._writes([{"type": "text", "text": "probe"}])

    def _writes(self, content: Any) -> bool:
        try:
            return "probe" in self._render([{"role": "user", "content": content}], [])[0]
        except ChatError:
            return False


def unread_option(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Problem | None:
    """One of `data.chat_options` that no template of this tokenizer reads."""
    given = tokenizer.chat_template
    text = "\n".join(given.values()) if isinstance(given, dict) else str(given)
    taken = inspect.signature(tokenizer.apply_chat_template).parameters
    for name, value in options.items():
        if name in taken or name == "messages" or not re.search(rf"\b{re.escape(name)}\b", text):
            known = sorted(_undeclared(text) - {*taken, *tokenizer.special_tokens_map, *GIVEN})
            rule = f"the chat template does not read it; it reads {', '.join(known) or 'no options'}"
            near = did_you_mean(name, known)
            return Problem(f"data.chat_options.{name}", str(value), rule, f"data.chat_options.{near}=…" if near else "")
    return None


def meant_role(role: str) -> str:
    """The role that this one, which is not known as it is, stands for by all appearances; empty where there is none."""
    name = role.strip().casefold()
    if role in ROLES or role in ("function", ""):
        return ""
    other = next((meant for meant, names in MEANT.items() if name in names), "")
    return other or next(iter(difflib.get_close_matches(name, ROLES, 1, 0.8)), "")


def _undeclared(template: str) -> set[str]:
    """Names that a template reads and does not set."""
    import jinja2.meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    source = GENERATION.sub("", template)
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return jinja2.meta.find_undeclared_variables(environment.parse(source))
    except (jinja2.TemplateError, RecursionError):
        return set()


def _laid_out(whole: str, answers: Sequence[Answer]) -> list[Segments]:
    """Texts in which each answer stands once as a model would write it: the whole, if it has one, and those needed."""
    waiting, found, text = list(answers), list[Segments](), whole
    while True:
        here = [answer for answer in waiting if text[: answer.stop] == answer.text[: answer.stop]]
        waiting = [answer for answer in waiting if answer not in here]
        if here or not answers:
            found.append(_segments(text, [span for answer in here for span in answer.spans]))
        if not waiting:
            return found
        text = waiting[-1].text


def _segments(text: str, spans: Sequence[tuple[int, int]]) -> Segments:
    segments, at = [], 0
    for start, stop in spans:
        segments += [(text[at:start], False), (text[start:stop], True)]
        at = stop
    return [(part, learned) for part, learned in [*segments, (text[at:], False)] if part]


@functools.cache
def _with_visible_marks(template: str) -> str:
    return GENERATION.sub(_visible, template)


def _visible(mark: re.Match[str]) -> str:
    """A mark that shows in the output and leaves the white space around it as the mark does."""
    before, end, behind = mark.groups()
    sign = CLOSE if end else OPEN
    return f'{{%{before} set mark_ = 0 %}}{{{{ "{sign}" }}}}{{% set mark_ = 0 {behind}%}}'


def _spans(marked: str) -> list[tuple[int, int]] | None:
    """Where a text without its marks lies between them; None where they do not come in pairs."""
    signs = MARKS.findall(marked)
    if signs != [OPEN, CLOSE] * (len(signs) // 2):
        return None
    places = [found.start() - before for before, found in enumerate(MARKS.finditer(marked))]
    return list(zip(places[::2], places[1::2], strict=True))


def _is_empty(message: Message) -> bool:
    return not any(str(message.get(key) or "").strip() for key in SPOKEN)


def _bare(text: str) -> str:
    return "".join(text.split())


def _stands_in(text: str, bare: str) -> bool:
    """Whether a text stands in one without white space, as it is or as JSON writes it."""
    forms = (text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return any(_bare(form) in bare for form in forms)
