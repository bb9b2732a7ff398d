"""Notices of the package, shown to a person; a program that uses the library decides for itself."""

import logging
import sys


class _StandardError(logging.Handler):
    """Writes to the standard error of the moment, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{self.format(record)}\n")
        sys.stderr.flush()


def show_notices() -> None:
    """Show what the package announces and warns of, as plain lines on standard error.

    The command line and :func:`mimrefiner.start_run` call it; a second call changes nothing.
    """
    logger = logging.getLogger("mimrefiner")
    if not any(isinstance(handler, _StandardError) for handler in logger.handlers):
        logger.addHandler(_StandardError())
    logger.setLevel(logging.INFO)
