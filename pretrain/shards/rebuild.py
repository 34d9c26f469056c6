"""The index of a folder of tars, written anew from the tars alone: those of stock webdataset, or of a damaged data set.

Everything is checked before anything is written; the sidecars wait under temporary names until all tars were read.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pretrain.files import sync_folder, write_atomically, write_synced
from pretrain.shards import manifest as manifests
from pretrain.shards import sidecar
from pretrain.shards.manifest import INDEX_NAME, Manifest, Shard
from pretrain.shards.remote import Store
from pretrain.shards.samples import content_problems, read_layout, text_bytes
from pretrain.shards.verify import Progress, hash_regions
from pretrain.tokenizer.texts import TOKENIZER_NAMES
from pretrain.tokenizer.tokenizer import Tokenizer, load_tokenizer

_COMPRESSED = re.compile(r".*\.(tgz|tbz2?|txz|tzst|tar\.(gz|bz2|xz|zst|lz4|Z))", re.IGNORECASE)


@dataclass
class Rebuilt:
    """A rebuilt index. `notes`: what the user should know of; `changed`: the files written, none when all was right."""

    manifest: Manifest
    changed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Indexed:
    """A tar that was read; the sizes of its chunks say whether all of them are full."""

    shard: Shard
    dtype: str
    chunk_sizes: frozenset[int]  # tokens of the chunks but the last
    last_chunk: int
    ignored: Counter[str]


def tar_names(folder: Path) -> list[str]:
    """The names of the tars in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".tar") and path.is_file())


def _shard_names(folder: Path) -> list[str]:
    tars = tar_names(folder)
    for name in sorted(path.name for path in folder.iterdir()):
        if _COMPRESSED.fullmatch(name):
            raise ValueError(f"{folder / name} is compressed, so it cannot be read by position: unpack it to a .tar")
        if name in tars and not manifests.is_shard_name(name):
            raise ValueError(f"{folder}: {name!r} is not a plain shard name: use letters, digits, _, - and . only")
    if not tars:
        raise ValueError(f"{folder} holds no .tar files: give the folder of the shards")
    return tars


def rebuild(folder: Path, tokenizer_path: Path | None, progress: Progress) -> Rebuilt:
    """Write sidecars and index.json for the tars of a folder; `ValueError`, and nothing written, for unfit ones.

    `tokenizer_path`: the tokenizer that wrote the tokens, copied in where the folder has none. What a valid index says
    beyond the tars (how long the text of an unchanged shard was) is kept, so an intact data set keeps its fingerprint.
    """
    names = _shard_names(folder)
    try:
        old = manifests.read_index(folder)
    except ValueError:
        old = None
    tokenizer = _tokenizer(folder, tokenizer_path, old)
    byte_lengths = tokenizer.byte_lengths()
    known = {shard.name: shard for shard in old.shards} if old else {}
    indexed: list[_Indexed] = []
    try:
        for name in names:
            indexed.append(_index(folder / name, tokenizer, byte_lengths, known.get(name), progress))
            if indexed[-1].dtype != indexed[0].dtype:
                raise ValueError(f"{folder / name} holds {indexed[-1].dtype}, {names[0]} {indexed[0].dtype}: "
                                 "write all tokens with one dtype")  # fmt: skip
        rebuilt = Rebuilt(_manifest(folder, tokenizer, indexed, old))
        _commit(folder, tokenizer, rebuilt)
    finally:
        for name in names:
            _temporary(folder / name).unlink(missing_ok=True)
    rebuilt.notes += _notes(rebuilt.manifest, known, indexed)
    if byte_lengths is None and any(shard.text_bytes == 0 for shard in rebuilt.manifest.shards):
        rebuilt.notes.append("this tokenizer loses some text, so how long the text was is not known: 0 bytes are noted")
    return rebuilt


def _tokenizer(folder: Path, given: Path | None, old: Manifest | None) -> Tokenizer:
    names = [name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    own = folder / (names or TOKENIZER_NAMES)[0]
    if given is None:
        if not names:
            raise ValueError(f"{own} is not there: name the tokenizer that wrote the tokens with --tokenizer FILE")
        given = own
    tokenizer = load_tokenizer(given)
    if old and tokenizer.sha256 != old.tokenizer_sha256:
        raise ValueError(
            f"{given} is not the tokenizer that {folder / INDEX_NAME} names (sha256 {tokenizer.sha256[:12]}, expected "
            f"{old.tokenizer_sha256[:12]}): give the right one with --tokenizer FILE, or delete the index first"
        )
    for other in (folder / name for name in names if name != tokenizer.file_name or not old):
        if other.read_bytes() != tokenizer.file_bytes:
            raise ValueError(f"{other} is another tokenizer than {given}: delete the one that did not write the tokens")
    return tokenizer


def _index(
    path: Path, tokenizer: Tokenizer, byte_lengths: np.ndarray | None, known: Shard | None, progress: Progress
) -> _Indexed:
    """Read a tar, and write its sidecar under a temporary name."""
    where = str(path)
    with open(path, "rb") as file:
        layout = read_layout(file, where)
        chunks, text = layout.chunks, 0
        for i, chunk in enumerate(chunks):
            for problem in content_problems(file, chunk, layout.dtype, tokenizer.vocab_size):
                raise ValueError(f"{where}, chunk {i:08d}: {problem}")
            text += 0 if byte_lengths is None else text_bytes(file, chunk, layout.dtype, byte_lengths)
        sha256, crc32s, size = hash_regions(file, chunks["bytes"].tolist(), progress)
    if size != int(chunks["bytes"].sum()) or None in crc32s:
        raise ValueError(f"{where} changed while it was read: wait until it is written")
    chunks["crc32"] = crc32s
    table = sidecar.to_bytes(chunks)
    write_synced(_temporary(path), table)
    shard = Shard(
        name=path.name,
        bytes=size,
        sha256=sha256,
        tokens=int(chunks["tokens"].sum()),
        docs=sidecar.docs_of(chunks),
        text_bytes=known.text_bytes if known and known.sha256 == sha256 else text,
        index_sha256=hashlib.sha256(table).hexdigest(),
    )
    sizes = frozenset(chunks["tokens"][:-1].tolist())
    return _Indexed(shard, layout.dtype.replace("i", "u"), sizes, int(chunks["tokens"][-1]), layout.ignored)


def _manifest(folder: Path, tokenizer: Tokenizer, indexed: list[_Indexed], old: Manifest | None) -> Manifest:
    sizes = set().union(*(item.chunk_sizes for item in indexed))
    largest = max(sizes | {item.last_chunk for item in indexed})
    if old and old.full_chunks and largest <= old.chunk_tokens and sizes <= {old.chunk_tokens}:
        largest = old.chunk_tokens  # no chunk may be full
    return Manifest(
        store=Store(str(folder)),
        dtype=indexed[0].dtype,
        chunk_tokens=largest,
        full_chunks=sizes <= {largest},
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        shards=tuple(item.shard for item in indexed),
    )


def _commit(folder: Path, tokenizer: Tokenizer, rebuilt: Rebuilt) -> None:
    """Give the new files their names, the index last: until then the folder has no index, or one they do not fit."""
    own = folder / tokenizer.file_name
    if not (own.is_file() and own.read_bytes() == tokenizer.file_bytes):
        write_atomically(own, tokenizer.file_bytes)
        rebuilt.changed.append(tokenizer.file_name)
    for shard in rebuilt.manifest.shards:
        path, new = folder / sidecar.sidecar_name(shard.name), _temporary(folder / shard.name)
        if not (path.is_file() and path.read_bytes() == new.read_bytes()):
            os.replace(new, path)
            rebuilt.changed.append(path.name)
    sync_folder(folder)
    index = folder / INDEX_NAME
    data = manifests.index_bytes(rebuilt.manifest)
    if not (index.is_file() and index.read_bytes() == data):
        write_atomically(index, data)
        rebuilt.changed.append(INDEX_NAME)


def _notes(manifest: Manifest, known: dict[str, Shard], indexed: list[_Indexed]) -> Iterator[str]:
    ignored = sum((item.ignored for item in indexed), Counter())
    if ignored:
        kinds = ", ".join(f"{count:,} x .{kind}" for kind, count in ignored.most_common(5))
        yield f"members that hold no tokens were passed over: {kinds}"
    for shard in manifest.shards:
        if shard.name in known and known[shard.name].sha256 != shard.sha256:
            yield f"{shard.name} is not the one that the old index named; it is taken as it is now"
    for name in sorted(set(known) - {shard.name for shard in manifest.shards}):
        yield f"{name}, which the old index named, is not there any more"


def _temporary(shard: Path) -> Path:
    return shard.with_name(sidecar.sidecar_name(shard.name) + ".tmp")
