"""The closed form against torch's own counter, which watches the real operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerroute import RouterConfig
from layerroute.runtime.cost import backbone_flops, executed_flops

PROMPT, NEW = 11, 6


def counted(run):
    """Matrix products of `run()`, those of the rotary embedding left out."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    rotary = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")}
    return counter.get_total_flops() - sum(rotary.values())


def eager(model):
    """Attention as plain matrix products, which the counter knows on every device."""
    model.backbone.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("config", [
    RouterConfig(protect_first=1, window=4),
    RouterConfig(protect_first=0, protect_last=0, position="block", pooling="mean"),
    RouterConfig(protect_first=1, window=4, context="window"),
    RouterConfig(protect_first=1, window=4, pooling="joint"),
], ids=["early", "block", "window", "joint"])  # fmt: skip
def test_prefill_and_decode_match_the_counter(family, config, make_routed, tokens):
    """Invariant 10: the cost of a decided route, and of the untouched backbone."""
    model = eager(make_routed(family, config))
    ids = tokens(1, PROMPT)
    route = model.route(ids)[0]

    prefill = counted(lambda: model.generate(ids, max_new_tokens=1, do_sample=False))
    total = counted(lambda: model.generate(ids, max_new_tokens=NEW, do_sample=False))
    flops = executed_flops(model, [(0, route)], PROMPT, NEW)
    assert (flops.prefill, flops.decode) == (prefill, total - prefill)

    with model.disable_adapter():
        prefill = counted(lambda: model.generate(ids, max_new_tokens=1, do_sample=False))
        total = counted(lambda: model.generate(ids, max_new_tokens=NEW, do_sample=False))
    flops = backbone_flops(model, PROMPT, NEW)
    assert (flops.prefill, flops.decode) == (prefill, total - prefill)


def test_a_closed_block_costs_nothing_but_its_router(make_routed):
    model = make_routed(blocks=5)
    route = torch.ones(5, dtype=torch.bool)
    whole = executed_flops(model, [(0, route)], PROMPT, NEW)
    route[2] = False
    less = executed_flops(model, [(0, route)], PROMPT, NEW)
    block = sum(2 * m.weight.numel() for m in model.structure.blocks[2].modules() if isinstance(m, torch.nn.Linear))
    assert whole.decode - less.decode == (NEW - 1) * block + 4 * 32 * sum(range(PROMPT + 1, PROMPT + NEW))
    assert less.total < whole.total


@pytest.mark.parametrize("context", ["full", "window"])
def test_segments_match_the_counter(family, context, make_routed, tokens):
    """Before the boundary one route, behind it another; the second decision is counted where it is made."""
    config = RouterConfig(protect_first=1, protect_last=0, window=4, context=context)
    model, ids = eager(make_routed(family, config)), tokens(1, PROMPT)
    boundary = (int(model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, PROMPT + 1]),)
    run = {"boundaries": [boundary], "do_sample": False, "return_dict_in_generate": True}

    out = model.generate(ids, max_new_tokens=NEW, **run)
    (_, first), *later = out.past_key_values.segments
    segments = [(0, first[0]), *((position + 1 - PROMPT, routes[0]) for position, routes in later)]
    assert len(segments) > 1
    prefill = counted(lambda: model.generate(ids, max_new_tokens=1, **run))
    total = counted(lambda: model.generate(ids, max_new_tokens=NEW, **run))
    flops = executed_flops(model, segments, PROMPT, NEW)
    assert (flops.prefill, flops.decode) == (prefill, total - prefill)
