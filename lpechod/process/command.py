"""How this process was started, so that it, or something like it, can be started again."""

import sys


def own_command() -> list[str]:
    """Return the command that starts what is running, with the code that is on disk by then.

    The interpreter's own path, since what it was called by may be relative or a name on PATH; and
    then its arguments word for word, options of the interpreter (``-X``, ``-m``) among them.
    """
    return [sys.executable, *sys.orig_argv[1:]]
