"""What a folder of shards holds: index.json, the sidecar of each shard, and the fingerprint of it all.

A folder of format 1:

    index.json              format, dtype, chunk size, tokenizer hash, vocabulary size, special ids, the shards
    00000000.tar            the shard (see shards.py)
    00000000.idx.npy        its sidecar: one row of `CHUNK_DTYPE` for each chunk
    tokenizer.model         a copy of the tokenizer that wrote it

The fingerprint is the sha256 of the canonical JSON of everything in index.json but itself, so it changes with any byte
of any shard. index.json is written last: a folder without it is not a data set.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from pretrain.files import write_atomically

FORMAT = 1
INDEX_NAME = "index.json"
TOKENIZER_NAME = "tokenizer.model"
# offsets are bytes from the start of the shard to the first number (after the .npy header); counts are numbers;
# flag 1: the first tokens continue the document of the chunk before; crc32 of the numbers' bytes
CHUNK_DTYPE = np.dtype(
    [("tokens_offset", "<i8"), ("tokens", "<i8"), ("tokens_crc32", "<u4"),
     ("docs_offset", "<i8"), ("docs", "<i8"), ("docs_crc32", "<u4"), ("flags", "<u4")]
)  # fmt: skip
CONTINUES = 1


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
    """A folder of shards, as index.json describes it. `dtype` is '<u2' or '<u4', `special_ids` name -> id."""

    folder: Path
    dtype: str
    chunk_tokens: int
    tokenizer_sha256: str
    vocab_size: int
    special_ids: dict[str, int]
    shards: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode()).hexdigest()

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def docs(self) -> int:
        return sum(shard.docs for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def tokenizer_path(self) -> Path:
        """The copy of the tokenizer that travels with the shards."""
        return self.folder / TOKENIZER_NAME

    def check_tokenizer(self, path: str | Path, sha256: str) -> None:
        """`ValueError` unless the tokenizer at `path` with hash `sha256` is the one that wrote these shards."""
        if sha256 != self.tokenizer_sha256:
            raise ValueError(
                f"the shards in {self.folder} were written with another tokenizer than {path} (sha256 "
                f"{self.tokenizer_sha256[:12]}, not {sha256[:12]}): use {self.tokenizer_path}, "
                "or write the shards again"
            )

    def chunks(self, shard: int) -> np.ndarray:
        """The sidecar of shard number `shard`, CHUNK_DTYPE[chunks]; `ValueError` when it is not the one written."""
        entry = self.shards[shard]
        path = self.folder / sidecar_name(entry.name)
        if not path.is_file():
            raise ValueError(f"{path} is missing: copy it again, or write the shards again")
        data = path.read_bytes()
        found = hashlib.sha256(data).hexdigest()
        if found != entry.index_sha256:
            raise ValueError(
                f"{path} is damaged: sha256 {found[:12]} where {INDEX_NAME} says {entry.index_sha256[:12]}; "
                "copy it again, or write the shards again"
            )
        chunks = np.load(path, allow_pickle=False)
        assert chunks.dtype == CHUNK_DTYPE and int(chunks["tokens"].sum()) == entry.tokens
        return chunks

    def windows_per_shard(self, seq_len: int) -> np.ndarray:
        """How many windows of `seq_len` tokens each shard holds, int64[shards]; a window never crosses a chunk."""
        assert seq_len > 0
        counts = [int((self.chunks(i)["tokens"] // seq_len).sum()) for i in range(len(self.shards))]
        return np.array(counts, dtype=np.int64)

    def _facts(self) -> dict:
        facts = {"format": FORMAT, "shards": [asdict(shard) for shard in self.shards]}
        for name in ("dtype", "chunk_tokens", "tokenizer_sha256", "vocab_size", "special_ids"):
            facts[name] = getattr(self, name)
        return facts


def sidecar_name(shard_name: str) -> str:
    """The file name of a shard's sidecar: 00000000.tar -> 00000000.idx.npy."""
    return shard_name.removesuffix(".tar") + ".idx.npy"


def resolve_split(path: str | Path, split: str) -> Path:
    """The folder of a split ("train" or "val"): `path/split` where that is a data set, else `path` itself."""
    assert split in ("train", "val")
    inside = Path(path) / split
    return inside if (inside / INDEX_NAME).is_file() else Path(path)


def save(manifest: Manifest) -> None:
    """Write index.json, complete or not at all."""
    facts = manifest._facts() | {"fingerprint": manifest.fingerprint}
    write_atomically(manifest.folder / INDEX_NAME, (json.dumps(facts, indent=1) + "\n").encode())


def load(folder: str | Path) -> Manifest:
    """Read and check the index of a folder of shards; every fault is a `ValueError` that names the file."""
    folder = Path(folder)
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: give the folder that tools/write_shards.py wrote")
    if not path.is_file():
        splits = [name for name in ("train", "val") if (folder / name / INDEX_NAME).is_file()]
        hint = f"; it has the splits {', '.join(splits)}: give one of them" if splits else ""
        raise ValueError(
            f"{folder} has no {INDEX_NAME}{hint or ': it is not a data set, or writing it was not finished'}"
            f"{'' if splits else '; write it with tools/write_shards.py'}"
        )
    try:
        facts = json.loads(path.read_bytes())
        version = facts["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a valid index ({error!r}): copy it again, or write the shards again") from None
    if version != FORMAT:
        raise ValueError(f"{path} has format {version!r}, this program reads format {FORMAT}: write the shards again")
    manifest = _parse(path, facts)
    _check_files(manifest)
    return manifest


def _parse(path: Path, facts: dict) -> Manifest:
    try:
        shards = tuple(Shard(**entry) for entry in facts["shards"])
        named = {f.name: facts[f.name] for f in fields(Manifest) if f.name not in ("folder", "shards")}
        manifest = Manifest(folder=path.parent, shards=shards, **named)
        intact = facts["fingerprint"] == manifest.fingerprint
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} lacks a field ({error!r}): copy it again, or write the shards again") from None
    if not intact:
        raise ValueError(f"{path} was changed: its fingerprint does not match its content; copy it again")
    return manifest


def _check_files(manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = manifest.folder / shard.name
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.tar", shard.name):
            raise ValueError(f"{manifest.folder / INDEX_NAME}: {shard.name!r} is not a plain shard name (NAME.tar)")
        if not path.is_file():
            raise ValueError(f"{path} is missing, {INDEX_NAME} lists it: copy it again, or write the shards again")
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes where {INDEX_NAME} says {shard.bytes:,}: "
                "copy it again, or write the shards again"
            )
    if manifest.tokens == 0:
        raise ValueError(f"{manifest.folder} holds no tokens: write shards from text that is not empty")
