"""Conversations: what a session keeps, and that its answers are those of a cold start."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerroute import RouterConfig, Session
from layerroute.errors import ConfigError, GenerationError

GREEDY = {"do_sample": False, "max_new_tokens": 5}
OPEN = torch.tensor([1, 1, 1, 1], dtype=torch.bool)
FEWER = torch.tensor([1, 0, 1, 1], dtype=torch.bool)
OTHER = torch.tensor([1, 1, 0, 1], dtype=torch.bool)

READS = [{}, {"pooling": "mean"}, {"pooling": "last"}, {"pooling": "joint"}, {"context": "window"}]


def answer(model, ids, **arguments):
    """`generate` on a prompt in which the padding token, too, is a token."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, **arguments)


def count_tokens(model):
    """Tokens that reach the first block, pass by pass."""
    seen = []
    model.structure.blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
    return seen


def converse(model, turns, tokens, session, **arguments):
    """Several turns, each prompt the conversation so far and ten new tokens: (prompt, answer, routes, read) of each."""
    ids, done, seen = tokens(1, 10), [], count_tokens(model)
    for number in range(turns):
        del seen[:]
        out = answer(model, ids, session=session, return_dict_in_generate=True, **arguments)
        done.append((ids, out.sequences, out.past_key_values.routes, seen[:]))
        ids = torch.cat([out.sequences, tokens(1, 10, seed=50 + number)], dim=1)
    return done


@pytest.mark.parametrize("read", READS, ids=str)
def test_equal_routes_answer_as_a_cold_start(family, read, make_routed, tokens):
    """With reuse="equal" every turn is exactly what `generate` gives without a session, boundaries included."""
    config = RouterConfig(protect_first=1, protect_last=1, window=4, **read)
    for seed in range(3):
        model = make_routed(family, config, seed=seed)
        boundary = (int(answer(model, tokens(1, 10))[0, 11]),)
        session = Session(model, reuse="equal")
        for ids, sequences, routes, _ in converse(model, 4, tokens, session, boundaries=(boundary,)):
            cold = answer(model, ids, boundaries=(boundary,), return_dict_in_generate=True)
            assert torch.equal(sequences, cold.sequences)
            assert torch.equal(routes, cold.past_key_values.routes)


def test_same_route_reads_new_tokens_only(make_routed, tokens):
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=1, window=4))
    model.routers.weight.data.zero_()
    model.routers.bias.data.copy_(torch.tensor([1.0, -1.0]))
    for number, (ids, sequences, _, seen) in enumerate(converse(model, 4, tokens, Session(model))):
        # the last generated token was never read
        assert seen == [10 if number == 0 else 11, 1, 1, 1, 1]
        assert torch.equal(sequences, answer(model, ids))


@pytest.mark.parametrize(
    ("routes", "reuse", "read"),
    [
        ((OPEN, FEWER), "within", 11),  # within the cached route: its keys serve
        ((OPEN, FEWER), "equal", 25),
        ((FEWER, OPEN), "within", 25),  # a block opens, whose keys are missing
        ((FEWER, OTHER), "within", 25),
        ((OPEN, FEWER, OPEN), "within", 26),  # kept up to where the narrower route began: 14 of 40 tokens
        ((OPEN, FEWER, FEWER), "within", 11),
    ],
)
def test_what_is_read_again(routes, reuse, read, make_routed, tokens):
    """And every turn's answer is that of an uncached pass in which each token has the route it was read under."""
    model = make_routed()
    session = Session(model, reuse=reuse)
    ids, seen, held = tokens(1, 10), count_tokens(model), torch.zeros(0, 4, dtype=torch.bool)
    for number, route in enumerate(routes):
        del seen[:]
        out = answer(model, ids, session=session, routes=route, return_dict_in_generate=True).sequences
        prefilled = seen[0]
        held = torch.cat([held[: ids.shape[1] - prefilled], route.expand(prefilled + 4, 4)])
        expected = uncached(model, out[:, :-1], held)
        assert torch.equal(out[0, ids.shape[1] :], expected[0, ids.shape[1] - 1 :].argmax(-1)), number
        ids = torch.cat([out, tokens(1, 10, seed=50 + number)], dim=1)
    assert prefilled == read


def uncached(model, ids, held):
    """Logits of one pass in which every token runs the blocks of its own route; runs are segments that may reopen."""
    from layerroute.model.routing import Routing

    class ByToken(Routing):
        def run(self, index, block, hidden, kwargs):
            return torch.where(held[:, index, None], block(hidden, **kwargs), hidden)

    routing = ByToken(model.routers, [torch.ones_like(ids, dtype=torch.bool)])
    with torch.no_grad():
        return model.backbone(ids, use_cache=False, routing=routing).logits


def test_think_deep_call_shallow_think_deep(make_routed, tokens):
    """The agent's own pattern: after a call under fewer blocks only the call and what follows is read again."""
    model = make_routed()
    session = Session(model)
    ids = tokens(1, 10)
    thought = answer(model, ids, routes=OPEN)
    boundary = (int(thought[0, 11]),)
    turn = answer(model, ids, session=session, routes=torch.stack([OPEN, FEWER])[None], boundaries=[boundary])
    assert [start for start, _ in session.routes][-1] in (10, 11)
    ids, seen = torch.cat([turn, tokens(1, 10, seed=3)], dim=1), count_tokens(model)
    again = answer(model, ids, session=session, routes=OPEN)
    assert seen[0] == 25 - session.routes[1][0] if len(session.routes) > 1 else seen[0] in (14, 15)
    assert torch.equal(again, answer(model, ids, routes=OPEN))


@pytest.mark.parametrize("pooling", ["tail", "last", "mean", "joint"])
def test_an_edited_or_repeated_prompt(pooling, make_routed, tokens):
    """Only what the prompt shares with the cache is kept; the routers read their tail again, a mean from the start, so
    that the route is that of the prompt as it is now."""
    config = RouterConfig(protect_first=1, protect_last=1, window=4, pooling=pooling)
    moved = 0
    for seed in range(8):
        model = make_routed(config=config, seed=seed)
        session, ids = Session(model, reuse="equal"), tokens(1, 20, seed=seed)
        first = answer(model, ids, session=session)
        edited = torch.cat([ids[:, :15], tokens(1, 5, seed=90 + seed)], dim=1)
        boundary = (int(first[0, 21]),)
        for prompt in (edited, ids, ids, torch.cat([first, edited[:, 15:]], dim=1)):
            out = answer(model, prompt, session=session, boundaries=(boundary,), return_dict_in_generate=True)
            cold = answer(model, prompt, boundaries=(boundary,), return_dict_in_generate=True)
            assert torch.equal(out.sequences, cold.sequences)
            assert torch.equal(out.past_key_values.routes, cold.past_key_values.routes)
        moved += not torch.equal(model.route(ids), model.route(edited))
    assert moved  # the edit changes routes, so a stale memory would show


@pytest.mark.parametrize("pooling", ["tail", "mean"])
def test_what_an_edit_costs(pooling, make_routed, tokens):
    model = make_routed(config=RouterConfig(protect_first=1, protect_last=1, window=4, pooling=pooling))
    model.routers.weight.data.zero_()
    session, ids = Session(model), tokens(1, 20)
    answer(model, ids, session=session)
    seen = count_tokens(model)
    answer(model, torch.cat([ids[:, :15], tokens(1, 5, seed=9)], dim=1), session=session)
    assert seen[0] == (9 if pooling == "tail" else 20)


def test_merging_between_turns_starts_afresh(make_routed, tokens):
    model = make_routed()
    session = Session(model)
    out = answer(model, tokens(1, 10), session=session)
    model.merge_adapter()
    seen = count_tokens(model)
    answer(model, torch.cat([out, tokens(1, 3)], dim=1), session=session)
    assert seen[0] == 18


def test_inference_mode_in_one_turn_and_not_in_the_next(make_routed, tokens):
    model = make_routed()
    session = Session(model)
    with torch.inference_mode():
        out = answer(model, tokens(1, 10), session=session)
    ids = torch.cat([out, tokens(1, 3)], dim=1)
    assert torch.equal(answer(model, ids, session=session), answer(model, ids))


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_conversation(data, make_routed, tokens):
    """Property: routers of any reading decide, prompts grow, are edited, cut and repeated, boundaries occur; with
    reuse="equal" every turn is what `generate` gives without a session, boundaries and all."""
    read = data.draw(st.sampled_from(READS))
    kind = data.draw(st.sampled_from(["llama", "qwen2", "gemma3_text"]))
    config = RouterConfig(protect_first=1, protect_last=data.draw(st.integers(0, 1)), window=4, **read)
    model = make_routed(kind, config, seed=data.draw(st.integers(0, 20)))
    session, ids = Session(model, reuse="equal", max_tokens=data.draw(st.sampled_from([18, 200]))), tokens(1, 9)
    boundaries: tuple = ()
    for number in range(data.draw(st.integers(2, 4))):
        out = answer(model, ids, session=session, boundaries=boundaries, return_dict_in_generate=True)
        cold = answer(model, ids, boundaries=boundaries, return_dict_in_generate=True)
        assert torch.equal(out.sequences, cold.sequences)
        assert torch.equal(out.past_key_values.routes, cold.past_key_values.routes)
        done = out.sequences
        boundaries = ((int(done[0, -data.draw(st.integers(1, 4))]),),)
        kept = data.draw(st.integers(max(1, done.shape[1] - 12), done.shape[1]))
        ids = torch.cat([done[:, :kept], tokens(1, data.draw(st.integers(1, 8)), seed=number)], dim=1)


def test_memory_is_bounded_and_can_be_dropped(make_routed, tokens):
    model = make_routed()
    session = Session(model, max_tokens=12, reuse="equal")
    whole = Session(model)
    for kept in (session, whole):
        answer(model, tokens(1, 30), session=kept, routes=OPEN)
    assert len(session.tokens) == 12 and len(whole.tokens) == 34
    assert 0 < session.nbytes < whole.nbytes
    ids = torch.cat([tokens(1, 30), tokens(1, 3, seed=1)], dim=1)
    assert torch.equal(answer(model, ids, session=session), answer(model, ids))
    session.drop()
    assert session.nbytes == 0 and not session.tokens
    assert torch.equal(answer(model, ids, session=session), answer(model, ids))


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_turn_leaves_nothing_stale(after, make_routed, tokens):
    model = make_routed()
    session = Session(model)
    done = converse(model, 2, tokens, session)

    class Cancels:
        def __init__(self):
            self.count = 0

        def put(self, value):
            self.count += 1
            if self.count > after:
                raise KeyboardInterrupt

        def end(self):
            pass

    ids = torch.cat([done[-1][1], tokens(1, 10, seed=4)], dim=1)
    with pytest.raises(KeyboardInterrupt):
        answer(model, ids, session=session, streamer=Cancels())
    assert torch.equal(answer(model, ids, session=session), answer(model, ids))


def test_what_a_session_refuses(make_routed, tokens):
    model, other = make_routed(), make_routed(seed=1)
    session = Session(model)
    with pytest.raises(GenerationError, match="another adapter or model"):
        answer(other, tokens(1, 5), session=session)
    with pytest.raises(GenerationError, match="one row, not 2"):
        answer(model, tokens(2, 5), session=session)
    with pytest.raises(GenerationError, match="one row, not 2"):
        model.generate(tokens(1, 5), session=session, do_sample=True, num_return_sequences=2, max_new_tokens=2)
    with model.disable_routing(), pytest.raises(GenerationError, match="session= was given, but routing is disabled"):
        answer(model, tokens(1, 5), session=session)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        Session(model, max_tokens=0)
    with pytest.raises(ConfigError, match="reuse='some'"):
        Session(model, reuse="some")
    with pytest.raises(ConfigError, match="position='early'"):
        Session(make_routed(config=RouterConfig(position="block")))
