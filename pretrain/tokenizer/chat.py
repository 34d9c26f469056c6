"""Conversations as ids, by a tokenizer's chat template (Jinja, as transformers renders it) or a plain one of our own.

Text stays text: only what the template itself writes becomes special ids, whatever the messages hold. A template comes
with a tokenizer from anywhere, so it runs in Jinja's sandbox. It is told no date: the same messages are the same ids on
any day (a template that would write today's date takes the fixed one that it has for this case, or else `TODAY`).
"""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pretrain.tokenizer.texts import SpecialToken
from pretrain.tokenizer.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
# For a tokenizer that brings none: "User: Hi\nAssistant: Hello</s>User: ..."; the model writes the space, too.
DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_OPEN, _CLOSE = "\ue000\ue0c7", "\ue0c7\ue001"  # around the number of a message, where its content is to stand
_HIDDEN = "\0"  # stands for the characters of contents where special tokens are looked for
TODAY = datetime(2024, 7, 26)  # what `strftime_now` says; the date that Llama's templates have for this case
Message = dict[str, str]  # {"role": one of ROLES, "content": text}
Span = tuple[int, int]  # characters [start, end) of a rendered conversation


class ChatFormat:
    """How conversations are written for a tokenizer.

    `template`: the Jinja template; `is_default`: whether it is ours, because the tokenizer has none; `stop_ids`: what
    ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._names = {f"{name}_token": text for name, text in tokenizer.special_texts.items()}
        self.is_default = tokenizer.chat_template is None
        self.template = self._own_template() if self.is_default else tokenizer.chat_template
        self._compiled = self._compile()
        special = tokenizer.special_tokens()
        self._ids, self._special = {token.text: token.id for token in special}, _pattern(special)
        self._inside = tokenizer.inside()  # after a special token
        self._prompt = self._generation_prompt()
        self.stop_ids = self._stop_ids()

    def encode(
        self, messages: list[Message], add_generation_prompt: bool = False, place: str = "the conversation"
    ) -> tuple[list[int], list[bool]]:
        """The ids of a conversation, and which of them an assistant writes: from the generation prompt on to the token
        that ends an answer.

        The ids are those of transformers' `apply_chat_template(tokenize=True)` for contents without special tokens.
        `add_generation_prompt`: up to where the assistant's next answer begins. `place` is for messages.
        Raises `ValueError` for messages that the template does not take, or changes by more than spaces around them.
        """
        messages = checked_messages(messages, place)
        text, contents = self._rendered(messages, add_generation_prompt, place)
        hidden = list(text)
        for start, end, _ in contents:  # spaces stay: some tokens take in those around them
            hidden[start:end] = re.sub(r"\S", _HIDDEN, text[start:end])
        special = list(self._special.finditer("".join(hidden)))
        ids, spans = self._tokens(text, special)
        answers = [(self._begin(text, start), _end(text, end, special)) for start, end, number in contents
                   if messages[number]["role"] == "assistant"]  # fmt: skip
        return ids, _within(spans, answers)

    def _rendered(self, messages: list[Message], prompt: bool, place: str) -> tuple[str, list[tuple[int, int, int]]]:
        """The conversation as the template writes it, and (start, end, number of the message) of each content in it."""
        marked = [{**message, "content": f"{_OPEN}{i}{_CLOSE}"} for i, message in enumerate(messages)]
        parts = re.split(f"{_OPEN}(\\d+){_CLOSE}", self._render(marked, prompt, place))
        fixed, numbers = parts[::2], [int(number) for number in parts[1::2]]
        if missing := sorted(set(range(len(messages))) - set(numbers)):
            raise ValueError(f"{place}: the chat template of {self.tokenizer.path} does not write message "
                             f"{missing[0] + 1}: leave it out, or change the template")  # fmt: skip
        text, contents, at = self._render(messages, prompt, place), [], 0
        for count, number in enumerate(numbers, 1):
            before, after, content = fixed[count - 1], fixed[count], messages[number]["content"]
            for shown in (content, content.strip(), content.lstrip(), content.rstrip()):
                end = at + len(before) + len(shown) + len(after)
                if text.startswith(before + shown + after, at) and (count < len(numbers) or end == len(text)):
                    break
            else:
                raise ValueError(f"{place}: the chat template of {self.tokenizer.path} changes the content of message "
                                 f"{number + 1} ({content[:60]!r}): it cannot be kept apart from what the template "
                                 "writes; change the message or the template")  # fmt: skip
            at += len(before)
            contents.append((at, at + len(shown), number))
            at += len(shown)
        return text, contents

    def _tokens(self, text: str, special: list[re.Match]) -> tuple[list[int], list[Span]]:
        """The ids of a rendered conversation, and the characters of each; text between special tokens is one piece."""
        ids, spans, at = [], [], 0
        for match in [*special, None]:
            start, end = match.span() if match else (len(text), len(text))
            found, places = (self._inside if at else self.tokenizer).encode_spans(text[at:start])
            ids += found.tolist()
            spans += (places + at).tolist()
            if match:
                ids.append(self._ids[match[0] if match[0] in self._ids else match[0].strip()])
                spans.append((start, end))
            at = end
        return ids, spans

    def _begin(self, text: str, start: int) -> int:
        """Where an answer begins whose content does at `start`: after the generation prompt, perhaps with spaces."""
        if not self._prompt:
            return len(text[:start].rstrip())
        at = text.rfind(self._prompt, 0, start)
        begin = at + len(self._prompt)
        return start if at < 0 or text[begin:start].strip() else begin

    def _generation_prompt(self) -> str:
        """What the template writes where an answer is to begin."""
        question = [{"role": "user", "content": "a"}]
        without, whole = (self._render(question, prompt, "a question") for prompt in (False, True))
        return whole.removeprefix(without) if whole.startswith(without) else ""

    def _stop_ids(self) -> tuple[int, ...]:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        ids, is_answer = self.encode(messages, place="a question and its answer")
        last = [id_ for id_, is_ in zip(ids, is_answer, strict=True) if is_][-1]
        return tuple({last} & set(self._ids.values()) | {self.tokenizer.eos} - {None})

    def _own_template(self) -> str:
        if self.tokenizer.eos is None:
            raise ValueError(f"{self.tokenizer.path} has no chat template and no token that ends an answer: name one "
                             "of its tokens as eos_token in tokenizer_config.json")  # fmt: skip
        starts = self.tokenizer.prefix and self.tokenizer.prefix == [self.tokenizer.special_ids.get("bos")]
        return ("{{ bos_token }}" if starts else "") + DEFAULT_TEMPLATE

    def _compile(self) -> jinja2.Template:
        options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [_Generation, loopcontrols]}
        environment = ImmutableSandboxedEnvironment(**options)
        environment.globals["raise_exception"] = _refuse
        if not re.search(r"strftime_now\s+is\s+(not\s+)?defined", self.template):
            environment.globals["strftime_now"] = TODAY.strftime
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {self.tokenizer.path} cannot be read: {error}") from None

    def _render(self, messages: list[Message], add_generation_prompt: bool, place: str) -> str:
        names = {**self._names, "tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(messages=messages, **names)
        except Exception as error:  # a template is a program: it may end with any
            raise ValueError(f"{place}: the chat template of {self.tokenizer.path} does not take it: {error}") from None


class _Generation(Extension):
    """`{% generation %}` around what an assistant writes: taken as if it were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    """What templates call `raise_exception`."""
    raise jinja2.TemplateError(message)


def checked_messages(messages: Any, place: str) -> list[Message]:
    """The messages, without keys that are null; `ValueError` for what is no list of them, each with a role and a
    content.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{place} has no messages: give a list of {{'role': ..., 'content': ...}}")
    found = []
    for number, message in enumerate(messages, 1):
        problem = None
        if isinstance(message, dict):
            message = {key: value for key, value in message.items() if value is not None or key == "content"}
            found.append(message)
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            problem = "it must have a role and a content"
        elif others := sorted(set(message) - {"role", "content"}):
            problem = f"the key {others[0]!r} is not read: leave it out, or write what it says into the content"
        elif message["role"] not in ROLES:
            problem = f"the role is {message['role']!r}, not one of {', '.join(ROLES)}"
        elif not isinstance(message["content"], str) or not message["content"].strip():
            problem = "the content is empty, or no text; leave the message out"
        if problem:
            raise ValueError(f"{place}, message {number}: {problem}")
    return found


def _pattern(special: Iterable[SpecialToken]) -> re.Pattern:
    """Finds special tokens, the longest at a place, with the spaces that some of them take in."""
    parts = [r"\s*" * token.takes_before + re.escape(token.text) + r"\s*" * token.takes_after
             for token in sorted(special, key=lambda token: len(token.text), reverse=True)]  # fmt: skip
    return re.compile("|".join(parts) or "(?!)")


def _end(text: str, end: int, special: list[re.Match]) -> int:
    """Where an answer ends whose content does at `end`: with the special token after it, perhaps after spaces."""
    following = next((match for match in special if match.start() >= end), None)
    return following.end() if following and not text[end : following.start()].strip() else end


def _within(spans: list[Span], ranges: Iterable[Span]) -> list[bool]:
    """Which tokens lie, at least with a part, in one of the ranges of characters."""
    starts, ends = np.array(spans).reshape(-1, 2).T
    found = np.zeros(len(spans), dtype=bool)
    for start, end in ranges:
        found |= (starts < end) & (np.maximum(ends, starts + 1) > start)
    return found.tolist()
