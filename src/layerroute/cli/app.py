"""The entry point: finds the command, and turns every failure that is meant into one line and an exit status.

Results go to stdout, everything else to stderr. Exit status 0: done; 2: a user's mistake; 130: interrupted. Commands
import what they need when they run, so that `--help` and a mistyped option never wait for torch.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

import layerroute
from layerroute.config import nearest
from layerroute.errors import Interrupted, LayerRouteError

__all__ = ["main", "print_result"]

_COMMANDS = (
    "ablate",
    "benchmark",
    "benchmark-training",
    "calibrate",
    "data",
    "demo",
    "evaluate",
    "generate",
    "info",
    "report",
    "train",
)


class _Commands(click.Group):
    """Loads the module of the command that is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(import_module(f"layerroute.cli.{name}"), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in _COMMANDS:
            known = list(_COMMANDS)
            ctx.fail(f"no command {args[0]!r}{nearest(args[0], known)}; commands: {', '.join(known)}")
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: layerroute demo",
)
@click.version_option(layerroute.__version__, prog_name="layerroute")
def app() -> None:
    """Let an agent's language model skip blocks on the steps that need less."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    _log_to_stderr()
    try:
        app.main(args=None if args is None else list(args), prog_name="layerroute", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message(), 2)
    except LayerRouteError as error:
        _fail(str(error), 130 if isinstance(error, Interrupted) else 2)
    except (KeyboardInterrupt, click.Abort):
        _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone
        sys.stderr.close()
        sys.exit(1)
    sys.exit(0)


def print_result(result: dict[str, Any], as_json: bool, text: str) -> None:
    """Print a command's result: one JSON object, or the text for people."""
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else text)


def _fail(message: str, status: int) -> NoReturn:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(status)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("layerroute")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
    # PEFT asks a transformers model by the name that transformers has since changed
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
