"""Small data sets for tests: random documents written through the real writer."""

import random
from pathlib import Path

import numpy as np

from pretrain.shards import manifest as manifests
from pretrain.shards.manifest import Manifest
from pretrain.shards.writer import DatasetWriter
from pretrain.stream.order import hash_key, splitmix64

SPECIAL_IDS = {"unk": 0, "bos": 1, "eos": 2, "pad": 3, "mask": 4, "cls": 5, "sep": 6}


def random_documents(count: int, longest: int, vocab_size: int = 500, seed: int = 0) -> list[np.ndarray]:
    """Documents of 2 to `longest` tokens, bos and eos included; the same with every version of NumPy."""
    documents = []
    for size in (splitmix64(hash_key(seed), count) % np.uint64(longest - 1)).tolist():
        inner = 7 + splitmix64(hash_key(seed, len(documents)), size) % np.uint64(vocab_size - 7)
        documents.append(np.concatenate([[1], inner.astype(np.int64), [2]]))
    return documents


def write_dataset(
    folder: Path,
    documents: list[np.ndarray],
    chunk_tokens: int = 1000,
    shard_tokens: int = 4000,
    dtype: str = "<u2",
    vocab_size: int = 500,
) -> Manifest:
    """Write documents as a data set, and load it."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = DatasetWriter(folder, dtype, chunk_tokens, shard_tokens)
    for tokens in documents:
        writer.add(tokens, text_bytes=len(tokens) - 2)
    writer.finish("0" * 64, vocab_size, SPECIAL_IDS)
    return manifests.load(folder)


def python_like_text(lines: int, seed: int = 0) -> str:
    """Text with words, indentation and digits, enough to train a small tokenizer on."""
    rng = random.Random(seed)
    names = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(300)]
    out = []
    for _ in range(lines):
        indent = "    " * rng.randint(0, 3)
        out.append(f"{indent}{rng.choice(names)} = {rng.choice(names)}({rng.randint(0, 999)}, {rng.choice(names)})\n")
        if rng.random() < 0.2:
            out.append(f"\n\ndef {rng.choice(names)}():\n")
    return "".join(out)


def spans_by_bytes(text: str, lengths: np.ndarray) -> list[tuple[int, int]]:
    """The characters that tokens stand for, when they hold `lengths` bytes each of the text in UTF-8, in its order."""
    char_of_byte = np.repeat(np.arange(len(text)), [len(char.encode()) for char in text])
    ends = np.cumsum(lengths)
    return [(int(char_of_byte[start]), int(char_of_byte[end - 1]) + 1)
            for start, end in zip(ends - lengths, ends, strict=True)]  # fmt: skip
