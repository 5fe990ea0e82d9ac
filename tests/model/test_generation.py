"""Routed generation against plain transformers models from which the closed blocks were deleted."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from layerroute import RouterConfig
from layerroute.errors import ConfigError, GenerationError, LayerRouteError

GREEDY = {"do_sample": False, "max_new_tokens": 6}


def reference(delete_blocks, model, route, row, new_tokens=6):
    """Greedy tokens of plain transformers on one unpadded row, uncached."""
    plain = delete_blocks(model, route)
    ids = row[None]
    with torch.no_grad():
        for _ in range(new_tokens):
            ids = torch.cat([ids, plain(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(row) :]


def test_mixed_batch_equals_deleted_blocks_row_by_row(family, make_routed, delete_blocks, tokens, pad):
    """Invariants 3, 4 and 5, the first block and the last skipped too; sliding windows shorter than the prompt."""
    model = make_routed(family)
    rows = [tokens(1, length, seed=length)[0] for length in (14, 9, 11, 5)]
    ids, mask = pad(rows, "left")
    routes = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    out = model.generate(ids, attention_mask=mask, routes=routes, **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, ids.shape[1] :], reference(delete_blocks, model, routes[i], row)), i


def test_routes_change_the_answer(family, make_routed, tokens):
    """The comparison above can fail: another route gives other tokens."""
    model = make_routed(family)
    ids = tokens(1, 12)
    answers = {
        tuple(model.generate(ids, routes=torch.tensor(route, dtype=torch.bool), **GREEDY)[0].tolist())
        for route in ([1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 0, 1])
    }
    assert len(answers) > 1


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_route_any_batch(data, make_routed, delete_blocks, tokens, pad):
    """Property: random depth, rows, lengths, padding and routes; cached generation equals uncached references."""
    kind = data.draw(st.sampled_from(["llama", "gemma3_text", "mistral"]))
    blocks = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    drawn = [data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)) for _ in lengths]
    model = make_routed(kind, config=RouterConfig(protect_first=0, protect_last=0, window=4), blocks=blocks)
    rows = [tokens(1, length, seed=i)[0] for i, length in enumerate(lengths)]
    ids, mask = pad(rows, "left")
    routes = torch.tensor(drawn)
    out = model.generate(ids, attention_mask=mask, routes=routes, do_sample=False, max_new_tokens=3)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, ids.shape[1] :], reference(delete_blocks, model, routes[i], row, new_tokens=3))


@pytest.mark.parametrize("read", [{}, {"position": "block"}, {"context": "window"}, {"pooling": "joint"}], ids=str)
def test_own_routes_govern_prompt_and_answer(family, read, make_routed, delete_blocks, tokens, pad):
    """Without forced routes: the route of `route()`, rows as if alone, nothing decided again while decoding."""
    model = make_routed(family, config=RouterConfig(protect_first=1, protect_last=1, window=4, **read))
    rows = [tokens(1, length, seed=length)[0] for length in (14, 9, 11, 5)]
    ids, mask = pad(rows, "left")
    out = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    routes = out.past_key_values.routes
    assert torch.equal(routes, model.route(ids, attention_mask=mask))
    assert len(routes.unique(dim=0)) > 1
    for i, row in enumerate(rows):
        assert torch.equal(out.sequences[i, ids.shape[1] :], reference(delete_blocks, model, routes[i], row))


def test_skipped_blocks_hold_no_cache(family, make_routed, tokens):
    """Invariant 6: neither called nor cached, at prefill and at decode; the length is right all the same."""
    model = make_routed(family)
    calls = torch.zeros(4, dtype=torch.long)

    def count(index):
        def hook(block, args):
            calls[index] += len(args[0])

        return hook

    for index, block in enumerate(model.structure.decoder.layers):
        block.register_forward_pre_hook(count(index))
    routes = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0]], dtype=torch.bool)
    out = model.generate(tokens(2, 7), routes=routes, return_dict_in_generate=True, **GREEDY)
    cache = out.past_key_values
    assert calls.tolist() == [0, 2 * 6, 0, 6]
    assert [0 if layer.keys is None else layer.keys.shape[0] for layer in cache.layers] == [0, 2, 0, 1]
    assert cache.get_seq_length() == 12
    assert torch.equal(cache.routes, routes)
    alone = [
        model.generate(tokens(2, 7)[i : i + 1], routes=routes[i], return_dict_in_generate=True, **GREEDY)
        for i in range(2)
    ]
    assert cache.nbytes() == sum(out.past_key_values.nbytes() for out in alone)


def test_everything_skipped_still_generates(make_routed, delete_blocks, tokens):
    model = make_routed()
    nothing = torch.zeros(4, dtype=torch.bool)
    out = model.generate(tokens(1, 5), routes=nothing, **GREEDY)
    assert torch.equal(out[0, 5:], reference(delete_blocks, model, nothing, tokens(1, 5)[0]))


def test_cached_steps_equal_one_uncached_pass(family, make_routed, tokens):
    """Invariant 4 on logits: prompt, then token by token over a RoutedCache, against one pass."""
    model = make_routed(family)
    ids = tokens(3, 16)
    routes = torch.tensor([[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    whole = model(ids, routes=routes).logits
    out = model(ids[:, :10], routes=routes, use_cache=True)
    steps = [out.logits]
    for position in range(10, 16):
        out = model(ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        assert torch.equal(out.routes, routes)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)


def test_sampling_with_several_returned_sequences(make_routed, tokens):
    """Same seed, same draws as transformers' own sampling loop on the LoRA-only model when all gates are open."""
    model = make_routed()
    ids = tokens(2, 8)
    arguments = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "top_k": 20}
    torch.manual_seed(0)
    mine = model.generate(ids, routes=torch.ones(4, dtype=torch.bool), **arguments)
    torch.manual_seed(0)
    with model.disable_routing():
        expected = model.generate(ids, **arguments)
    assert mine.shape == (6, 13) and torch.equal(mine, expected)
    torch.manual_seed(0)
    out = model.generate(ids, return_dict_in_generate=True, **arguments)
    assert torch.equal(out.past_key_values.routes, model.route(ids).repeat_interleave(3, dim=0))


def test_streamer_stopping_and_a_cancelled_call(make_routed, tokens):
    model = make_routed()
    ids = tokens(1, 8)

    class Streamer:
        def __init__(self, limit=None):
            self.received, self.limit = [], limit

        def put(self, value):
            self.received.append(value.flatten().tolist())
            if self.limit and len(self.received) > self.limit:
                raise KeyboardInterrupt

        def end(self):
            self.received.append("end")

    class StopAfterTwo(StoppingCriteria):
        def __call__(self, input_ids, scores, **_):
            return torch.tensor([input_ids.shape[1] >= 10])

    streamer = Streamer()
    expected = model.generate(ids, streamer=streamer, **GREEDY)
    assert [*streamer.received[0], *(t for part in streamer.received[1:-1] for t in part)] == expected[0].tolist()
    stopped = model.generate(ids, stopping_criteria=StoppingCriteriaList([StopAfterTwo()]), **GREEDY)
    assert torch.equal(stopped, expected[:, :10])
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, streamer=Streamer(limit=2), **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_padding_is_inferred_as_transformers_does(make_routed, tokens, pad):
    model = make_routed()
    ids, mask = pad([tokens(1, 9)[0], tokens(1, 5, seed=1)[0]], "left")
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, generation_config=GenerationConfig(**GREEDY)), expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 2},
        {"assistant_model": torch.nn.Identity()},
        {"prompt_lookup_num_tokens": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"cache_implementation": "static"},
        {"guidance_scale": 1.5},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"custom_generate": "somebody/loop"},
        {"generation_config": GenerationConfig(num_beams=3)},
        {"inputs_embeds": torch.zeros(1, 4, 32)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_cannot_work_is_refused_by_name(arguments, make_routed, tokens):
    name = "num_beams" if "generation_config" in arguments else next(iter(arguments))
    with pytest.raises(GenerationError, match=f"{name}=.* cannot be used with routing"):
        make_routed().generate(tokens(1, 5), **arguments)


def test_a_typo_is_refused_as_transformers_refuses_it(make_routed, tokens):
    with pytest.raises(ValueError, match="max_new_token"):
        make_routed().generate(tokens(1, 5), max_new_token=4)


def test_prompt_longer_than_the_context(make_routed, tokens):
    with pytest.raises(GenerationError, match=r"130 tokens.*holds 128"):
        make_routed().generate(tokens(1, 130), **GREEDY)


def test_forced_routes_in_generate(make_routed, tokens):
    model = make_routed()
    with pytest.raises(ConfigError, match=r"expected bool of shape \(4,\)"):
        model.generate(tokens(1, 5), routes=torch.ones(3, dtype=torch.bool), **GREEDY)
    with model.disable_routing(), pytest.raises(LayerRouteError, match="routing is disabled"):
        model.generate(tokens(1, 5), routes=torch.ones(4, dtype=torch.bool), **GREEDY)


def test_base_generation_is_the_backbones_own(family, make_routed, make_backbone, tokens):
    """Design D7, in generation."""
    ids = tokens(2, 7)
    model = make_routed(family)
    with model.disable_adapter():
        got = model.generate(ids, **GREEDY)
    assert torch.equal(got, make_backbone(family).generate(ids, attention_mask=torch.ones_like(ids), **GREEDY))


def test_out_of_memory_while_reading_a_prompt(make_routed, tokens):
    """A device that is out of memory says so in one line; the next call is right."""
    model = make_routed()
    expected = model.generate(tokens(2, 7), **GREEDY)

    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    handle = model.structure.blocks[2].register_forward_pre_hook(exhausted)
    everything = torch.ones(4, dtype=torch.bool)
    with pytest.raises(GenerationError, match="out of memory while reading a prompt of 2 x 7 tokens"):
        model.generate(tokens(2, 7), routes=everything, **GREEDY)
    handle.remove()
    assert torch.equal(model.generate(tokens(2, 7), **GREEDY), expected)


def test_stop_strings_need_the_tokenizer(make_routed, tokens, byte_tokenizer):
    model = make_routed()
    with pytest.raises(GenerationError, match="stop_strings='x' needs tokenizer="):
        model.generate(tokens(1, 5), stop_strings="x", **GREEDY)
    tokenizer = byte_tokenizer()
    free = model.generate(tokens(1, 5), **GREEDY)
    stop = tokenizer.decode(free[0, 6:8])
    out = model.generate(tokens(1, 5), stop_strings=stop, tokenizer=tokenizer, **GREEDY)
    assert torch.equal(out, free[:, : out.shape[1]]) and out.shape[1] <= 8


def test_a_skip_budget_moves_the_threshold(make_routed, tokens):
    from layerroute.model.calibration import calibrate

    model = make_routed()
    ids = tokens(64, 9)
    with pytest.raises(ConfigError, match="holds no calibration; run `layerroute calibrate`"):
        model.generate(ids[:1], skip_budget=0.3, **GREEDY)
    probs = model.gate_probs(ids)[:, model.routable]
    model.calibration = calibrate(probs, ["tool_call"] * 64, 4, routers="", data={})
    for budget in (0.1, 0.3, {"tool_call": 0.4}):
        wanted = budget if isinstance(budget, float) else 0.4
        routes = model.route(ids, skip_budget=budget)
        assert float((~routes).float().mean()) == pytest.approx(wanted, abs=0.03)
        out = model.generate(ids, skip_budget=budget, return_dict_in_generate=True, **GREEDY)
        assert torch.equal(out.past_key_values.routes, routes)
    with model.disable_routing():
        lora_only = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, skip_budget=0, **GREEDY), lora_only)
    for wrong, message in ((1.5, "from 0 to 0.5"), (-0.1, "from 0 to 0.5"), (0.9, "at most 0.5 of all")):
        with pytest.raises(ConfigError, match=message):
            model.generate(ids, skip_budget=wrong, **GREEDY)
