"""How every command line of the project ends: one clear message and exit code 2 for a user's mistake, no traceback."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's `main`; `ValueError` and `OSError` become one message on stderr and exit code 2, Ctrl-C 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def child(command: list[str], stop: Callable[[Any], None] = lambda process: process.kill(), **options: Any) -> Iterator:
    """A process (`subprocess.Popen` with `options`) that never outlives what is done with it: whatever ends that early,
    Ctrl-C at its very start too, the process is stopped and waited for.
    """
    process = None
    try:
        with uninterrupted():
            process = subprocess.Popen(command, **options)
        yield process
    except BaseException:
        if process is not None:
            stop(process)
            process.wait()
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of something short."""
    came = []
    before = {number: signal.signal(number, lambda *_: came.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A polite signal ends the work like Ctrl-C, with what it started and what it left half done."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
