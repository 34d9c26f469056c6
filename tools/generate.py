"""python tools/generate.py runs/NAME --prompt "def " --max-tokens 100

Continues text with a model: that of a run (its newest checkpoint), of a checkpoint, or of a Hugging Face folder.

  --prompt TEXT                    continues a prompt, printing as it goes
  --input FILE --output FILE       continues every prompt of a file, many at once
  --chat                           talks: each line is a message, the answers keep the conversation; Ctrl-D ends it
  --chat --prompt TEXT             answers a message; --chat --input FILE each message of a file

What is drawn depends on the seed and the number of the prompt, not on the batches.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pretrain import dist, hardware
from pretrain.checkpoint.load import run_of
from pretrain.cli import check_text, run_tool
from pretrain.examples.tables import read_table
from pretrain.files import check_output, write_output
from pretrain.hub import convert
from pretrain.inference import generate
from pretrain.tokenizer.chat import ChatFormat
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    check_output(args.output)
    prompts = read_prompts(args.input, args.text_key) if args.input else args.prompt or [""]
    model, tokenizer = load(args.run, args.precision)
    if args.chat and convert.task_of(args.run).get("chat") is False:
        print(f"({args.run} was tuned on prompts as they are: without --chat it reads what it has learnt from)",
              file=sys.stderr)  # fmt: skip
    talk = Talk(model, tokenizer, args)
    if args.input:
        rows = continue_all(talk, prompts, args.batch_size)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if args.output:
            write_output(args.output, lines.encode())
        else:
            sys.stdout.write(lines)
    elif args.chat and not args.prompt:
        converse(talk)
    else:
        for row, prompt in enumerate(prompts):
            talk.say(talk.ids([prompt]), row, "" if args.chat else prompt)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, one of its checkpoints, or a Hugging Face folder")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", action="append", help="the text to continue (default: a new text); may be repeated")
    what.add_argument("--input", type=Path, help="a file of prompts: .txt, one a line, or .jsonl, .csv, .parquet, ...")
    add("--text-key", default="prompt", help="the column of --input that holds them (default %(default)s)")
    add("--output", type=Path, help="where the continuations of --input go, as JSONL (default: to the terminal)")
    add("--batch-size", type=int, default=16, help="prompts of --input at once (default %(default)s)")
    add("--max-tokens", type=int, default=128, help="stop after this many tokens (default %(default)s)")
    usual = generate.SAMPLED
    add("--temperature", type=float, default=usual.temperature, help="0: the likeliest token (default %(default)s)")
    add("--top-p", type=float, default=usual.top_p, help="nucleus sampling's mass (default %(default)s)")
    add("--top-k", type=int, default=0, help="sample from so many likeliest tokens (default: all)")
    add("--seed", type=int, default=0, help="the same seed writes the same text (default %(default)s)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--chat", action="store_true", help="prompts are messages, written by the tokenizer's chat template")
    add("--system", metavar="TEXT", help="what the system says before a chat")
    add("--precision", choices=("auto", "bf16", "fp32"), default="fp32", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.output and not args.input:
        parser.error("--output is for the prompts of --input")
    if args.system and not args.chat:
        parser.error("--system is for --chat")
    if args.batch_size < 1 or "" in args.stop:
        parser.error("--batch-size must be at least 1, and --stop some text")
    return args


def read_prompts(path: Path, column: str) -> list[str]:
    """The prompts of a file: the lines of a .txt, else a column of a table."""
    if path.suffix != ".txt":
        return read_table(str(path), "--input").texts(column, "--text-key")
    try:
        prompts = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from None
    if prompts == [""]:
        raise ValueError(f"{path} has no lines: write a prompt on each")
    return prompts


def load(path: Path, precision: str) -> tuple[torch.nn.Module, Tokenizer]:
    device = dist.device_of()
    model = convert.load_model(path).to(device, hardware.dtype_for(precision, device))
    return model, load_tokenizer(run_of(path))


class Talk:
    """A model, and how it is to write: texts, or answers to messages."""

    def __init__(self, model: torch.nn.Module, tokenizer: Tokenizer, args: argparse.Namespace):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, args.max_tokens
        self.sampling = generate.Sampling(args.temperature, args.top_p, args.top_k, args.seed)
        self.chat = ChatFormat(tokenizer) if args.chat else None
        self.system = [{"role": "system", "content": args.system}] if args.system else []
        self.ends = {"stop_ids": self.chat.stop_ids if self.chat else None, "stops": args.stop}

    def ids(self, said: list[str], place: str = "the conversation") -> list[int]:
        """What the model continues: a text, or the messages of a user and the assistant in turn."""
        if self.chat is None:
            return generate.prompt_ids(self.tokenizer, said[-1])
        roles = ("user", "assistant") * len(said)
        messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
        return self.chat.encode([*self.system, *messages], add_generation_prompt=True, place=place)[0]

    def fitting(self, said: list[str]) -> list[str]:
        """The end of a conversation, from a question on, that leaves room for the answer; the last message must fit."""
        generate.check(self.model, [self.ids(said[-1:])], self.max_tokens)
        limit, kept = self.model.trunk.config.max_positions, said
        while len(kept) > 1 and len(self.ids(kept)) + self.max_tokens > limit:
            kept = kept[2:]
            print("(the oldest question and its answer are forgotten: the conversation is too long)", file=sys.stderr)
        return kept

    def say(self, ids: list[int], row: int, before: str = "") -> str:
        """Print `before` and what the model writes after these ids, as it comes; the latter is returned."""
        arguments = (self.model, self.tokenizer, ids, self.max_tokens, self.sampling)
        pieces, text = generate.continue_text(*arguments, **self.ends, row=row), ""
        sys.stdout.write(before)
        for piece in pieces:
            piece = piece if text or self.chat is None else piece.lstrip()  # templates put a space before an answer
            text += piece
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
        return text


def continue_all(talk: Talk, prompts: list[str], batch_size: int) -> list[dict]:
    """{"prompt", "text", "tokens"} of each prompt."""
    ids = [talk.ids([prompt], f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
    started = time.perf_counter()
    with tqdm(total=len(ids), desc="generating", unit=" prompts") as bar:
        options = {**talk.ends, "on_rows": bar.update}
        arguments = (ids, talk.max_tokens, batch_size, talk.sampling)
        found = generate.generate_texts(talk.model, talk.tokenizer, *arguments, **options)
    tokens, seconds = sum(count for _, count in found), time.perf_counter() - started
    print(f"{tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} a second", file=sys.stderr)
    return [{"prompt": prompt, "text": text.strip() if talk.chat else text, "tokens": count}
            for prompt, (text, count) in zip(prompts, found, strict=True)]  # fmt: skip


def converse(talk: Talk) -> None:
    """Answer each line of the terminal until it ends."""
    said: list[str] = []
    for turn in itertools.count():
        try:
            message = input("> " if sys.stdin.isatty() else "").strip()
            check_text(message, "the message")
        except EOFError:
            return
        except ValueError as error:
            print(f"({error})", file=sys.stderr)
            continue
        if not message:
            continue
        answer, problem, kept = "", "no answer", []
        try:
            kept = talk.fitting([*said, message])
            answer = talk.say(talk.ids(kept), turn).strip()
        except ValueError as error:  # the message alone is too long, or the template refuses
            problem = str(error)
        if answer:
            said = [*kept, answer]
        else:
            print(f"({problem})", file=sys.stderr)


if __name__ == "__main__":
    run_tool(main)
