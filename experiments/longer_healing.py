"""Heal calls of missing blocks for long: on calls of the training and made-up ones, with plans and answers or not.

Start from an adapter that was trained with all budgets at 0. The seven blocks of the shipped adapter are left out of
calls from their boundary on. An update has six rows of at most 400 tokens: three calls of the training sets and three
made-up ones (`copied_arguments.py`); or, to keep the model's text as it is, two of each, a plan and an answer at full
depth, every type's nats a token in proportion to its rows. Other rows, up to 768 tokens long and none of them made up,
are measured as in `lora_on_mlp.py`. The adapter as it then is can be kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from healing import apply_gradients, healing_arguments, measured, outputs_under
from healing_of_sets import SETS
from trained import load_data

from layerroute import RoutedModel
from layerroute.data.render import Sample
from layerroute.training import objective
from layerroute.training.bank import Bank
from layerroute.training.search import rows_of_kind


def endless(samples: list[Sample], made_up: bool, kind: str) -> Iterator[Sample]:
    """Rows of a kind in random order, again and again."""
    rows = [
        sample
        for sample in rows_of_kind([s for s in samples if s.source.startswith("copied") == made_up], kind, 3000, 7)
        if len(sample.input_ids) <= 400
    ]
    rng = random.Random(0)
    while True:
        rng.shuffle(rows)
        yield from rows


def main() -> None:
    parser = healing_arguments("Healing for long.", updates=200, rows=150)
    parser.add_argument("--text", action="store_true", help="train plans and answers, too")
    parser.add_argument("--output", help="folder for the adapter")
    options = parser.parse_args()
    parts, collator = load_data(options, validation_share=0.15, max_length=768)
    model = RoutedModel.from_pretrained(options.adapter, parts.backbone, is_trainable=True).eval()
    real = [sample for sample in parts.validation.samples if not sample.source.startswith("copied")]
    held = {"tool_call": rows_of_kind(real, "tool_call", options.rows, 0)}
    held |= {kind: rows_of_kind(real, kind, 40, 0) for kind in ("planning", "answer")}
    bank = Bank(len(model.structure.blocks), {"tool_call": SETS["seed 42, which ships"]})
    whole = Bank(bank.blocks)

    def report(when: str) -> None:
        for kind, samples in held.items():
            for depth, under in {"routed": bank, "full depth": whole}.items():
                if depth == "full depth" or kind == "tool_call":
                    found = measured(model, samples, collator, under)
                    nats, accuracy, _ = found.mean(0)
                    says = f"{nats:.3f} nats, accuracy {accuracy:.4f}, whole {found[:, 2].sum():.0f} of {len(samples)}"
                    print(f"{when}: {kind}, {depth}: {says}", flush=True)

    train = parts.train.samples
    calls = endless(train, False, "tool_call"), endless(train, True, "tool_call")
    text = endless(train, False, "planning"), endless(train, False, "answer")
    lora = list(model.lora_parameters())
    optimizer = torch.optim.AdamW(lora, lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=0)
    report("before")
    model.train()
    for update in range(options.updates):
        count = 2 if options.text else 3
        groups = [[next(source) for source in calls for _ in range(count)]]
        if options.text:
            groups += [[next(source)] for source in text]
        for rows in groups:
            logits, targets = outputs_under(bank, model, rows, collator)
            nats = objective.cross_entropy_sum(logits, targets) / len(targets)
            (nats * len(rows) / 6).backward()
        apply_gradients(optimizer, lora, options.learning_rate, update, options.updates)
    model.eval()
    report("after")
    if options.output:
        model.save_pretrained(options.output)


if __name__ == "__main__":
    main()
