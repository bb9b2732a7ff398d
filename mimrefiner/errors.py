"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """What a person gave does not fit; the message says what was expected, what came, what to do.

    The command line prints the message as one line, without a traceback, and exits with status 2.

    >>> import mimrefiner as mr
    >>> try:
    ...     mr.ViTConfig(dim=64, num_heads=5)
    ... except mr.InputError as error:
    ...     print(error)
    dim 64 is not divisible by 5 attention heads
    """


class Stopped(Exception):
    """Training was asked to end (SIGTERM) and has saved where it is."""


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise InputError, which lists ``valid``, unless ``value`` is one of them."""
    if value not in valid:
        raise InputError(f"unknown {name} {value!r}: choose one of {', '.join(valid)}")
