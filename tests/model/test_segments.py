"""Several segments in a turn: cached generation against plain transformers, uncached, with a hook on every block."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerroute import RouterConfig
from layerroute.data.boundaries import boundary_ends
from layerroute.errors import ConfigError, GenerationError

GREEDY = {"do_sample": False, "max_new_tokens": 8}
NEW = 8


def segment_of(ids, prompt, boundaries):
    """The segment of every position: a boundary in the generated part starts a new one with its last token, unless
    that is the end of the turn, which no pass reads."""
    ends = [end for end in boundary_ends(ids, boundaries, start=prompt) if end < prompt + NEW - 1]
    return [sum(position >= end for end in ends) for position in range(len(ids))]


def plain_logits(delete_blocks, model, ids, routes_by_token):
    """Plain transformers, LoRA merged by PEFT, uncached; a hook undoes each block on the tokens that skip it."""
    plain = delete_blocks(model, torch.ones(model.routers.blocks, dtype=torch.bool))
    for index, block in enumerate(plain.get_decoder().layers):
        runs = routes_by_token[:, index, None]

        def undo(module, args, kwargs, output, runs=runs):
            entering = args[0] if args else kwargs["hidden_states"]
            return torch.where(runs, output, entering)

        block.register_forward_hook(undo, with_kwargs=True)
    with torch.no_grad():
        return plain(ids[None], use_cache=False).logits[0]


def reference(delete_blocks, model, row, routes, boundaries, new_tokens=NEW):
    """Greedy tokens of one row alone under routes `[segments, blocks]`."""
    ids = row
    for _ in range(new_tokens):
        segments = torch.tensor(segment_of(ids.tolist(), len(row), boundaries)).clamp(max=len(routes) - 1)
        ids = torch.cat([ids, plain_logits(delete_blocks, model, ids, routes[segments])[-1:].argmax(-1)])
    return ids[len(row) :]


def closing(routes):
    return routes.long().cumprod(-2).bool()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_batch_any_segments(data, make_routed, delete_blocks, tokens, pad):
    """Property: random models, rows, padding, routes and boundaries; every row is what it is alone, uncached."""
    kind = data.draw(st.sampled_from(["llama", "qwen2", "gemma3_text", "mistral"]))
    blocks = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 11), min_size=1, max_size=4))
    model = make_routed(
        kind, RouterConfig(protect_first=0, protect_last=0, window=4), blocks, seed=data.draw(st.integers(0, 3))
    )
    if data.draw(st.booleans()):
        model.merge_adapter()
    count, side = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["left", "right"]))
    drawn = data.draw(
        st.lists(st.booleans(), min_size=len(lengths) * count * blocks, max_size=len(lengths) * count * blocks)
    )
    routes = closing(torch.tensor(drawn).view(len(lengths), count, blocks))
    rows = [tokens(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask = pad(rows, side)
    # boundaries that do occur: tokens that these rows generate under their first routes
    first = model.generate(ids, attention_mask=mask, routes=routes[:, 0], **GREEDY)[:, ids.shape[1] :]
    picked = data.draw(st.lists(st.tuples(st.integers(0, len(rows) - 1), st.integers(0, NEW - 3)), max_size=2))
    boundaries = [(int(first[row, at]),) for row, at in picked] + [(int(first[0, 1]), int(first[0, 2]))]
    out = model.generate(
        ids, attention_mask=mask, routes=routes, boundaries=boundaries, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    model.unmerge_adapter()
    for i, row in enumerate(rows):
        expected = reference(delete_blocks, model, row, routes[i], boundaries)
        assert torch.equal(out.sequences[i, ids.shape[1] :], expected), i
    assert out.past_key_values.segments[0][0] == 0


def turn(model, row, **arguments):
    return model.generate(row[None], return_dict_in_generate=True, **GREEDY, **arguments)


READS = [{}, {"pooling": "mean"}, {"pooling": "last"}, {"pooling": "joint"}, {"context": "window"}]


@pytest.mark.parametrize("read", READS, ids=str)
def test_training_and_inference_decide_alike_over_a_turn(family, read, make_routed, delete_blocks, tokens, pad):
    """Invariants 3, 5, 8, 9 with segments: training's masked pass over a whole turn has the routes and the logits of
    cached inference, which decides at the prompt's end and again at each boundary; the batch is padded and mixed."""
    model = make_routed(family, config=RouterConfig(protect_first=1, protect_last=0, window=4, **read))
    rows = [tokens(1, length, seed=length)[0] for length in (9, 6, 11)]
    free = [turn(model, row).sequences[0] for row in rows]
    boundaries = tuple({(int(free[0][11]),), (int(free[1][8]), int(free[1][9]))})
    outs = [turn(model, row, boundaries=boundaries, output_logits=True) for row in rows]
    assert any(len(out.past_key_values.segments) > 1 for out in outs)
    turns = [out.sequences[0] for out in outs]
    ids, mask = pad(turns, "right")
    segments, _ = pad(
        [torch.tensor(segment_of(ids_.tolist(), len(row), boundaries)) for ids_, row in zip(turns, rows, strict=True)],
        "right",
    )
    segments = segments.masked_fill(mask == 0, 7)  # padding's own do not matter
    context = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    trained = model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    trained = model(ids, attention_mask=mask, context_mask=context, segment_ids=segments)
    evaluated = model.eval()(ids, attention_mask=mask, context_mask=context, segment_ids=segments)
    torch.testing.assert_close(trained.logits[mask.bool()], evaluated.logits[mask.bool()], rtol=1e-4, atol=1e-4)
    for i, (out, row) in enumerate(zip(outs, rows, strict=True)):
        inferred = torch.cat(out.logits)
        last = len(turns[i]) - 1
        torch.testing.assert_close(trained.logits[i, len(row) - 1 : last], inferred, rtol=1e-3, atol=1e-3)
        assert torch.equal(trained.routes[i, -1], out.past_key_values.routes[0])
        for k, (_, routes) in enumerate(out.past_key_values.segments):
            assert torch.equal(trained.routes[i, k], routes[0])


def test_a_boundary_changes_the_answer_and_closes_only(make_routed, tokens):
    """The comparisons above can fail: with the boundary other blocks run, and never more of them."""
    changed = closed = 0
    for seed in range(12):
        model = make_routed(seed=seed, config=RouterConfig(protect_first=1, protect_last=0, window=3))
        row = tokens(1, 7, seed=seed)[0]
        free = turn(model, row)
        out = turn(model, row, boundaries=[(int(free.sequences[0, 8]),)])
        (_, before), (start, after), *_ = out.past_key_values.segments
        assert start in (7, 8) and not (after & ~before).any()
        closed += int((before & ~after).sum())
        changed += not torch.equal(free.sequences, out.sequences)
        for index in range(4):
            assert (out.past_key_values.layers[index].keys is None) == (not out.past_key_values.routes[0, index])
    assert closed and changed


def test_rows_cross_their_boundaries_alone(make_routed, tokens, pad):
    """A row that reaches its boundary later, or never, is not disturbed; nothing is read twice."""
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=4))
    rows = [tokens(1, length, seed=length)[0] for length in (9, 6, 11, 7)]
    free = [turn(model, row).sequences[0, len(row) :] for row in rows]
    boundaries = [(int(free[0][1]),), (int(free[2][3]),)]
    ids, mask = pad(rows, "left")
    calls = []
    model.structure.blocks[0].register_forward_pre_hook(lambda block, args: calls.append(args[0].shape[1]))
    out = model.generate(ids, attention_mask=mask, boundaries=boundaries, **GREEDY)
    assert calls == [ids.shape[1]] + [1] * (NEW - 1)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, ids.shape[1] :], turn(model, row, boundaries=boundaries).sequences[0, len(row) :])


def test_boundaries_of_the_adapter_are_the_default(make_routed, tokens):
    row = tokens(1, 7)[0]
    plain = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=3))
    boundary = (int(turn(plain, row).sequences[0, 8]),)
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=0, window=3, boundaries=(boundary,)))
    assert len(turn(model, row).past_key_values.segments) >= 2
    assert len(turn(model, row, boundaries=()).past_key_values.segments) == 1


def test_what_boundaries_cannot_be(make_routed, tokens):
    model = make_routed()
    for wrong in [(97,)], ["<tool_call>"], [()]:
        with pytest.raises(GenerationError, match="no sequence of this backbone's token ids"):
            turn(model, tokens(1, 5)[0], boundaries=wrong)
    at_blocks = make_routed(config=RouterConfig(position="block"))
    with pytest.raises(GenerationError, match="decide once"):
        turn(at_blocks, tokens(1, 5)[0], boundaries=[(3,)])
    with pytest.raises(ConfigError, match="position='early'"):
        RouterConfig(position="block", boundaries=((3,),))
    route = torch.ones(4, dtype=torch.bool)
    with pytest.raises(GenerationError, match="holds for good"):
        turn(model, tokens(1, 5)[0], boundaries=[(3,)], routes=route)
    with pytest.raises(GenerationError, match="nothing starts the second one"):
        turn(model, tokens(1, 5)[0], routes=route.expand(1, 2, 4))
    with pytest.raises(GenerationError, match="asks no router"):
        turn(model, tokens(1, 5)[0], routes=route, skip_budget=0.1)
    opening = torch.tensor([[[1, 0, 1, 1], [1, 1, 1, 1]]], dtype=torch.bool)
    with pytest.raises(ConfigError, match="may only close"):
        turn(model, tokens(1, 5)[0], boundaries=[(3,)], routes=opening)
    with pytest.raises(ConfigError, match="a cached pass holds one segment"):
        model(tokens(1, 5), segment_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True)
