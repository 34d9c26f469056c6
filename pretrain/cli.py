"""How every command line of the project ends: with a code of one table, and for a user's mistake one clear message."""

import contextlib
import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pretrain.console import outlive

# SIGUSR1: Slurm's, before time is up; SIGHUP: the terminal is gone, and under nohup it is ignored
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# Exit codes, of sysexits.h where it has one; launch/README.md explains them.
FINISHED, FAILED, MISTAKE = 0, 1, 2
HELD = 69  # another process has the run, or the output; EX_UNAVAILABLE
STOPPED = 75  # on request, before it was done: started again, it goes on; EX_TEMPFAIL

LISTED = 20  # names in a message


class Held(ValueError):
    """Another process works on what this one was to work on."""


def how_to_install(extra: str) -> str:
    """What to run for an optional part of the installation (setup.py lists them)."""
    return f"launch/setup.sh all in a checkout, else pip install 'pretrain[{extra}]'"


def among(wanted: str, known: Sequence[str]) -> str:
    """Known names for a message about one that is not: few, or the nearest of many."""
    if len(known) <= LISTED:
        return ", ".join(known)
    near = difflib.get_close_matches(wanted, known, 3, 0.6)
    meant = f"the nearest are {', '.join(map(repr, near))}" if near else f"as {', '.join(known[:3])}"
    return f"{len(known):,} ({meant})"


def check_text(text: str, what: str) -> None:
    """`ValueError` where bytes that are no characters of this terminal or shell have come in as text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not UTF-8: type it, or rename the file, in UTF-8") from None


def run_tool(main: Callable[[], None], tells: bool = False, kept: str = "") -> None:
    """Run a tool's `main`; `ValueError`, `OSError` and Ctrl-C become one message on stderr and a code of the table.
    `kept`: what there is of the work after Ctrl-C, where stdout is not all of it.

    Nothing that stderr does ends it; nor stdout, where that only `tells` of work whose result is elsewhere. Where the
    result is what is printed, the tool ends quietly when its reader left, with the code that SIGPIPE would give.
    """
    outlive("stderr", *["stdout"] * tells)
    try:
        for number, argument in enumerate(sys.argv[1:], 1):
            check_text(argument, f"argument {number} ({ascii(argument)[:60]})")
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still in the buffer
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(HELD if isinstance(error, Held) else MISTAKE)
    except KeyboardInterrupt:
        kept = kept or "no output was written" * tells
        print("interrupted" + f": {kept}; run the same command again" * bool(kept), file=sys.stderr)
        sys.exit(STOPPED)


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
    polite = [number for number in polite if signal.getsignal(number) != signal.SIG_IGN]
    before = [signal.signal(number, interrupt) for number in polite]
    try:
        yield
    finally:
        for number, handler in zip(polite, before, strict=True):
            signal.signal(number, handler)
