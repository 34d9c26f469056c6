"""Which documents of a preparation are left out as duplicates: decided in one place, in the order of the input.

sign_part (parts.py) saves for each part, in signed/00012/, what is compared (a row for each document that the filters
keep) and the place of each: two numbers. `decide` adds, for each document, the number of the earlier one that it is a
duplicate of, counted over the whole input, or -1. From numbers to places that a user can open is the way of the few
examples of a report only, at the end.
"""

import hashlib
import io
from pathlib import Path

import numpy as np

from pretrain.files import write_atomically
from pretrain.prepare.dedup import first_occurrences, near_duplicates
from pretrain.prepare.documents import source_of
from pretrain.prepare.filters import Report
from pretrain.prepare.plan import DUPLICATES_NAME, SIGNED, Plan

SIGNATURES_NAME, PLACES_NAME = "signatures.npy", "places.npy"
ENDS_NAME, DECIDED_NAME = "ends.npy", "decided"  # of the whole input, beside the parts


def save_signatures(folder: Path, rows: list[np.ndarray], places: list[tuple[int, int]]) -> None:
    """What sign_part saves of a part; a place: the number of the piece, and of the document in it."""
    _save(folder / SIGNATURES_NAME, np.array(rows) if rows else np.zeros((0, 0), dtype=np.uint8))
    _save(folder / PLACES_NAME, np.array(places, dtype=np.int64).reshape(-1, 2))


def decide(plan: Plan) -> None:
    """Decide over all parts, unless it was done for the same parts before."""
    numbers = range(len(plan.parts))
    key = hashlib.sha256("".join(part.key for part in plan.parts).encode()).hexdigest()
    decided = plan.staging / SIGNED / DECIDED_NAME
    are_there = all((plan.folder(SIGNED, number) / DUPLICATES_NAME).exists() for number in numbers)
    if are_there and decided.exists() and decided.read_text(encoding="utf-8") == key:
        return
    arrays = [_load(plan.folder(SIGNED, number) / SIGNATURES_NAME) for number in numbers]
    ends = np.cumsum([len(array) for array in arrays])
    if plan.settings.dedup == "exact":
        digests = np.concatenate([array for array in arrays if len(array)] or [np.zeros((0, 16), dtype=np.uint8)])
        originals = first_occurrences(digests)
        originals[originals == np.arange(len(originals))] = -1
    else:
        originals = near_duplicates((row for array in arrays for row in array), plan.settings.dedup_threshold)
    for number, part in zip(numbers, np.split(originals, ends[:-1]), strict=True):
        _save(plan.folder(SIGNED, number) / DUPLICATES_NAME, part)
    _save(plan.staging / SIGNED / ENDS_NAME, ends)
    write_atomically(decided, key.encode())


def load(plan: Plan, number: int) -> np.ndarray:
    """For each document of a part that the filters keep: the number of the one it is a duplicate of, or -1."""
    return np.load(plan.folder(SIGNED, number) / DUPLICATES_NAME, allow_pickle=False)


def name_places(plan: Plan, report: Report) -> None:
    """Put into the examples of a report, each with the numbers of a duplicate (its part, its place among those of the
    part that the filters keep) and of the earlier one (among those of the whole input), where the two lie.
    """
    ends = np.load(plan.staging / SIGNED / ENDS_NAME, allow_pickle=False)
    for example in report.dropped[f"{plan.settings.dedup}_duplicate"].examples:
        part, document, original = example.pop("numbers")
        earlier = int(np.searchsorted(ends, original, side="right"))
        first = int(ends[earlier - 1]) if earlier else 0
        example["source"] = _source_of(plan, part, document)
        example["detail"] = f"like {_source_of(plan, earlier, original - first)}"


def _source_of(plan: Plan, part: int, document: int) -> str:
    piece, number = _load(plan.folder(SIGNED, part) / PLACES_NAME)[document].tolist()
    try:
        return source_of(plan.parts[part].pieces[piece], number, plan.settings.text_key)
    except OSError:  # the input is read once more for this, and may be gone by now: that undoes nothing
        return str(plan.parts[part].pieces[piece].path)


def _load(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r" if path.stat().st_size > 1 << 16 else None, allow_pickle=False)


def _save(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
