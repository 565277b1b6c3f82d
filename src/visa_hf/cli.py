"""The command line `visa`: finds the command, and turns what goes wrong into one line and an exit code.

0 is done, 1 is "done, and something was found wrong" where a command says so, 2 is an error, 130 is an interruption.
The commands themselves are in `visa_hf.commands`.
"""

import argparse
import errno
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

# Each is a file in `visa_hf.commands`, which is loaded only when it is asked for: some take seconds.
COMMANDS = {
    "segment": "find what sentences mean in a video",
    "data": "check, make and publish data sets",
    "train": "train or fine-tune as a recipe says",
    "merge": "fold a trained adapter into its model",
    "evaluate": "score a model, or predictions, on a benchmark",
}
# What a user can cause, or a machine. Anything else is a defect of ours, and keeps its traceback.
_EXPECTED_ERRORS = (ValueError, TypeError, ImportError, OSError, RuntimeError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `visa`.

    Args:
        argv (`Sequence[str]`, *optional*): the arguments, those of the process by default.

    Returns:
        `int`: the exit code.
    """
    given = sys.argv[1:] if argv is None else list(argv)
    output: Path | None = None
    # Where DeepSpeed is installed, accelerate loads it whether it is used or not, and it says that there is a CPU.
    logging.getLogger("DeepSpeed").addFilter(_says_more_than_the_device)
    try:
        with _termination_is_interruption():
            args = build_parser(given).parse_args(given)
            output = vars(args).get("output")
            return args.run(args)
    except KeyboardInterrupt as interruption:
        print(f"\nvisa: interrupted. {interruption}".rstrip(), file=sys.stderr)
        return 130
    except _EXPECTED_ERRORS as error:
        print(f"visa: error: {_one_line(error, output)}", file=sys.stderr)
        return 2


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        argv (`Sequence[str]`, defaults to none): arguments; only the command that they name gets to know its own.
    """
    parser = argparse.ArgumentParser(prog="visa", description="Find what a sentence means in a video.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in argv[:1]:
            import_module(f"visa_hf.commands.{name}").add_arguments(command)
    return parser


def _says_more_than_the_device(record: logging.LogRecord) -> bool:
    return "Setting accelerator to CPU" not in record.getMessage()


@contextmanager
def _termination_is_interruption() -> Iterator[None]:
    """Let SIGTERM, which schedulers and `timeout` send, clean up as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _one_line(error: BaseException, out: Path | None) -> str:
    """Return an error's message in one line."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"No space is left on the disk{f' of `{out}`' if out else ''}. Free some, or choose another folder."
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return " ".join(text.split()) or type(error).__name__
