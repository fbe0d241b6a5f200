"""The ``dynamon`` command."""

import argparse
from collections.abc import Sequence

from dynamon.cli import demo, report, schedule


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows the program's name; ``sys.argv`` by default.

    Returns:
        The exit status: 0, 1 where a command did not reach what it promises, or 2 where it refuses what it was given.
    """
    parser = argparse.ArgumentParser(prog="dynamon", description="Training dynamics for PyTorch Lightning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo.add_parser(commands)
    report.add_parser(commands)
    schedule.add_parser(commands)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status
