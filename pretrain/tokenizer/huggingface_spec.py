"""What a Hugging Face tokenizer.json says of its tokens: the bytes of text behind each, and whether any text is lost.

Two kinds of BPE keep every text: over bytes (GPT-2's ByteLevel alphabet), and over characters with bytes for what is
not known (`<0xNN>`, with U+2581 for a space), as SentencePiece does. Nothing here needs the `tokenizers` library.
"""

import re
from collections.abc import Iterator
from functools import cached_property

from pretrain.tokenizer.texts import continues_word

SPACE = "\u2581"
BYTES, PIECES, WORDPIECE, OTHER = "bytes", "pieces", "wordpiece", "other"
_USED = {*range(0xC0), *range(0xC2, 0xF5)}  # bytes that UTF-8 has
_RARE = {*range(0x20), 0x7F, 0xF1, 0xF2, 0xF3, 0xF4} - set(b"\t\n\r")  # control characters, and what Unicode left free
_HARMLESS = {"Split", "Digits", "Punctuation", "ByteLevel", "Metaspace"}  # pre-tokenizers that only cut


class Spec:
    """The content of a tokenizer.json, `special` the ids that are no text."""

    def __init__(self, content: dict, vocab: dict[str, int], special: set[int]):
        """`vocab`: token -> id, those that were added included."""
        self._content, self._special = content, special
        self._added = {token["id"]: token for token in content.get("added_tokens") or []}
        self._model = content.get("model") or {}
        self._tokens = {id_: token for token, id_ in vocab.items()}

    @cached_property
    def kind(self) -> str:
        """Which of the kinds above, by the decoder: it turns tokens into text."""
        decoders = {part["type"] for part in _parts(self._content.get("decoder"), "decoders")}
        if self._model.get("type") == "WordPiece" or "WordPiece" in decoders:
            return WORDPIECE
        if "ByteLevel" in decoders:
            return BYTES
        return PIECES if decoders & {"ByteFallback", "Metaspace"} else OTHER

    @property
    def adds_space(self) -> bool:
        """Whether a space is put in front of a text, so that its first word is like all others."""
        parts = [*_parts(self._content.get("normalizer"), "normalizers"), *pre_tokenizers(self._content)]
        return any(part["type"] == "Prepend" or part.get("prepend_scheme", "never") != "never"
                   or part.get("add_prefix_space", False) for part in parts)  # fmt: skip

    @property
    def is_exact(self) -> bool:
        """Whether decode(encode(x)) == x for every x, but for a U+2581 with PIECES."""
        return self.is_lossless() and not self.adds_space and self._known_bytes() >= _USED

    def is_lossless(self) -> bool:
        """`is_exact`, but for a space in front and for control characters that the training text did not have."""
        model = self._model
        if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
            return False
        for part in pre_tokenizers(self._content):
            if part["type"] not in _HARMLESS or part.get("behavior") == "Removed":
                return False
        for id_, token in self._added.items():
            if id_ not in self._special and (token["lstrip"] or token["rstrip"] or self._bytes(id_) != _text(token)):
                return False
        normalizers = list(_parts(self._content.get("normalizer"), "normalizers"))
        if self.kind == BYTES:
            return not normalizers and self._known_bytes() >= _USED - _RARE
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        allowed = [spaces, {"type": "Prepend", "prepend": SPACE}]
        return self.kind == PIECES and self._known_bytes() >= _USED and all(part in allowed for part in normalizers)

    def token_bytes(self, size: int) -> list[bytes]:
        """The bytes of text behind each id; nothing for special ids and for ids of no token."""
        return [self._bytes(id_) for id_ in range(size)]

    def continues_word(self, size: int) -> list[bool]:
        """Which ids go on with the word of the id before."""
        if self.kind == WORDPIECE:
            prefix = self._model.get("continuing_subword_prefix", "##")
            tokens = [self._tokens.get(id_, "") if id_ not in self._special else "" for id_ in range(size)]
            return [len(token) > len(prefix) and token.startswith(prefix) for token in tokens]
        return [continues_word(piece) for piece in self.token_bytes(size)]

    def _bytes(self, id_: int) -> bytes:
        token = self._tokens.get(id_)
        if token is None or id_ in self._special:
            return b""
        if self.kind == BYTES:
            alphabet = _byte_alphabet()
            return bytes(alphabet[char] for char in token) if all(c in alphabet for c in token) else token.encode()
        if self.kind == PIECES:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()
        return token.encode()

    def _known_bytes(self) -> set[int]:
        known = self._model.get("vocab", {})
        if self.kind == BYTES:
            return {byte for char, byte in _byte_alphabet().items() if char in known}
        return {byte for byte in range(256) if self._model.get("byte_fallback") and f"<0x{byte:02X}>" in known}


def pre_tokenizers(content: dict) -> list[dict]:
    """What cuts a text into words, one after the other."""
    return list(_parts(content.get("pre_tokenizer"), "pretokenizers"))


def _parts(part: dict | None, key: str) -> Iterator[dict]:
    """The parts of a sequence of them, however deep; one that is none is its own only part."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield part
        return
    for inner in part[key]:
        yield from _parts(inner, key)


def _text(added: dict) -> bytes:
    return added["content"].replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte: itself where it is printable, else the next one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
