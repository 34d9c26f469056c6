"""python tools/search.py runs/NAME --texts my_text --index my.index
python tools/search.py runs/NAME --index my.index --query "how to sort a list" --top 5

Search by meaning: the first command cuts texts (files or folders, as for tools/write_shards.py) into passages and
writes their vectors into a folder, the second finds those nearest to a question. The model is a run tuned with
task=embedding (or any other, less well), one of its checkpoints, or a Hugging Face folder; an index belongs to the
weights that made it. Many questions: --queries FILE.jsonl --output FILE.jsonl.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pretrain import dist
from pretrain.checkpoint.load import checkpoint_of, run_of
from pretrain.checkpoint.manifest import MANIFEST
from pretrain.cli import run_tool
from pretrain.config import compose
from pretrain.examples.tables import read_table
from pretrain.files import check_output, sha256_of_file, write_output
from pretrain.hub import convert
from pretrain.inference.vectors import Index, library, write_index
from pretrain.prepare.documents import Counts, read_documents
from pretrain.prepare.finding import find_files
from pretrain.tasks.text_vectors import embed_texts
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

LONGEST = 512  # tokens of a passage where the model does not say what it was tuned on
SHOWN = 300  # characters of a passage on the terminal


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run's folder, one of its checkpoints, or a Hugging Face folder")
    parser.add_argument("--index", type=Path, required=True, help="the index's folder")
    parser.add_argument("--texts", nargs="+", metavar="PATH", help="make the index of these files and folders")
    parser.add_argument("--text-key", default="text", help="--texts: field of JSONL or Parquet (default %(default)s)")
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


def build(args: argparse.Namespace) -> None:
    """Cut, embed, write."""
    library()
    with convert.staged(args.index) as folder:
        path = args.model if (args.model / "config.json").is_file() else checkpoint_of(args.model)
        model, tokenizer, longest = open_model(path)
        limit = min(args.max_tokens or longest, model.trunk.config.max_positions)
        passages = read_passages(args.texts, args.text_key, tokenizer, limit)
        texts = [passage["text"] for passage in passages]
        vectors = embed_with_bar(model, tokenizer, texts, limit, args.batch_size)
        facts = {"model": str(args.model), "weights_sha256": weights_sha256(path), "max_tokens": limit}
        write_index(folder, vectors, passages, facts)
    print(f"wrote {args.index}: {len(passages):,} passages of at most {limit} tokens, {vectors.shape[1]} numbers each")


def search(args: argparse.Namespace) -> None:
    """Open, embed, look."""
    check_output(args.output)
    index = Index(args.index)
    if weights_sha256(args.model) != index.facts["weights_sha256"]:
        raise ValueError(f"{args.index} was made with other weights ({index.facts['model']}) than {args.model}: search "
                         "with those, or make an index of your own with --texts")  # fmt: skip
    queries = args.query
    if args.queries:
        queries = queries + read_table(args.queries, "--queries").texts(args.query_key, "--query-key")
    model, tokenizer, _ = open_model(args.model)
    vectors = embed_with_bar(model, tokenizer, queries, index.facts["max_tokens"], args.batch_size)
    results = index.search(vectors, args.top)
    found = [{"query": query, "results": rows} for query, rows in zip(queries, results, strict=True)]
    if args.output:
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in found)
        write_output(args.output, "".join(lines).encode())
        print(f"wrote {args.output}: {len(found):,} queries")
    else:
        show(found)


def open_model(path: Path) -> tuple[torch.nn.Module, Tokenizer, int]:
    """The model on the GPU if there is one, its tokenizer, and the tokens of the texts that it knows."""
    folder = run_of(path)
    config = folder / "config.yaml"
    if config.is_file():
        longest = compose.read(config).train.seq_len
    else:
        longest = convert.task_of(path).get("seq_len", LONGEST)  # a Hugging Face folder's own limit
    return convert.load_model(path).to(dist.device_of()), load_tokenizer(folder), longest


def read_passages(inputs: Sequence[str], text_key: str, tokenizer: Tokenizer, max_tokens: int) -> list[dict[str, str]]:
    """The texts cut into pieces that the model can take whole, each with where it is from."""
    files, counts, passages = find_files(inputs).files, Counts(), []
    room = max_tokens - len(tokenizer.prefix) - len(tokenizer.suffix)
    if room < 1:
        raise ValueError(f"--max-tokens={max_tokens} leaves no room for text: take more")
    with tqdm(total=sum(file.bytes for file in files), desc="reading", unit="B", unit_scale=True) as bar:
        for document in read_documents(files, text_key, counts):
            _, spans = tokenizer.encode_spans(document.text)
            for start in range(0, len(spans), room):
                first, last = spans[start, 0], spans[min(start + room, len(spans)) - 1, 1]
                if text := document.text[first:last].strip():
                    passages.append({"source": document.source, "text": text})
            bar.update(document.input_bytes)
    if not passages:
        raise ValueError(f"{' '.join(inputs)} holds no text")
    if summary := counts.summary():
        print(summary, file=sys.stderr)
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
            text = " ".join(row["text"].split())
            print(f"{rank:4} {row['score']:7.3f}  {row['source']}\n      {text[:SHOWN]}{'…' * (len(text) > SHOWN)}")


if __name__ == "__main__":
    run_tool(main)
