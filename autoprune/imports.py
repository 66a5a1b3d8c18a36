"""Imports of libraries that change warning filters or environment variables of the process."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

_LOCK = threading.RLock()
_LATE = ("torch._dynamo", "scipy.special", "scipy.sparse")  # imported by tracing and its checks anyway


@contextmanager
def importing() -> Iterator[None]:
    """Leave warning filters and environment variables as they were before the imports inside."""
    with _LOCK, warnings.catch_warnings():
        before = dict(os.environ)
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@cache
def import_late_ones() -> None:
    """Import the modules that PyTorch and SciPy would import during the first search."""
    with importing():
        for name in _LATE:
            import_module(name)


@contextmanager
def quiet_optuna() -> Iterator[Any]:
    """Import Optuna, without its messages and warnings about experimental features; its settings are restored."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield optuna
    finally:
        optuna.logging.set_verbosity(verbosity)


def notebook_shell() -> Any:
    """Return IPython's shell if this process is the kernel of a notebook, else None; imports nothing."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return shell if getattr(shell, "kernel", None) is not None else None
