"""Examples for every task out of real text that is always there: the source code of Python's standard library."""

import ast
import hashlib
import io
import json
import os
import shutil
import tokenize
from pathlib import Path

MODULES = ("json", "email", "http", "unittest")
KINDS = {tokenize.NAME: "NAME", tokenize.NUMBER: "NUMBER", tokenize.STRING: "STRING"}


def sources() -> list[tuple[str, str]]:
    """(module, source code) of some packages, in order."""
    root = Path(os.__file__).parent
    return [(name, file.read_text()) for name in MODULES for file in sorted((root / name).glob("*.py"))]


def functions() -> list[dict]:
    """Every documented function, well mixed: its module, name, arguments, first sentence and code."""
    found = []
    for module, source in sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                code = ast.get_source_segment(source, node) or ""
                arguments = code.partition("(")[2].partition(")")[0]
                found.append({"module": module, "name": node.name, "arguments": arguments, "code": code[:300],
                              "text": text.splitlines()[0]})  # fmt: skip
    return sorted(found, key=lambda row: hashlib.sha256(row["code"].encode()).digest())


def tagged_lines() -> list[dict]:
    """Lines of code as words with the kinds that Python's own tokenizer gives them; a string of several words is one
    span.
    """
    found = []
    for _, source in sources()[:12]:
        for line in source.splitlines():
            try:
                tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
            except (tokenize.TokenError, SyntaxError):
                continue
            words, tags = [], []
            for token in tokens:
                for number, word in enumerate(token.string.split()):
                    kind = KINDS.get(token.type)
                    words.append(word)
                    tags.append("O" if kind is None else f"{'I' if number else 'B'}-{kind}")
            if len(words) > 2:
                found.append({"tokens": words, "tags": tags})
    return found


def questions(known: list[dict]) -> list[dict]:
    """What the arguments of a function are, answered by its code."""
    found = []
    for number, row in enumerate(known):
        answer, start = row["arguments"].strip(), row["code"].find(row["arguments"].strip())
        if answer and start >= 0:
            found.append({"id": str(number), "question": f"What does {row['name']} take?", "context": row["code"],
                          "answers": {"text": [answer], "answer_start": [start]}})  # fmt: skip
    return found


def kinds(row: dict) -> list[str]:
    """What is true of a function, often nothing."""
    told = {"private": row["name"].startswith("_"), "short": len(row["code"]) < 200, "long name": len(row["name"]) > 12}
    return [name for name, is_so in told.items() if is_so]


def talk(row: dict) -> list[dict]:
    """A conversation on a function."""
    said = (row["name"], row["text"][:40], "Where?", row["module"])
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)]


def write_examples(folder: Path) -> dict[str, Path]:
    """Name -> a folder with its train.jsonl and val.jsonl. The names are those of tasks, and of variants of some."""
    known = functions()
    tables = {
        "classification": [{"text": row["text"], "label": row["module"]} for row in known],
        "token_classification": tagged_lines(),
        "extractive_qa": questions(known),
        "instruct": [{"prompt": row["text"], "response": row["name"]} for row in known],
        "language_model": [{"text": row["code"]} for row in known],
        "embedding": [{"query": row["name"].replace("_", " "), "document": row["text"]} for row in known],
        "pairs": [{"text": row["name"], "code": row["code"], "label": kinds(row)} for row in known],
        "conversations": [{"messages": talk(row)} for row in known],
    }
    for name, rows in tables.items():
        (folder / name).mkdir(parents=True)
        for split, part in (("train", rows[:96]), ("val", rows[96:119])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / name / f"{split}.jsonl").write_text(text)
    write_scored(folder / "embedding", folder / "scored", known[96:119])
    return {path.name: path for path in folder.iterdir()}


def write_scored(pairs: Path, folder: Path, known: list[dict]) -> None:
    """The same pairs to learn from; held-out ones scored by whether they belong together."""
    shutil.copytree(pairs, folder)
    rows = [{"query": row["name"], "document": known[other]["text"], "score": int(number == other)}
            for number, row in enumerate(known) for other in (number, number - 1)]  # fmt: skip
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
