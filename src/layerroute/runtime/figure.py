"""The figure of a benchmark's sweep: decode time against executed blocks. Needs matplotlib, the extra `figures`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerroute.errors import ConfigError

__all__ = ["check_figure", "draw_sweep"]

_SUFFIXES = (".png", ".svg")
# Okabe and Ito's palette; colour-blind readers tell them apart, and so do the markers
_KINDS = {"static": ("plain, blocks deleted", "#0072B2", "s"), "routed": ("routed", "#D55E00", "o")}


def check_figure(file: str | os.PathLike[str]) -> None:
    """Make sure that a figure can be written there, before anything is measured.

    Raises:
        ConfigError: a suffix other than .png or .svg, a folder that is not there, or no matplotlib.
    """
    path = Path(file)
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"--figure {path}: the name must end in {' or '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--figure {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise ConfigError("--figure needs matplotlib: pip install 'layerroute[figures]'")


def draw_sweep(sweep: Mapping[str, Any], title: str, file: str | os.PathLike[str]) -> None:
    """Draw the `sweep` of a benchmark's report: medians with their quartiles, and the ideal line.

    The ideal line goes through the whole backbone's time with the slope of deleting blocks.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    executed = sweep["executed"]
    slope, whole = sweep["static"]["line"]["per_block"], sweep["static"]["decode_ms"][0]["median"]
    ideal = [whole - slope * (executed[0] - count) for count in executed]
    axes.plot(executed, ideal, color=_KINDS["static"][1], linewidth=1, linestyle="--", label="ideal")
    for kind, (label, colour, marker) in _KINDS.items():
        points = sweep[kind]["decode_ms"]
        medians = [point["median"] for point in points]
        below = [point["median"] - point["lower_quartile"] for point in points]
        above = [point["upper_quartile"] - point["median"] for point in points]
        axes.errorbar(
            executed, medians, (below, above), color=colour, marker=marker, linestyle="", capsize=3, label=label
        )
    axes.set(xlabel="executed blocks", ylabel="decode, ms per token", title=title, xticks=executed)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=200)
