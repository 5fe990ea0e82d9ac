"""How well a router knows the prompt of a direct call, by the depth at which it reads, on sources seen and unseen.

For each depth a router is fitted as training fits it (kinds and sources count alike), once on 60% of the rows and once
without each source; printed are the shares of prompts it closes, and AUC where a source holds both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor
from trained import arguments, load_trained

from layerroute import RoutedModel
from layerroute.data.render import Sample
from layerroute.training.fit import _regress, _weights
from layerroute.training.search import rows_of_kind

KINDS = ("direct_call", "planning", "answer")
DEPTHS = (2, 4, 6, 8, 10, 12, 16)
TAIL, DECAY = 16, 0.03


class _ReadEnoughError(Exception):
    """Raised above the deepest block that is read: the rest of the model need not run."""


@torch.no_grad()
def read(model: RoutedModel, rows: Sequence[Sample]) -> dict[int, Tensor]:
    """What a router at each depth reads of a prompt: the mean over its tail, at unit root mean square; `[n, width]`."""
    seen: dict[int, list[Tensor]] = {depth: [] for depth in DEPTHS}

    def keep(depth: int, hidden: Tensor) -> None:
        vector = hidden[0, -TAIL:].float().mean(0)
        seen[depth].append(vector / vector.square().mean().add(1e-6).sqrt())
        if depth == DEPTHS[-1]:
            raise _ReadEnoughError

    for depth in DEPTHS:
        model.structure.blocks[depth].register_forward_pre_hook(
            lambda _, args, kwargs, depth=depth: keep(depth, args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
    everything = torch.ones(len(model.structure.blocks), dtype=torch.bool)
    for sample in rows:
        try:
            model(torch.tensor([sample.input_ids[: sample.context_length]]), routes=everything)
        except _ReadEnoughError:
            continue
    return {depth: torch.stack(vectors) for depth, vectors in seen.items()}


def closed(vectors: Tensor, kinds: Tensor, sources: list[str], test: Tensor, open_weight: float) -> tuple[str, str]:
    """Fit on the rest, and say what is closed of the rows in `test`, by kind; and the AUC."""
    train = (~test).nonzero()[:, 0]
    runs = (kinds[train] != 0).float()
    weights = _weights(kinds[train], [sources[row] for row in train]) * torch.where(runs > 0.5, open_weight, 1.0)
    weight, bias = _regress(vectors[train], weights / weights.sum(), runs, DECAY)
    logits, of_test = vectors[test] @ weight + bias, kinds[test]
    shares = [
        f"{name} {100 * (logits[of_test == kind] < 0).float().mean():.0f}%"
        for kind, name in enumerate(KINDS)
        if bool((of_test == kind).any())
    ]
    direct, other = logits[of_test == 0], logits[of_test != 0]
    if not len(direct) or not len(other):
        return ", ".join(shares), "-"
    return ", ".join(shares), f"{mannwhitneyu(other, direct).statistic / (len(direct) * len(other)):.2f}"


def main() -> None:
    parser = arguments("A direct call's prompt, read at several depths.")
    parser.add_argument("--rows", type=int, default=300, help="of each kind")
    options = parser.parse_args()
    model, parts, _ = load_trained(options, validation_share=0.05)
    model.merge_adapter()
    rows = [
        (sample, kind)
        for kind, name in enumerate(KINDS)
        for sample in rows_of_kind(parts.fit.samples, name, options.rows, 0)
    ]
    kinds, sources = torch.tensor([kind for _, kind in rows]), [sample.source for sample, _ in rows]
    print(Counter((KINDS[kind], sample.source) for sample, kind in rows))
    by_depth = read(model, [sample for sample, _ in rows])
    unseen = {source: torch.tensor([other == source for other in sources]) for source in sorted(set(sources))}
    tests = {"seen": torch.rand(len(rows), generator=torch.Generator().manual_seed(0)) < 0.4, **unseen}
    for depth, vectors in by_depth.items():
        for open_weight in (4.0, 2.0, 1.0):
            for name, test in tests.items():
                shares, auc = closed(vectors, kinds, sources, test, open_weight)
                print(
                    f"depth {depth:2} open_weight {open_weight:.0f} {name:16} AUC {auc:4}  closed: {shares}", flush=True
                )


if __name__ == "__main__":
    main()
