"""Teacher forcing per step, against plain transformers with the blocks deleted, and how steps are read."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerroute import RouterConfig, get_routed_model
from layerroute.data.boundaries import boundary_tokens
from layerroute.data.builtin import builtin_steps
from layerroute.data.collate import StepCollator
from layerroute.data.load import open_steps
from layerroute.data.steps import write_steps
from layerroute.errors import DataError
from layerroute.evaluation.measure import batches, measure, score
from layerroute.evaluation.perturb import measure_stability, reword
from layerroute.evaluation.reading import StepReader
from layerroute.evaluation.samples import RowFile, read_rows, write_json
from layerroute.runtime.cost import executed_flops

BLOCKS, LENGTH = 5, 2048


@pytest.fixture(scope="module")
def tokenizer(hermes_tokenizer):
    return hermes_tokenizer


@pytest.fixture
def make_model(make_config):
    """A tiny model that reads bytes, with random routers and LoRA."""

    def make(**router):
        torch.manual_seed(0)
        config = make_config("llama", BLOCKS, vocab_size=300, max_position_embeddings=LENGTH)
        routed = get_routed_model(AutoModelForCausalLM.from_config(config), RouterConfig(window=8, **router))
        with torch.no_grad():
            routed.routers.weight.copy_(torch.randn(routed.routers.weight.shape) * 0.2)
            routed.routers.bias.zero_()
            for name, parameter in routed.peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        return routed.eval().requires_grad_(False)

    return make


@pytest.fixture
def model(make_model):
    return make_model(protect_first=1)


@pytest.fixture
def read(tokenizer, tmp_path):
    """Write steps to a file and open a reader on it."""

    def open_reader(steps, max_length=LENGTH, boundaries=()):
        path = tmp_path / "steps.jsonl"
        write_steps(path, steps)
        return StepReader(open_steps([str(path)]), tokenizer, max_length, boundaries)

    return open_reader


def reference(backbone, sample):
    """Summed negative log-likelihood and accuracy of the target, by plain transformers on one unpadded row."""
    ids = torch.tensor([sample.input_ids.tolist()])
    with torch.no_grad():
        logits = backbone(input_ids=ids).logits[0, sample.prompt_length - 1 : -1].double()
    target = ids[0, sample.prompt_length :]
    nll = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    right = logits.argmax(1) == target
    return float(nll), float(right.double().mean()), bool(right[0])


def test_every_arm_agrees_with_plain_transformers(model, tokenizer, read, delete_blocks):
    backbone = copy.deepcopy(model).peft_model.unload()
    (batch,) = batches(list(read(builtin_steps(6, seed=1)).samples(set())), tokens=10**6)
    rows = measure(model, batch, StepCollator(tokenizer.pad_token_id))
    assert [row["id"] for row in rows] == [sample.id for sample in batch]
    assert len({row["route"] for row in rows}) > 1
    for sample, row in zip(batch, rows, strict=True):
        route = torch.tensor([bit == "1" for bit in row["route"]])
        assert row["skip_rate"] == pytest.approx(100 * float((~route).float().mean()))
        every = torch.ones(BLOCKS, dtype=torch.bool)
        for arm, plain in {
            "base": backbone,
            "lora_only": delete_blocks(model, every),
            "routed": delete_blocks(model, route),
        }.items():
            nll, accuracy, starts = reference(plain, sample)
            assert row["nll"][arm] == pytest.approx(nll, rel=1e-4)
            assert row["accuracy"][arm] == pytest.approx(accuracy)
            assert row["starts"][arm] == starts
        cost = executed_flops(model, [(0, route)], row["prompt_tokens"], row["target_tokens"])
        assert row["flops"]["routed"] == {"prefill": cost.prefill, "decode": cost.decode}
        assert row["flops"]["base"]["prefill"] < row["flops"]["lora_only"]["prefill"]


def test_the_rows_beside_a_step_change_nothing(model, tokenizer, read):
    samples = list(read(builtin_steps(5, seed=2)).samples(set()))
    collator = StepCollator(tokenizer.pad_token_id)
    together = {row["id"]: row for row in measure(model, samples, collator)}
    for sample in samples:
        (alone,) = measure(model, [sample], collator)
        beside = together[sample.id]
        assert alone["route"] == beside["route"] and alone["flops"] == beside["flops"]
        assert alone["nll"]["routed"] == pytest.approx(beside["nll"]["routed"], rel=1e-4)


def test_forced_and_decided_routes_give_the_same(model, tokenizer, read):
    samples = list(read(builtin_steps(4, seed=3)).samples(set()))
    batch = StepCollator(tokenizer.pad_token_id)(samples)
    decided = score(model, batch)
    forced = score(model, batch, decided.routes)
    assert torch.equal(decided.nll, forced.nll) and torch.equal(decided.routes, forced.routes)


def test_segments_have_a_route_each_and_flops_of_each(model, tokenizer, read):
    boundaries = boundary_tokens(tokenizer, ["template"])
    steps = [step for step in builtin_steps(40, seed=4) if step.step_type == "tool_call"]
    samples = list(read(steps, boundaries=boundaries).samples(set()))
    parted = next(sample for sample in samples if sample.segment_starts[0] >= sample.prompt_length)
    (row,) = measure(model, [parted], StepCollator(tokenizer.pad_token_id))
    first, second = row["segments"]
    assert first["start"] == 0 and second["start"] == parted.segment_starts[0]
    assert row["route"] == second["route"]
    assert all(now <= before for now, before in zip(second["route"], first["route"], strict=True))
    routes = [torch.tensor([bit == "1" for bit in segment["route"]]) for segment in (first, second)]
    start = second["start"] + 1 - row["prompt_tokens"]
    cost = executed_flops(model, [(0, routes[0]), (start, routes[1])], row["prompt_tokens"], row["target_tokens"])
    assert row["flops"]["routed"] == {"prefill": cost.prefill, "decode": cost.decode}


def test_steps_are_counted_and_those_done_are_left_out(read):
    steps = builtin_steps(10, seed=5)
    reader = read([*steps, steps[3]], max_length=8192)
    assert len([sample for batch in reader.batches({(steps[0].id,)}, "x") for sample in batch]) == 9
    assert vars(reader.counts) == {"read": 11, "measured": 10, "dropped": 0, "duplicate_ids": 1}
    with pytest.raises(DataError, match="none of 11 steps fits into 8 tokens; raise --max-length"):
        list(read([*steps, steps[3]], max_length=8).batches(set(), "x"))


def test_batches_hold_each_sample_once_within_their_tokens(read):
    samples = list(read(builtin_steps(30, seed=6)).samples(set()))
    made = list(batches(samples, tokens=3000))
    assert sorted(sample.id for batch in made for sample in batch) == sorted(sample.id for sample in samples)
    assert all(len(batch) == 1 or len(batch) * max(len(s.input_ids) for s in batch) <= 3000 for batch in made)
    assert len(made) < 30


def test_a_torn_line_is_dropped_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "samples.jsonl"
    file = RowFile(path)
    assert file.keys("id") == set()
    file.append([{"id": "a", "arm": 1}, {"id": "b", "arm": 2}])
    with path.open("a") as torn:
        torn.write('{"id": "c", "ar')
    assert RowFile(path).keys("id", "arm") == {("a", 1), ("b", 2)}
    assert [row["id"] for row in read_rows(path)] == ["a", "b"]
    path.write_text('{"id": "a"}\nnonsense\n')
    with pytest.raises(DataError, match=r"samples\.jsonl:2: not JSON"):
        list(read_rows(path))
    path.write_text("7\n")
    with pytest.raises(DataError, match="a row is a JSON object"):
        list(read_rows(path))


def test_rewording_keeps_capitals_and_is_seeded():
    text = "Can you find two big lists? Please use the search function. " * 3
    assert reword(text, 1) == reword(text, 1) != reword(text, 2)
    assert reword("xyz", 1) == "xyz"
    assert any(reword("Can you", seed) == "Could you" for seed in range(10))


TOOL_LIST = """You may call one or more functions. Please use the list of tools (two at most, 3 if needed):
<tools>
{"type": "function", "function": {"name": "get_list", "description": "Find the name of a list, two or 2.",
"parameters": {"type": "object", "properties": {
"end": {"type": "string", "description": "the end of it"}, "list-name": {"type": "list"},
"total": {"type": "integer", "default": 10}, "show.use": {"type": "string", "enum": ["start", "end", "a\\nfind"]}},
"required": ["end", "total"]}}}
</tools>"""


def test_rewording_leaves_tools_whole():
    """Keys, types, values and figures of a tool list stay; what is changed is prose."""

    def tool(text):
        return json.loads(text.split("<tools>")[1].split("</tools>")[0])["function"]

    whole, texts = tool(TOOL_LIST), {reword(TOOL_LIST, seed) for seed in range(30)}
    assert len(texts) > 10
    for text in texts:
        found = tool(text)
        assert "two or 2." in found["description"] and "two at most, 3 if" in text
        found["description"] = whole["description"]
        found["parameters"]["properties"]["end"]["description"] = "the end of it"
        assert found == whole
    words = "it's \"find\" get. use_it buy-now big2 'list' \\nshow function(x) name:"
    assert all(reword(words[4:], seed) == words[4:] for seed in range(30))


def test_files_that_cannot_be_written_are_named_and_the_old_one_stays(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    (tmp_path / ".summary.json.new").mkdir()
    with pytest.raises(DataError, match=r"summary\.json cannot be written: .*; once it can, the same command goes on"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(DataError, match=r"cannot be written"):
        RowFile(tmp_path)  # a folder
    with pytest.raises(DataError, match=r"full cannot be written"):
        RowFile(Path("/dev/full")).append([{"id": "a"}])
    with pytest.raises(DataError, match=r"cannot be written"):
        write_json(path / "below.json", {})


def test_gates_without_a_number_are_null(model, tokenizer, read):
    with torch.no_grad():
        model.routers.weight.fill_(float("nan"))
    (row,) = measure(model, list(read(builtin_steps(1, seed=8)).samples(set())), StepCollator(tokenizer.pad_token_id))
    assert row["gate_probs"] == [None if block in model.routable else 1.0 for block in range(BLOCKS)]
    json.dumps(row, allow_nan=False)


def stabilities(model, tokenizer, samples):
    rows = measure(model, samples, StepCollator(tokenizer.pad_token_id))
    decided = [row["segments"][0]["route"] for row in rows]
    found = (
        measure_stability(model, tokenizer, sample, route, 0) for sample, route in zip(samples, decided, strict=True)
    )
    return [row for row in found if row is not None]


def test_stability_is_of_the_context_before_the_window(model, make_model, tokenizer, read):
    samples = list(read(builtin_steps(12, seed=7)).samples(set()))
    found = stabilities(model, tokenizer, samples)
    assert found == stabilities(model, tokenizer, samples)
    assert found and all(0 <= row["flips"] <= 100 and row["same_route"] == (row["flips"] == 0) for row in found)
    # routers that read the window as it enters the first block, where no token has seen another: nothing can reach them
    assert all(row["same_route"] for row in stabilities(make_model(protect_first=0), tokenizer, samples))
