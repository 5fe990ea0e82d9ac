"""The sections of a recipe besides the router's, as frozen settings without default values.

The values live in `layerroute/recipes/*.yaml`. Imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from layerroute.config import Settings

__all__ = [
    "Accepted",
    "Budgets",
    "GateSettings",
    "LoraSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "SearchSettings",
    "TrainingSettings",
]


class LoraSettings(Settings):
    """The LoRA adapters on the attention projections."""

    rank: int = Field(ge=1)
    """Rank of each pair of matrices."""

    alpha: int = Field(ge=1)
    """The update is scaled by `alpha / rank`."""

    dropout: float = Field(ge=0, lt=1)
    """Dropout on the adapters' input, while training."""


class Budgets(Settings):
    """Share of ALL blocks, protected ones counted, that each kind of decision is to skip."""

    tool_call: float = Field(ge=0, le=1)
    """Of a call, from the boundary that opens it on; of its prompt too where there is no boundary."""

    direct_call: float | None = Field(ge=0, le=1)
    """Of the prompt of a call that no thought precedes, up to its boundary; null: as `tool_call`."""

    planning: float = Field(ge=0, le=1)
    answer: float = Field(ge=0, le=1)

    @model_validator(mode="after")
    def _consistent(self) -> Budgets:
        if self.direct_call is not None and self.direct_call > self.tool_call:
            raise ValueError(
                f"direct_call={self.direct_call} exceeds tool_call={self.tool_call}, but a route may only close blocks "
                "at a boundary; lower direct_call"
            )
        if self.planning > self.tool_call:
            raise ValueError(
                f"planning={self.planning} exceeds tool_call={self.tool_call}, but what a thought's route closes stays "
                "closed for the call after it; lower planning"
            )
        return self


class Accepted(Settings):
    """What skipping may cost each kind of decision: divergence from full depth, nats per token; 0 skips nothing."""

    tool_call: float = Field(ge=0)
    direct_call: float = Field(ge=0)
    planning: float = Field(ge=0)
    answer: float = Field(ge=0)


class ObjectiveSettings(Settings):
    """What is minimised, and how much may be skipped."""

    budgets: Budgets | None
    """Skip budget of each kind of decision; null with `accepted`, and where the gates' penalty aims at nothing."""

    accepted: Accepted | None
    """Loss that is accepted of each kind, in place of budgets: each skips as much as that allows."""

    ramp_share: float = Field(ge=0, le=1)
    """Share of the run over which the budgets rise linearly from 0 to their values."""

    distillation_weight: float = Field(ge=0)
    """Weight of the divergence from the same model with all blocks running, on rows that skip; 0 saves that pass."""

    loss_on: Literal["target", "all"]
    """Which tokens the cross-entropy counts: the assistant step alone, or the prompt too."""

    pool_over: Literal["prompt", "sequence"]
    """Which tokens the routers read: those before the step, or the step too (which no inference can do)."""


class SearchSettings(Settings):
    """Search, heal, route: a few routes are searched, LoRA is trained under them, routers are fitted to choose them."""

    full_depth_share: float = Field(ge=0, lt=1)
    """Share of the run in which LoRA is trained at full depth, before any block is left out."""

    rows: int = Field(ge=1)
    """Rows of each kind of decision on which removals are tried."""

    part: int = Field(ge=1)
    """Blocks of a kind that are searched at a time, each part on the model that was healed of the parts before."""

    fit_rows: int = Field(ge=1)
    """Rows of each kind of decision, at most, that the routers are fitted to; the sources come in turn."""

    fit_length: int | None = Field(ge=16)
    """Longest of those rows, in tokens; longer ones are cut or left out. null: `training.max_length`. They cost little,
    for only the first blocks read them, and routers meet prompts longer than LoRA was trained on."""

    fit_decay: float = Field(gt=0)
    """Weight of the routers' squared weights in that fit."""

    open_weight: float = Field(gt=0)
    """How much more that fit minds a block closed that should run than a block run that could be left out."""


class GateSettings(Settings):
    """End to end: gates are trained with the loss, which adds `router_loss_weight` * penalty."""

    penalty: Literal["soft_mean", "budget"]
    """`soft_mean`: the mean gate probability (the publication). `budget`: squared distance of the executed gates' skip
    rate from the budget of the step type."""

    router_loss_weight: float = Field(ge=0)
    """Weight of the penalty."""

    statistic_decay: float = Field(ge=0, lt=1)
    """How much of the running skip rate a micro-batch keeps, for the budget penalty; 0 looks at one batch only."""

    gate_signal: Literal["straight_through", "measured"]
    """What tells a gate the cost of closing. `straight_through`: the gradient of the cross-entropy (the publication).
    `measured`: the rise in loss when that block alone is left out, measured per step type before the first update."""

    cost_rows: int | None = Field(ge=1)
    """Rows of each step type on which `gate_signal="measured"` measures; null with `straight_through`."""

    logit_noise: float = Field(ge=0)
    """Scale of the logistic noise on the router logits at the first step (exploration)."""

    noise_share: float = Field(ge=0, le=1)
    """Share of the run over which the noise falls linearly to none."""

    @model_validator(mode="after")
    def _consistent(self) -> GateSettings:
        if (self.gate_signal == "measured") == (self.cost_rows is None):
            raise ValueError(
                f"cost_rows={self.cost_rows} with gate_signal={self.gate_signal!r}: 'measured' needs a number of rows, "
                "'straight_through' takes cost_rows=null"
            )
        return self


class OptimizerSettings(Settings):
    """AdamW, with one learning rate for the routers and one for LoRA."""

    router_lr: float | None = Field(ge=0)
    """Peak learning rate of the routers; 0 keeps them as they start, whatever `min_lr` is. null where they are fitted
    to searched routes instead."""

    lora_lr: float = Field(ge=0)
    """Peak learning rate of LoRA; 0 keeps it as it starts, without effect, whatever `min_lr` is."""

    weight_decay: float = Field(ge=0)
    betas: tuple[float, float]
    schedule: Literal["cosine", "constant"]
    """After warm-up: `cosine` falls to `min_lr` at the last update, `constant` stays."""

    min_lr: float = Field(ge=0)
    """Where the cosine of both learning rates ends."""

    warmup_share: float = Field(ge=0, lt=1)
    """Share of the run over which both learning rates rise linearly to their peak."""

    max_grad_norm: float = Field(ge=0)
    """The gradients of the routers, and those of LoRA, are each scaled down to this norm; 0 clips nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: both must be at least 0 and less than 1")
        if any(0 < peak < self.min_lr for peak in (self.router_lr or 0, self.lora_lr)):
            raise ValueError(f"min_lr={self.min_lr} exceeds router_lr={self.router_lr} or lora_lr={self.lora_lr}")
        return self


class TrainingSettings(Settings):
    """How long, on how much, in what precision, and how often to report."""

    steps: int = Field(ge=1)
    """Length of the run, counted in `step_unit`."""

    step_unit: Literal["update", "micro_batch"]
    """`update`: one optimiser update. `micro_batch`: one forward and backward pass, `gradient_accumulation` of which
    make an update (so counted the publication)."""

    batch_size: int = Field(ge=1)
    """Rows per micro-batch and device."""

    gradient_accumulation: int = Field(ge=1)
    """Micro-batches per update."""

    max_length: int = Field(ge=16)
    """Tokens per row; longer steps lose the left of their messages."""

    precision: Literal["fp32", "bf16"]
    """Of the frozen backbone and of the arithmetic; routers, LoRA and losses are float32 either way."""

    gradient_checkpointing: bool
    rows_per_source: int | None = Field(ge=1)
    """At most so many rows of each data source; null takes all."""

    validation_share: float = Field(ge=0, lt=1)
    """Share of the groups (problems, conversations) kept out of training."""

    validation_rows: int | None = Field(ge=1)
    """At most so many of the kept-out rows are evaluated, step types in equal parts; null takes all."""

    balance_types: bool
    """Draw the step types in equal parts; otherwise as the data has them."""

    length_window: int = Field(ge=1)
    """Micro-batches among which rows are sorted by length, to pad less; 1 sorts nothing."""

    mixed_types: bool
    """Whether every micro-batch holds the step types in turn, each sorted by length among its own; otherwise rows of
    like length meet whatever their type, which pads least."""

    seed: int = Field(ge=0, lt=2**32)
    log_every: int = Field(ge=1)
    """Updates between two lines of the log."""

    eval_every: int = Field(ge=0)
    """Updates between two evaluations; 0 evaluates once, at the end."""

    save_every: int = Field(ge=1)
    """Updates between two checkpoints."""

    report_to: tuple[str, ...]
    """Trackers of transformers' Trainer, such as `tensorboard` or `wandb`."""

    @model_validator(mode="after")
    def _whole_updates(self) -> TrainingSettings:
        if self.step_unit == "micro_batch" and self.steps % self.gradient_accumulation:
            raise ValueError(
                f"steps={self.steps} micro-batches are no whole number of updates at "
                f"gradient_accumulation={self.gradient_accumulation}; use a multiple of it, or step_unit='update'"
            )
        return self

    @property
    def updates(self) -> int:
        """Optimiser updates of the run."""
        return self.steps if self.step_unit == "update" else self.steps // self.gradient_accumulation
