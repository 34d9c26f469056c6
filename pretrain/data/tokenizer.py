"""SentencePiece tokenizers: load, hash, special ids, and the bytes of text behind each id.

tools/train_tokenizer.py trains them: BPE with byte fallback and no normalisation, so that decode(encode(x)) == x on any
text. The one exception is a literal U+2581 (the sign that SentencePiece writes a space with inside): it comes back as a
space. Special pieces are control symbols: text that looks like one ("<s>") stays text.
"""

import hashlib
import io
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

# name -> piece, in the order of their ids, 0 to 6; one tokenizer serves causal and masked models
SPECIAL_PIECES = {
    "unk": "<unk>",
    "bos": "<s>",
    "eos": "</s>",
    "pad": "<pad>",
    "mask": "<mask>",
    "cls": "<cls>",
    "sep": "<sep>",
}


class Tokenizer:
    """A trained SentencePiece model with the special pieces of this project; `ValueError` for any other file."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not there: train a tokenizer with tools/train_tokenizer.py")
        model = self.path.read_bytes()
        self.sha256 = hashlib.sha256(model).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"{self.path} is not a SentencePiece model: {error}") from None
        self.vocab_size: int = self._model.vocab_size()
        ids = {name: self._model.piece_to_id(piece) for name, piece in SPECIAL_PIECES.items()}
        for name, id_ in ids.items():
            if self._model.id_to_piece(id_) != SPECIAL_PIECES[name]:
                raise ValueError(
                    f"{self.path} has no piece {SPECIAL_PIECES[name]}: use a tokenizer of tools/train_tokenizer.py"
                )
        self.special_ids: dict[str, int] = ids
        self.unk, self.bos, self.eos, self.pad = ids["unk"], ids["bos"], ids["eos"], ids["pad"]
        self.mask, self.cls, self.sep = ids["mask"], ids["cls"], ids["sep"]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special ids are added."""
        return self._model.encode(text, out_type=int)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """The ids of many texts, with `num_threads` threads."""
        return self._model.encode(texts, out_type=int, num_threads=num_threads)

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of many texts, int32 each, on this thread; other threads of Python run meanwhile."""
        return self._model.encode(texts, out_type="numpy", num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids stand for no text."""
        return self._model.decode([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of UTF-8 text each id stands for, int64[vocab_size]: special ids 0, single bytes 1.

        The sum over encode(x) is len(x.encode()) for every x without a U+2581.
        """
        model = self._model
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for i in range(self.vocab_size):
            if model.is_byte(i):
                lengths[i] = 1
            elif not (model.is_control(i) or model.is_unknown(i)):
                lengths[i] = len(model.id_to_piece(i).replace("\u2581", " ").encode())
        return lengths


def train(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a tokenizer on pieces of text and return the model file; the same texts give the same bytes.

    Newlines inside a text count (the trainer drops one at its end), so give it several lines at a time: then pieces
    such as ")\\n" are learned. `ValueError` when the texts do not allow a vocabulary of this size.
    """
    model = io.BytesIO()
    specials = {f"{name}_{what}": value for name, id_ in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 3))
                for what, value in (("id", id_), ("piece", SPECIAL_PIECES[name]))}  # fmt: skip
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            control_symbols=[SPECIAL_PIECES[name] for name in ("mask", "cls", "sep")],
            byte_fallback=True,
            normalization_rule_name="identity",  # nmt_nfkc, the default, loses newlines and tabs
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # the indentation of code
            split_digits=True,
            max_sentence_length=1 << 24,  # longer texts would be left out without a word
            num_threads=4,  # the model file records it, so it may not depend on the machine
            minloglevel=2,
            **specials,
        )
    except RuntimeError as error:
        raise _explained(str(error), vocab_size) from None
    return model.getvalue()


def _explained(message: str, vocab_size: int) -> Exception:
    """SentencePiece's message for a mistake of the user as a `ValueError` with a remedy."""
    if most := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return ValueError(
            f"a vocabulary of {vocab_size} is too large for this text: use at most {most[1]}, or give more text"
        )
    if least := re.search(r"Vocabulary size is smaller than required_chars. \d+ vs (\d+)", message):
        return ValueError(
            f"a vocabulary of {vocab_size} is too small for the characters of this text: use more than {least[1]}"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return ValueError("there is no text to train a tokenizer on: check the input files")
    return RuntimeError(f"SentencePiece could not train: {message}")
