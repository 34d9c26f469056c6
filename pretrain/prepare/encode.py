"""Documents to tokens at the tokenizer's full speed: threads encode while the caller reads on and writes."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

from pretrain.tokenizer.tokenizer import Tokenizer

PIECE_CHARS = 500_000  # longer documents are tokenized in pieces, cut after a line where there is one
BATCH_CHARS = 250_000  # what a thread encodes at a time; with the batches under way it bounds the memory

Tag = TypeVar("Tag")
Batch = list[tuple[str, Tag | None]]  # a tag goes with the last piece of its document


def encode(
    documents: Iterable[tuple[str, Tag]], tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[np.ndarray, Tag]]:
    """(text, tag) to (prefix + ids + suffix, tag), in order; the tokens do not depend on the number of threads."""
    prefix, suffix = (np.array(ids, dtype=np.int32) for ids in (tokenizer.prefix, tokenizer.suffix))
    parts = [prefix]
    for batch, future in _in_order(_batches(documents), _pool(threads, os.getpid()), tokenizer, threads):
        for ids, (_, tag) in zip(future.result(), batch, strict=True):
            parts.append(ids)
            if tag is not None:
                yield np.concatenate([*parts, suffix]), tag
                parts = [prefix]


@lru_cache(maxsize=1)
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    """The threads of this process: new ones for each part would each leave memory behind."""
    return ThreadPoolExecutor(threads, thread_name_prefix="encode")


def _in_order(
    batches: Iterator[Batch], pool: ThreadPoolExecutor, tokenizer: Tokenizer, threads: int
) -> Iterator[tuple[Batch, Future]]:
    """Each batch with its tokens to come; a few are under way, so that no thread waits for the reader."""
    under_way: deque[tuple[Batch, Future]] = deque()
    for batch in batches:
        under_way.append((batch, pool.submit(tokenizer.encode_arrays, [text for text, _ in batch])))
        if len(under_way) > threads + 1:
            yield under_way.popleft()
    yield from under_way


def _batches(documents: Iterable[tuple[str, Tag]]) -> Iterator[Batch]:
    batch: Batch = []
    chars = 0
    for text, tag in documents:
        *head, tail = cut(text)
        for piece, tag_or_none in [*((piece, None) for piece in head), (tail, tag)]:
            batch.append((piece, tag_or_none))
            chars += len(piece)
            if chars >= BATCH_CHARS:
                yield batch
                batch, chars = [], 0
    if batch:
        yield batch


def cut(text: str) -> list[str]:
    """A text in pieces of at most PIECE_CHARS."""
    parts, start = [], 0
    while len(text) - start > PIECE_CHARS:
        end = text.rfind("\n", start, start + PIECE_CHARS) + 1 or start + PIECE_CHARS
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]
