"""Token shards written: plain USTAR tar files, with the same bytes for the same documents every time.

Members of a chunk lie next to each other and share a key, so stock `webdataset.WebDataset(path).decode()` reads them:

    00000000.tokens.npy     1-D '<u2' or '<u4', at most chunk_tokens numbers
    00000000.docs.npy       '<i4': where in the chunk documents start; the tokens before the first start continue the
                            last document of the chunk before

A document is never cut between two shards, so every chunk is full but the last one of a shard.
"""

import hashlib
import io
import os
import zlib
from pathlib import Path

import numpy as np

from pretrain.files import write_atomically
from pretrain.shards import sidecar, tar
from pretrain.shards.manifest import Manifest, Shard, save
from pretrain.shards.remote import Store


class ShardWriter:
    """Writes one shard under a temporary name, counting and hashing on the way; `close` gives it its name."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")
        self._sha256 = hashlib.sha256()
        self._crc32 = 0  # of the chunk under way
        self._position = 0
        self._chunks: list[tuple] = []
        self.tokens = 0

    def add_chunk(self, tokens: np.ndarray, doc_starts: np.ndarray, continues: bool) -> None:
        """Append a chunk: tokens of the shard's dtype, the starts of documents in it, whether it begins inside one."""
        key, start = f"{len(self._chunks):08d}", self._position
        self._crc32 = 0
        tokens_offset = self._add_member(f"{key}.tokens.npy", tokens)
        docs_offset = self._add_member(f"{key}.docs.npy", np.asarray(doc_starts, dtype="<i4"))
        flags = sidecar.CONTINUES if continues else 0
        self._chunks.append((start, self._position - start, self._crc32, flags,
                             tokens_offset, len(tokens), docs_offset, len(doc_starts)))  # fmt: skip
        self.tokens += len(tokens)

    def close(self, text_bytes: int) -> Shard:
        """Finish the file and its sidecar, make them durable, and describe them."""
        self._write(tar.end_of_archive(self._position))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        chunks = np.array(self._chunks, dtype=sidecar.CHUNK_DTYPE)
        chunks[-1]["bytes"] = self._position - chunks[-1]["offset"]  # the last chunk watches the end of the archive too
        chunks[-1]["crc32"] = self._crc32
        table = sidecar.to_bytes(chunks)
        write_atomically(self._path.with_name(sidecar.sidecar_name(self._path.name)), table)
        os.replace(self._temporary, self._path)
        return Shard(
            name=self._path.name,
            bytes=self._position,
            sha256=self._sha256.hexdigest(),
            tokens=self.tokens,
            docs=int(chunks["docs"].sum()),
            text_bytes=text_bytes,
            index_sha256=hashlib.sha256(table).hexdigest(),
        )

    def abandon(self) -> None:
        """Drop an unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _add_member(self, name: str, array: np.ndarray) -> int:
        """Write one .npy member; returns the offset of its first number."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        self._write(tar.header(name, len(header.getvalue()) + array.nbytes) + header.getvalue())
        offset = self._position
        self._write(memoryview(array).cast("B") if array.size else b"")
        self._write(b"\0" * (-self._position % tar.BLOCK))
        return offset

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self._crc32 = zlib.crc32(data, self._crc32)
        self._position += len(data)


class DatasetWriter:
    """Writes documents into a folder of shards: 00000000.tar, 00000001.tar, ... and index.json at the end.

    A shard is closed after the document that brings it to `shard_tokens` tokens.
    """

    def __init__(self, folder: Path, dtype: str, chunk_tokens: int, shard_tokens: int):
        self._folder, self._shard_tokens = folder, shard_tokens
        self._dtype = dtype
        self._chunk = np.empty(chunk_tokens, dtype=dtype)
        self._filled = 0
        self._doc_starts: list[int] = []
        self._continues = False
        self._text_bytes = 0
        self._shard: ShardWriter | None = None
        self.shards: list[Shard] = []

    def add(self, tokens: np.ndarray, text_bytes: int) -> None:
        """Append one document (its special tokens included), `text_bytes` bytes of text."""
        assert len(tokens) > 0
        if self._shard is None:
            self._shard = ShardWriter(self._folder / f"{len(self.shards):08d}.tar")
        self._doc_starts.append(self._filled)
        done = 0
        while done < len(tokens):
            part = tokens[done : done + len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            done += len(part)
            if self._filled == len(self._chunk):
                self._flush(continues_after=done < len(tokens))
        self._text_bytes += text_bytes
        if self._shard.tokens + self._filled >= self._shard_tokens:
            self._close_shard()

    def close(self) -> list[Shard]:
        """Close the last shard; the shards that were written."""
        if self._shard is not None:
            self._close_shard()
        return self.shards

    def finish(self, tokenizer_sha256: str, vocab_size: int, special_ids: dict[str, int]) -> Manifest:
        """Close the last shard and write index.json."""
        manifest = Manifest(
            store=Store(str(self._folder)),
            dtype=self._dtype,
            chunk_tokens=len(self._chunk),
            full_chunks=True,
            tokenizer_sha256=tokenizer_sha256,
            vocab_size=vocab_size,
            special_ids=special_ids,
            shards=tuple(self.close()),
        )
        save(manifest, self._folder)
        return manifest

    def abandon(self) -> None:
        """Stop: drop the unfinished shard, write no index."""
        if self._shard is not None:
            self._shard.abandon()

    def _flush(self, continues_after: bool) -> None:
        if self._filled:
            self._shard.add_chunk(self._chunk[: self._filled], np.array(self._doc_starts), self._continues)
        self._continues = continues_after
        self._filled = 0
        self._doc_starts = []

    def _close_shard(self) -> None:
        self._flush(continues_after=False)
        self.shards.append(self._shard.close(self._text_bytes))
        self._shard = None
        self._text_bytes = 0


def token_dtype(vocab_size: int) -> str:
    """The smallest stored dtype whose numbers reach every id of a vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"
