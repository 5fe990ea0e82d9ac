"""A recipe: every number that a training run depends on, as frozen settings read from YAML.

The values live in `layerroute/recipes/*.yaml`, not here: those in the package are complete, and a recipe
file of your own states only what differs from `default`. Imports neither torch nor transformers.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, model_validator

from layerroute.config import RouterConfig, Settings, nearest
from layerroute.errors import ConfigError
from layerroute.training.settings import (
    GateSettings,
    LoraSettings,
    ObjectiveSettings,
    OptimizerSettings,
    SearchSettings,
    TrainingSettings,
)

__all__ = ["Recipe", "load_recipe", "recipe_keys", "recipe_names"]


class Recipe(Settings):
    """Everything a run depends on besides the backbone and the data."""

    router: RouterConfig
    lora: LoraSettings
    objective: ObjectiveSettings
    search: SearchSettings | None
    """How routes are searched, or null with `gates`."""
    gates: GateSettings | None
    """How gates are trained end to end, or null with `search`."""
    optimizer: OptimizerSettings
    training: TrainingSettings

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.router.boundaries and self.objective.pool_over == "sequence":
            raise ValueError(
                f"router.boundaries={list(self.router.boundaries)} with objective.pool_over='sequence': routers that "
                "read the whole sequence have nothing to decide again at a boundary; use pool_over='prompt', or "
                "boundaries=[]"
            )
        if (self.search is None) == (self.gates is None):
            both = "both are given" if self.search else "both are null"
            raise ValueError(
                f"search and gates: {both}; routes are either searched (gates=null, recipe `default`) or trained end "
                "to end (search=null, recipe `end_to_end`)"
            )
        if self.gates is None:
            self._check_search()
        else:
            self._check_gates(self.gates)
        return self

    def _check_search(self) -> None:
        if (self.objective.budgets is None) == (self.objective.accepted is None):
            both = "neither is given" if self.objective.budgets is None else "both are given"
            raise ValueError(
                f"objective.budgets and objective.accepted: {both}; search takes either shares of blocks (accepted="
                "null) or losses in nats per token (budgets=null)"
            )
        if self.objective.accepted is not None and not self.objective.distillation_weight:
            raise ValueError("objective.accepted with distillation_weight=0: the divergence is then not measured")
        assert self.search is not None
        full, ramp = self.search.full_depth_share, self.objective.ramp_share
        if self.objective.accepted is None and full + ramp > 1:
            raise ValueError(
                f"search.full_depth_share={full} and objective.ramp_share={ramp} add up to more than the run; the "
                "budgets would not be reached"
            )
        if self.objective.accepted is not None and (full > 0.5 or self.search.part > 8):
            raise ValueError(
                f"objective.accepted with search.full_depth_share={full} and search.part={self.search.part}: depth is "
                "found block by block, so use full_depth_share <= 0.5 and part <= 8"
            )
        if self.optimizer.router_lr is not None:
            raise ValueError(
                f"optimizer.router_lr={self.optimizer.router_lr} with search: routers are fitted to the searched "
                "routes, not trained by gradient; use router_lr=null, or recipe `end_to_end`"
            )
        if self.router.position == "block" or self.router.closed_blocks:
            raise ValueError(
                f"search with router.position={self.router.position!r} and router.closed_blocks="
                f"{list(self.router.closed_blocks)}: it needs position='early' and closed_blocks=[]"
            )
        if self.objective.pool_over == "sequence":
            raise ValueError("objective.pool_over='sequence' with search: routers are fitted to prompts; use 'prompt'")

    def _check_gates(self, gates: GateSettings) -> None:
        budgets = self.objective.budgets
        if self.objective.accepted is not None:
            raise ValueError("objective.accepted with gates: they take budgets; use accepted=null, or `search`")
        if gates.penalty == "budget" and budgets is None:
            raise ValueError("penalty='budget' needs budgets; give budgets.tool_call, budgets.planning, budgets.answer")
        if gates.penalty == "soft_mean" and budgets is not None:
            raise ValueError("penalty='soft_mean' obeys no budgets; set budgets=null, or penalty='budget'")
        if budgets is not None and budgets.direct_call is not None:
            raise ValueError(
                f"objective.budgets.direct_call={budgets.direct_call} with gates: they know step types alone, and take "
                "the prompt of a call as tool_call; use direct_call=null"
            )
        if self.optimizer.router_lr is None:
            raise ValueError("optimizer.router_lr=null with gates: give a learning rate; 0 keeps routers as they start")

    def check_blocks(self, blocks: int) -> None:
        """Refuse what a backbone of `blocks` blocks cannot do.

        Raises:
            ConfigError: if no block is routable, or a budget exceeds the share of blocks that may be skipped.
        """
        routable = len(self.router.routable(blocks))
        if self.objective.budgets is None:
            return
        for step_type, budget in self.objective.budgets.model_dump().items():
            if budget is not None and budget > routable / blocks:
                raise ConfigError(
                    f"objective.budgets.{step_type}={budget}: only {routable} of this backbone's {blocks} blocks may "
                    f"be skipped (protect_first={self.router.protect_first}, protect_last={self.router.protect_last}), "
                    f"so the budget can be at most {math.floor(100 * routable / blocks) / 100}"
                )


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(item.name.removesuffix(".yaml") for item in _folder().iterdir() if item.name.endswith(".yaml"))


def recipe_keys() -> dict[str, Any]:
    """Every key of a recipe as its dotted path (`objective.budgets.tool_call`), with its annotation."""
    return dict(_leaves(Recipe, ""))


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, str] | None = None) -> Recipe:
    """Read a recipe and change some of its values.

    Args:
        name_or_path: a packaged name (`default`, `end_to_end`, `paper`) or a YAML file; keys that a file leaves out are
            `default`'s.
        overrides: values as YAML text by key, either dotted (`training.steps`) or bare where unambiguous (`steps`).

    Raises:
        ConfigError: no such recipe, no YAML, an unknown or ambiguous key, or a value that its field does not allow.
    """
    source = str(name_or_path)
    values = _merge(_parse(_read("default"), "default"), _parse(_read(source), source))
    for key, text in (overrides or {}).items():
        path = _resolve(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{path}={text!r} is not valid YAML; give a number, a word or a [list]") from None
        _assign(values, path, value)
    recipe = _build(Recipe, values, "", source)
    assert isinstance(recipe, Recipe)
    return recipe


def _folder() -> Any:
    return resources.files("layerroute") / "recipes"


def _read(source: str) -> str:
    names = recipe_names()
    if source in names:
        return str((_folder() / f"{source}.yaml").read_text(encoding="utf-8"))
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"no recipe {source!r}{nearest(source, names)}; use {', '.join(names)}, or a YAML file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {source} cannot be read: {error}") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ConfigError(f"recipe {source}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {source}: expected sections ({', '.join(Recipe.model_fields)}), found {values!r}")
    return values


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(merged.get(key), dict) and isinstance(value, Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _section(annotation: Any) -> type[BaseModel] | None:
    """The Settings class of a field that is a section (`Budgets | None` counts), else None."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _leaves(cls: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if section:
            yield from _leaves(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field.annotation


def _resolve(key: str) -> str:
    paths = list(recipe_keys())
    sections = {path.rsplit(".", depth)[0] for path in paths for depth in range(1, path.count(".") + 1)}
    if key in paths or key in sections:
        return key
    matches = [path for path in [*paths, *sections] if path.endswith(f".{key}")]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"recipe key {key!r} is ambiguous; write one of {', '.join(sorted(matches))}")
    hint = nearest(key, paths) if "." in key else nearest(key, [path.rsplit(".", 1)[1] for path in paths])
    raise ConfigError(f"unknown recipe key {key!r}{hint or '; known: ' + ', '.join(paths)}")


def _assign(values: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for name in sections:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[leaf] = value


def _build(cls: type[BaseModel], values: Mapping[str, Any], prefix: str, source: str) -> BaseModel:
    """Build inner sections first, so that an error names the full path of its field."""
    built = dict(values)
    if any(not isinstance(key, str) for key in built):
        raise ConfigError(
            f"recipe {source}: every key is a word, not {next(k for k in built if not isinstance(k, str))!r}"
        )
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if section and isinstance(built.get(name), Mapping):
            built[name] = _build(section, built[name], f"{prefix}{name}.", source)
    try:
        return cls(**built)
    except ConfigError as error:
        where = f"recipe {source}" + (f", {prefix.rstrip('.')}" if prefix else "")
        raise ConfigError(f"{where}: {error}") from None
