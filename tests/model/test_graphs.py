"""Compiled decoding gives the tokens of eager decoding, one graph per route, and gives everything back."""

import copy

import pytest
import torch

from layerroute import RouterConfig, Session
from layerroute.errors import GenerationError
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
    model.graphs.cpu_rows = 8
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


def test_code_generation_for_this_machine(make_routed, tokens, pad):
    """The real compiler: rows padded and under two routes, a memory that grows in the graph, a boundary that closes
    blocks, and a mask of another type the second time."""
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=4), blocks=3)
    model.merge_adapter()
    ids, mask = pad([tokens(1, length, seed=length)[0] for length in (9, 6)], "left")
    routes = torch.tensor([[[1, 1, 1], [1, 0, 1]], [[1, 0, 1], [1, 0, 1]]], dtype=torch.bool)
    free = model.generate(ids, attention_mask=mask, routes=routes[:, 0], **GREEDY)
    boundaries = [(int(free[0, ids.shape[1] + 2]),)]
    same(*both(model, ids, attention_mask=mask, routes=routes, boundaries=boundaries))
    assert len(model.graphs) >= 2
    for kind in (torch.long, torch.float32):
        same(*both(model, tokens(1, 9), attention_mask=torch.ones(1, 9, dtype=kind), boundaries=boundaries))


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


def test_unmerged_for_a_while(eager_backend, make_routed, tokens):
    """Graphs of merged weights do not serve the others, and are there again afterwards."""
    model = make_routed()
    model.merge_adapter()
    same(*both(model, tokens(1, 7)))
    with model.unmerged():
        same(*both(model, tokens(1, 7)))
    assert len(model.graphs) == 1
    same(*both(model, tokens(1, 7)))


def test_a_copied_model_has_graphs_of_its_own(eager_backend, make_routed, tokens):
    model = make_routed()
    same(*both(model, tokens(1, 7)))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.get_output_embeddings().weight.mul_(-1)
    assert len(other.graphs) == 0
    same(*both(other, tokens(1, 7)))
    same(*both(model, tokens(1, 7)))


def test_a_route_whose_generations_grow_keeps_one_graph(eager_backend, make_routed, tokens):
    model = make_routed()
    model.config.max_position_embeddings = 1024
    everything = torch.ones(4, dtype=torch.bool)
    for length, capacity in ((7, 64), (50, 64), (70, 128), (300, 320)):
        same(*both(model, tokens(1, length), routes=everything))
        assert [graph.capacity for graph in model.graphs._graphs.values()] == [capacity]


def test_a_failure_while_loading_frees_the_graph(eager_backend, make_routed, tokens, monkeypatch):
    model = make_routed()
    same(*both(model, tokens(1, 7)))
    graph = next(iter(model.graphs._graphs.values()))
    monkeypatch.setattr(graph, "load", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.generate(tokens(1, 7), compiled=True, **GREEDY)
    assert not graph.busy


def test_no_compiler(make_routed, tokens, monkeypatch):
    def no_compiler(function, **options):
        def step(*args):
            raise RuntimeError("No working C++ compiler found\nand a long story")

        return step

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(GenerationError, match=r"could not compile .*: No working C\+\+ compiler found\); a C\+\+"):
        make_routed().generate(tokens(1, 7), compiled=True, **GREEDY)


def test_batches_decode_eagerly_on_a_cpu(eager_backend, make_routed, tokens, caplog):
    """Where generated code is slower for several rows; said once."""
    model = make_routed()
    for _ in range(2):
        model.generate(tokens(2, 7), compiled=True, **GREEDY)
    assert len(model.graphs) == 0
    assert [record.getMessage() for record in caplog.records] == [
        "compiled=True: decoding eagerly: on a CPU more than 1 rows are faster so"
    ]
    model.generate(tokens(1, 7), compiled=True, **GREEDY)
    assert len(model.graphs) == 1
