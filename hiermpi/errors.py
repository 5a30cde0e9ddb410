"""The errors a user can cause or mend, each with its exit code.

Anything that is not a :class:`UserError` is a defect or a broken machine and ends with a report of rank and host.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: stopped early with a checkpoint, run me again


class UserError(Exception):
    """Something the user can mend: the message is one sentence that names the thing and what to do."""

    exit_code = EXIT_ERROR
    everywhere = False
    """Whether every rank raises it; otherwise the rank that does must end the others."""


class UsageError(UserError):
    """The command line or the configuration is wrong."""

    exit_code = EXIT_USAGE


class PluginError(UserError):
    """Code from outside the package does not keep its contract: the message names it, and what it must give."""


class DamagedFile(UserError):
    """A file is not what it claims to be: truncated, altered, foreign or of an unknown version."""


@contextmanager
def plugin_errors(what: str) -> Iterator[None]:
    """Run code from outside the package; tell what it raises in one sentence.

    Args:
        what: How the user chose it, such as ``optimizer.rule = my_module:RULE``. Where it is empty, the code is of the
            package, and what it raises is left as it is.

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
        raise PluginError(f"{what}: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    """Return an error's type and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
