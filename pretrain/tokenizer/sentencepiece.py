"""SentencePiece tokenizers: the model file, its training, and the same tokenizer as files for Hugging Face.

tools/train_tokenizer.py trains them: BPE with byte fallback and no normalisation, so that decode(encode(x)) == x on any
text. The one exception is a literal U+2581 (the sign that SentencePiece writes a space with inside): it comes back as a
space. Special pieces are control symbols: text that looks like one ("<s>") stays text.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from pretrain.tokenizer.texts import SpecialToken, continues_word

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
SPACE = "\u2581"


class SentencePieceTokenizer:
    """A trained SentencePiece model with the special pieces of this project; `ValueError` for any other file."""

    file_name = "tokenizer.model"
    is_exact = True
    special_texts = SPECIAL_PIECES
    chat_template = None

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is not there: train a tokenizer with tools/train_tokenizer.py")
        self.file_bytes = self.path.read_bytes()
        self.sha256 = hashlib.sha256(self.file_bytes).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.file_bytes)
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
        self.prefix, self.suffix = [ids["bos"]], [ids["eos"]]
        self.between = self.suffix
        self.eos, self.mask = ids["eos"], ids["mask"]

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special ids are added."""
        return self._model.encode(text, out_type=int)

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """The ids of many texts, with `num_threads` threads."""
        return self._model.encode(texts, out_type=int, num_threads=num_threads)

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of many texts, int32 each, on this thread; other threads of Python run meanwhile."""
        return self._model.encode(texts, out_type="numpy", num_threads=1)

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, int32[n], and the characters [start, end) of the text that each stands for, int32[n, 2].

        The bytes of one character share its span; the space before a word is of the word's first piece.
        """
        found = self._model.encode(text, return_type="offset_mapping")
        spans = np.array(found["offsets"], dtype=np.int32).reshape(-1, 2)
        spans[:, 1] = np.maximum(spans[:, 1], spans[:, 0] + 1)  # only the last byte of a character has it otherwise
        return np.array(found["ids"], dtype=np.int32), spans

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids stand for no text."""
        return self._model.decode([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of UTF-8 text each id stands for, int64[vocab_size]: special ids 0, single bytes 1.

        The sum over encode(x) is len(x.encode()) for every x without a U+2581.
        """
        return np.array([len(piece) for piece in self._bytes()], dtype=np.int64)

    def continues_word(self) -> np.ndarray:
        """Which ids go on with the word of the id before, bool[vocab_size]; special ids do not."""
        return np.array([continues_word(piece) for piece in self._bytes()])

    def special_tokens(self) -> list[SpecialToken]:
        """What a chat template may write that is no text."""
        return [SpecialToken(piece, self.special_ids[name]) for name, piece in SPECIAL_PIECES.items()]

    def inside(self) -> "SentencePieceTokenizer":
        """The same for text that does not begin a whole one: no space is put in front of either."""
        return self

    def hf_files(self, max_positions: int, ends: bool = False) -> dict[str, bytes]:
        """The same tokenizer for transformers' AutoTokenizer, which puts the prefix in front of a text, and where it
        `ends` the suffix after it.
        """
        roles = {f"{name}_token": piece for name, piece in SPECIAL_PIECES.items()}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", **roles, "model_max_length": max_positions,
            "split_special_tokens": True,  # in a text, "<s>" is text, as here
            "clean_up_tokenization_spaces": False, "model_input_names": ["input_ids", "attention_mask"],
        }  # fmt: skip
        contents = {"tokenizer.json": self._hf_tokenizer(ends), "tokenizer_config.json": config,
                    "special_tokens_map.json": roles}  # fmt: skip
        return {name: (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()
                for name, content in contents.items()}  # fmt: skip

    def _bytes(self) -> list[bytes]:
        """What each id stands for; nothing for special ids."""
        model, found = self._model, []
        for i in range(self.vocab_size):
            piece = model.id_to_piece(i)
            if model.is_byte(i):
                found.append(bytes([int(piece[1:-1], 16)]))
            else:
                is_special = model.is_control(i) or model.is_unknown(i)
                found.append(b"" if is_special else piece.replace(SPACE, " ").encode())
        return found

    def _hf_tokenizer(self, ends: bool) -> dict:
        """The content of tokenizer.json."""
        model = self._model
        pieces = [model.id_to_piece(i) for i in range(self.vocab_size)]
        special = [{"id": id_, "content": SPECIAL_PIECES[name], "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": True} for name, id_ in self.special_ids.items()]  # fmt: skip
        bos, eos = SPECIAL_PIECES["bos"], SPECIAL_PIECES["eos"]
        first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        second = [{"SpecialToken": {"id": eos, "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
        last = second[:1] if ends else []
        template = {
            "type": "TemplateProcessing", "single": first + last,
            "pair": first + second + [{"SpecialToken": {"id": eos, "type_id": 1}}] * ends,
            "special_tokens": {piece: {"id": piece, "ids": ids, "tokens": [piece]}
                               for piece, ids in ((bos, self.prefix), (eos, self.between))},
        }  # fmt: skip
        to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
        return {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            "pre_tokenizer": None, "post_processor": template,
            "decoder": {"type": "Sequence", "decoders": [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": SPECIAL_PIECES["unk"], "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": self._merges(pieces),
            },
        }  # fmt: skip

    def _merges(self, pieces: list[str]) -> list[list[str]]:
        """The pairs that may become one piece, the likeliest piece first: what SentencePiece's scores say."""
        model = self._model
        others = (model.is_control, model.is_unknown, model.is_byte)
        plain = [i for i in range(self.vocab_size) if not any(is_other(i) for is_other in others)]
        known, merges = {pieces[i] for i in plain}, []
        for i in sorted(plain, key=lambda i: (-model.get_score(i), i)):
            halves = ((pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i])))
            merges += [list(pair) for pair in halves if pair[0] in known and pair[1] in known]
        return merges


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
