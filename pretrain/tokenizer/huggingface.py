"""Hugging Face "fast" tokenizers, as one file of ours, `hf_tokenizer.json`, that travels with shards and runs:

    {"format": 1,
     "tokenizer": the content of tokenizer.json,
     "config": the content of tokenizer_config.json, with special_tokens_map.json and chat_template.jinja}

It is written canonically, so its sha256 identifies the tokenizer. Text is only ever text here: what looks like a
special token ("<s>") is encoded as any other characters.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.cli import how_to_install
from pretrain.tokenizer.huggingface_spec import PIECES, SPACE, Spec, pre_tokenizers
from pretrain.tokenizer.texts import TRICKY_TEXTS, SpecialToken

FORMAT = 1
FILE_NAME, HF_NAME, CONFIG_NAME, MAP_NAME = (
    "hf_tokenizer.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
)  # fmt: skip
TEMPLATE_NAME = "chat_template.jinja"
ROLES = ("unk", "bos", "eos", "pad", "mask", "cls", "sep")
# what transformers takes where the config names no tokens, as in the folders of the first models
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_LLAMA = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
_DEFAULTS = {
    "bert": _BERT, "llama": _LLAMA, "mistral": _LLAMA,
    "gpt2": {name: "<|endoftext|>" for name in ("unk", "bos", "eos")},
    "roberta": _LLAMA | {"pad": "<pad>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"},
}  # fmt: skip
_MOST_IDS = 1 << 24


def pack(folder: Path) -> bytes:
    """The content of hf_tokenizer.json for a folder with tokenizer.json, as `save_pretrained` writes it."""
    content = _read(folder / HF_NAME)
    config = _read(folder / CONFIG_NAME) if (folder / CONFIG_NAME).is_file() else {}
    config.pop("auto_map", None)  # names code, which is not run here and does not travel
    if (folder / MAP_NAME).is_file():
        named = _read(folder / MAP_NAME)
        config = named | config if "added_tokens_decoder" in config else config | named
    if (folder / TEMPLATE_NAME).is_file():
        config["chat_template"] = (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    family = config.get("tokenizer_class", "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    if family not in _DEFAULTS and (folder / "config.json").is_file():
        family = _read(folder / "config.json").get("model_type", "")
    known = {token["content"] for token in content.get("added_tokens") or []}
    for name, token in _DEFAULTS.get(family, {}).items():
        if token in known:
            config.setdefault(f"{name}_token", token)
    try:
        return _packed(content, config)
    except UnicodeEncodeError:
        raise ValueError(f"{folder / HF_NAME} holds half characters (lone surrogates): download it again") from None


class FastTokenizer:
    """A tokenizer of the `tokenizers` library; `path` is for messages."""

    file_name = FILE_NAME

    def __init__(self, path: str | Path, file_bytes: bytes):
        """`file_bytes`: the content of an hf_tokenizer.json."""
        self.path, self.file_bytes = Path(path), file_bytes
        self.sha256 = hashlib.sha256(file_bytes).hexdigest()
        content, config = self._contents()
        names = {name: text for name in ROLES if (text := _text(config.get(f"{name}_token")))}
        extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
        extra = extra.values() if isinstance(extra, dict) else extra
        self._fast = _build(content, {*names.values(), *map(_text, extra)}, self.path)
        self._vocab: dict[str, int] = self._fast.get_vocab(with_added_tokens=True)
        self.vocab_size = self._counted()
        self.special_texts = {name: text for name, text in names.items() if text in self._vocab}
        self.special_ids = {name: self._vocab[text] for name, text in self.special_texts.items()}
        added = self._fast.get_added_tokens_decoder()
        self._special = {id_ for id_, token in added.items() if token.special} | set(self.special_ids.values())
        self.eos, self.mask = self.special_ids.get("eos"), self.special_ids.get("mask")
        self.prefix, self.suffix = self._around()
        self.between = self._between()
        self._check_text_stays_text()
        self.chat_template = _default_template(config.get("chat_template"))
        self._added: list[dict] = content.get("added_tokens") or []
        self.is_exact = Spec(content, self._vocab, self._special).is_exact

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special ids are added."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], num_threads: int = 1) -> list[list[int]]:
        """The ids of many texts, with `num_threads` threads."""
        with ThreadPoolExecutor(num_threads) as pool:
            parts = pool.map(self.encode_arrays, [texts[i::num_threads] for i in range(num_threads)])
            found: list[Any] = [None] * len(texts)
            for i, part in enumerate(parts):
                found[i::num_threads] = [ids.tolist() for ids in part]
        return found

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of many texts, int32 each, on this thread; other threads of Python run meanwhile."""
        encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def encode_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, int32[n], and the characters [start, end) of the text that each stands for, int32[n, 2].

        As the library has them: in the text as it is given, also where it is normalised; the tokens of one character
        share its span; some tokenizers count the space before a word to its first token, some to none.
        """
        encoding = self._fast.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int32).reshape(-1, 2)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special ids stand for no text."""
        return self._fast.decode([int(i) for i in ids], skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray | None:
        """How many bytes of UTF-8 text each id stands for, int64[vocab_size]; None where text is lost on the way.

        The sum over encode(x) is len(x.encode()), and one more where a space is put in front of a text.
        """
        spec = self._spec()
        if not spec.is_lossless():
            return None
        lengths = np.array([len(piece) for piece in spec.token_bytes(self.vocab_size)], dtype=np.int64)
        for text in TRICKY_TEXTS:  # the last word has what the library does
            if not self.is_exact:
                text = "".join(char for char in text if char in "\t\n\r" or char.isprintable())
            more = lengths[self.encode(text)].sum() - len(text.encode())
            if more not in ((0, 1) if spec.adds_space else (0,)) and not (spec.kind == PIECES and SPACE in text):
                return None
        return lengths

    def continues_word(self) -> np.ndarray:
        """Which ids go on with the word of the id before, bool[vocab_size]; special ids do not."""
        return np.array(self._spec().continues_word(self.vocab_size), dtype=bool)

    def special_tokens(self) -> list[SpecialToken]:
        """What a chat template may write that is no text: the tokens of roles, and those that no text is encoded to."""
        added = {token["content"]: token for token in self._added if token["id"] not in self.encode(token["content"])}
        ids = {self.special_texts[name]: id_ for name, id_ in self.special_ids.items()}
        ids |= {text: token["id"] for text, token in added.items()}
        return [SpecialToken(text, id_, *(bool(added.get(text, {}).get(side)) for side in ("lstrip", "rstrip")))
                for text, id_ in ids.items()]  # fmt: skip

    def inside(self) -> "FastTokenizer":
        """The same for text that does not begin a whole one, in front of which some put a space."""
        content, config = self._contents()
        begins = [part for part in pre_tokenizers(content) if part.get("prepend_scheme") == "first"]
        for part in begins:
            part["prepend_scheme"] = "never"
        return FastTokenizer(self.path, _packed(content, config)) if begins else self

    def hf_files(self, max_positions: int, ends: bool = False) -> dict[str, bytes]:
        """The files as they came, for transformers' AutoTokenizer: `pack` makes the same tokenizer of them. Whether a
        text `ends` is theirs to say.
        """
        content, config = self._contents()
        template = config.get("chat_template")
        files = {}
        if isinstance(template, str):  # else some, by name
            del config["chat_template"]
            files[TEMPLATE_NAME] = template.encode()
        for name, file in {HF_NAME: content, CONFIG_NAME: config}.items():
            files[name] = (json.dumps(file, indent=1, ensure_ascii=False) + "\n").encode()
        return files

    def _contents(self) -> tuple[dict, dict]:
        packed = _parse(self.file_bytes, self.path)
        if packed.get("format") != FORMAT or not all(isinstance(packed.get(n), dict) for n in ("tokenizer", "config")):
            raise ValueError(f"{self.path} is not a tokenizer packed by this program ({FILE_NAME}, format {FORMAT}): "
                             f"give the Hugging Face folder that holds {HF_NAME}")  # fmt: skip
        return packed["tokenizer"], packed["config"]

    def _spec(self) -> Spec:
        return Spec(self._contents()[0], self._vocab, self._special)

    def _counted(self) -> int:
        """The highest id and one more: what a model's embedding must have; a few ids of no token do no harm."""
        size = max(self._vocab.values(), default=-1) + 1
        if not 0 < size <= min(_MOST_IDS, 2 * len(self._vocab)):
            raise ValueError(f"{self.path} has {len(self._vocab):,} tokens with ids up to {size - 1:,}: most ids have "
                             "no token, the file is damaged; download it again")  # fmt: skip
        return size

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids before and after a document: what the tokenizer itself puts around a text; eos where it ends none."""
        encoding = self._fast.encode("a", add_special_tokens=True)
        added = encoding.special_tokens_mask
        if 0 not in added:
            raise ValueError(f"{self.path} has no token for the letter a: give a tokenizer of text")
        first, after = added.index(0), len(added) - added[::-1].index(0)
        prefix, suffix = encoding.ids[:first], encoding.ids[after:]
        if not suffix and self.eos is None:
            raise ValueError(f"{self.path} has no token that ends a document: name one of its tokens as eos_token in "
                             f"{CONFIG_NAME}")  # fmt: skip
        return prefix, suffix or [self.eos]

    def _between(self) -> list[int]:
        """The ids that the tokenizer itself puts between the texts of a pair; where it puts none, the suffix."""
        encoding = self._fast.encode("a", "a", add_special_tokens=True)
        texts = encoding.sequence_ids  # 0, 1, or None for what was added
        end, start = len(texts) - texts[::-1].index(0), texts.index(1)
        return encoding.ids[end:start] or self.suffix

    def _check_text_stays_text(self) -> None:
        for id_ in self._special - {self.special_ids.get("unk")}:
            token = self._fast.id_to_token(id_)
            if id_ in self.encode(f"{token} a{token}b\n{token}"):
                raise ValueError(f"{self.path} takes the text {token!r} for its special token {id_}: any document "
                                 "could end or mask itself; give another tokenizer")  # fmt: skip


def _build(content: dict, special: set[str], path: Path) -> Any:
    """The library's tokenizer, without what would make ids depend on more than the text."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the threads and processes here are our own
    try:
        import tokenizers
    except ImportError:
        raise ValueError(f"{path} needs the tokenizers library: {how_to_install('hf')}") from None
    content = deepcopy(content) | {"truncation": None, "padding": None}
    try:
        if content["model"].get("dropout"):
            content["model"]["dropout"] = None
        for token in content.get("added_tokens") or []:
            token["special"] = token["special"] or token["content"] in special
        fast = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no narrower kind
        raise ValueError(
            f"{path} is not a tokenizer that the tokenizers library can read ({error}): download it again, or save it "
            "again with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        ) from None
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
    for text, id_ in added.items():
        if fast.token_to_id(text) != id_:  # the library numbers them itself
            raise ValueError(f"{path} has ids of no token: the tokenizers library gives {text!r} the id "
                             f"{fast.token_to_id(text)}, not {id_}; add a token for each id before it")  # fmt: skip
    known = (text for text in sorted(special - {""}) if fast.token_to_id(text) is not None)
    fast.add_special_tokens([text for text in known if text not in added])
    fast.encode_special_tokens = True
    return fast


def _default_template(templates: Any) -> str | None:
    """The chat template of a config: the only one, or of some by name that named default."""
    if isinstance(templates, str):
        return templates
    return {template["name"]: template["template"] for template in templates or []}.get("default")


def _packed(content: dict, config: dict) -> bytes:
    packed = {"format": FORMAT, "tokenizer": content, "config": config}
    return (json.dumps(packed, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n").encode()


def _text(token: Any) -> str:
    """A token of a config, which is a string or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read(path: Path) -> dict:
    return _parse(path.read_bytes(), path)


def _parse(data: bytes, path: Path) -> dict:
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download or copy it again") from None
    return content
