"""Recipe `end_to_end` in two stages, routers first and LoRA after: the same model, another of its learning rates at 0.

In the second stage the routers stand, without noise, and LoRA learns to live with what they close. Prints the last
validation of each stage.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import set_seed

from layerroute.data.collate import padding_id
from layerroute.model.attach import get_routed_model
from layerroute.training.recipe import load_recipe
from layerroute.training.run import load_parts, lora_config
from layerroute.training.trainer import RoutedTrainer

STAGES = {
    "routers": {"optimizer.lora_lr": "0"},
    "LoRA": {"optimizer.router_lr": "0", "gates.logit_noise": "0", "objective.ramp_share": "0"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Routers first, LoRA after.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of both stages, as in training")
    options = parser.parse_args()
    common = dict(item.split("=", 1) for item in options.set)
    recipes = {name: load_recipe("end_to_end", common | changes) for name, changes in STAGES.items()}
    first = recipes["routers"]
    parts = load_parts(options.model, options.data, first)
    set_seed(first.training.seed)
    model = get_routed_model(parts.backbone, parts.router, lora_config(first))
    for name, recipe in recipes.items():
        with TemporaryDirectory() as folder:
            trainer = RoutedTrainer(
                model,
                recipe,
                parts.train,
                parts.validation,
                pad_token_id=padding_id(parts.tokenizer),
                checkpoints=Path(folder),
                data=parts.record(),
            )
            trainer.train()
        for event in trainer.state.log_history:
            shown = {key: round(value, 3) for key, value in event.items() if key.startswith(("eval_", "skip", "cross"))}
            print(name, int(event["step"]), shown, flush=True)


if __name__ == "__main__":
    main()
