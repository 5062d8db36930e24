"""The command line. Only argument passing and printing: what a command does is in the module that it calls."""

from __future__ import annotations

from flatcompress.cli.app import main

__all__ = ["main"]
