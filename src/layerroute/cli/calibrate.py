"""`layerroute calibrate`: measures which threshold gives which average skip rate, for `--skip-budget`."""

from __future__ import annotations

import click

from layerroute.cli.app import print_result

__all__ = ["calibrate"]

_EPILOG = """\b
Examples:
  layerroute calibrate --adapter my-adapter --data builtin
  layerroute calibrate --adapter my-adapter --data calls.jsonl.gz plans.jsonl.gz --rows 200
  layerroute calibrate --adapter smollm2-135m --data builtin --output elsewhere --json
  layerroute generate --adapter my-adapter --prompt "Weather in Oslo?" --skip-budget 0.2
"""


@click.command(epilog=_EPILOG)
@click.option("--adapter", required=True, help="An adapter folder, or a built-in name such as smollm2-135m.")
@click.option(
    "--data", "first_data", multiple=True, required=True, help="Files of steps, `builtin`, or a hub source; several."
)
@click.argument("more_data", nargs=-1, metavar="[MORE DATA]...")
@click.option("--rows", default=400, show_default=True, type=click.IntRange(min=2), help="At most so many per source.")
@click.option("--max-length", default=1024, show_default=True, type=click.IntRange(min=1), help="Tokens per step.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of the choice of rows.")
@click.option("--output", type=click.Path(), help="Where to write calibration.json.  [default: the adapter's folder]")
@click.option("--backbone", help="Where the backbone is, if not under the name that the adapter records.")
@click.option("--device", help="Such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def calibrate(
    adapter: str,
    first_data: tuple[str, ...],
    more_data: tuple[str, ...],
    rows: int,
    max_length: int,
    seed: int,
    output: str | None,
    backbone: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure which threshold gives which average skip rate, so that one adapter serves many budgets.

    Half of the data makes the table that `generate --skip-budget` looks up; the other half shows what it reaches.
    """
    from pathlib import Path

    from layerroute.cli.load import load_adapter
    from layerroute.data.load import load_steps
    from layerroute.model.adapter import find_adapter
    from layerroute.model.calibration import routers_digest, write_calibration
    from layerroute.runtime.calibrate import run

    folder = find_adapter(adapter)
    loaded = load_steps([*first_data, *more_data], seed=seed, limit_per_source=rows)
    model, tokenizer = load_adapter(adapter, backbone, device, calibrated=False)
    report = run(model, tokenizer, loaded, routers=routers_digest(folder), max_length=max_length, seed=seed)
    path = write_calibration(Path(output) if output else folder, report.calibration)
    print_result({"output": str(path), **report.as_dict()}, as_json, f"{report.table()}\ncalibration: {path}")
