"""How every command line of the project ends: one clear message and exit code 2 for a user's mistake, no traceback."""

import sys
from collections.abc import Callable


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
