"""How every command line of the project ends: one clear message and exit code 2 for a user's mistake, no traceback."""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator


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
def uninterrupted() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM to the end of something short: the start of a process, which would be left behind."""
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
