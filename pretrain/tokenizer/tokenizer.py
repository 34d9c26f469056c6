"""Tokenizers, of two kinds with one interface: of SentencePiece, and Hugging Face's fast ones."""

from pathlib import Path
from typing import Protocol

import numpy as np

from pretrain.tokenizer import huggingface, texts
from pretrain.tokenizer.sentencepiece import SentencePieceTokenizer
from pretrain.tokenizer.texts import TOKENIZER_NAMES

TRICKY_TEXTS = texts.TRICKY_TEXTS  # to compare tokenizers on
_SLOW = ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", huggingface.CONFIG_NAME)


class Tokenizer(Protocol):
    """What a tokenizer is to all others. Text that looks like a special token stays text; special ids are no text."""

    path: Path
    sha256: str  # of file_bytes
    file_name: str  # the name of its file, in shards and runs: one of TOKENIZER_NAMES
    file_bytes: bytes
    vocab_size: int  # the highest id and one more
    special_ids: dict[str, int]  # those it has of unk bos eos pad mask cls sep
    special_texts: dict[str, str]  # the same as a chat template writes them
    chat_template: str | None  # in Jinja; None where it brings none
    prefix: list[int]  # what stands before a document, perhaps nothing
    suffix: list[int]  # what stands after a document, always something
    between: list[int]  # what stands between two texts of a pair: prefix, a, between, b, suffix
    eos: int | None  # what ends a generated text
    mask: int | None
    is_exact: bool  # whether decode(encode(x)) == x for every x (but for a literal U+2581)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without prefix and suffix."""

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """The ids of many texts, with `num_threads` threads."""

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of many texts, int32 each, on this thread; other threads of Python run meanwhile."""

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, int32[n], and the characters [start, end) of the text that each stands for, int32[n, 2].

        Spaces around a word may be in the spans or not: whoever cuts an answer out trims it.
        """

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""

    def byte_lengths(self) -> np.ndarray | None:
        """How many bytes of UTF-8 text each id stands for, int64[vocab_size]: bits per byte are exact with them.

        None where decode(encode(x)) loses some of the text.
        """

    def continues_word(self) -> np.ndarray:
        """Which ids go on with the word of the id before, bool[vocab_size]."""

    def special_tokens(self) -> list[texts.SpecialToken]:
        """What a chat template may write that is no text."""

    def inside(self) -> "Tokenizer":
        """The same for text that does not begin a whole one, in front of which some put a space."""

    def hf_files(self, max_positions: int, ends: bool = False) -> dict[str, bytes]:
        """The files (tokenizer.json, ...) from which transformers' AutoTokenizer gives the same ids, with the prefix
        before a text and, where it `ends`, the suffix after it.
        """


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from its file, or from a folder: of a run, of shards, or of Hugging Face (with a tokenizer.json)."""
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise ValueError(f"{path} is not there: train a tokenizer with tools/train_tokenizer.py, or name the folder of "
                         "a Hugging Face tokenizer")  # fmt: skip
    if path.name in (huggingface.HF_NAME, huggingface.CONFIG_NAME):
        return _from_folder(path.parent)
    with open(path, "rb") as file:
        is_json = file.read(1) == b"{"
    return huggingface.FastTokenizer(path, path.read_bytes()) if is_json else SentencePieceTokenizer(path)


def _from_folder(folder: Path) -> Tokenizer:
    names = [name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    if (folder / huggingface.HF_NAME).is_file():
        return huggingface.FastTokenizer(folder / huggingface.HF_NAME, huggingface.pack(folder))
    is_hugging_face = any((folder / name).is_file() for name in _SLOW)
    if is_hugging_face and huggingface.FILE_NAME not in names:
        raise ValueError(
            f"{folder} holds a slow tokenizer, without {huggingface.HF_NAME}: convert it in Python with "
            f"transformers.AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    if len(names) > 1:
        raise ValueError(f"{folder} holds {' and '.join(names)}: name the one you mean")
    if names:
        return load_tokenizer(folder / names[0])
    for split in ("train", "val"):
        if any((folder / split / name).is_file() for name in TOKENIZER_NAMES):
            return _from_folder(folder / split)
    names = ", ".join((*TOKENIZER_NAMES, huggingface.HF_NAME))
    raise ValueError(f"{folder} holds no tokenizer ({names}): name its file or its folder")
