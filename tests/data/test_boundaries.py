"""Boundary markers as tokens: in any surroundings, from the chat template, and found again in what was written."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import layerroute
from layerroute.data.boundaries import KNOWN_MARKERS, boundary_ends, boundary_tokens, ends_in_boundary
from layerroute.data.render import encode_prompt, tokenize_step
from layerroute.errors import ConfigError


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the splitting rule of Llama 3 and Qwen, under which `>` and a line break merge."""
    core = Tokenizer(models.BPE())
    rule = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(rule, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    texts = [f"I look it up.\n{call(name, city='Lima')}" for name in ("get_weather", "search", "add")] * 20
    texts += ["So I call:<tool_call>[1, 2]</tool_call>", "a > b <tool_call> {}"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_one_token_per_byte_gives_one_sequence(tokenizer):
    (boundary,) = boundary_tokens(tokenizer, ["<tool_call>"])
    assert tokenizer.decode(boundary) == "<tool_call>" and len(boundary) == len("<tool_call>")


def test_an_added_token_is_one_id(byte_tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool_call>"])
    assert boundary_tokens(tokenizer, ["<tool_call>"]) == ((len(tokenizer) - 1,),)


def test_tokens_shared_with_neighbours_belong_to_the_marker(merging):
    assert ">\n" in merging.batch_decode([[i] for i in range(len(merging))])
    boundaries = boundary_tokens(merging, ["<tool_call>"])
    assert len(boundaries) > 1 and boundaries == tuple(sorted(set(boundaries)))
    assert all("<tool_call>" in merging.decode(boundary) for boundary in boundaries)
    # neither the first token nor the last can go
    assert all("<tool_call>" not in merging.decode(part) for b in boundaries for part in (b[1:], b[:-1]))


@pytest.mark.parametrize("before", ["", "\n", "Look it up. ", "Look it up.", "Look it up.\n\n", "So: "])
@pytest.mark.parametrize("after", ["\n{", "{", " {", "[1]", "\n\n", "", "\n  {"])
def test_a_written_marker_ends_once_at_the_token_that_completes_it(merging, before, after):
    boundaries = boundary_tokens(merging, ["<tool_call>"])
    ids = merging.encode(f"{before}<tool_call>{after}", add_special_tokens=False)
    complete = [n - 1 for n in range(1, len(ids) + 1) if "<tool_call>" in merging.decode(ids[:n])]
    assert boundary_ends(ids, boundaries) == complete[:1]


def test_known_markers_come_from_the_template(make_tokenizer, chatml):
    (hermes,) = boundary_tokens(make_tokenizer(chatml), ["template"])
    assert make_tokenizer().decode(hermes) == "<tool_call>"
    wide = KNOWN_MARKERS[-1]  # of characters that are several tokens each
    several = make_tokenizer({"default": "{{ messages }}", "tool_use": f"[TOOL_CALLS] {wide}"})
    texts = {several.decode(boundary) for boundary in boundary_tokens(several, ["template", "STOP"])}
    assert texts == {"[TOOL_CALLS]", wide, "STOP"}
    for template in ("{{ messages }}", None):
        assert boundary_tokens(make_tokenizer(template), ["template"]) == ()
    every = make_tokenizer("".join(KNOWN_MARKERS))
    assert {every.decode(boundary) for boundary in boundary_tokens(every, ["template"])} == set(KNOWN_MARKERS)


def test_ids_are_taken_as_they_are(tokenizer):
    assert boundary_tokens(tokenizer, [(7, 8), [3], (7, 8)]) == ((3,), (7, 8))
    assert boundary_tokens(tokenizer, []) == ()


@pytest.mark.parametrize(
    ("markers", "message"),
    [
        ([""], r"boundaries: '' is an empty marker; give the text that opens a call, such as '<tool_call>'"),
        ([()], r"boundaries: \(\) is an empty marker"),
        ([(1, 9999, -1)], r"boundaries: \[1, 9999, -1\] names \[9999, -1\]; token ids here are 0 to \d+"),
    ],
)
def test_markers_that_are_refused(tokenizer, markers, message):
    with pytest.raises(ConfigError, match=message):
        boundary_tokens(tokenizer, markers)


def test_a_text_that_the_tokenizer_cannot_write_is_refused():
    core = Tokenizer(models.WordLevel({"<unk>": 0, "call": 1, "CALL": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert boundary_tokens(words, ["call"]) == ((1,),)
    with pytest.raises(ConfigError, match=r"cannot write '<tool_call>', it makes '<unk>' of it; .* or token ids"):
        boundary_tokens(words, ["<tool_call>"])
    with pytest.raises(ConfigError, match="cannot write 'call <unk>'"):
        boundary_tokens(words, ["call <unk>"])


def test_ends_against_a_plain_search():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(3) for _ in range(20)]
        boundaries = [[rng.randrange(3) for _ in range(rng.randrange(1, 4))] for _ in range(rng.randrange(3))]
        start = rng.randrange(20)
        expected = [
            end
            for end in range(20)
            if any(
                end + 1 - len(boundary) >= start and ids[end + 1 - len(boundary) : end + 1] == boundary
                for boundary in boundaries
            )
        ]
        assert boundary_ends(ids, boundaries, start) == expected
        assert ends_in_boundary(ids[start:], boundaries) == (19 in expected)
    assert not ends_in_boundary([], [[1]]) and not ends_in_boundary([1], [[2, 1]]) and not ends_in_boundary([1], [])


# --- segments of a sample ------------------------------------------------------------------------------------------

HERMES = Path(layerroute.__file__).parent / "templates" / "hermes.jinja"
USER = {"role": "user", "content": "Weather?"}
THOUGHT = {"role": "assistant", "content": "I look <tool_call it up.", "partial": True}


def test_a_thought_and_its_call_are_two_segments(tokenizer, make_step, weather):
    step = make_step("tool_call", [USER, THOUGHT], tools=[weather])
    boundaries = boundary_tokens(tokenizer, ["template"])
    sample, plain = (tokenize_step(tokenizer, step, 10_000, given) for given in (boundaries, ()))
    assert list(sample.input_ids[: sample.context_length]) == encode_prompt(tokenizer, [USER], [weather])
    (start,) = sample.segment_starts
    assert tokenizer.decode(sample.input_ids[: start + 1]).endswith("it up.\n<tool_call>")
    assert (plain.input_ids, plain.prompt_length) == (sample.input_ids, sample.prompt_length)
    assert (plain.context_length, plain.segment_starts) == (plain.prompt_length, ())


def test_a_direct_call_is_two_segments_and_further_calls_are_more(tokenizer, make_step):
    calls = [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]
    past = {"role": "assistant", "content": None, "tool_calls": calls}
    history = [USER, past, {"role": "tool", "content": "<tool_call>"}, USER]
    step = make_step("tool_call", history, {**past})
    sample = tokenize_step(tokenizer, step, 10_000, boundary_tokens(tokenizer, ["<tool_call>"]))
    assert sample.context_length == sample.prompt_length and len(sample.segment_starts) == 2
    assert all(tokenizer.decode(sample.input_ids[: p + 1]).endswith("<tool_call>") for p in sample.segment_starts)
    assert min(sample.segment_starts) >= sample.prompt_length


def test_a_marker_may_lie_across_the_joint_but_not_across_the_start_of_the_turn(tokenizer, make_step):
    boundaries = boundary_tokens(tokenizer, ["up.\n<tool_call>", "assistant\nI look"])
    sample = tokenize_step(tokenizer, make_step("tool_call", [USER, THOUGHT]), 10_000, boundaries)
    (start,) = sample.segment_starts
    assert tokenizer.decode(sample.input_ids[: start + 1]).endswith("up.\n<tool_call>")


def test_a_segment_of_the_last_token_alone_is_left_out(tokenizer, make_step):
    step = make_step("answer")
    assert tokenize_step(tokenizer, step, 10_000, boundary_tokens(tokenizer, ["<|im_end|>"])).segment_starts == ()
    assert len(tokenize_step(tokenizer, step, 10_000, boundary_tokens(tokenizer, ["y."])).segment_starts) == 1


def test_the_cut_prompt_is_what_counts(make_tokenizer, make_step, weather):
    tokenizer = make_tokenizer(HERMES.read_text(encoding="utf-8"))
    messages = [{"role": "user", "content": "A" * 99}, {"role": "assistant", "content": "B"}, USER, THOUGHT]
    step = make_step("tool_call", messages, tools=[weather])
    boundaries = boundary_tokens(tokenizer, ["template"])
    whole = tokenize_step(tokenizer, step, 10_000, boundaries)
    cut = tokenize_step(tokenizer, step, len(whole.input_ids) - 1, boundaries)
    assert cut.cut and cut.thought_length == whole.thought_length == len(THOUGHT["content"])
    gone = len(whole.input_ids) - len(cut.input_ids)
    assert [start - gone for start in whole.segment_starts] == list(cut.segment_starts)
