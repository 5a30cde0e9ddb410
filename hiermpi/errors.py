"""The errors that a user can cause or fix, each with its exit code.

Anything that is not a :class:`UserError` is a defect or a broken machine and ends with a report of rank and host.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: the run stopped early with a checkpoint and can be started again


class UserError(Exception):
    """An error that the user can fix; its message is one sentence that names the cause and what to do."""

    exit_code = EXIT_ERROR
    everywhere = False
    """This is true if every rank raises the error; otherwise the rank that raises it must end the others."""


class UsageError(UserError):
    """An error in the command line or the configuration."""

    exit_code = EXIT_USAGE


class PluginError(UserError):
    """An error of code from outside the package that breaks its contract; the message names both."""


class DamagedFile(UserError):
    """An error of a file that is not what it claims to be: truncated, altered, foreign or of an unknown version."""


@contextmanager
def plugin_errors(what: str) -> Iterator[None]:
    """Run code from outside the package, and turn its exceptions into a PluginError of one sentence.

    Args:
        what: The user's choice of the code, such as ``optimizer.rule = my_module:RULE``. It is empty for code of the
            package, whose exceptions pass unchanged.

    Raises:
        PluginError: The body raised anything but a UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not what:
            raise
        raise PluginError(f"{what}: {type(error).__name__}: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """Return an error's message on one line."""
    return " ".join(str(error).split())[:300]
