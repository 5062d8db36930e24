"""Every figure that the documentation quotes, each by one command: `python -m benchmarks.NAME [--quick] [--check]`."""

from __future__ import annotations

import sys
from types import TracebackType

_CALLED = {"sklearn": "scikit-learn", "skimage": "scikit-image", "PIL": "pillow", "yaml": "pyyaml"}


def _sentence(error: BaseException) -> str | None:
    """What to say of an error that is no fault of the benchmark: a package that is missing, an input that is wrong."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        missing = error.name.partition(".")[0]
        package = _CALLED.get(missing, missing.replace("_", "-"))
        return f"this benchmark needs a package that is not installed: pip install {package}"
    return str(error) if type(error).__name__ == "UserError" else None


def _told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if (sentence := _sentence(error)) is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(sentence, file=sys.stderr)


if sys.argv[0] == "-m":  # while `python -m benchmarks.NAME` looks for its module; never where a program imports it
    sys.excepthook = _told
