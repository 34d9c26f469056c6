"""How every command line of the project ends: one clear message and exit code 2 for a user's mistake, no traceback."""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: Slurm's, before time is up


def how_to_install(extra: str) -> str:
    """What to run for an optional part of the installation (setup.py lists them)."""
    return f"launch/setup.sh all in a checkout, else pip install 'pretrain[{extra}]'"


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
    Ctrl-C at its very start too, the process is stopped and waited for, also when more signals come.
    """
    process = None
    try:
        with uninterrupted():
            process = subprocess.Popen(command, **options)
        yield process
    except BaseException:
        if process is not None:
            with uninterrupted():
                stop(process)
                process.wait()
        raise


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off the signals that stop a program to the end of something that must be whole; ignored ones stay so."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def stops_as_ctrl_c() -> Iterator[None]:
    """Every polite signal ends the work like Ctrl-C, with what it started and what it left half done."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    polite = [number for number in STOP_SIGNALS if number != signal.SIGINT]
    before = [signal.signal(number, interrupt) for number in polite]
    try:
        yield
    finally:
        for number, handler in zip(polite, before, strict=True):
            signal.signal(number, handler)
