"""python tools/train_tokenizer.py --input PATH... --vocab-size 8192 --output tokenizer.model

Trains a SentencePiece BPE tokenizer on text, JSONL (also .gz, .zst), Parquet, WebDataset tars, or folders of them. It
keeps every character (byte fallback, no normalisation), so decode(encode(x)) == x on any text without a literal U+2581.
The same input gives the same file.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from pretrain.cli import run_tool
from pretrain.examples.decompress import is_compressed
from pretrain.files import check_new_folder, write_atomically
from pretrain.prepare.documents import Counts, is_held_out, read_documents
from pretrain.prepare.finding import InputFile, find_files
from pretrain.stream.order import hash_key
from pretrain.tokenizer.sentencepiece import train
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

PIECE_CHARS = 1000  # the text is sampled and trained on in runs of lines of about this length
COMPRESSION = 4  # a guess at what .gz and .zst save, to choose how much to sample


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.monotonic()
    output = Path(args.output)
    if output.exists():
        what = "is a folder: name a file in it" if output.is_dir() else "exists already: delete it"
        raise ValueError(f"{output} {what}, or choose another --output")
    check_new_folder(output)
    found = find_files(args.input, args.include, args.exclude)
    for note in found.notes():
        print(f"note: {note}")
    counts = Counts()
    texts = sample(found.files, args.text_key, int(args.max_mb * 1e6), args.val_fraction, counts)
    size = sum(len(text.encode()) for text in texts)
    if notes := counts.summary():
        print(f"note: {notes}")
    print(f"training {args.vocab_size} pieces on {size / 1e6:.1f} MB of text: about {1 + size / 3e6:.0f} s", flush=True)
    model = train(texts, args.vocab_size)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, model)
    report(load_tokenizer(output), texts, time.monotonic() - start)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a SentencePiece BPE tokenizer that keeps every character.",
        epilog="example: python tools/train_tokenizer.py --input my_texts/ --vocab-size 8192 --output tokenizer.model",
    )
    what = "text, JSONL, Parquet, tar files, or folders of them"
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help=what)
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="pieces, with 263 special and bytes")
    parser.add_argument("--output", required=True, metavar="FILE", help="the tokenizer to write")
    key = "field of a JSON object or Parquet column (default: text)"
    parser.add_argument("--text-key", default="text", metavar="KEY", help=key)
    parser.add_argument("--include", nargs="+", default=[], metavar="GLOB", help="files of folders to take")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="files and subfolders to leave out")
    parser.add_argument("--max-mb", type=float, default=20, metavar="MB", help="train on a sample of this size (20)")
    leave_out = "leave out the documents that write_shards.py --val-fraction F holds out"
    parser.add_argument("--val-fraction", type=float, default=0.0, metavar="F", help=leave_out)
    args = parser.parse_args(argv)
    if args.max_mb <= 0 or args.vocab_size < 1:
        parser.error("--max-mb and --vocab-size must be positive")
    if not 0 <= args.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    return args


def sample(files: list[InputFile], text_key: str, max_bytes: int, val_fraction: float, counts: Counts) -> list[str]:
    """About `max_bytes` of the files' text in pieces spread evenly over all of it; the same ones every time."""
    on_disk = sum(file.bytes for file in files)
    expected = sum(file.bytes * (COMPRESSION if is_compressed(file.path) else 1) for file in files)
    share = max_bytes / max(expected, 1)
    texts, size, number = [], 0, 0
    with tqdm(total=on_disk, desc="reading", unit="B", unit_scale=True) as bar:
        for document in read_documents(files, text_key, counts):
            held_out = is_held_out(document.text.encode(), val_fraction)
            for piece in () if held_out else pieces(document.text):
                number += 1
                if hash_key(number) < share * 2**64:
                    texts.append(piece)
                    size += len(piece.encode())
            bar.update(document.input_bytes)
            if size > 2 * max_bytes:  # compressed better than guessed
                break
    return texts


def pieces(text: str) -> Iterator[str]:
    """Cut a text into runs of whole lines of about PIECE_CHARS; a longer line is cut where it falls."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS, start + 4 * PIECE_CHARS)
        end = end + 1 if end >= 0 else min(start + 4 * PIECE_CHARS, len(text))
        yield text[start:end]
        start = end


def report(tokenizer: Tokenizer, texts: list[str], seconds: float) -> None:
    """Print what was made."""
    part = texts[:: max(1, len(texts) // 1000)]
    tokens = sum(map(len, tokenizer.encode_batch(part, num_threads=1)))
    ratio = sum(len(text.encode()) for text in part) / tokens
    print(
        f"wrote {tokenizer.path}: {tokenizer.vocab_size} pieces, {ratio:.2f} bytes a token on the training text, "
        f"sha256 {tokenizer.sha256[:12]}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    run_tool(main, tells=True)
