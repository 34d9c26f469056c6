"""Duplicates: which documents are the same as an earlier one, exactly (by a hash) or nearly (MinHash, by datasketch).

Digests and signatures depend on the text alone, so any number of processes may compute them, on any machine; the
decisions are taken in one place, in the order of the documents: of several alike, the first one stays.
"""

import hashlib
import re
import zlib
from collections.abc import Iterable

import numpy as np

from pretrain.cli import how_to_install

DIGEST_BYTES = 16
_WORD = re.compile(r"\w+")
_SCHEME = "affine32"  # datasketch's permutations: signatures are uint32
_SEED = 1
_BATCH = 4096  # shingles permuted together: a larger matrix does not fit the caches
_FOUND = 0.99  # at least this share of the pairs at the threshold is looked at


def digest(text: str) -> bytes:
    """16 bytes that only the same text has."""
    return hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest()


def first_occurrences(digests: np.ndarray) -> np.ndarray:
    """For each row of uint8[n, 16] the number of the first row that equals it (its own for the first): int64[n]."""
    assert digests.dtype == np.uint8 and digests.ndim == 2 and digests.shape[1] == DIGEST_BYTES, digests
    halves = np.ascontiguousarray(digests).view("<u8")
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal rows stay in their order
    ordered = halves[order]
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    result = np.empty(len(order), dtype=np.int64)
    result[order] = order[is_new][np.cumsum(is_new) - 1]
    return result


class MinHasher:
    """Signatures of texts: the share of places where two are equal estimates the share of word n-grams in common
    (Jaccard). Words are compared without case and punctuation; a text below `ngram` words is one n-gram.
    """

    def __init__(self, num_perm: int = 128, ngram: int = 5):
        self.num_perm = num_perm
        self.ngram = ngram
        self._datasketch = _datasketch()
        self._permutations = self._datasketch.MinHash(num_perm, _SEED, scheme=_SCHEME).permutations

    def signature(self, text: str) -> np.ndarray:
        """uint32[num_perm]"""
        sketch = self._datasketch.MinHash(
            self.num_perm, _SEED, hashfunc=int, permutations=self._permutations, scheme=_SCHEME
        )
        shingles = self._shingles(text).tolist()
        for start in range(0, len(shingles), _BATCH):
            sketch.update_batch(shingles[start : start + _BATCH])
        return sketch.hashvalues

    def _shingles(self, text: str) -> np.ndarray:
        """The distinct n-grams, as hashes: never Python's own hash, which differs between processes."""
        words = _WORD.findall(text.lower())
        data = "\n".join(words).encode().split(b"\n") if words else [text.encode()]
        hashes = np.fromiter(map(zlib.crc32, data), dtype=np.uint64, count=len(data))
        size = max(1, len(hashes) - self.ngram + 1)
        combined = np.zeros(size, dtype=np.uint64)
        for place in range(min(self.ngram, len(hashes))):
            combined = _mixed(combined ^ hashes[place : place + size])
        return np.unique(combined >> np.uint64(32))


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer, so that the order of the words matters."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def near_duplicates(signatures: Iterable[np.ndarray], threshold: float) -> np.ndarray:
    """For each document, in order: the number of the first earlier one that stays and that it is near to (their
    signatures agree in at least `threshold` of the places), or -1 when it stays itself. int64[n].

    LSH (locality-sensitive hashing) proposes the pairs to compare.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"a threshold of {threshold} for near-duplicates: choose more than 0 and at most 1, like 0.8")
    datasketch, lsh = _datasketch(), None
    result: list[int] = []
    kept: list[int] = []  # the numbers of the documents that stay; their signatures are the first rows of `rows`
    for number, signature in enumerate(signatures):
        sketch = datasketch.LeanMinHash(seed=_SEED, hashvalues=signature, scheme=_SCHEME)
        if lsh is None:
            lsh = datasketch.MinHashLSH(num_perm=len(signature), params=_bands(threshold, len(signature)))
            rows = np.empty((1024, len(signature)), dtype=np.uint32)
        candidates = sorted(lsh.query(sketch))
        near = np.flatnonzero((rows[candidates] == signature).mean(axis=1) >= threshold) if candidates else ()
        result.append(kept[candidates[near[0]]] if len(near) else -1)
        if not len(near):
            if len(kept) == len(rows):
                rows = np.concatenate([rows, np.empty_like(rows)])
            rows[len(kept)] = signature
            lsh.insert(len(kept), sketch, check_duplication=False)
            kept.append(number)
    return np.array(result, dtype=np.int64)


def _bands(threshold: float, num_perm: int) -> tuple[int, int]:
    """How many bands of how many places LSH compares: as long as can be, so that few pairs are proposed in vain, with
    one band equal in enough of the pairs at the threshold.
    """
    for size in range(num_perm // 2, 1, -1):
        bands = num_perm // size
        if 1 - (1 - threshold**size) ** bands >= _FOUND:
            return bands, size
    return num_perm, 1


def _datasketch():
    try:
        import datasketch
    except ImportError:
        raise ValueError(f"finding near-duplicates needs datasketch: {how_to_install('prepare')}") from None
    return datasketch
