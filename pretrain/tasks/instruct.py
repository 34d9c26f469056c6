"""Responses to prompts, and conversations: a language model that learns what the assistant writes, not what it reads.

A conversation is written by the chat template of the tokenizer (`tokenizer.chat`). So are a prompt and its response, as
one turn each, when the tokenizer brings a template: that is what its model was taught. Where it brings none, the
response stands right after the prompt, as the columns have them; spaces that end a prompt go to the response, which
begins with them as words in a text do, so that a prompt alone has the ids that it has before its response.

Several conversations are packed into a row (`data.packing=best_fit`), each computed as if it stood alone.
"""

import string
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from pretrain.config.schema import ModelConfig, TaskConfig
from pretrain.evaluation import metrics
from pretrain.examples.stream import ExampleRows, Examples, Ragged
from pretrain.examples.tables import Table
from pretrain.inference.generate import end_ids, generate_all, prompt_ids
from pretrain.stream.objectives import batch_of
from pretrain.stream.packing import PADDING, best_fit_decreasing, targets
from pretrain.stream.stream import Rows
from pretrain.tasks.language_model import LanguageModel
from pretrain.tasks.task import Write, Written, read_rows
from pretrain.tokenizer.chat import ChatFormat, Message, checked_messages
from pretrain.tokenizer.tokenizer import Tokenizer

Judge = Callable[[list[str], list[str]], metrics.Figures]
# task.figures -> (responses and gold -> figures, their names; the last one tells the best checkpoint)
JUDGES: dict[str, tuple[Judge, tuple[str, ...]]] = {
    "translation": (metrics.translation, ("bleu", "chrf")),
    "summaries": (metrics.summaries, ("rouge_1", "rouge_2", "rouge_l")),
    "answers": (lambda said, gold: metrics.answers(said, [[text] for text in gold]), ("exact_match", "f1")),
}


class Instruct(LanguageModel):
    """The loss is on the tokens of responses, and on the one that ends each."""

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, model: ModelConfig, *others: Any):
        if not model.causal:
            raise ValueError("task=instruct: a model that looks ahead (model.causal=false) writes no responses: take "
                             "one that looks back only")  # fmt: skip
        super().__init__(config, tokenizer, model, *others)
        self.byte_lengths, self.is_sparse = None, True
        self.figures, self.best = ("accuracy",), "val_loss"
        self.judge: Judge | None = None
        if config.figures != "none":
            self.judge, names = JUDGES[config.figures]
            self.figures, self.best = (*self.figures, *names), f"val_{names[-1]}"
            self.judge(["a"], ["a"])  # a library that is missing is missed now, not at the first evaluation
        self.chat, self.is_chat = ChatFormat(tokenizer), False
        self.template = _parsed(config.template.replace("\\n", "\n")) if config.template is not None else None

    def described(self) -> dict:
        return super().described() | {"chat": self.is_chat}

    def encode(self, table: Table, with_gold: bool = True) -> Examples:
        assert with_gold, "without gold a response is written: see `respond`"
        read, is_chat = self._conversations(table)
        self.is_chat = is_chat
        rows, found, dropped = read_rows(table, lambda row: self._encoded(read(row), is_chat), self.config.drop_bad)
        tokens, answers = zip(*found, strict=True)
        sizes = np.array([len(ids) for ids in tokens])
        groups = self._packed(sizes)
        columns = {
            "inputs": Ragged(np.concatenate([tokens[number] for number in group]) for group in groups),
            "is_response": Ragged((np.concatenate([answers[number] for number in group]) for group in groups), np.int8),
            "documents": Ragged(np.repeat(np.arange(len(group)), sizes[group]) for group in groups),
        }
        first = [rows[group[0]] for group in groups]
        return self.examples(columns, first, facts={"rows": np.array(rows)}, dropped=dropped)

    def collate(self, rows: ExampleRows) -> dict[str, np.ndarray]:
        columns, numbers = rows.examples.columns, rows.numbers
        documents = columns["documents"].padded(numbers, PADDING, np.int32)
        is_target = targets(documents) & columns["is_response"].padded(numbers, 0, bool)[:, 1:]
        tokens, is_packed = columns["inputs"].padded(numbers, 0), documents.max() > 0
        return batch_of(self.ask, Rows(rows.sample_numbers, tokens, is_target, documents if is_packed else None))

    def judge_written(self, table: Table, examples: Examples, write: Write) -> tuple[dict, list[dict]]:
        """Of `task.generate_samples` rows, evenly spread."""
        if self.judge is None:
            return {}, []
        rows, (read, is_chat) = examples.facts["rows"], self._conversations(table)
        count = min(self.config.generate_samples, len(rows))
        asked, gold = [], []
        for row in rows[np.arange(count) * len(rows) // count].tolist():
            messages = read(row)
            last = _last_answer(messages)
            asked.append(messages[:last])
            gold.append(messages[last]["content"].strip())
        prompts = [self._prompt(messages, is_chat) for messages in asked]
        said = [self._text(ids) for ids in write(prompts, self.config.max_new_tokens, self._stop_ids(is_chat))]
        main = self.figures[-1]
        return self.judge(said, gold), [
            {"prompt": messages[-1]["content"], "gold": theirs, "prediction": ours, "right": ours == theirs,
             "score": self.judge([ours], [theirs])[main]}
            for messages, theirs, ours in zip(asked, gold, said, strict=True)
        ]  # fmt: skip

    def respond(
        self, model: nn.Module, table: Table, batch_size: int, on_rows: Callable[[int], object] = lambda count: None,
        written: Written | None = None,
    ) -> list[dict]:  # fmt: skip
        """{"response": text} for each row: what comes after its prompt, or its conversation without a last answer."""
        read, is_chat = self._conversations(table, with_gold=False)

        def asked(row: int) -> list[int]:
            messages = read(row)
            is_answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
            prompt = self._prompt(messages[:-1] if is_answered else messages, is_chat)
            if len(prompt) >= self.model.max_positions:
                raise ValueError(f"the prompt has {len(prompt)} tokens, the model {self.model.max_positions} positions")
            return prompt

        _, prompts, _ = read_rows(table, asked, drop_bad=False, with_gold=False)
        options = {"stop_ids": self._stop_ids(is_chat), "on_rows": on_rows}
        found = generate_all(model, prompts, self.config.max_new_tokens, batch_size, **options)
        if written is not None:
            written.update(zip(map(tuple, prompts), found, strict=True))
        return [{"response": self._text(ids)} for ids in found]

    def _conversations(self, table: Table, with_gold: bool = True) -> tuple[Callable[[int], list[Message]], bool]:
        """What reads the messages of a row, and whether they are written as a chat; without gold, those of a prompt
        without a response.
        """
        is_talk = self.config.template is None and self.config.messages in table.columns
        talks = table.column(self.config.messages, "task.messages") if is_talk else None
        turns = None if is_talk else self._turns(table, with_gold)

        def read(row: int) -> list[Message]:
            return checked_messages(talks.value(row) if is_talk else turns(row), "the conversation")

        return read, is_talk or not self.chat.is_default

    def _turns(self, table: Table, with_gold: bool) -> Callable[[int], list[Message]]:
        """What reads a prompt and its response."""
        prompt = self._prompts(table)
        response = table.column(self.config.response, "task.response").text if with_gold else None

        def read(row: int) -> list[Message]:
            asked = [{"role": "user", "content": prompt(row)}]
            return asked + [{"role": "assistant", "content": response(row)}] if response else asked

        return read

    def _prompts(self, table: Table) -> Callable[[int], str]:
        """What reads the prompt of a row: a column, or the template filled with several."""
        if self.template is None:
            return table.column(self.config.prompt, "task.prompt").text
        parts = [(text, table.column(name, "task.template") if name else None) for text, name in self.template]
        return lambda row: "".join(text + (str(column.value(row)) if column else "") for text, column in parts)

    def _encoded(self, messages: list[Message], is_chat: bool) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a conversation, and which are a response's; `ValueError` where it cannot be learnt from."""
        if not _last_answer(messages):
            raise ValueError("the conversation has no answer, a message of the assistant after another one")
        ids, is_response = self.chat.encode(messages) if is_chat else self._joined(*(m["content"] for m in messages))
        if len(ids) > self.seq_len + 1:  # the last one is predicted, not read
            raise ValueError(f"the conversation has {len(ids)} tokens, train.seq_len={self.seq_len} takes "
                             f"{self.seq_len + 1}")  # fmt: skip
        return np.array(ids, dtype=np.int32), np.array(is_response, dtype=np.int8)

    def _joined(self, prompt: str, response: str) -> tuple[list[int], list[bool]]:
        """As `ChatFormat.encode`, of a prompt and its response without a template."""
        before, whole = self._before(prompt), prompt_ids(self.tokenizer, prompt + response)
        after = whole[len(before) :]
        if whole[: len(before)] != before:  # a token would reach over from one to the other
            after = self.tokenizer.encode(prompt[len(prompt.rstrip(" ")) :] + response)
        after = [*after, *self.tokenizer.suffix]
        return [*before, *after], [False] * len(before) + [True] * len(after)

    def _before(self, prompt: str) -> list[int]:
        return prompt_ids(self.tokenizer, prompt.rstrip(" "))

    def _prompt(self, messages: list[Message], is_chat: bool) -> list[int]:
        """The ids after which a response begins."""
        if is_chat:
            return self.chat.encode(messages, add_generation_prompt=True)[0]
        return self._before(messages[0]["content"])

    def _stop_ids(self, is_chat: bool) -> tuple[int, ...]:
        return self.chat.stop_ids if is_chat else end_ids(self.tokenizer)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).strip()

    def _packed(self, sizes: np.ndarray) -> list[np.ndarray]:
        """The numbers of the conversations in each row."""
        if self.packing != "best_fit":
            return list(np.arange(len(sizes))[:, None])
        numbers, rows = best_fit_decreasing(sizes, self.seq_len + 1)
        in_order = np.argsort(rows, kind="stable")
        return np.split(numbers[in_order], np.bincount(rows).cumsum()[:-1])


def _last_answer(messages: list[Message]) -> int:
    """The place of the last message of the assistant; 0 where none has another one before it."""
    return max((place for place, message in enumerate(messages) if message["role"] == "assistant"), default=0)


def _parsed(template: str) -> list[tuple[str, str | None]]:
    """A format string as parts: a text, and the name of the column after it (None at the end)."""
    try:
        parts = list(string.Formatter().parse(template))
        if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
            raise ValueError("only names of columns stand in braces")
        if not any(name for _, name, _, _ in parts):
            raise ValueError("it names no column")
    except ValueError as error:
        raise ValueError(f"task.template={template!r}: {error}; write it as \"task.template='Translate: {{text}}'\", "
                         "and a brace itself twice") from None  # fmt: skip
    return [(text, name) for text, name, _, _ in parts]
