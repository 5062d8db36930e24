"""The two ways a run can end badly: the user's input is wrong, or the run itself failed.

Everything raised on purpose derives from one of these, so the command line can turn it into one readable
message and the right exit code, and a library user can catch it as the builtin it also is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The input is wrong: a recipe, a flag, a file, an argument. Exit code 2, never a traceback."""

    exit_code = 2


class RunError(RuntimeError):
    """The run failed although the input was right. Exit code 3; the message says what is kept."""

    exit_code = 3


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one known spelling that begins with ``name``, else the closest, or None when nothing is close.

    >>> nearest("sagn", ["sam", "sagm", "adasap"])
    'sagm'
    """
    known = list(known)
    begun = [k for k in known if len(str(name)) > 2 and k.startswith(str(name).lower())]
    if len(begun) == 1:
        return begun[0]
    matches = difflib.get_close_matches(str(name)[:100].lower(), list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown(kind: str, name: object, known: Iterable[str]) -> UserError:
    """A UserError for a name that is not in ``known``: what was found, the nearest spelling, what is allowed."""
    names = sorted(known)
    guess = nearest(str(name), names)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return UserError(f"unknown {kind} {name!r}.{hint} Allowed: {', '.join(names)}.")


class Interrupted(Exception):
    """The run was asked to stop (SIGINT, SIGTERM) and has saved where it was. Exit code 130."""

    exit_code = 130
