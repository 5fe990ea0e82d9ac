"""`RoutedTrainer`: transformers' Trainer with LayerRoute's loss, learning rates, sampler, evaluation and checkpoints.

Everything else (precision, accumulation, distributed runs, the loop) is the Trainer's.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast, broadcast_object_list
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, set_seed
from transformers.trainer_utils import EvalLoopOutput

from layerroute.data.collate import StepCollator, StepDataset
from layerroute.data.render import Sample
from layerroute.errors import TrainingError
from layerroute.model.adapter import fingerprint, read_config
from layerroute.model.routed import RoutedModel
from layerroute.training import objective
from layerroute.training.arguments import training_arguments
from layerroute.training.bank import Bank
from layerroute.training.callbacks import BeforeEvaluation, LogLines, ProgressBar
from layerroute.training.checkpoints import last_checkpoint
from layerroute.training.fit import fit_routers, read_decisions
from layerroute.training.loss import RoutedLoss
from layerroute.training.meter import Means
from layerroute.training.processes import check_launch
from layerroute.training.recipe import Recipe
from layerroute.training.removal import choose_rows, removal_costs
from layerroute.training.sampler import StepSampler
from layerroute.training.search import extend_bank, kinds_of
from layerroute.training.settings import TrainingSettings
from layerroute.training.told import ToldLoss
from layerroute.training.validation import measure_batch

__all__ = ["RoutedTrainer", "plan_rows"]

_STATE = "objective_state.json"

_LOG = logging.getLogger(__name__)


def plan_rows(samples: Sequence[Sample], settings: TrainingSettings, processes: int = 1) -> StepSampler:
    """Which of the samples make which micro-batch of the run."""
    return StepSampler(
        [kinds_of(sample)[-1] for sample in samples],
        [sample.source for sample in samples],
        [len(sample.input_ids) for sample in samples],
        batch_size=settings.batch_size * processes,  # one after the other, the processes take its parts
        batches=settings.updates * settings.gradient_accumulation,
        seed=settings.seed,
        balance=settings.balance_types,
        length_window=settings.length_window,
        mixed=settings.mixed_types,
    )


class RoutedTrainer(Trainer):
    """Trains the routers and LoRA of a `RoutedModel` after a recipe.

    Args:
        model: what is trained, in place.
        recipe: every setting; `recipe.training.updates` is the length of the run.
        train_dataset: tokenised steps.
        eval_dataset: tokenised steps kept out of training, or None.
        pad_token_id: fills rows up.
        checkpoints: folder for the Trainer's checkpoints.
        data: digests of the data, recorded in every adapter that is saved.
        fit_dataset: what the routers are fitted to, where routes are searched; by default `train_dataset`.
        progress: draw a progress bar on stderr; otherwise log a line from time to time.
        **kwargs: the Trainer's other arguments (`callbacks`, such as `Trackers`).

    Raises:
        ConfigError: the recipe does not fit the backbone, or the launcher asks for FSDP or DeepSpeed.
    """

    def __init__(
        self,
        model: RoutedModel,
        recipe: Recipe,
        train_dataset: StepDataset,
        eval_dataset: StepDataset | None,
        *,
        pad_token_id: int,
        checkpoints: Path,
        data: Mapping[str, Any],
        fit_dataset: StepDataset | None = None,
        progress: bool = False,
        **kwargs: Any,
    ) -> None:
        check_launch()
        recipe.check_blocks(model.routers.blocks)
        self.recipe = recipe
        self.samples = train_dataset.samples
        self.fit_samples = (fit_dataset or train_dataset).samples
        self.checkpoints = checkpoints
        self.data_record = data
        if recipe.training.gradient_checkpointing:
            model.activation_checkpointing_enable()
        settings = recipe.objective
        super().__init__(
            model=model,
            args=training_arguments(recipe, checkpoints, model.device, progress, eval_dataset is not None),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=StepCollator(pad_token_id, loss_on=settings.loss_on, pool_over=settings.pool_over),
            **kwargs,
        )
        if self.args.process_index:  # each process draws dropout and noise of its own
            set_seed(recipe.training.seed + self.args.process_index)
        for default in (PrinterCallback, ProgressCallback):  # both print logs to stdout
            self.remove_callback(default)
        self.add_callback(ProgressBar() if progress else LogLines())
        self.add_callback(BeforeEvaluation(self.fit_routers))
        # compute_loss divides by the tokens of the whole accumulated batch itself
        self.loss_is_scaled_for_ga = True
        self.routed_loss = self._make_loss(model)

    # --- loss --------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Fetch the micro-batches of one update, and count their loss tokens over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        tokens = torch.stack([(batch["labels"][:, 1:] != -100).sum() for batch in samples]).sum().to(device)
        return samples, self._reduce(tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the update's loss, see `RoutedLoss`.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss, out = self.routed_loss(
            model,
            self.accelerator.unwrap_model(model),
            inputs,
            self.state.global_step,
            num_items_in_batch,
            self.current_gradient_accumulation_steps,
        )
        self._require_finite(loss, "loss")
        return (loss, out) if return_outputs else loss

    def _make_loss(self, model: RoutedModel) -> RoutedLoss | ToldLoss:
        rank_sum, processes = self._reduce, self.accelerator.num_processes
        if self.recipe.search is not None:
            return ToldLoss(self.recipe, model, self._search, rank_sum, processes)
        return RoutedLoss(self.recipe, self._measure_costs, rank_sum, processes, self.args.device)

    def _measure_costs(self, rows: int) -> Tensor:
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(self.data_collator, StepCollator)
        _LOG.info("measuring what each block is worth to each step type (%d rows a type)", rows)
        chosen = choose_rows(self.samples, rows, self.recipe.training.seed)
        costs: Tensor = broadcast(removal_costs(model, chosen, self.data_collator))  # see `_search`
        return costs

    def _search(self, bank: Bank, depth: Mapping[str, int]) -> None:
        model, settings = self.accelerator.unwrap_model(self.model), self.recipe.search
        assert settings is not None and isinstance(self.data_collator, StepCollator)
        seed = self.recipe.training.seed
        _LOG.info("searching the blocks that each kind of decision can do without (%d rows a kind)", settings.rows)
        extend_bank(model, bank, depth, self.samples, self.data_collator, rows=settings.rows, seed=seed)
        # every process has searched the same rows, but another card may round another way: the first one's holds
        bank.orders.update(broadcast_object_list([bank.orders])[0])

    def fit_routers(self) -> None:
        """Fit the routers to the bank of routes, where routes are searched; otherwise they are trained already."""
        settings, loss = self.recipe.search, self.routed_loss
        if settings is None:
            return
        model = self.accelerator.unwrap_model(self.model)
        assert isinstance(self.data_collator, StepCollator) and isinstance(loss, ToldLoss)
        seed = self.recipe.training.seed
        decisions = read_decisions(model, self.fit_samples, self.data_collator, rows=settings.fit_rows, seed=seed)
        bank = Bank(loss.bank.blocks, self.left_out)  # as deep as this update went, not as the search did
        fit_routers(model, decisions, bank, decay=settings.fit_decay, open_weight=settings.open_weight)
        broadcast([parameter.data for parameter in model.router_parameters()])  # see `_search`

    @property
    def left_out(self) -> dict[str, list[int]] | None:
        """The blocks that each kind of decision left out in the last update, where routes are searched."""
        loss = self.routed_loss
        if not isinstance(loss, ToldLoss):
            return None
        depth = loss.depth.at(self.state.global_step - 1)
        return {kind: order[: depth[kind]] for kind, order in loss.bank.orders.items()}

    def _reduce(self, sums: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(sums, reduction="sum")
        return total

    def _require_finite(self, value: Tensor | float, what: str) -> None:
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not math.isfinite(number):
            good = last_checkpoint(self.checkpoints)
            raise TrainingError(
                f"the {what} became {number} in update {self.state.global_step + 1}; last good checkpoint: "
                f"{good or 'none yet'}; a lower optimizer.router_lr or optimizer.lora_lr may help"
            )

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip routers and LoRA apart: a penalty far from its budget must not shrink what LoRA learns."""
        routed = self.accelerator.unwrap_model(model)
        groups = (list(routed.router_parameters()), list(routed.lora_parameters()))
        limit = self.args.max_grad_norm
        norms = [torch.as_tensor(self.accelerator.clip_grad_norm_(group, limit)) for group in groups]
        return torch.stack(norms).norm()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._require_finite(norm, "gradient norm")  # before the update, so that no checkpoint is spoilt
        return norm

    # --- optimiser, schedule, data -----------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over two groups: the routers, then LoRA."""
        if self.optimizer is None:
            routed = self.accelerator.unwrap_model(self.model if model is None else model)
            settings = self.recipe.optimizer
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": list(routed.router_parameters()), "lr": settings.router_lr or 0.0},
                    {"params": list(routed.lora_parameters()), "lr": settings.lora_lr},
                ],
                betas=settings.betas,
                weight_decay=settings.weight_decay,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Each group's own course from its peak (see `objective.learning_rate_at`)."""
        if self.lr_scheduler is None:
            factors: list[Callable[[int], float]] = [partial(self._learning_rate_factor, i) for i in range(2)]
            chosen = self.optimizer if optimizer is None else optimizer
            assert chosen is not None
            self.lr_scheduler = LambdaLR(chosen, factors)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _learning_rate_factor(self, group: int, step: int) -> float:
        """Learning rate of update `step` over its peak, for the routers (0) or LoRA (1)."""
        settings, updates = self.recipe.optimizer, self.recipe.training.updates
        peak = (settings.router_lr, settings.lora_lr)[group]
        if not peak:
            return 0.0  # not even the cosine's end moves it
        lowest = settings.min_lr if settings.schedule == "cosine" else None
        return objective.learning_rate_at(step, peak, lowest, settings.warmup_share * updates, updates) / peak

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        return plan_rows(self.samples, self.recipe.training, self.args.world_size)

    # --- logs and evaluation -----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the routing figures to a training log line (one that holds `loss`)."""
        if "loss" in logs:
            step = self.state.global_step - 1  # counted up before it is logged
            logs.pop("learning_rate", None)
            logs.update(self.routed_loss.means.read(self._reduce))
            logs.update(self.routed_loss.figures(step))
            if self.recipe.optimizer.router_lr is not None:
                logs["router_lr"] = self.recipe.optimizer.router_lr * self._learning_rate_factor(0, step)
            logs["lora_lr"] = self.recipe.optimizer.lora_lr * self._learning_rate_factor(1, step)
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """This process's part of the rows; accelerate would count some twice, to give every process as many."""
        assert isinstance(self.eval_dataset, StepDataset)
        samples = self.eval_dataset.samples
        own = samples[self.args.process_index :: self.args.world_size] or samples[:1]
        return DataLoader(StepDataset(own), batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as inference runs; the metrics are those of `validation.measure_batch`, over all processes."""
        model, means = self.accelerator.unwrap_model(self.model), Means()
        model.eval()
        assert isinstance(self.eval_dataset, StepDataset)
        rows = len(self.eval_dataset)
        for inputs in dataloader:
            measure_batch(model, self._prepare_inputs(inputs), means)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        counts = self.args.process_index < rows  # others have read a row that is not theirs, for the figures' names
        read = means.read(lambda sums: self._reduce(sums * counts))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in read.items()}
        return EvalLoopOutput(predictions=np.empty(0), label_ids=None, metrics=metrics, num_samples=rows)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the first process then writes the file that makes a checkpoint complete

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter and the objective's state; the Trainer adds optimiser, schedule and random states."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.checkpoints)
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, recipe=self.recipe.model_dump(mode="json"), data=dict(self.data_record))
        (folder / _STATE).write_text(json.dumps(self.routed_loss.state()) + "\n", encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        routed = self.accelerator.unwrap_model(self.model if model is None else model)
        saved, found = read_config(folder)["backbone"]["fingerprint"], fingerprint(routed.backbone)
        if saved != found:
            raise TrainingError(
                f"{folder} was trained on a backbone with fingerprint {saved}, not {found}; resume with that backbone, "
                "or give another output"
            )
        routed.routers.load_state_dict(load_file(folder / "router_model.safetensors"))
        set_peft_model_state_dict(routed.peft_model, load_file(folder / "adapter_model.safetensors"))
        self.routed_loss.load_state(json.loads((folder / _STATE).read_text(encoding="utf-8")))
