"""A folder of passages and their vectors, searched exactly by inner product. The only module that imports faiss.

A folder of an index:

    vectors.faiss     the vectors, in the order of the passages
    passages.jsonl    one object a passage
    index.json        what made it, and how many there are
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.cli import how_to_install
from pretrain.files import write_synced

VECTORS, PASSAGES, FACTS = "vectors.faiss", "passages.jsonl", "index.json"
INSTALL = how_to_install("tasks")


def write_index(folder: Path, vectors: np.ndarray, passages: Sequence[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Write an index into a folder that is there; vectors float32[n, D]."""
    assert len(vectors) == len(passages)
    faiss = library()
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / VECTORS))
    with open(folder / PASSAGES, "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(passage, ensure_ascii=False) + "\n" for passage in passages)
    write_synced(folder / FACTS, (json.dumps(facts | {"passages": len(passages)}, indent=1) + "\n").encode())


class Index:
    """An index, opened; `facts` is what it was made with."""

    def __init__(self, folder: Path):
        if not (folder / FACTS).is_file():
            raise ValueError(f"{folder} is no index of tools/search.py: make one with --texts")
        faiss = library()
        try:
            self.facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            self._lines = (folder / PASSAGES).read_bytes().splitlines()
            self._index = faiss.read_index(str(folder / VECTORS))
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"{folder} is damaged ({error}): make the index again with --texts") from None
        counts = {self.facts["passages"], len(self._lines), self._index.ntotal}
        if len(counts) > 1:
            raise ValueError(f"{folder} is damaged (its files are of different lengths): make the index again")

    def search(self, queries: np.ndarray, top: int) -> list[list[dict[str, Any]]]:
        """The nearest passages of each query float32[n, D], the best first, each with its `score`."""
        scores, numbers = self._index.search(queries, min(top, len(self._lines)))
        return [
            [{"score": score} | json.loads(self._lines[number]) for score, number in zip(*row, strict=True)]
            for row in zip(scores.tolist(), numbers.tolist(), strict=True)
        ]


def library() -> Any:
    """faiss; `ValueError` where it is missing, which should come before the work on an index."""
    try:
        import faiss
    except ImportError:
        raise ValueError(f"an index needs faiss: {INSTALL}") from None
    return faiss
