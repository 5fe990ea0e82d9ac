"""Bytes of a step, counted from the weights that it needs."""

import pytest
import torch

from layerroute.runtime.bandwidth import bandwidth_limits, read_bandwidth, step_bytes


def test_bytes_of_a_step(family, make_routed, tokens):
    """Executed weights, head and norm once; the cache of the open blocks as a real generation holds it."""
    model = make_routed(family)
    model.merge_adapter()
    route = torch.tensor([1, 0, 1, 1], dtype=torch.bool)
    out = model.generate(
        tokens(2, 5), routes=route, do_sample=False, max_new_tokens=2, return_dict_in_generate=True
    ).past_key_values
    cached = sum(t.nbytes for i in (0, 2, 3) for t in (out.layers[i].keys, out.layers[i].values))
    plain = sum(p.nbytes for name, p in model.backbone.named_parameters() if "embed_tokens" not in name)
    skipped = sum(p.nbytes for p in model.structure.blocks[1].parameters())
    assert step_bytes(model, route, 6, 2) == plain - skipped + cached


def test_limits_scale_with_what_is_read(make_routed):
    model = make_routed()
    whole, less = torch.ones(4, dtype=torch.bool), torch.tensor([1, 0, 1, 1], dtype=torch.bool)
    limits = bandwidth_limits(model, {"open": whole, "routed": less}, 10, 1)
    assert limits["bytes_per_second"] > 0 and read_bandwidth(torch.device("cpu")) > 0
    ratio = limits["routed"]["limit_ms"] / limits["open"]["limit_ms"]
    assert ratio == pytest.approx(step_bytes(model, less, 10, 1) / step_bytes(model, whole, 10, 1))
