"""This rank's rows of global batch k, read ahead in the background. The state is one number and fingerprints.

Global batch k is the samples k * B ... (k + 1) * B - 1 of the order, and rank r of w takes rows r, r + w, ... of it:
the batches are the same for every number of ranks. Batches run over the end of an epoch; nothing is dropped there.
"""

import atexit
import functools
import hashlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pretrain.data.manifest import Manifest
from pretrain.data.order import Order
from pretrain.data.shards import ShardReader


@dataclass(frozen=True)
class Rows:
    """b windows of T tokens. tokens[:, :T] are the inputs, tokens[:, 1:] the token after each.

    `is_target` says which of them is to be predicted: where a window ends its chunk, the last one (a 0) is not.
    `documents` numbers the documents of a row from 0 on, -1 where there is none (padding); None when not asked for.
    """

    sample_numbers: np.ndarray  # int64[b]
    tokens: np.ndarray  # uint32[b, T + 1]
    is_target: np.ndarray  # bool[b, T]
    documents: np.ndarray | None = None  # int32[b, T + 1]


class Stream:
    """The batches of a data set for one rank; see `batches`, and `rows` for any samples by number.

    `seq_len` in tokens, `global_batch_size` in samples over all ranks, `prefetch_batches` how far to read ahead.
    """

    def __init__(
        self,
        manifest: Manifest,
        seq_len: int,
        seed: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        shuffle: bool = True,
        prefetch_batches: int = 4,
    ):
        assert 0 <= rank < world_size and seq_len > 0 and global_batch_size > 0 and prefetch_batches > 0
        windows = manifest.windows_per_shard(seq_len)
        _check_enough(manifest, int(windows.sum()), seq_len, global_batch_size)
        if global_batch_size % world_size:
            raise ValueError(
                f"a global batch of {global_batch_size} samples does not divide into {world_size} ranks: "
                f"use a multiple of {world_size}"
            )
        self._manifest, self._seq_len, self._seed, self._shuffle = manifest, seq_len, seed, shuffle
        self._global_batch_size, self._rank, self._world_size = global_batch_size, rank, world_size
        self._prefetch_batches = prefetch_batches
        self._order = Order(windows, seed, shuffle)
        self._reader = ShardReader(manifest)
        self.epoch_samples = self._order.epoch_samples
        # tokens that no window of this length holds: the ends of chunks
        self.unused_tokens = manifest.tokens - self.epoch_samples * seq_len

    def rows(self, sample_numbers: np.ndarray) -> Rows:
        """The rows of any samples, in the order asked for; read here and now."""
        sample_numbers = np.asarray(sample_numbers, dtype=np.int64)
        places = self._order.locate(sample_numbers)
        tokens, last_is_target = self._reader.read(places.shard, places.window, self._seq_len)
        is_target = np.ones((len(tokens), self._seq_len), dtype=bool)
        is_target[:, -1] = last_is_target
        return Rows(sample_numbers, tokens, is_target)

    def batches(self, start_step: int) -> Iterator[Rows]:
        """This rank's rows of global batches start_step, start_step + 1, ... without end.

        A background thread reads ahead from the first `next` on; it ends when the iterator is closed or dropped, and
        never keeps the process alive. What goes wrong in it is raised here.
        """
        assert start_step >= 0
        ahead: queue.Queue[Rows | BaseException] = queue.Queue(maxsize=self._prefetch_batches)
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
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            atexit.unregister(end)
            end()

    def state(self, samples: int) -> dict:
        """What a checkpoint keeps, as plain JSON: the samples consumed so far by all ranks, and what they depend on."""
        phase = {"from_sample": 0, "seq_len": self._seq_len, "global_batch_size": self._global_batch_size}
        return {"samples": samples} | self._identity() | {"phases": [phase]}

    def check_state(self, state: dict) -> None:
        """`ValueError` that says what differs, unless `state` was saved by a stream with the same order."""
        now = self.state(samples=0)
        then = {name: state[name] for name in self._identity()} | state["phases"][-1]
        differs = [
            f"{name} was {then[name]!r} and is {value!r}"
            for name, value in (self._identity() | now["phases"][-1]).items()
            if then[name] != value
        ]
        if differs:
            raise ValueError(
                f"the checkpoint belongs to another order of samples: {'; '.join(differs)}. "
                "Continue with the data and the settings it was saved with, or start a new run"
            )

    def _identity(self) -> dict:
        return {"seed": self._seed, "shuffle": self._shuffle, "fingerprint": self._manifest.fingerprint}

    def _read_ahead(self, step: int, ahead: queue.Queue, stop: threading.Event) -> None:
        mine = np.arange(self._rank, self._global_batch_size, self._world_size, dtype=np.int64)
        try:
            while not stop.is_set():
                ahead.put(self.rows(step * self._global_batch_size + mine))
                step += 1
        except BaseException as error:  # whatever it is belongs to the consumer
            ahead.put(error)


def _check_enough(manifest: Manifest, samples: int, seq_len: int, global_batch_size: int) -> None:
    if samples >= global_batch_size:
        return
    shorter = seq_len
    while shorter > 1 and int(manifest.windows_per_shard(shorter).sum()) < global_batch_size:
        shorter //= 2
    fits = int(manifest.windows_per_shard(shorter).sum()) >= global_batch_size
    remedies = [f"a global batch of at most {samples}"] if samples else []
    remedies += [f"a sequence length of at most {shorter}"] if fits else []
    raise ValueError(
        f"{manifest.location} holds {samples} samples of {seq_len} tokens, fewer than one batch of {global_batch_size} "
        f"({manifest.tokens:,} tokens in all): use {' or '.join(remedies + ['more text'])}"
    )


def _end(worker: threading.Thread, ahead: queue.Queue, stop: threading.Event) -> None:
    """End a thread that reads ahead; one that hangs in a read (a dead file server) is left behind."""
    stop.set()
    while not ahead.empty():  # makes room: a put that waits goes through, and then the thread sees the event
        ahead.get_nowait()
    if threading.current_thread() is not worker:  # the garbage collector may call this in the worker itself
        worker.join(timeout=5)


def row_digests(rows: Rows) -> np.ndarray:
    """A digest of each row's sample number and tokens, uint8[b, 16] (sha256, cut short)."""
    numbers, tokens = rows.sample_numbers.astype("<i8"), rows.tokens.astype("<u4")
    digests = [
        hashlib.sha256(number.tobytes() + row.tobytes()).digest()[:16]
        for number, row in zip(numbers, tokens, strict=True)
    ]
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(digests), 16)


def batch_hash(digests: np.ndarray) -> str:
    """The hash of a global batch from the digests of all its rows, in global order: 16 hex characters."""
    return hashlib.sha256(np.ascontiguousarray(digests, dtype=np.uint8).tobytes()).hexdigest()[:16]
