"""Free running: the model answers on its own, and the answer is graded, because teacher forcing flatters.

Two tasks are found in the data: `tool_call`, any step whose target is calls under a list of tools, graded as the
Berkeley Function Calling Leaderboard does; `gsm8k`, any step whose target ends in `#### NUMBER`, graded by that number.
Greedy, at the same prompts under three arms: the untouched backbone, LoRA alone, and routed; with baselines a fourth,
static: one set of blocks left out for each step type, chosen greedily by that type's loss, as many as the routed model
skipped on that type.

A step that goes on from a thought of its own turn is left out where the model decides again at boundaries: asked with
the thought in the prompt, it would decide once, with the thought read, and not as in the turn that was measured.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from layerroute.data.render import encode_prompt
from layerroute.data.steps import Step
from layerroute.errors import DataError
from layerroute.evaluation.baselines import Baselines
from layerroute.evaluation.calls import parse_calls, schema_valid
from layerroute.evaluation.grading import Accepted, accepted_from_gold, grade_calls, grade_number, last_number_is
from layerroute.evaluation.measure import as_row, skip_points
from layerroute.evaluation.reading import StepReader
from layerroute.evaluation.samples import RowFile
from layerroute.model.routed import RoutedModel
from layerroute.runtime.complete import Completion, complete_all
from layerroute.runtime.cost import backbone_flops, executed_flops, lora_flops

__all__ = ["ARMS", "Choice", "choose_steps", "fill", "grade", "task_of"]

ARMS = ("base", "lora_only", "routed", "static")

_NUMBER_AT_END = re.compile(r"####[ \t]*(?:-?\$?|\$-)[0-9][0-9,]*\.?[0-9]*\s*$")
"""How a gold answer of GSM8K ends; a Markdown heading of that depth is none."""


def task_of(step: Step) -> str | None:
    """Which task grades this step, if any."""
    if step.step_type == "tool_call":
        return "tool_call" if step.tools else None
    return "gsm8k" if _gold_number(step) else None


def _gold_number(step: Step) -> str | None:
    """The end of a gold answer, `#### NUMBER`, if that is how the target ends."""
    found = _NUMBER_AT_END.search(step.target["content"] or "")
    return found.group() if found else None


@dataclass(frozen=True)
class Choice:
    """The steps that are generated."""

    steps: list[Step]
    unfinished_turns: int
    """Steps with a task that were left out: they go on from a thought of their own turn."""


def choose_steps(steps: Iterable[Step], count: int, seed: int, *, whole_turns: bool) -> Choice:
    """Draw at most `count` steps of each task: always the same ones for a seed, whatever their order.

    Args:
        steps: of an id that is repeated, the first step counts, as where steps are measured.
        count: steps of each task, at most.
        seed: of the draw.
        whole_turns: leave out steps whose last message is a thought of the same turn (see the module's docstring).
    """
    drawn: dict[str, list[tuple[bytes, str, Step]]] = {}
    seen: set[str] = set()  # with no id twice, no two items are equal before their steps, which have no order
    unfinished = 0
    for step in steps:
        task = None if step.id in seen else task_of(step)
        seen.add(step.id)
        if task is None:
            continue
        if whole_turns and step.messages[-1].get("partial"):
            unfinished += 1
            continue
        heap = drawn.setdefault(task, [])
        rank = hashlib.blake2b(f"{seed}:{step.id}".encode(), digest_size=8).digest()
        item = (bytes(255 - byte for byte in rank), step.id, step)  # a heap drops its smallest: the largest rank
        if len(heap) < count:
            heapq.heappush(heap, item)
        elif item[:2] > heap[0][:2]:
            heapq.heapreplace(heap, item)
    return Choice([step for task in sorted(drawn) for _, _, step in sorted(drawn[task])], unfinished)


def fill(
    model: RoutedModel,
    reader: StepReader,
    steps: Sequence[Step],
    choose: Callable[[], Baselines] | None,
    file: RowFile,
    *,
    max_new_tokens: int,
    batch_size: int,
) -> int:
    """Generate and grade each step under each arm that the file lacks.

    LoRA is merged for the while: the texts are those that `layerroute generate` gives.

    Args:
        model: in evaluation mode.
        reader: whose tokenizer and progress bar are used.
        steps: as `choose_steps` gives them.
        choose: gives the static arm's routes, called before LoRA is merged and where that arm lacks something; None
            leaves that arm out.
        file: generations.jsonl.
        max_new_tokens: tokens of an answer at most.
        batch_size: steps of like length that are generated side by side.

    Returns:
        How many steps were left out because their prompt does not fit.

    Raises:
        DataError: accepted values of one of the steps are malformed, or the file cannot be written.
    """
    for step in steps:
        if task_of(step) == "tool_call":
            _expected(step)  # before hours of generating rather than after
    fitting = [(length, step) for step in steps if (length := _prompt_length(model, reader, step, max_new_tokens))]
    fitting.sort(key=lambda item: (item[0], item[1].id))
    # batches are those of an unbroken run, for an answer may hang on its neighbours in the last digits
    batches = [[step for _, step in fitting[at : at + batch_size]] for at in range(0, len(fitting), batch_size)]
    done = file.keys("id", "arm")
    arms = ARMS if choose else ARMS[:-1]
    pending = [(arm, batch) for batch in batches for arm in arms if any((step.id, arm) not in done for step in batch)]
    if pending:
        chosen = choose() if choose and any(arm == "static" for arm, _ in pending) else None
        model.merge_adapter()
        try:
            for arm, batch in tqdm(pending, desc="generating", unit="batch", disable=not reader.progress):
                rows = _rows(model, reader, batch, arm, chosen, max_new_tokens)
                file.append([row for row in rows if (row["id"], arm) not in done])
        finally:
            model.unmerge_adapter()
    return len(steps) - len(fitting)


def _prompt_length(model: RoutedModel, reader: StepReader, step: Step, max_new_tokens: int) -> int | None:
    """Tokens of the prompt; None where it is not read whole: an answer to half a question says nothing."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = reader.max_length if context is None else min(reader.max_length, context - max_new_tokens)
    length = len(encode_prompt(reader.tokenizer, step.messages, step.tools))
    return length if length <= room else None


def _rows(
    model: RoutedModel,
    reader: StepReader,
    steps: Sequence[Step],
    arm: str,
    chosen: Baselines | None,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Generate these steps side by side under one arm, and grade them."""
    within: AbstractContextManager[None] = nullcontext()
    forced: dict[str, Tensor] = {}
    if arm == "base":
        within = model.disable_adapter()
    elif arm == "lora_only":
        within = model.disable_routing()
    elif arm == "static":
        assert chosen is not None
        routes = [chosen.route("oracle", step.id, step.step_type) for step in steps]
        forced = {"routes": torch.stack(routes).to(model.device)}
    requests = [(step.messages, step.tools) for step in steps]
    with within, torch.no_grad():
        answers = complete_all(
            model, reader.tokenizer, requests, max_new_tokens=max_new_tokens, do_sample=False, **forced
        )
    return [_row(model, step, arm, answer) for step, answer in zip(steps, answers, strict=True)]


def _row(model: RoutedModel, step: Step, arm: str, answer: Completion) -> dict[str, Any]:
    segments = [(segment.start, segment.route) for segment in answer.segments]
    lengths = answer.prompt_tokens, answer.new_tokens
    flops = {"base": backbone_flops, "lora_only": lora_flops}
    cost = flops[arm](model, *lengths) if arm in flops else executed_flops(model, segments, *lengths)
    return {
        "id": step.id,
        "group": step.group,
        "source": step.source,
        "task": task_of(step),
        "arm": arm,
        "text": answer.text,
        "new_tokens": answer.new_tokens,
        "finished": answer.finished,
        **grade(step, answer.text),
        "skip_rate": skip_points(answer.segments[-1].route),
        "flops": as_row(cost),
    }


def grade(step: Step, text: str) -> dict[str, Any]:
    """Grade an answer.

    Gives `correct`; `error`, the first fault; `valid_json` and `schema_valid`, null where there are no calls to make;
    `last_number`, whether that of the answer is right though nothing marks it, null where no number is asked for.

    A step may bring accepted values of its own in `meta["accepted"]`, in the leaderboard's form
    `[{NAME: {PARAMETER: [VALUE, ...]}}, ...]`; otherwise its own calls are the only right ones.

    Raises:
        DataError: accepted values in another form.
    """
    checks: dict[str, bool | None] = dict.fromkeys(("valid_json", "schema_valid", "last_number"))
    if number := _gold_number(step):
        grade = grade_number(text, number)
        checks["last_number"] = last_number_is(text, number)
    else:
        tools = step.tools or []
        calls, checks["valid_json"] = parse_calls(text)
        grade = grade_calls(calls, _expected(step), tools)
        checks["schema_valid"] = bool(calls) and all(schema_valid(call, tools) for call in calls)
    return {"correct": grade.correct, **checks, "error": grade.error}


def _expected(step: Step) -> list[Accepted]:
    """What the calls of a tool_call step are graded against."""
    accepted = step.meta.get("accepted")
    if accepted is None:
        return accepted_from_gold(step.target["tool_calls"], step.tools or [])
    if isinstance(accepted, list) and accepted and all(map(_is_answer, accepted)):
        return accepted
    raise DataError(
        f"step {step.id!r} of {step.source!r}: meta.accepted is {accepted!r:.80}; give a list with one "
        "{NAME: {PARAMETER: [VALUE, ...]}} for each call, or leave it out to grade by the step's own calls"
    )


def _is_answer(answer: Any) -> bool:
    """Whether this is one expected call: a name, and a list of values for each parameter."""
    return (
        isinstance(answer, dict)
        and len(answer) == 1
        and all(isinstance(given, dict) for given in answer.values())
        and all(isinstance(values, list) for given in answer.values() for values in given.values())
    )
