"""The command line, one file per command; `app.py` holds what they share."""

from layerroute.cli.app import main

__all__ = ["main"]
