"""This rank's rows of global batch k, read ahead in the background. The state is one number and fingerprints.

With global batches of B samples, batch k is the samples k * B ... (k + 1) * B - 1 of the order, and rank r of w takes
rows r, r + w, ... of it: the batches are the same for every number of ranks. Batches run over the end of an epoch;
nothing is dropped there. Sources and phases are `mixture`'s, the cut of a shard into rows is `packing`'s.
"""

import atexit
import functools
import hashlib
import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from pretrain.shards.manifest import Manifest
from pretrain.stream import summary
from pretrain.stream.mixture import BLOCK, Cut, Mixture, Phase, open_phases, quotas
from pretrain.stream.source import Source, StreamOptions

DEFAULTS = StreamOptions()
STATE_VERSION = 2  # 1: no phase had pieces of longer windows
FETCH_BATCHES = 256  # how many batches ahead remote shards are fetched


@dataclass(frozen=True)
class Rows:
    """b windows of T tokens. tokens[:, :T] are the inputs, tokens[:, 1:] the token after each.

    `is_target` says which of them is to be predicted: where a window ends its chunk, the last one (a 0) is not.
    `documents` numbers the documents of a row from 0 on, -1 where there is none (padding); None when not asked for.
    """

    sample_numbers: np.ndarray  # int64[b]
    tokens: np.ndarray  # uint16 or uint32, as stored: [b, T + 1]
    is_target: np.ndarray  # bool[b, T]
    documents: np.ndarray | None = None  # int32[b, T + 1]

    def part(self, start: int, stop: int) -> "Rows":
        """Some of the rows."""
        columns = [getattr(self, field.name) for field in fields(self)]
        return Rows(*(None if column is None else column[start:stop] for column in columns))

    def digests(self) -> np.ndarray:
        """A digest of each row's sample number and tokens, uint8[b, 16] (sha256, cut short)."""
        numbers, tokens = self.sample_numbers.astype("<i8"), self.tokens.astype("<u4")
        digests = [
            hashlib.sha256(number.tobytes() + row.tobytes()).digest()[:16]
            for number, row in zip(numbers, tokens, strict=True)
        ]
        return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), 16)


class DataError(ValueError):
    """What went wrong while reading ahead (damage, a server that is gone), in words for the user."""


class Stream:
    """The batches of one or several data sets for one rank; see `batches`, and `rows` for any samples by number."""

    def __init__(
        self, sources: Sequence[Manifest], plan: Sequence[Phase], seed: int, rank: int = 0, world_size: int = 1,
        options: StreamOptions = DEFAULTS,
    ):  # fmt: skip
        """`plan` is the phases of the run, the first from step 0 on, with a weight for each source."""
        assert 0 <= rank < world_size and sources
        self._seed, self._options = seed, options
        self._rank, self._world_size = rank, world_size
        self._sources = [Source(manifest, seed, options) for manifest in sources]
        self._plan = self._in_wholes(plan)
        for phase in self._plan:
            self._check(phase)
        self._mixture = self._mix(recorded=(), step=0)

    @classmethod
    def in_order(cls, manifest: Manifest, seq_len: int, options: StreamOptions = DEFAULTS) -> "Stream":
        """All windows of a data set as they lie in it."""
        return cls([manifest], [Phase(0, seq_len, 1, (1.0,))], seed=0, options=replace(options, shuffle=False))

    @property
    def fingerprints(self) -> list[str]:
        """Of the sources."""
        return [source.manifest.fingerprint for source in self._sources]

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the run, past and planned."""
        return self._mixture.phases

    @property
    def epoch_samples(self) -> int:
        """Samples in an epoch of the first source in the first planned phase."""
        return self._sources[0].epoch_samples(self._plan[0].cut)

    def summary(self, steps: int) -> list[dict]:
        """What a run of `steps` steps reads of each source (`summary.of_sources`)."""
        return summary.of_sources(*self._read_in(), steps)

    def phase_summary(self, steps: int) -> list[dict]:
        """What it reads in each of its phases (`summary.of_phases`)."""
        return summary.of_phases(*self._read_in(), steps)

    def _read_in(self) -> tuple:
        return self.phases, self._sources, self._options.packing, self._seed

    def phase_of_step(self, step: int) -> Phase:
        """The phase that global batch `step` belongs to."""
        return self._mixture.phase_of_step(step)

    def rows(self, sample_numbers: np.ndarray) -> Rows:
        """The rows of any samples of one phase, in the order asked for; read here and now."""
        sample_numbers = np.asarray(sample_numbers, dtype=np.int64)
        phase = self._mixture.phase_of_sample(int(sample_numbers[0])) if sample_numbers.size else self.phases[0]
        return self._rows(sample_numbers, phase)

    def places(self, sample_numbers: np.ndarray) -> list[dict]:
        """Where samples of one phase come from: location of the source, epoch, shard, chunks, row in the shard."""
        phase = self._mixture.phase_of_sample(int(sample_numbers[0]))
        source, places = self._mixture.locate(sample_numbers, phase)
        found = []
        for s, epoch, shard, row in zip(
            *(column.tolist() for column in (source, places.epoch, places.shard, places.window)), strict=True
        ):
            manifest, layout = self._sources[s].manifest, self._sources[s].layout(phase.cut)
            found.append({"source": manifest.location, "epoch": epoch, "shard": manifest.shards[shard].name,
                          "chunks": layout.chunks_of(shard, row), "row": row})  # fmt: skip
        return found

    def numbers(self, step: int) -> np.ndarray:
        """The sample numbers of this rank's rows of global batch `step`."""
        phase = self._mixture.phase_of_step(step)
        first = phase.from_sample + (step - phase.from_step) * phase.global_batch_size
        return np.arange(first + self._rank, first + phase.global_batch_size, self._world_size, dtype=np.int64)

    def progress(self, step: int) -> tuple[int, int]:
        """The samples and the row places (tokens of input) of all batches before `step`, over all ranks."""
        samples = tokens = 0
        for phase, following in zip(self.phases, [*self.phases[1:], None], strict=True):
            end = min(step, following.from_step) if following else step
            count = max(0, end - phase.from_step) * phase.global_batch_size
            samples, tokens = samples + count, tokens + count * phase.seq_len
        return samples, tokens

    def batches(self, start_step: int) -> Iterator[Rows]:
        """This rank's rows of global batches start_step, start_step + 1, ... without end.

        A background thread reads ahead from the first `next` on; it ends when the iterator is closed or dropped, and
        never keeps the process alive. What goes wrong in it is raised here.
        """
        assert start_step >= 0
        ahead: queue.Queue[list[Rows] | BaseException] = queue.Queue(maxsize=1)
        stop = threading.Event()
        # the thread holds no reference to this iterator, so that dropping the iterator can end the thread
        worker = threading.Thread(
            target=self._read_ahead, args=(start_step, ahead, stop), name="pretrain-stream", daemon=True
        )
        # Python ends threads that still run at its exit in the middle of NumPy's C++, which aborts the process
        end = functools.partial(_end, worker, ahead, stop)
        atexit.register(end)
        worker.start()
        try:
            while True:
                item = ahead.get()
                if isinstance(item, ValueError | OSError):
                    raise DataError(str(item)) from item
                if isinstance(item, BaseException):
                    raise item
                yield from item
        finally:
            atexit.unregister(end)
            end()

    def state(self, step: int) -> dict:
        """What a checkpoint keeps, as plain JSON: the samples that all ranks have consumed before `step`, the phases so
        far, and what the order depends on.
        """
        phases = [asdict(phase) for phase in self.phases if phase.from_step < max(step, 1)]
        quarantine = [[*place] for place in sorted(self.quarantine)]
        facts = {"phases": phases, "quarantine": quarantine, "version": STATE_VERSION}
        return {"samples": self.progress(step)[0]} | self._identity() | facts

    def resume(self, state: dict, step: int) -> None:
        """Take up the history that a checkpoint of `step` keeps; a plan that says otherwise opens a new phase there.

        `ValueError` that says what differs when the checkpoint belongs to another order.
        """
        if state.get("version", 1) > STATE_VERSION:
            raise ValueError(
                "the checkpoint is of a newer version, whose order of samples this one does not know: update"
            )
        now = self._identity()
        differs = [f"{key} was {state[key]!r} and is {value!r}" for key, value in now.items() if state[key] != value]
        if differs:
            raise ValueError(
                f"the checkpoint belongs to another order of samples: {'; '.join(differs)}. "
                "Continue with the data and the settings it was saved with, or start a new run"
            )
        self._mixture = self._mix([_phase(entry) for entry in state["phases"]], step)
        self.adopt_quarantine(map(tuple, state["quarantine"]))

    @property
    def quarantine(self) -> set[tuple[int, int, int]]:
        """(source, shard, chunk) of the chunks found damaged and read no more."""
        return {(number, *place) for number, source in enumerate(self._sources) for place in source.bad}

    def describe(self, place: tuple[int, int, int]) -> dict:
        """A (source, shard, chunk) by the names of its source and shard."""
        source, shard, chunk = place
        manifest = self._sources[source].manifest
        return {"source": manifest.location, "shard": manifest.shards[shard].name, "chunk": chunk}

    def adopt_quarantine(self, places: Iterable[tuple[int, int, int]]) -> None:
        """Read these chunks no more, whatever they hold: other ranks, or the run before, found them damaged."""
        for source, shard, chunk in places:
            self._sources[source].bad.add((shard, chunk))

    def _identity(self) -> dict:
        return {
            "seed": self._seed, "shuffle": self._options.shuffle, "packing": self._options.packing,
            "fingerprints": self.fingerprints,
        }  # fmt: skip

    def _mix(self, recorded: Sequence[Phase], step: int) -> Mixture:
        def epoch_samples(source: int, cut: Cut) -> int:
            return self._sources[source].epoch_samples(cut)

        phases = open_phases(self._plan, recorded, step, self._seed, epoch_samples)
        return Mixture(phases, self._seed, lambda source, whole_len: self._sources[source].order(whole_len))

    def _in_wholes(self, plan: Sequence[Phase]) -> tuple[Phase, ...]:
        """The plan, its lengths as pieces of the longest one where they divide it and all sources have such windows.
        Documents that are packed have no pieces.
        """
        longest = max(phase.seq_len for phase in plan)
        used = [any(weights) for weights in zip(*(phase.weights for phase in plan), strict=True)]
        manifests = [source.manifest for source, is_used in zip(self._sources, used, strict=True) if is_used]
        if self._options.packing != "window":
            return tuple(plan)
        have = all(manifest.windows_per_shard(longest).any() for manifest in manifests)
        return tuple(
            replace(phase, whole_len=longest if have and longest % phase.seq_len == 0 else phase.seq_len)
            for phase in plan
        )

    def _check(self, phase: Phase) -> None:
        """`ValueError` for a phase that the data or the number of ranks do not allow."""
        if phase.global_batch_size % self._world_size:
            raise ValueError(
                f"a global batch of {phase.global_batch_size} samples does not divide into {self._world_size} ranks: "
                f"use a multiple of {self._world_size}"
            )
        for source, weight, places in zip(self._sources, phase.weights, quotas(phase.weights).tolist(), strict=True):
            if weight and not places:
                raise ValueError(
                    f"the weight {weight:g} of {source.manifest.location} is so small a share that none of {BLOCK} "
                    "samples would be of it: give it a greater weight, or 0"
                )
            source.check_enough(phase.cut, -(-phase.global_batch_size * places // BLOCK))

    def _read_ahead(self, step: int, ahead: queue.Queue, stop: threading.Event) -> None:
        fetched = step
        try:
            while not stop.is_set():
                fetched = self._fetch_ahead(fetched, step + FETCH_BATCHES)
                some = self._some_batches(step)
                ahead.put(some)
                step += len(some)
        except BaseException as error:  # whatever it is belongs to the consumer
            ahead.put(error)

    def _some_batches(self, step: int) -> list[Rows]:
        """`prefetch_batches` batches of one phase from `step` on, read at once: small batches cost more one by one."""
        phase = self.phase_of_step(step)
        steps = range(step, step + self._options.prefetch_batches)
        numbers = [self.numbers(each) for each in steps if self.phase_of_step(each) is phase]
        rows = self._rows(np.concatenate(numbers), phase)
        ends = np.cumsum([0, *map(len, numbers)])
        return [rows.part(start, end) for start, end in itertools.pairwise(ends.tolist())]

    def _fetch_ahead(self, start: int, end: int) -> int:
        """Have the shards of this rank's batches start ... end - 1 fetched in the order of use; returns `end`."""
        remote = any(source.manifest.store.is_remote for source in self._sources)
        for step in range(start, end) if remote else ():
            which, places = self._mixture.locate(self.numbers(step), self.phase_of_step(step))
            for s, source in enumerate(self._sources):
                source.fetch(dict.fromkeys(places.shard[which == s].tolist()))
        return end

    def _rows(self, sample_numbers: np.ndarray, phase: Phase) -> Rows:
        source, places = self._mixture.locate(sample_numbers, phase)
        if len(self._sources) == 1:
            return Rows(sample_numbers, *self._sources[0].read(phase.cut, places.shard, places.window))
        where = [np.flatnonzero(source == s) for s in np.unique(source).tolist()]
        parts = [
            self._sources[source[mine[0]]].read(phase.cut, places.shard[mine], places.window[mine]) for mine in where
        ]
        back = np.argsort(np.concatenate(where))
        columns = [None if column[0] is None else np.concatenate(column)[back] for column in zip(*parts, strict=True)]
        return Rows(sample_numbers, *columns)


def _phase(entry: dict) -> Phase:
    """A phase as `Stream.state` keeps it."""
    return Phase(**{name: tuple(value) if isinstance(value, list) else value for name, value in entry.items()})


def _end(worker: threading.Thread, ahead: queue.Queue, stop: threading.Event) -> None:
    """End a thread that reads ahead; one that hangs in a read (a dead file server) is left behind."""
    stop.set()
    while not ahead.empty():  # makes room: a put that waits goes through, and then the thread sees the event
        ahead.get_nowait()
    if threading.current_thread() is not worker:  # the garbage collector may call this in the worker itself
        worker.join(timeout=5)


HASH_SUMS = 4


def digest_sums(digests: np.ndarray) -> np.ndarray:
    """The digests of rows, added up: sums of 32 bits, fp64 [HASH_SUMS], exact for as many as two million ranks' sums.

    A digest has its sample's number in it, so the sum says which rows there were, and where; and ranks can add it up.
    """
    words = np.ascontiguousarray(digests, dtype=np.uint8).view("<u4")
    return (words.sum(0, dtype=np.uint64) & 0xFFFFFFFF).astype(np.float64)


def hash_of_sums(sums: Sequence[float]) -> str:
    """The hash of a global batch, from the sum over the ranks of their `digest_sums`: 16 hex characters."""
    words = np.array(sums, dtype=np.float64).astype(np.uint64) & np.uint64(0xFFFFFFFF)
    return hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()[:16]


def batch_hash(digests: np.ndarray) -> str:
    """The hash of a batch from the digests of all its rows."""
    return hash_of_sums(digest_sums(digests))
