"""One evaluation from names to files: measure, then baselines, then free running, then the summary.

    provenance.json      what is evaluated; an interrupted evaluation goes on where it agrees with this
    samples.jsonl        a row per step, teacher forcing
    baselines.jsonl      the same steps under routes that were chosen otherwise
    generations.jsonl    a row per step and arm, free running
    summary.json         made of the others, and of nothing else

Steps are read one by one and written as they are measured: what is held is some dozens of them, and every id.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerroute.data.boundaries import boundary_tokens
from layerroute.data.collate import StepCollator, padding_id
from layerroute.data.load import open_steps
from layerroute.data.render import Sample
from layerroute.errors import ConfigError, DataError
from layerroute.evaluation import baselines, generations
from layerroute.evaluation.measure import measure
from layerroute.evaluation.perturb import measure_stability
from layerroute.evaluation.provenance import describe, resumed
from layerroute.evaluation.reading import StepReader
from layerroute.evaluation.samples import RowFile, read_rows, write_json
from layerroute.evaluation.summary import summarize
from layerroute.model.adapter import find_adapter, load, read_config
from layerroute.model.backbone import load_backbone
from layerroute.model.routed import RoutedModel

__all__ = ["EvaluationSettings", "evaluate", "write_summary"]

_CALIBRATION_ROWS = 100
"""Steps of each source that baselines are chosen on, at most."""
_SHOWN = 400
"""Characters of a prompt's end and of a target that a row shows."""

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is evaluated, besides the adapter."""

    data: Sequence[str]
    """Anything `open_steps` takes; better not what the adapter was trained on."""
    limit: int | None = None
    """Steps per source at most, whole groups, drawn by `seed`."""
    max_length: int = 1024
    """Tokens per step; older messages are cut to fit."""
    seed: int = 0
    """Of every random choice, resampling included."""
    baselines: bool = False
    """Also measure static, random, oracle, label-trained and length-threshold routes at the same rate, and generate
    under static ones."""
    generate: int = 0
    """So many steps of each task are also generated freely, and graded."""
    max_new_tokens: int = 256
    """Of a free generation."""
    batch_size: int = 8
    """Free generations side by side."""
    calibration: Sequence[str] = ()
    """What baselines are chosen on; no step of `data` should be in it."""

    def check(self, context: int | None) -> None:
        """Refuse what cannot be done.

        Raises:
            ConfigError: a length beyond the backbone's context, or a baseline without data to choose it on.
        """
        if context is not None and self.max_length > context:
            raise ConfigError(f"max_length={self.max_length}: this backbone reads at most {context} tokens")
        if self.baselines and not self.calibration:
            raise ConfigError(
                "baselines need calibration data, on which static routes are chosen; give --calibration with the files "
                "that the adapter was trained on, or `builtin`"
            )
        if self.calibration and not self.baselines:
            raise ConfigError("calibration data is given, but no --baselines, which alone use it")

    def as_row(self) -> dict[str, Any]:
        """What the figures depend on besides data and seed, JSON-able."""
        names = ("limit", "max_length", "max_new_tokens", "batch_size")
        return {name: getattr(self, name) for name in names}


def evaluate(
    adapter: str,
    settings: EvaluationSettings,
    output: str | Path,
    *,
    backbone: str | None = None,
    device: Any = "cpu",
    progress: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate an adapter; the same call goes on where an interrupted one stopped.

    Args:
        adapter: a folder or a built-in name.
        settings: on what, and how much of it.
        output: the folder to write.
        backbone: where the backbone is, if not under the name that the adapter records.
        device: torch's.
        progress: draw a progress bar on stderr.
        command: to stand in the provenance.

    Returns:
        The content of summary.json.

    Raises:
        AdapterError, BackboneError, DataError: something cannot be loaded, or the output holds another evaluation or
            cannot be written.
        ConfigError: a setting that cannot be served here.
    """
    folder = find_adapter(adapter)
    source = backbone or read_config(folder)["backbone"]["name"]
    steps = open_steps(settings.data, settings.seed, settings.limit)
    # by another seed, so that `builtin` gives other conversations than those that are evaluated
    held = open_steps(settings.calibration, settings.seed + 1, _CALIBRATION_ROWS) if settings.calibration else None
    plain, tokenizer = load_backbone(source, device=device)
    settings.check(getattr(plain.config.get_text_config(), "max_position_embeddings", None))
    model = RoutedModel(*load(folder, plain, is_trainable=False)).eval().requires_grad_(False)
    target = _folder(output)
    made = describe(
        model, folder, data=steps, calibration=held, seed=settings.seed, settings=settings.as_row(), command=command
    )
    provenance = resumed(target / "provenance.json", made)
    boundaries = boundary_tokens(tokenizer, model.router_config.boundaries)
    collator = StepCollator(padding_id(tokenizer))
    reader = StepReader(steps, tokenizer, settings.max_length, boundaries, progress)
    measured = RowFile(target / "samples.jsonl")
    _measure(model, reader, collator, measured, settings.seed)
    provenance["rows"] = vars(reader.counts)
    write_json(target / "provenance.json", provenance)  # what is measured is kept, should the rest fail
    choose: Callable[[], baselines.Baselines] | None = None
    if held is not None:
        shared = {(step.id,) for step in held} & measured.keys("id")
        provenance["calibration_shared"] = len(shared)

        @cache  # takes minutes, and is not needed where an earlier run did everything
        def choose_once() -> baselines.Baselines:
            calibration = StepReader(held, tokenizer, settings.max_length, boundaries).samples(set())
            rates = baselines.reached_rates(read_rows(measured.path))
            chosen = baselines.choose(model, list(calibration), collator, rates, settings.seed)
            provenance["baselines"] = chosen.summary()
            return chosen

        choose = choose_once
        _compare(model, reader, collator, RowFile(target / "baselines.jsonl"), choose)
    if settings.generate:
        generated = RowFile(target / "generations.jsonl")
        provenance["generations"] = _generate(model, reader, generated, choose, settings)
    write_json(target / "provenance.json", provenance)
    return write_summary(target)


def write_summary(folder: Path) -> dict[str, Any]:
    """Make summary.json of the files of an evaluation, and return its content.

    Raises:
        DataError: there is no evaluation, or the folder cannot be written.
    """
    try:
        provenance = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no evaluation: {error}") from None
    summary = summarize(
        read_rows(folder / "samples.jsonl"),
        provenance,
        baselines=read_rows(folder / "baselines.jsonl"),
        generations=read_rows(folder / "generations.jsonl"),
        seed=provenance["seed"],
    )
    write_json(folder / "summary.json", summary)
    return summary


def _measure(model: RoutedModel, reader: StepReader, collator: StepCollator, file: RowFile, seed: int) -> None:
    """Fill samples.jsonl."""
    done = file.keys("id")
    if done:
        _LOG.info("going on: %d steps are measured already", len(done))
    for samples in reader.batches(done, "measuring"):
        rows = measure(model, samples, collator)
        for sample, row in zip(samples, rows, strict=True):
            row["stability"] = measure_stability(model, reader.tokenizer, sample, row["segments"][0]["route"], seed)
            row["text"] = _texts(reader.tokenizer, sample)
        file.append(rows)


def _compare(
    model: RoutedModel,
    reader: StepReader,
    collator: StepCollator,
    file: RowFile,
    choose: Callable[[], baselines.Baselines],
) -> None:
    """Fill baselines.jsonl."""
    for samples in reader.batches(file.keys("id"), "baselines"):
        file.append(baselines.measure_baselines(model, samples, collator, choose()))


def _generate(
    model: RoutedModel,
    reader: StepReader,
    file: RowFile,
    choose: Callable[[], baselines.Baselines] | None,
    settings: EvaluationSettings,
) -> dict[str, int]:
    """Fill generations.jsonl, and count what was chosen and what was left out."""
    whole_turns = bool(model.router_config.boundaries)
    choice = generations.choose_steps(reader.steps, settings.generate, settings.seed, whole_turns=whole_turns)
    too_long = generations.fill(
        model,
        reader,
        choice.steps,
        choose,
        file,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
    )
    return {"chosen": len(choice.steps), "unfinished_turns": choice.unfinished_turns, "too_long": too_long}


def _texts(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> dict[str, str]:
    ids = sample.input_ids.tolist()
    prompt, target = ids[: sample.prompt_length], ids[sample.prompt_length :]
    return {
        "prompt_end": str(tokenizer.decode(prompt[-_SHOWN:]))[-_SHOWN:],
        "target": str(tokenizer.decode(target[:_SHOWN]))[:_SHOWN],
    }


def _folder(output: str | Path) -> Path:
    target = Path(output)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output {output}: cannot be made: {error}") from None
    return target
