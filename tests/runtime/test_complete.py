"""Several conversations completed side by side, against each of them on its own."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.resources import files

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from layerroute import RouterConfig, get_routed_model
from layerroute.errors import DataError, GenerationError
from layerroute.runtime.complete import complete, complete_all

BLOCKS = 6


@pytest.fixture(scope="module")
def chat(byte_tokenizer, make_config):
    """A tiny routed model whose routers tell rows apart, and a tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (files("layerroute") / "templates" / "hermes.jinja").read_text()
    torch.manual_seed(0)
    config = make_config("llama", BLOCKS, vocab_size=len(tokenizer), max_position_embeddings=512)
    model = get_routed_model(AutoModelForCausalLM.from_config(config), RouterConfig(protect_first=1, window=8))
    model = model.eval().requires_grad_(False)
    for parameter in model.router_parameters():
        parameter.normal_(0, 2)
    return model, tokenizer


def request(text):
    return [{"role": "user", "content": text}], None


def facts(completion):
    parts = [(part.start, part.new_tokens, part.route.tolist()) for part in completion.segments]
    return completion.text, completion.finished, completion.prompt_tokens, parts


def common_tokens(model, tokenizer, texts, count):
    """Token ids that these rows are likely to write, as boundaries and stops that really come."""
    prompts = [complete(model, tokenizer, *request(text), max_new_tokens=count) for text in texts]
    return [tokenizer.encode(prompt.text, add_special_tokens=False) for prompt in prompts]


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text("abcdef ", min_size=1, max_size=30), min_size=1, max_size=5),
    where=st.integers(0, 5),
    ends=st.booleans(),
)
def test_side_by_side_equals_one_by_one(chat, texts, where, ends):
    model, tokenizer = chat
    written = [row for row in common_tokens(model, tokenizer, texts, 6) if len(row) > where]
    options = {"max_new_tokens": 8}
    if written:  # some row crosses a boundary, or ends, while the others go on
        options |= {"eos_token_id": written[0][where]} if ends else {"boundaries": [[written[0][where]]]}
    stops = model.backbone.generation_config.eos_token_id
    model.backbone.generation_config.eos_token_id = options.pop("eos_token_id", stops)
    try:
        together = complete_all(model, tokenizer, [request(text) for text in texts], **options)
        alone = [complete(model, tokenizer, *request(text), **options) for text in texts]
    finally:
        model.backbone.generation_config.eos_token_id = stops
    assert [facts(found) for found in together] == [facts(expected) for expected in alone]
    for completion in together:
        assert sum(part.new_tokens for part in completion.segments) == completion.new_tokens


@pytest.mark.parametrize("arm", ["disable_adapter", "disable_routing", "forced"])
def test_every_arm_can_run_side_by_side(chat, arm):
    model, tokenizer = chat
    texts = ["a", "bb cc", "d" * 20]
    routes = torch.rand(len(texts), BLOCKS, generator=torch.Generator().manual_seed(1)) < 0.6
    with nullcontext() if arm == "forced" else getattr(model, arm)():
        together = complete_all(
            model,
            tokenizer,
            [request(text) for text in texts],
            max_new_tokens=5,
            **({"routes": routes} if arm == "forced" else {}),
        )
        for row, text in enumerate(texts):
            forced = {"routes": routes[row]} if arm == "forced" else {}
            assert facts(together[row]) == facts(complete(model, tokenizer, *request(text), max_new_tokens=5, **forced))


def test_a_marker_that_is_a_special_token_stays_in_the_text(chat):
    model, tokenizer = chat
    plain = complete(model, tokenizer, *request("a"), max_new_tokens=6)
    assert "<|im_start|>" not in plain.text
    marker = tokenizer.convert_tokens_to_ids("<|im_start|>")
    bias = {(marker,): 1e9}  # the model writes nothing else
    hidden = complete(model, tokenizer, *request("a"), max_new_tokens=3, sequence_bias=bias)
    kept = complete(model, tokenizer, *request("a"), max_new_tokens=3, sequence_bias=bias, boundaries=[[marker]])
    assert hidden.text == "" and kept.text == 3 * "<|im_start|>" and len(kept.segments) == 3


def test_one_bad_request_of_several_is_refused_before_anything_runs(chat):
    model, tokenizer = chat
    bad = [{"name": "add", "parameters": {"type": 7}}]
    with pytest.raises(DataError):
        complete_all(model, tokenizer, [request("a"), ([{"role": "user", "content": "b"}], bad)], max_new_tokens=2)
    with pytest.raises(GenerationError, match="context holds 512"):
        complete_all(model, tokenizer, [request("a"), request("b" * 600)], max_new_tokens=2)
