"""Exact and near-duplicates: the first one stays, the same decisions anywhere, and how many pairs are found."""

import os
import random
import subprocess
import sys
from hashlib import blake2b
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from pretrain.prepare import dedup
from pretrain.prepare.dedup import MinHasher, digest, first_occurrences, near_duplicates
from tests.forked import ROOT

pytest.importorskip("datasketch")
STDLIB = sorted(Path(os.__file__).parent.glob("*.py"))


# Exact


def test_a_digest_is_of_the_text():
    assert digest("caf\u00e9") == blake2b(b"caf\xc3\xa9", digest_size=16).digest() and len(digest("")) == 16
    assert len({digest(text) for text in ("a", "a ", "A", "a\n", "")}) == 5


@pytest.mark.parametrize("count", [0, 1, 2, 5000])
def test_first_occurrences_are_those_of_a_plain_loop(count):
    rng = np.random.default_rng(count)
    digests = rng.integers(0, 256, (count, 16), dtype=np.uint8)
    digests[:, :15] *= digests[:, :15] > 250  # few different rows, that differ in any byte
    if count > 2:
        digests[rng.integers(0, count, count // 2)] = digests[rng.integers(0, count, count // 2)]
    seen: dict[bytes, int] = {}
    wanted = [seen.setdefault(row.tobytes(), number) for number, row in enumerate(digests)]
    found = first_occurrences(digests)
    assert found.dtype == np.int64 and found.tolist() == wanted
    assert count < 2 or len(set(wanted)) < count or count == 2


def test_each_byte_of_a_digest_counts():
    base = np.arange(16, dtype=np.uint8)
    others = [base.copy() for _ in range(16)]
    for place, row in enumerate(others):
        row[place] ^= 1
    assert first_occurrences(np.array([base, *others, base])).tolist() == [*range(17), 0]
    assert first_occurrences(np.array([base, *others, base])[::-1]).tolist() == [*range(17), 0]


# Near: signatures


def shingles(text: str, ngram: int = 5) -> set[tuple[str, ...]]:
    words = dedup._WORD.findall(text.lower())
    return {tuple(words[place : place + ngram]) for place in range(max(1, len(words) - ngram + 1))}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def changed(text: str, share: float, rng: random.Random) -> str:
    """A copy with that share of the words replaced."""
    words = text.split()
    for place in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[place] = f"other{rng.randrange(1000)}"
    return " ".join(words)


def test_equal_places_of_signatures_estimate_the_words_in_common():
    rng, hasher = random.Random(2), MinHasher()
    errors = []
    for path in STDLIB[:30]:
        text = path.read_text(errors="replace")[:20_000]
        for share in (0.005, 0.02, 0.05, 0.2):
            other = changed(text, share, rng)
            errors.append(np.mean(hasher.signature(text) == hasher.signature(other)) - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.01  # no bias
    assert np.std(errors) < 0.05  # sqrt(0.5 * 0.5 / 128) = 0.044 at most


def test_a_signature_is_of_the_words_and_their_order():
    hasher = MinHasher()
    base = hasher.signature("one two three four five six seven")
    assert base.dtype == np.uint32 and base.shape == (128,)
    assert (base == hasher.signature("One, two --- THREE\n(four) five: six seven.")).all()
    assert not (base == hasher.signature("two one three four five six seven")).all()
    assert (base == hasher.signature("seven six five four three two one")).mean() < 0.1
    repeated = "one two three four five six seven " * 3
    assert (hasher.signature(repeated) == hasher.signature(repeated * 9)).all()  # a set, not a bag
    assert MinHasher(num_perm=16, ngram=2).signature("a b c").shape == (16,)


def test_short_texts_and_texts_without_words_are_told_apart():
    hasher = MinHasher()
    texts = ["one", "two", "one two", "two one", "!?", "...", "", "one two three four"]
    signatures = [hasher.signature(text) for text in texts]
    for one, other in combinations(signatures, 2):
        assert (one == other).mean() < 0.1
    assert near_duplicates(signatures + signatures, 0.8).tolist() == [-1] * 8 + list(range(8))


def test_a_long_text_is_hashed_in_parts_like_a_short_one(monkeypatch):
    text = STDLIB[0].read_text() + STDLIB[1].read_text()
    whole = MinHasher().signature(text)
    monkeypatch.setattr(dedup, "_BATCH", 17)
    assert (MinHasher().signature(text) == whole).all()


def test_signatures_are_the_same_in_every_process():
    """On every machine and with any seed of Python's hash: a fixed value."""
    code = (
        "from pretrain.prepare.dedup import MinHasher\n"
        "print(MinHasher().signature('the same words in the same order caf\\u00e9')[:4].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("0", "1")
    }  # fmt: skip
    assert outputs == {"[685601843, 383978539, 529219993, 31312754]"}


def test_without_datasketch_the_extra_to_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"needs datasketch: .* else pip install 'pretrain\[prepare\]'"):
        MinHasher()


# Near: decisions


def made_texts(count: int, words: int, rng: random.Random) -> list[str]:
    vocabulary = sorted({word for path in STDLIB[:20] for word in path.read_text(errors="replace").split()})
    return [" ".join(rng.choices(vocabulary, k=words)) for _ in range(count)]


def signatures_of(texts: list[str]) -> list[np.ndarray]:
    hasher = MinHasher()
    return [hasher.signature(text) for text in texts]


@pytest.mark.parametrize(
    "threshold, share, least, most",
    [
        (0.8, 0.01, 197, 200),
        (0.8, 0.02, 190, 200),
        (0.7, 0.02, 200, 200),
        (0.7, 0.03, 195, 200),
        (0.8, 0.10, 0, 0),
        (0.7, 0.10, 0, 2),
    ],
)
def test_recall_and_precision_on_made_pairs(threshold, share, least, most):
    """200 texts of 60 to 600 words and their copies with a share of the words changed, all in one set."""
    rng = random.Random(4)
    originals = [text for words in (60, 150, 300, 600) for text in made_texts(50, words, rng)]
    found = near_duplicates(signatures_of(originals + [changed(text, share, rng) for text in originals]), threshold)
    assert found[:200].tolist() == [-1] * 200  # no two originals are alike
    hits = int((found[200:] == np.arange(200)).sum())
    assert least <= hits <= most
    assert ((found[200:] == np.arange(200)) | (found[200:] == -1)).all()  # a copy is near its original or nothing


def test_real_texts_are_not_near_each_other_but_their_edits_are():
    rng = random.Random(6)
    texts = [path.read_text(errors="replace") for path in STDLIB[:100] if path.stat().st_size > 2000]
    edits = [changed(text, 0.01, rng) for text in texts]
    found = near_duplicates(signatures_of(texts + edits), 0.7)
    assert found.tolist() == [-1] * len(texts) + list(range(len(texts)))


def test_the_first_one_stays_and_only_those_that_stay_count():
    """A chain a ~ b ~ c where a and c are not near: b goes, so c stays."""
    words = made_texts(1, 400, random.Random(8))[0].split()

    def edited(*ranges: range) -> str:
        places = {place for chosen in ranges for place in chosen}
        return " ".join(f"new{place}" if place in places else word for place, word in enumerate(words))

    a, b, c = edited(), edited(range(0, 50)), edited(range(0, 50), range(200, 250))
    assert jaccard(a, b) > 0.75 and jaccard(b, c) > 0.75 and jaccard(a, c) < 0.65
    assert near_duplicates(signatures_of([a, b, c, c, b, a]), 0.7).tolist() == [-1, 0, -1, 2, 0, 0]
    assert near_duplicates(signatures_of([b, a, c]), 0.7).tolist() == [-1, 0, 0]


def test_of_several_near_ones_the_first_is_named():
    text = made_texts(1, 500, random.Random(9))[0]
    rng = random.Random(10)
    copies = [changed(text, 0.03, rng) for _ in range(40)]
    found = near_duplicates(signatures_of([text, *copies]), 0.6)
    assert found.tolist() == [-1] + [0] * 40
    kept = []
    signatures, loop = signatures_of(copies), []
    for number, signature in enumerate(signatures):  # as a plain loop decides
        near = [other for other in kept if (signatures[other] == signature).mean() >= 0.75]
        loop.append(near[0] if near else -1)
        kept += [] if near else [number]
    assert near_duplicates(iter(signatures), 0.75).tolist() == loop
    assert 1 < len(kept) < 40


def test_more_documents_than_fit_the_first_table():
    rng = np.random.default_rng(3)
    signatures = rng.integers(0, 2**32, (2500, 128), dtype=np.uint32)
    again = np.concatenate([signatures, signatures[::-1]])
    assert near_duplicates(again, 0.9).tolist() == [-1] * 2500 + list(range(2499, -1, -1))
    assert near_duplicates([], 0.9).tolist() == [] and near_duplicates([], 0.9).dtype == np.int64


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_a_threshold_that_means_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match="choose more than 0 and at most 1"):
        near_duplicates([], threshold)
