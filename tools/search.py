"""python tools/search.py runs/NAME --texts my_text --index my.index
python tools/search.py runs/NAME --index my.index --query "how to sort a list" --top 5

Search by meaning: the first command cuts texts (files or folders, as for tools/write_shards.py) into passages and
writes their vectors into a folder, the second finds those nearest to a question, and where they are from. With --show
title,url these columns of a table (JSONL, JSON, CSV, Parquet, ...) are kept, and shown with what is found. The model is
a run tuned with task=embedding (or any other, less well), one of its checkpoints, or a Hugging Face folder; an index
belongs to the weights that made it. Many questions: --queries FILE.jsonl --output FILE.jsonl.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pretrain import dist
from pretrain.checkpoint.load import checkpoint_of, run_of
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.cli import among, run_tool
from pretrain.config import compose
from pretrain.examples.tables import plain, read_table
from pretrain.files import check_output, sha256_of_file, write_output
from pretrain.hub import convert
from pretrain.inference.vectors import Index, library, write_index
from pretrain.prepare.documents import Counts, read_documents
from pretrain.prepare.finding import find_files
from pretrain.tasks.text_vectors import embed_texts
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

LONGEST = 512  # tokens of a passage where the model does not say what it was tuned on
SHOWN = 300  # characters of a passage, and of a column, on the terminal
Text = tuple[str, dict]  # and what each of its passages tells besides


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--index", type=Path, required=True, help="the index's folder")
    parser.add_argument("--texts", nargs="+", metavar="PATH", help="make the index of these files and folders")
    parser.add_argument("--text-key", default="text", help="--texts: field of JSONL or Parquet (default %(default)s)")
    parser.add_argument("--show", type=names, default=[], metavar="COLUMN,...", help="with --texts: other columns of "
                        "the table (of a table or a folder of tables then), to be kept; to search: which to show "
                        "(default: all)")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, help="--texts: of a passage (default: of the run's tuning)")
    parser.add_argument("--query", action="append", default=[], help="what to look for; may be given several times")
    parser.add_argument("--queries", help="a table of them, as FILE.jsonl")
    parser.add_argument("--query-key", default="query", help="--queries: the column (default %(default)s)")
    parser.add_argument("--top", type=int, default=10, help="passages of each query (default %(default)s)")
    parser.add_argument("--output", type=Path, help="write what is found to this .jsonl instead of the terminal")
    parser.add_argument("--batch-size", type=int, default=32, help="texts at once (default %(default)s)")
    args = parser.parse_args(argv)
    if bool(args.texts) == bool(args.query or args.queries):
        parser.error("give --texts to make an index, or --query or --queries to search in one")
    if min(args.top, args.batch_size, args.max_tokens or 1) < 1:
        parser.error("--top, --batch-size and --max-tokens must be at least 1")
    build(args) if args.texts else search(args)


def names(text: str) -> list[str]:
    """The names in title,url."""
    found = [name.strip() for name in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} names no columns: give title,url")
    return list(dict.fromkeys(found))


def build(args: argparse.Namespace) -> None:
    """Cut, embed, write."""
    library()
    found = rows_of(args) if args.show else texts_of(args)
    with convert.staged(args.index) as folder:
        path = args.model if (args.model / "config.json").is_file() else checkpoint_of(args.model)
        model, tokenizer, longest = open_model(path)
        limit = min(args.max_tokens or longest, model.trunk.config.max_positions)
        passages = cut(found, tokenizer, limit)
        if not passages:
            raise ValueError(f"{' '.join(args.texts)} holds no text")
        texts = [passage["text"] for passage in passages]
        vectors = embed_with_bar(model, tokenizer, texts, limit, args.batch_size)
        facts = {"model": str(args.model), "weights_sha256": weights_sha256(path), "max_tokens": limit}
        facts["columns"] = args.show
        write_index(folder, vectors, passages, facts)
    print(f"wrote {args.index}: {len(passages):,} passages of at most {limit} tokens, {vectors.shape[1]} numbers each")


def search(args: argparse.Namespace) -> None:
    """Open, embed, look."""
    check_output(args.output)
    index = Index(args.index)
    shown = columns_to_show(index, args)
    if weights_sha256(args.model) != index.facts["weights_sha256"]:
        raise ValueError(f"{args.index} was made with other weights ({index.facts['model']}) than {args.model}: search "
                         "with those, or make an index of your own with --texts")  # fmt: skip
    queries = args.query
    if args.queries:
        queries = queries + read_table(args.queries, "--queries").texts(args.query_key, "--query-key")
    model, tokenizer, _ = open_model(args.model)
    vectors = embed_with_bar(model, tokenizer, queries, index.facts["max_tokens"], args.batch_size)
    results = index.search(vectors, args.top)
    for row in chain.from_iterable(results):
        if shown:
            row["columns"] = {name: row["columns"][name] for name in shown if name in row["columns"]}
    found = [{"query": query, "results": rows} for query, rows in zip(queries, results, strict=True)]
    if args.output:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in found)
        write_output(args.output, "".join(lines).encode())
        print(f"wrote {args.output}: {len(found):,} queries")
    else:
        show(found)


def columns_to_show(index: Index, args: argparse.Namespace) -> list[str]:
    """The columns that --show names, or all that the index keeps; `ValueError` where it does not keep one."""
    kept = index.facts.get("columns", [])
    for name in args.show:
        if name not in kept:
            there = among(name, kept) or "none"
            raise ValueError(f"{args.index} keeps no column {name!r} (there is: {there}): it keeps those that --show "
                             "names when it is made with --texts")  # fmt: skip
    return args.show or kept


def open_model(path: Path) -> tuple[torch.nn.Module, Tokenizer, int]:
    """The model on the GPU if there is one, its tokenizer, and the tokens of the texts that it knows."""
    folder = run_of(path)
    config = folder / "config.yaml"
    if config.is_file():
        longest = compose.read(config).train.seq_len
    else:
        longest = convert.task_of(path).get("seq_len", LONGEST)  # a Hugging Face folder's own limit
    return convert.load_model(path).to(dist.device_of()), load_tokenizer(folder), longest


def texts_of(args: argparse.Namespace) -> Iterator[Text]:
    """The texts of files and folders, as tools/write_shards.py reads them, each with its source."""
    files, counts = find_files(args.texts).files, Counts()
    with tqdm(total=sum(file.bytes for file in files), desc="reading", unit="B", unit_scale=True) as bar:
        for document in read_documents(files, args.text_key, counts):
            yield document.text, {"source": document.source}
            bar.update(document.input_bytes)
    if summary := counts.summary():
        print(summary, file=sys.stderr)


def rows_of(args: argparse.Namespace) -> list[Text]:
    """The texts of tables, each with its source and the columns to be shown; rows without a text are passed over.

    `ValueError` where a column is in none of their rows, or a text is none.
    """
    table, found = read_table(args.texts, "--texts"), []
    texts = table.column(args.text_key, "--text-key")
    for name in args.show:
        table.column(name, "--show")
    for number, row in enumerate(table.rows):
        if row.get(args.text_key) is None:
            continue
        try:
            text = texts.text(number)
        except ValueError as error:
            raise ValueError(f"{table.place(number)}: {error}") from None
        told = {name: plain(row[name]) for name in args.show if name in row}
        found.append((text, {"source": table.place(number), "columns": told}))
    return found


def cut(found: Iterable[Text], tokenizer: Tokenizer, max_tokens: int) -> list[dict]:
    """The texts in pieces that the model can take whole, each with what is told of its text."""
    passages = []
    room = max_tokens - len(tokenizer.prefix) - len(tokenizer.suffix)
    if room < 1:
        raise ValueError(f"--max-tokens={max_tokens} leaves no room for text: take more")
    for whole, told in found:
        _, spans = tokenizer.encode_spans(whole)
        for start in range(0, len(spans), room):
            first, last = spans[start, 0], spans[min(start + room, len(spans)) - 1, 1]
            if text := whole[first:last].strip():
                passages.append({**told, "text": text})
    return passages


def embed_with_bar(
    model: torch.nn.Module, tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int, batch_size: int
) -> np.ndarray:
    with tqdm(total=len(texts), desc="embedding", unit=" texts") as bar:
        return embed_texts(model, tokenizer, texts, max_tokens, batch_size, bar.update)


def weights_sha256(path: Path) -> str:
    """What tells the weights of a model from all others: of a checkpoint, the hash of its manifest of hashes."""
    if not (path / "config.json").is_file():
        return sha256_of_file(checkpoint_of(path) / MANIFEST)
    files = sorted(path.glob("*.safetensors"))
    return hashlib.sha256("".join(sha256_of_file(file) for file in files).encode()).hexdigest()


def show(found: list[dict]) -> None:
    for entry in found:
        print(f"\n{entry['query']}")
        for rank, row in enumerate(entry["results"], 1):
            print(f"{rank:4} {row['score']:7.3f}  {row['source']}")
            for name, value in row.get("columns", {}).items():
                print(f"      {name}: {on_a_line(value)}")
            print(f"      {on_a_line(row['text'])}")


def on_a_line(value: Any) -> str:
    """What the terminal shows of it."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).split())
    return text[:SHOWN] + "…" * (len(text) > SHOWN)


if __name__ == "__main__":
    run_tool(main, kept="nothing was written")
