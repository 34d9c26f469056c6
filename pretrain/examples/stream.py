"""Examples to fine-tune on, encoded, and their stream: order, batches and state as `stream.Stream` has them.

Epoch e is a permutation of the examples that depends on (seed, e) alone; with global batches of B, batch k holds the
samples k * B ... (k + 1) * B - 1, and rank r of w takes rows r, r + w, ... of it. The state is the number of samples.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pretrain.stream.order import Recent, hash_key, permutation

_EXAMPLES = 8  # keeps this use of the keys apart from those of order, mixture, source and objectives


class Ragged:
    """Rows of different lengths in one array: row i is values[ends[i - 1] : ends[i]]."""

    def __init__(self, rows: Iterable[Sequence[int] | np.ndarray], dtype: Any = np.int32):
        listed = [np.asarray(row, dtype=dtype) for row in rows]
        self.lengths = np.array([len(row) for row in listed], dtype=np.int64)
        self.values = np.concatenate(listed) if listed else np.zeros(0, dtype)
        self._starts = np.cumsum(self.lengths) - self.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self._starts[number] : self._starts[number] + self.lengths[number]]

    def padded(self, numbers: np.ndarray, fill: int, dtype: Any = np.int64) -> np.ndarray:
        """Some rows, one below the other, filled up to the longest of them: [k, longest]."""
        lengths = self.lengths[numbers]
        table = np.full((len(numbers), int(lengths.max(initial=1))), fill, dtype)
        table[np.arange(table.shape[1]) < lengths[:, None]] = np.concatenate([self[number] for number in numbers])
        return table


@dataclass(frozen=True)
class Examples:
    """What a model sees at once, n of them: `columns` of n rows each, `lengths` in tokens; `rows` are the rows of the
    table that they come from. `facts`: whatever else a task needs to judge predictions. `dropped`: what was left out.
    `whole`: the lengths before texts were cut.
    """

    columns: dict[str, Ragged]
    lengths: np.ndarray
    rows: np.ndarray
    fingerprint: str
    facts: dict[str, Any] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    whole: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def sizes(self) -> dict[str, int]:
        """The tokens of the longest, before it was cut; how many were cut, and how many tokens they lost."""
        whole = self.lengths if self.whole is None else self.whole
        lost = whole - self.lengths
        return {"longest": int(whole.max()), "cut": int((lost > 0).sum()), "cut_tokens": int(lost.sum())}


def make_examples(
    columns: dict[str, Ragged], rows: Iterable[int], facts: dict[str, Any] | None = None, dropped: Iterable[str] = (),
    whole: Iterable[int] | None = None,
) -> Examples:  # fmt: skip
    """Examples whose tokens are all columns named `inputs...`; the fingerprint is that of everything in the columns."""
    digest = hashlib.sha256()
    for name, column in sorted(columns.items()):
        digest.update(name.encode() + column.lengths.tobytes() + column.values.tobytes())
    lengths = sum(column.lengths for name, column in columns.items() if name.startswith("inputs"))
    numbers = np.fromiter(rows, dtype=np.int64)
    assert all(len(column) == len(numbers) for column in columns.values())
    whole = None if whole is None else np.fromiter(whole, dtype=np.int64)
    return Examples(columns, lengths, numbers, digest.hexdigest(), facts or {}, tuple(dropped), whole)


@dataclass(frozen=True)
class ExampleRows:
    """Some examples of a batch, by their numbers; `sample_numbers` are their places in the order of the run."""

    sample_numbers: np.ndarray
    numbers: np.ndarray
    examples: Examples

    def part(self, start: int, stop: int) -> "ExampleRows":
        return ExampleRows(self.sample_numbers[start:stop], self.numbers[start:stop], self.examples)

    def digests(self) -> np.ndarray:
        """A digest of each row's sample number and content, uint8[b, 16] (sha256, cut short)."""
        columns = [column for _, column in sorted(self.examples.columns.items())]
        found = []
        for sample, number in zip(self.sample_numbers.astype("<i8"), self.numbers.tolist(), strict=True):
            content = b"".join(column[number].tobytes() for column in columns)
            found.append(hashlib.sha256(sample.tobytes() + content).digest()[:16])
        return np.frombuffer(b"".join(found), dtype=np.uint8).reshape(len(found), 16)


class ExampleStream:
    """The batches of examples for one rank, with the interface that `loop.train_loop` uses of `stream.Stream`."""

    def __init__(self, examples: Examples, seed: int, global_batch_size: int, rank: int = 0, world_size: int = 1):
        if global_batch_size % world_size:
            raise ValueError(
                f"a global batch of {global_batch_size} examples does not divide into {world_size} ranks: use a "
                f"multiple of {world_size}"
            )
        self.examples, self._seed, self._batch = examples, seed, global_batch_size
        self._rank, self._world_size = rank, world_size
        self._from_step = self._from_sample = 0
        self._orders = Recent(2)  # epoch -> (its permutation, the tokens before each place of it)
        self.quarantine: set = set()

    @property
    def epoch_samples(self) -> int:
        return len(self.examples)

    def numbers(self, step: int) -> np.ndarray:
        """The sample numbers of this rank's rows of global batch `step`."""
        first = self._from_sample + (step - self._from_step) * self._batch
        return np.arange(first + self._rank, first + self._batch, self._world_size, dtype=np.int64)

    def rows(self, sample_numbers: np.ndarray) -> ExampleRows:
        epochs, places = np.divmod(sample_numbers, self.epoch_samples)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            numbers[epochs == epoch] = self._order(epoch)[0][places[epochs == epoch]]
        return ExampleRows(sample_numbers, numbers, self.examples)

    def batches(self, start_step: int) -> Iterator[ExampleRows]:
        """This rank's rows of global batches start_step, start_step + 1, ... without end; all of it is in memory."""
        while True:
            yield self.rows(self.numbers(start_step))
            start_step += 1

    def progress(self, step: int) -> tuple[int, int]:
        """The samples and the tokens of all batches before `step`, over all ranks."""
        samples = self._from_sample + (step - self._from_step) * self._batch
        epochs, place = divmod(samples, self.epoch_samples)
        before = int(self._order(epochs)[1][place]) if place else 0
        return samples, epochs * int(self.examples.lengths.sum()) + before

    def state(self, step: int) -> dict:
        """What a checkpoint keeps, as plain JSON."""
        return {"samples": self.progress(step)[0], "seed": self._seed, "examples": self.examples.fingerprint}

    def resume(self, state: dict, step: int) -> None:
        """Go on after a checkpoint of `step`, perhaps with another batch size; `ValueError` for other examples."""
        now = self.state(step)
        differs = [key for key in ("seed", "examples") if state.get(key) != now[key]]
        if differs:
            raise ValueError(
                f"the checkpoint belongs to another order of examples: {', '.join(differs)} differ. Continue with the "
                "data and the settings it was saved with, or start a new run"
            )
        self._from_step, self._from_sample = step, state["samples"]

    def summary(self, steps: int) -> list[dict]:
        samples = self.progress(steps)[0]
        return [{
            "examples": len(self.examples), "tokens": int(self.examples.lengths.sum()),
            "epochs": samples / self.epoch_samples, **self.examples.sizes(), "dropped": len(self.examples.dropped),
        }]  # fmt: skip

    def phase_summary(self, steps: int) -> list[dict]:
        """Nothing: there are no phases."""
        return []

    def describe(self, place: tuple) -> dict:
        raise AssertionError("examples are never put in quarantine")

    def adopt_quarantine(self, places: Iterable) -> None:
        """Nothing is ever found damaged: examples are in memory."""

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        def make() -> tuple[np.ndarray, np.ndarray]:
            order = permutation(hash_key(self._seed, _EXAMPLES, epoch), self.epoch_samples)
            lengths = self.examples.lengths[order]
            return order, np.cumsum(lengths) - lengths

        return self._orders.get(epoch, make)
