"""What a folder of shards holds: index.json, the sidecar of each shard, and the fingerprint of it all.

A folder of format 1:

    index.json              format, dtype, chunk size, tokenizer hash, vocabulary size, special ids, the shards
    00000000.tar            the shard (see writer.py)
    00000000.idx.npy        its sidecar: one row of `CHUNK_DTYPE` for each chunk
    tokenizer.model         a copy of the tokenizer that wrote it; hf_tokenizer.json of a Hugging Face one

The fingerprint is the sha256 of the canonical JSON of everything in index.json but itself, so it changes with any byte
of any shard. index.json is written last: a folder without it is not a data set.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from pretrain.files import write_atomically
from pretrain.shards import sidecar
from pretrain.shards.remote import CacheSettings, Store, open_store
from pretrain.tokenizer.texts import TOKENIZER_NAMES

FORMAT = 1
INDEX_NAME = "index.json"
_MOST_BYTES = 1 << 60  # of a shard: sums of positions stay within int64


@dataclass(frozen=True)
class Shard:
    """One shard: its file, and how many tokens (special ones included), documents and bytes of text it holds."""

    name: str
    bytes: int
    sha256: str
    tokens: int
    docs: int
    text_bytes: int
    index_sha256: str  # of the sidecar file: a wrong count in it would shift the order without a sound


@dataclass(frozen=True)
class Manifest:
    """A folder of shards, as index.json describes it. `dtype` is '<u2' or '<u4', `special_ids` name -> id.

    `full_chunks`: every chunk but the last of a shard holds `chunk_tokens` tokens, so the token counts of the shards
    say how many windows there are, and no sidecar is touched before it is needed.
    """

    store: Store
    dtype: str
    chunk_tokens: int
    full_chunks: bool
    tokenizer_sha256: str
    vocab_size: int
    special_ids: dict[str, int]
    shards: tuple[Shard, ...]

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()

    @property
    def location(self) -> str:
        """Where the data set lies, as the user gave it."""
        return self.store.location

    @property
    def folder(self) -> Path:
        """The folder of a local data set."""
        return Path(self.store.location)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def docs(self) -> int:
        return sum(shard.docs for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @cached_property
    def tokenizer_name(self) -> str:
        """The name of the copy of the tokenizer that travels with the shards."""
        return next((name for name in TOKENIZER_NAMES if self.store.exists(name)), TOKENIZER_NAMES[0])

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer that travels with the shards; `ValueError` when it is not the one written."""
        path = self.store.path(self.tokenizer_name, self.tokenizer_sha256)
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.tokenizer_sha256:
            raise ValueError(
                f"{self.location}/{self.tokenizer_name} is damaged: sha256 {found[:12]} where {INDEX_NAME} says "
                f"{self.tokenizer_sha256[:12]}; copy it again"
            )
        return path

    def check_tokenizer(self, path: str | Path, sha256: str) -> None:
        """`ValueError` unless the tokenizer at `path` with hash `sha256` is the one that wrote these shards."""
        if sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"the shards in {self.location} were written with another tokenizer than {path} (sha256 "
                f"{self.tokenizer_sha256[:12]}, not {sha256[:12]}): use {self.location}/{self.tokenizer_name}, "
                "or write the shards again"
            )

    def chunks(self, shard: int) -> np.ndarray:
        """The sidecar of shard number `shard`, CHUNK_DTYPE[chunks]; `ValueError` when it is not the one written."""
        entry = self.shards[shard]
        name = sidecar.sidecar_name(entry.name)
        data = self.store.path(name, entry.index_sha256).read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != entry.index_sha256:
            raise ValueError(
                f"{self.location}/{name} is damaged: sha256 {found[:12]} where {INDEX_NAME} says "
                f"{entry.index_sha256[:12]}; copy it again, or write the shards again"
            )
        try:
            chunks = sidecar.from_bytes(data)
            if problems := self.chunk_problems(shard, chunks):
                raise ValueError(problems[0])
        except ValueError as error:
            raise ValueError(f"{self.location}/{name} does not fit its shard: {error}; write it again") from None
        return chunks

    def chunk_problems(self, shard: int, chunks: np.ndarray) -> list[str]:
        """What in a table of chunks cannot be true of shard number `shard`."""
        entry, full = self.shards[shard], self.chunk_tokens if self.full_chunks else None
        return sidecar.problems(chunks, entry.bytes, entry.tokens, entry.docs, np.dtype(self.dtype).itemsize, full)

    def windows_per_shard(self, seq_len: int) -> np.ndarray:
        """How many windows of `seq_len` tokens each shard holds, int64[shards]; a window never crosses a chunk."""
        assert seq_len > 0
        if self.full_chunks:
            tokens = np.array([shard.tokens for shard in self.shards], dtype=np.int64)
            full, rest = np.divmod(tokens, self.chunk_tokens)
            return full * (self.chunk_tokens // seq_len) + rest // seq_len
        counts = [int((self.chunks(i)["tokens"] // seq_len).sum()) for i in range(len(self.shards))]
        return np.array(counts, dtype=np.int64)

    def _facts(self) -> dict:
        facts = {"format": FORMAT, "shards": [asdict(shard) for shard in self.shards]}
        for name in ("dtype", "chunk_tokens", "full_chunks", "tokenizer_sha256", "vocab_size", "special_ids"):
            facts[name] = getattr(self, name)
        return facts


def is_shard_name(name: str) -> bool:
    """Whether a shard may have this name: a plain one, so that it stays in its folder wherever it is read."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar", name) is not None


def open_split(
    location: str | Path, split: str, cache: CacheSettings | None = None, trusting: bool = False
) -> Manifest:
    """The data set of a split ("train" or "val"): `location/split` where there is one, else `location` itself."""
    assert split in ("train", "val")
    inside = f"{str(location).rstrip('/')}/{split}"
    return load(inside if open_store(inside, cache).exists(INDEX_NAME) else location, cache, trusting)


def save(manifest: Manifest, folder: Path) -> None:
    """Write index.json, complete or not at all."""
    write_atomically(folder / INDEX_NAME, index_bytes(manifest))


def index_bytes(manifest: Manifest) -> bytes:
    """The content of index.json."""
    return (json.dumps(manifest._facts() | {"fingerprint": manifest.fingerprint}, indent=1) + "\n").encode()


def load(location: str | Path, cache: CacheSettings | None = None, trusting: bool = False) -> Manifest:
    """Read and check the index of a folder of shards, local or remote; a fault is a `ValueError` that names the file.

    What is remote is read through the cache; of what is local, the sizes of the shards are checked too, unless
    `trusting`: a thousand ranks that each look at every shard are too much for a file system.
    """
    manifest = read_index(location, cache)
    if not manifest.store.is_remote and not trusting:
        for shard in manifest.shards:
            _check_file(Path(manifest.location) / shard.name, shard.bytes)
    return manifest


def read_index(location: str | Path, cache: CacheSettings | None = None) -> Manifest:
    """`load` without a look at the shards."""
    location = str(location)
    store = open_store(location, cache)
    if not store.exists(INDEX_NAME):
        raise ValueError(_no_index(store))
    where, data = f"{location}/{INDEX_NAME}", store.path(INDEX_NAME).read_bytes()
    try:
        facts = json.loads(data)
        version = facts["format"]
        if not data.endswith(b"}\n"):
            raise ValueError("its last line is cut short")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{where} is not a valid index ({error!r}): copy it, or write the shards, again") from None
    if version != FORMAT:
        raise ValueError(f"{where} has format {version!r}, this program reads format {FORMAT}: write the shards again")
    manifest = _parse(where, facts, store)
    _check_facts(where, manifest)
    return manifest


def _no_index(store: Store) -> str:
    location = store.location
    if not store.is_remote and not Path(location).is_dir():
        return f"{location} is not a folder: give the folder that tools/write_shards.py wrote"
    splits = [name for name in ("train", "val") if store.exists(f"{name}/{INDEX_NAME}")]
    if splits:
        return f"{location} has no {INDEX_NAME}; it has the splits {', '.join(splits)}: give one of them"
    return (
        f"{location} has no {INDEX_NAME}: it is not a data set, or writing it was not finished; write it with "
        "tools/write_shards.py, or index the shards of others with tools/verify_shards.py --rebuild"
    )


def _parse(where: str, facts: dict, store: Store) -> Manifest:
    try:
        shards = tuple(Shard(**entry) for entry in facts["shards"])
        named = {f.name: facts[f.name] for f in fields(Manifest) if f.name not in ("store", "shards")}
        manifest = Manifest(store=store, shards=shards, **named)
        intact = facts["fingerprint"] == manifest.fingerprint
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where} lacks a field ({error!r}): copy it again, or write the shards again") from None
    if not intact:
        raise ValueError(f"{where} was changed: its fingerprint does not match its content; copy it again")
    return manifest


def _check_facts(where: str, manifest: Manifest) -> None:
    """A right fingerprint says that nothing was changed since, not that it was sensible then."""
    for part in (manifest, *manifest.shards):
        for f in fields(part):
            value = getattr(part, f.name)
            if f.name.endswith("sha256") and not re.fullmatch("[0-9a-f]{64}", str(value)):
                raise ValueError(f"{where}: {f.name} is {value!r}, expected 64 hex digits")
            if f.type is int and not (type(value) is int and 0 <= value < _MOST_BYTES):
                raise ValueError(f"{where}: {f.name} is {value!r}, expected a count")
    if manifest.dtype not in ("<u2", "<u4") or type(manifest.full_chunks) is not bool or not manifest.chunk_tokens:
        raise ValueError(f"{where}: dtype, full_chunks or chunk_tokens is none that this program writes")
    ids = manifest.special_ids
    if not isinstance(ids, dict) or not all(type(i) is int and 0 <= i < manifest.vocab_size for i in ids.values()):
        raise ValueError(f"{where}: special_ids is {ids!r}, expected ids below {manifest.vocab_size}")
    for shard in manifest.shards:
        if not is_shard_name(shard.name):
            raise ValueError(f"{where}: {shard.name!r} is not a plain shard name (NAME.tar)")
    if len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        raise ValueError(f"{where} lists a shard twice: write the shards again")
    if manifest.tokens == 0:
        raise ValueError(f"{manifest.location} holds no tokens: write shards from text that is not empty")


def _check_file(path: Path, size: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing, {INDEX_NAME} lists it: copy it again, or write the shards again")
    if path.stat().st_size != size:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes where {INDEX_NAME} says {size:,}: "
            "copy it again, or write the shards again"
        )
