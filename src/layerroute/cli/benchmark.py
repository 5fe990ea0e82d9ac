"""`layerroute benchmark`: speed, memory and FLOPs beside plain transformers, measured in one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from layerroute.cli.app import print_result
from layerroute.cli.measured import goal_line, machine_lines, ratio_text, spread_text
from layerroute.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerroute.model.routed import RoutedModel

__all__ = ["benchmark"]

_EPILOG = """\b
Examples:
  layerroute benchmark --model smollm2-135m
  layerroute benchmark --adapter my-adapter --batch 1 --batch 4 --skip 8 --json > benchmark.json
  layerroute benchmark --model smollm2-135m --batch 1 --figure step-time.svg
  layerroute benchmark --model Qwen/Qwen2.5-0.5B-Instruct --device cuda --dtype bf16 --compiled

Which blocks are skipped is fixed (evenly spread), so that speeds of different runs compare; that
they are skipped is decided by the routers, as ever. Not a measurement of what an adapter skips.
"""


@click.command(epilog=_EPILOG)
@click.option("--model", help="A backbone: a built-in name, a folder, a .gguf file or a hub id.")
@click.option("--adapter", help="Or an adapter: a folder, or a built-in name.")
@click.option("--backbone", help="Where the adapter's backbone is, if not under the name that it records.")
@click.option("--batch", multiple=True, type=int, default=(1, 4, 8), show_default=True, help="Rows; may be repeated.")
@click.option("--prompt-tokens", default=256, show_default=True)
@click.option("--new-tokens", default=32, show_default=True)
@click.option("--skip", type=int, help="Blocks left out in the routed runs.  [default: 27% of all blocks]")
@click.option("--repetitions", default=9, show_default=True, help="Of every run, in turn with the others.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: torch's, the physical cores]")
@click.option("--device", help="Such as cuda or cpu.  [default: cuda if there is one]")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), help="Of the weights.  [default: the checkpoint's]")
@click.option("--compiled", is_flag=True, help="Measure compiled decoding too.")
@click.option("--figure", help="Also measure decode time against executed blocks; a .png or .svg file.")
@click.option("--seed", default=0, show_default=True, help="Of prompts, fresh LoRA and resampling.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def benchmark(
    model: str | None,
    adapter: str | None,
    backbone: str | None,
    threads: int | None,
    device: str | None,
    dtype: str | None,
    figure: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Time routed generation beside plain transformers and beside deleting the blocks."""
    _check_names(model, adapter, backbone)

    from layerroute.runtime.figure import check_figure, draw_sweep

    if figure is not None:
        check_figure(figure)

    import torch

    from layerroute.runtime.benchmark import BenchmarkSettings, run

    settings = BenchmarkSettings(sweep=figure is not None, **options)
    torch.set_num_threads(torch.get_num_threads() if threads is None else threads)  # pinned, either way
    plain, routed = _load(model, adapter, backbone, device, dtype, settings.seed)
    report = {"model": model or adapter, **run(plain, routed, settings)}
    if figure is not None:
        sweep = report["sweep"]
        draw_sweep(sweep, f"{report['model']}, batch {sweep['batch']}, {report['machine']['dtype']}", Path(figure))
    print_result(report, as_json, "\n".join(_text(report)))


def _check_names(model: str | None, adapter: str | None, backbone: str | None) -> None:
    if (model is None) == (adapter is None):
        raise ConfigError("give either --model NAME or --adapter ADAPTER")
    if backbone is not None and adapter is None:
        raise ConfigError("--backbone goes with --adapter; --model names the backbone itself")


def _load(
    model: str | None, adapter: str | None, backbone: str | None, device: str | None, dtype: str | None, seed: int
) -> tuple[PreTrainedModel, RoutedModel]:
    """The backbone twice: untouched, and routed with LoRA merged; what LoRA does not touch lies in memory once."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging as transformers_logging

    from layerroute import RoutedModel, get_routed_model
    from layerroute.cli.load import pick_device
    from layerroute.model.adapter import find_adapter, read_config
    from layerroute.model.backbone import load_backbone
    from layerroute.runtime.arms import sharing_copy

    transformers_logging.disable_progress_bar()
    source = model or backbone or read_config(find_adapter(str(adapter)))["backbone"]["name"]
    where = pick_device(device)
    weights = None if dtype is None else {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    plain, _ = load_backbone(source, dtype=weights, device=where)
    routable = sharing_copy(plain)
    if adapter is not None:
        routed = RoutedModel.from_pretrained(adapter, routable)
    else:
        set_seed(seed)
        routed = get_routed_model(routable).eval().requires_grad_(False)
        for name, parameter in routed.peft_model.named_parameters():
            if "lora_B" in name:  # zero when fresh; merging is then no change, and not the real path
                torch.nn.init.normal_(parameter, std=0.01)
    routed.merge_adapter()
    return plain, routed


def _text(report: Mapping[str, Any]) -> Iterator[str]:
    """The report's lines for people."""
    settings = report["settings"]
    yield from machine_lines(report["model"], report["machine"])
    lengths = f"{settings['prompt_tokens']} prompt tokens and {settings['new_tokens']} new ones"
    yield f"{lengths}, {settings['repetitions']} repetitions"
    yield f"skipped of {report['blocks']} blocks: {', '.join(map(str, report['skipped']))}"
    for batch, arms in report["arms"].items():
        yield f"\n{f'batch {batch}':<24}{'prefill ms':>28}{'decode ms per token':>28}{'warm-up s':>12}"
        for name, arm in arms.items():
            times = f"{spread_text(arm['prefill_ms']):>28}{spread_text(arm['decode_ms']):>28}"
            yield f"  {name:<22}{times}{arm['warmup_s']:>12.1f}"
        for name, parts in report["comparisons"][batch].items():
            for part, ratio in parts.items():
                yield f"  {name:<22}  {part:<8}{ratio_text(ratio)}"
    yield from _totals(report)
    for goal in report["goals"]:
        yield goal_line(goal)


def _totals(report: Mapping[str, Any]) -> Iterator[str]:
    held, flops = report["kv_bytes"], report["flops"]
    share = flops["routed_share"]
    counts = f"{share['counted']:.1%} counted, {share['closed_form']:.1%} in closed form"
    length = f"{flops['prompt_tokens']} + {flops['new_tokens']} tokens"
    yield f"\nKV bytes, batch {held['batch']}: {held['routed']:,} routed, {held['open']:,} open, {held['ratio']:.1%}"
    yield f"FLOPs, {length}, routed of open: {counts}; blocks executed: {share['blocks']:.1%}"
    limit = report["bandwidth"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in limit["share_of_limit"].items())
    least = f"{limit['open']['limit_ms']:.2f} ms open, {limit['routed']['limit_ms']:.2f} ms routed"
    yield f"memory is read at {limit['bytes_per_second'] / 1e9:.1f} GB/s, so a step of batch {limit['batch']} takes"
    yield f"{least} at least; share of that speed reached: {shares}"
    yield "\ngoals (met or missed where the whole 95% interval says so)"
