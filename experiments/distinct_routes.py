"""How many distinct routes some thousand steps take, and how many decisions take each.

    python distinct_routes.py --adapter FOLDER --data ... --steps 1000

A route is a segment's own, less what the turn's segments before it closed.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from layerroute import RoutedModel, load_backbone
from layerroute.data.boundaries import boundary_tokens
from layerroute.data.collate import StepCollator, StepDataset, padding_id
from layerroute.data.load import load_steps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="Distinct routes.")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=1000, help="as many of each source")
    parser.add_argument("--max-length", type=int, default=768)
    options = parser.parse_args()
    backbone, tokenizer = load_backbone(options.model)
    model = RoutedModel.from_pretrained(options.adapter, backbone).eval()
    loaded = load_steps(options.data, seed=0, limit_per_source=options.steps // len(options.data))
    boundaries = boundary_tokens(tokenizer, model.router_config.boundaries)
    dataset = StepDataset.from_steps(tokenizer, loaded.steps, options.max_length, boundaries=boundaries)
    collator, routes = StepCollator(padding_id(tokenizer)), Counter[tuple[str, str]]()
    samples = sorted(dataset.samples, key=lambda sample: len(sample.input_ids))
    for start in range(0, len(samples), 8):
        batch = collator(samples[start : start + 8])
        read = (batch["input_ids"], batch["attention_mask"], batch["context_mask"], batch["segment_ids"])
        open_gates = model.gate_probs(*read) > model.router_config.threshold
        for row, sample in enumerate(samples[start : start + 8]):
            route = torch.ones(open_gates.shape[-1], dtype=torch.bool)
            for segment in range(int(batch["segment_ids"][row].max()) + 1):
                route = route & open_gates[row, segment]
                closed = (~route).nonzero()[:, 0].tolist()
                routes[f"{sample.step_type}, segment {min(segment, 1)}", f"without {closed}"] += 1
    print(f"{len(samples)} steps, {len({route for _, route in routes})} distinct routes")
    for (decision, route), count in sorted(routes.items()):
        print(f"{count:6} {decision}: {route}")


if __name__ == "__main__":
    main()
