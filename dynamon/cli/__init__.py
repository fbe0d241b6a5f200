"""The ``dynamon`` command."""

import argparse
import sys
from collections.abc import Sequence

from dynamon.cli import advise, demo_options, report, schedule
from dynamon.cli.refusal import RefusalError

COMMANDS = (demo_options, report, schedule, advise)
_INTERRUPTED = 130  # what shells give for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0; 1 if the demo's results are not what it promises; 2 if a command refuses what it was given,
        with the reason printed; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="dynamon", description="Training dynamics for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except RefusalError as error:
        print(f"dynamon {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"dynamon {options.command}: stopped by Ctrl-C.", file=sys.stderr)
        return _INTERRUPTED
    return status
