"""`layerroute report`: evaluations and an ablation to one page that says what they mean."""

from __future__ import annotations

from pathlib import Path

import click

from layerroute.errors import ConfigError

__all__ = ["report"]

_EPILOG = """\b
Examples:
  layerroute report evaluation
  layerroute report seed-1 seed-2 ablation --output evidence.html
  layerroute report evaluation --format md
  layerroute report evaluation --format json > evidence.json
"""


@click.command(epilog=_EPILOG)
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option("--output", help="The file to write.  [default: report.html; md and json go to stdout]")
@click.option(
    "--format",
    "kind",
    default="html",
    show_default=True,
    type=click.Choice(["html", "md", "json"]),
    help="Of the report.",
)
def report(folders: tuple[str, ...], output: str | None, kind: str) -> None:
    """Report what evaluations found: the verdict first, then charts, tables, examples and provenance.

    DIR is what `layerroute evaluate` or `layerroute ablate` wrote. Several evaluations are shown side by side.
    """
    from layerroute.report.load import load
    from layerroute.report.render import render

    path = Path(output or "report.html") if output or kind == "html" else None
    if path is not None:
        _check(path)
    text = render(load(folders), kind)
    if path is None:
        click.echo(text, nl=False)
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror})") from None
    click.echo(f"report: {path}")


def _check(path: Path) -> None:
    """Before anything is read."""
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; give a file, such as {path / 'report.html'}")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: there is no folder {path.parent}")
