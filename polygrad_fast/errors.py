"""Exceptions raised by polygrad_fast. Every message names what was got and what was wanted."""


class InputError(ValueError):
    """The caller's input cannot be used. The command line prints the message and exits with 2."""


class CheckpointError(InputError):
    """A run directory or checkpoint is missing, incomplete, damaged or of another configuration."""


class NonFiniteError(RuntimeError):
    """Training met NaN or infinity. The message names the step, the quantity and the last
    checkpoint."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


class RunsFailedError(RuntimeError):
    """Some of several runs side by side ended with an error."""
