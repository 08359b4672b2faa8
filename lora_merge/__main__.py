"""The console script, also as `python -m lora_merge`: Ctrl-C ends it without a traceback, at whatever moment.

Before `main` begins Python itself would print one: so little is imported up to there, here and by the package.
"""

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line. While it imports, or ends, an interrupt ends it at once; a command sees to its own."""
    signal.signal(signal.SIGINT, _end)
    from lora_merge.cli.main import main as run

    run()


def _end(number: int, frame: FrameType | None) -> None:
    """End without the clean-up of an interpreter, which is not ready for this: nothing of ours is under way."""
    os._exit(130)


if __name__ == "__main__":
    main()
