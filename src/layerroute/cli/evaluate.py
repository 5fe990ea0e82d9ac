"""`layerroute evaluate`: what routing does to a person's own steps, per step and summarised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from layerroute.cli.app import print_result
from layerroute.errors import Interrupted

__all__ = ["evaluate"]

_EPILOG = """\b
Examples:
  layerroute evaluate --adapter smollm2-135m --data builtin:100 --output evaluation
  layerroute evaluate --adapter my-adapter --data calls.test.jsonl.gz plans.test.jsonl.gz --output out
  layerroute evaluate --adapter my-adapter --data test.jsonl --limit 200 --baselines \\
    --calibration train.jsonl --output out
  layerroute evaluate --adapter my-adapter --data test.jsonl --generate 50 --output out
  layerroute report out --output report.html

An interrupted evaluation goes on with the same command. Evaluate on data that the adapter was not
trained on; data that it was trained on is recognised, and said so.
"""


@click.command(epilog=_EPILOG)
@click.option("--adapter", required=True, help="An adapter folder, or a built-in name such as smollm2-135m.")
@click.option(
    "--data", "first_data", multiple=True, required=True, help="Files of steps, `builtin`, or a hub source; several."
)
@click.argument("more_data", nargs=-1, metavar="[MORE DATA]...")
@click.option("--output", required=True, type=click.Path(), help="The folder to write.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many steps per source, drawn by --seed.")
@click.option("--max-length", default=1024, show_default=True, type=click.IntRange(min=8), help="Tokens per step.")
@click.option("--baselines", is_flag=True, help="Also measure routes that were chosen otherwise, at the same rate.")
@click.option(
    "--generate",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Also generate so many steps per task (calls, and answers after ####), and grade them.",
)
@click.option("--max-new-tokens", default=256, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--batch-size", default=8, show_default=True, type=click.IntRange(min=1), help="Steps generated side by side."
)
@click.option("--calibration", multiple=True, help="Data that baselines are chosen on; may be repeated.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of all random choices.")
@click.option("--backbone", help="Where the backbone is, if not under the name that the adapter records.")
@click.option("--device", help="Such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")
def evaluate(
    adapter: str,
    first_data: tuple[str, ...],
    more_data: tuple[str, ...],
    output: str,
    backbone: str | None,
    device: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure every step under the backbone, under LoRA alone, and routed; then say what routing does."""
    import sys

    from transformers.utils import logging as transformers_logging

    from layerroute.cli.load import pick_device
    from layerroute.evaluation.run import EvaluationSettings
    from layerroute.evaluation.run import evaluate as run

    transformers_logging.disable_progress_bar()
    settings = EvaluationSettings(data=(*first_data, *more_data), **options)
    try:
        summary = run(
            adapter,
            settings,
            output,
            backbone=backbone,
            device=pick_device(device),
            progress=sys.stderr.isatty(),
            command=_command(adapter, output, backbone, settings),
        )
    except KeyboardInterrupt:
        raise Interrupted("interrupted; run the same command again to go on from there") from None
    print_result(summary, as_json, "\n".join([*_text(summary), f"evaluation: {output}"]))


def _command(adapter: str, output: str, backbone: str | None, settings: Any) -> str:
    """The command that makes this evaluation, options left out that stand at their default."""
    import shlex

    defaults = type(settings)(data=())
    words = ["layerroute", "evaluate", "--adapter", adapter, "--data", *settings.data]
    for name, value in vars(settings).items():
        if name == "data" or value == getattr(defaults, name):
            continue
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        else:
            words += [
                word for part in (value if isinstance(value, tuple) else (value,)) for word in (option, str(part))
            ]
    words += ["--backbone", backbone] if backbone else []
    return shlex.join([*words, "--output", output])


def _text(summary: Mapping[str, Any]) -> list[str]:
    """A few lines to print."""
    lines = [f"WARNING: {warning}" for warning in summary["warnings"]]
    for name, rate in summary["skip_rate"].items():
        if rate["n"]:
            share = summary["flops"][name]["total_share"]
            losses = " / ".join(
                _perplexity(summary["perplexity"][arm][name]) for arm in ("base", "lora_only", "routed")
            )
            lines.append(
                f"{name:<10} {rate['n']:>6} steps  skip rate {rate['mean']:5.1f} {_interval(rate['ci95'])}  "
                f"FLOPs {100 * share:.1f}% of the backbone's  perplexity base / LoRA / routed {losses}"
            )
    for name in ("paired", "paired_length_matched", "pooled", "length_matched"):
        found = summary["differential"][name]
        if found["mean"] is None:
            lines.append(f"differential, {name}: not given ({found['reason']})")
        else:
            p = "-" if found["p_value"] is None else f"{found['p_value']:.4f}"
            lines.append(f"differential, {name}: {found['mean']:+.1f} points {_interval(found['ci95'])}, p {p}")
    for task, quality in (summary["quality"] or {}).items():
        graded = ", ".join(f"{arm} {100 * part['accuracy']:.1f}%" for arm, part in quality["arms"].items())
        lines.append(f"graded {task} ({quality['n']} steps): {graded}")
    return lines


def _perplexity(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(bounds: list[float] | None) -> str:
    return "(no interval: too few groups)" if bounds is None else f"({bounds[0]:.1f} to {bounds[1]:.1f})"
