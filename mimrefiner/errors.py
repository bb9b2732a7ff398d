"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """Something the user gave does not fit; the message says what was expected, what came and what
    to do.

    The command line prints the message as one line, without a traceback, and exits with status 2.
    """


class Stopped(Exception):
    """Training was asked to end (SIGTERM) and has saved where it is."""


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    """InputError unless ``value`` is one of ``valid``, which it lists."""
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(valid)}")
