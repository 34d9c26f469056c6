"""Standard streams that only tell: whatever becomes of who reads them, the work goes on.

A stream may be closed at the other end (`| head`), full (`> /dev/full`), absent (`>&-`), unable to say a character
(an ASCII locale), or read by somebody who has stopped reading.
"""

import contextlib
import io
import logging
import os
import sys
import threading
from collections import deque

PATIENCE_SECONDS = 1.0  # for a reader who has stopped reading; after it, nothing waits for that stream until it moves
LAST_SECONDS = 10.0  # the same at the very end
KEPT = 10_000  # pieces of text that wait for a reader; what is more is dropped


class _Unfailing(io.RawIOBase):
    """Writes to a file descriptor; what that does not take is dropped."""

    def __init__(self, number: int):
        self._number = number

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        with contextlib.suppress(OSError):
            return os.isatty(self._number)
        return False

    def write(self, data: bytes) -> int:
        left = bytes(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(self._number, left) :]
        return len(data)


class _Unhurried(_Unfailing):
    """The same by a thread of its own: a reader who stopped reading stops nobody else."""

    def __init__(self, number: int):
        super().__init__(number)
        self._waiting: deque[bytes] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, daemon=True).start()

    def write(self, data: bytes) -> int:
        with self._changed:
            if len(self._waiting) < KEPT:
                self._waiting.append(bytes(data))
            self._changed.notify_all()
        return len(data)

    def written(self, seconds: float) -> bool:
        """Whether everything is written, after at most so long."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
            super().write(self._waiting[0])
            with self._changed:
                self._waiting.popleft()
                self._changed.notify_all()


class _Text(io.TextIOWrapper):
    """Text on an `_Unhurried` stream. `flush` waits for the reader as long as it is worth it."""

    _is_stuck = False

    def flush(self) -> None:
        super().flush()
        self._is_stuck = not self.buffer.raw.written(0 if self._is_stuck else PATIENCE_SECONDS)

    def drain(self) -> None:
        """The last `flush`."""
        super().flush()
        self.buffer.raw.written(LAST_SECONDS)


def outlive(*names: str, unhurried: bool = False) -> None:
    """No trouble with these of `stdout` and `stderr` reaches the program any more; `unhurried`: no waiting either."""
    for number in (0, 1, 2):  # where one is closed, the next file that is opened would be taken for it
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in names:
        old, number = getattr(sys, name), {"stdout": 1, "stderr": 2}[name]
        if old is None:  # it is absent
            old = open(os.devnull, "w", encoding="utf-8")
            setattr(sys, f"__{name}__", old)
        if old is not getattr(sys, f"__{name}__"):
            continue  # somebody else, as a test, has put it there
        kind, raw = (_Text, _Unhurried) if unhurried else (io.TextIOWrapper, _Unfailing)
        with contextlib.suppress(OSError):
            old.flush()
        new = kind(
            io.BufferedWriter(raw(number)), encoding=old.encoding, errors="backslashreplace",
            line_buffering=True,
        )  # fmt: skip
        setattr(sys, name, new)
        _tell_loggers(old, new)


def _tell_loggers(old: object, new: io.TextIOWrapper) -> None:
    """Libraries that log took the stream that was there when they were imported."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is old:
                handler.setStream(new)
