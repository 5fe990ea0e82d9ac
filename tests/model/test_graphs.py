"""Compiled decoding gives the tokens of eager decoding, one graph per route, and gives everything back."""

import pytest
import torch

from layerroute import RouterConfig, Session
from layerroute.model.graphs import DecodeGraphs

# torch's own compiler imports what it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.fixture
def eager_backend(monkeypatch):
    """Trace and guard as `torch.compile` does, but leave out code generation, which takes a compiler and minutes."""
    real = torch.compile

    def traced(function, dynamic, options):
        kept = {name: value for name, value in options.items() if name == "guard_filter_fn"}
        return real(function, backend="eager", dynamic=dynamic, options=kept)

    monkeypatch.setattr(torch, "compile", traced)


def both(model, ids, **arguments):
    mask = arguments.pop("attention_mask", torch.ones_like(ids))
    return [
        model.generate(
            ids,
            attention_mask=mask,
            compiled=compiled,
            return_dict_in_generate=True,
            output_logits=True,
            **GREEDY,
            **arguments,
        )
        for compiled in (False, True)
    ]


def same(first, second):
    assert torch.equal(first.sequences, second.sequences)
    torch.testing.assert_close(torch.stack(second.logits), torch.stack(first.logits), rtol=1e-4, atol=1e-4)
    one, two = first.past_key_values, second.past_key_values
    assert torch.equal(one.routes, two.routes) and one.get_seq_length() == two.get_seq_length()
    for a, b in zip(one.layers, two.layers, strict=True):
        assert (a.keys is None) == (b.keys is None)
        if a.keys is not None:
            torch.testing.assert_close(b.keys, a.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(b.values, a.values, rtol=1e-4, atol=1e-4)


def test_code_generation_for_this_machine(make_routed, tokens):
    """The real compiler, once, on two routes."""
    model = make_routed(blocks=3)
    model.merge_adapter()
    for route in ([1, 0, 1], [1, 1, 1]):
        same(*both(model, tokens(1, 9), routes=torch.tensor(route, dtype=torch.bool)))
    assert len(model.graphs) == 2


def test_mixed_padded_batches(family, eager_backend, make_routed, tokens, pad):
    """Rows are grouped by route, each group in its graph."""
    model = make_routed(family)
    rows = [tokens(1, length, seed=length)[0] for length in (14, 9, 11, 5)]
    ids, mask = pad(rows, "left")
    routes = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    same(*both(model, ids, attention_mask=mask, routes=routes))
    sliding = family in ("gemma3_text", "mistral")
    assert len(model.graphs) == (0 if sliding else 3)


def test_eager_attention(eager_backend, make_routed, tokens, pad):
    model = make_routed()
    model.backbone.set_attn_implementation("eager")
    ids, mask = pad([tokens(1, 9)[0], tokens(1, 6)[0]], "left")
    same(*both(model, ids, attention_mask=mask))
    assert len(model.graphs)


@pytest.mark.parametrize("read", [{}, {"pooling": "mean"}, {"pooling": "joint"}, {"context": "window"}], ids=str)
def test_boundaries(read, eager_backend, make_routed, tokens, pad):
    """The routers' memory grows inside the graph; a boundary leaves it, decides, and goes on in other graphs."""
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=4, **read))
    rows = [tokens(1, length, seed=length)[0] for length in (14, 9, 11)]
    ids, mask = pad(rows, "left")
    free = model.generate(ids, attention_mask=mask, **GREEDY)
    boundaries = [(int(free[0, 16]),), (int(free[1, 17]),)]
    same(*both(model, ids, attention_mask=mask, boundaries=boundaries))


def test_a_session(eager_backend, make_routed, tokens):
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=1, window=4))
    session = Session(model)
    ids = tokens(1, 10)
    for turn in range(3):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), session=session, compiled=True, **GREEDY)
        assert len(session.tokens) == out.shape[1] - 1
        ids = torch.cat([out, tokens(1, 6, seed=turn)], dim=1)
    cold = Session(model)
    for length in (10, 24, 38):
        again = model.generate(ids[:, :length], attention_mask=torch.ones(1, length), session=cold, **GREEDY)
        assert torch.equal(again, ids[:, : length + 8])


def test_the_number_of_graphs_is_bounded(eager_backend, make_routed, tokens):
    model = make_routed()
    model.graphs = DecodeGraphs(limit=2)
    for route in ([1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 1, 1]):
        same(*both(model, tokens(1, 7), routes=torch.tensor(route, dtype=torch.bool)))
    assert len(model.graphs) == 2


def test_merging_drops_graphs_of_other_weights(eager_backend, make_routed, tokens):
    model = make_routed()
    same(*both(model, tokens(1, 7)))
    assert len(model.graphs) == 1
    model.merge_adapter()
    assert len(model.graphs) == 0
    same(*both(model, tokens(1, 7)))


def test_a_cancelled_generation_frees_its_graph(eager_backend, make_routed, tokens):
    model = make_routed()

    class Cancels:
        count = 0

        def put(self, value):
            self.count += 1
            if self.count > 4:
                raise KeyboardInterrupt

        def end(self):
            pass

    expected = model.generate(tokens(1, 7), compiled=True, **GREEDY)
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens(1, 7, seed=1), compiled=True, streamer=Cancels(), **GREEDY)
    assert not any(graph.busy for graph in model.graphs._graphs.values())
    assert torch.equal(model.generate(tokens(1, 7), compiled=True, **GREEDY), expected)
