"""Steps to text and tokens, through the backbone's own chat template.

Contract: the prompt's tokens of a training sample are the tokens that inference sees for the same messages and tools
(`encode_prompt`), for prompt and target are tokenised apart. The template is asked twice, for the prompt and for the
whole turn, and the target is what the second has more; no template is known by name. Boundary: a tokenizer is passed
in; nothing here needs torch.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from layerroute.data.boundaries import boundary_ends
from layerroute.data.chat import normalize_message, normalize_tool
from layerroute.data.steps import Step
from layerroute.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Sample", "encode", "encode_prompt", "render_prompt", "render_step", "tokenize_step"]

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Sample:
    """A tokenised step: `input_ids[:prompt_length]` is the prompt, the rest the target."""

    input_ids: array[int]
    prompt_length: int
    step_type: str
    source: str
    group: str
    id: str
    cut: bool
    """Whether messages were cut to make the step fit."""
    thought_length: int = 0
    """So many tokens at the end of the prompt are of the turn itself (a thought that the target goes on from): the
    turn's first segment governs them, and its route is decided before them. 0 where a turn has one route."""
    segment_starts: tuple[int, ...] = ()
    """Where the turn's second and later segments start: the positions at which a boundary ends."""

    @property
    def context_length(self) -> int:
        """`input_ids[:context_length]` is what the turn's first route may depend on."""
        return self.prompt_length - self.thought_length


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None = None) -> str:
    """The text that a model continues with the next step.

    Args:
        tokenizer: one with a chat template.
        messages: in the chat form; arguments of calls may be objects or JSON strings. With a last assistant message
            marked `"partial": true`, the prompt ends with its text, inside the turn.
        tools: in the short or OpenAI's form, or None.

    Raises:
        DataError: a malformed message, or a conversation that the template refuses.
    """
    plain, wrapped = _uniform(messages), _wrap_tools(tools)
    if not plain[-1].get("partial"):
        return _render(tokenizer, plain, wrapped, prompt=True)
    return _open_turn(tokenizer, plain[:-1], wrapped, plain[-1]["content"])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, tools: Tools | None = None) -> list[int]:
    """The token ids of `render_prompt`, as training and inference use them."""
    return encode(tokenizer, render_prompt(tokenizer, messages, tools))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of rendered text; the template has written the special tokens already, so none is added."""
    # verbose=False: no warning where a text exceeds the context, for it is cut or refused afterwards
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def render_step(tokenizer: PreTrainedTokenizerBase, step: Step) -> tuple[str, str]:
    """`(prompt, target)`: what inference would see, and how the same turn goes on, its end-of-turn token included.

    A target marked `"partial": true` (a thought that a call follows) has no end of turn. Where the template writes
    other white space at the joint than in a prompt, the prompt ends before it.

    Raises:
        DataError: the template refuses the conversation, or the whole turn does not start with the prompt.
    """
    messages, tools, target = _uniform(step.messages), _wrap_tools(step.tools), _uniform([step.target])[0]
    opened = messages.pop() if messages[-1].get("partial") else None
    thought = opened["content"] if opened else ""
    if target.get("partial"):
        whole = _open_turn(tokenizer, messages, tools, _joined(thought, target["content"]))
    else:
        turn = {**target, "content": _joined(thought, target["content"])}
        whole = _render(tokenizer, [*messages, turn], tools, prompt=False)
    if opened:
        prompt = _open_turn(tokenizer, messages, tools, thought)
    else:
        prompt = _render(tokenizer, messages, tools, prompt=True)
    if not whole.startswith(prompt):
        prompt = prompt[: _common(prompt, whole)]
    return prompt, whole[len(prompt) :] if target.get("partial") else _until_end(tokenizer, whole[len(prompt) :])


def _common(prompt: str, whole: str) -> int:
    """Where the prompt and the whole turn part; only white space of the prompt may lie behind it."""
    shared = _shared(prompt, whole)
    if prompt[shared:].strip():
        raise DataError(
            "the chat template renders the whole turn differently from its prompt, at "
            f"{whole[max(0, shared - 20) : shared + 20]!r}; use a template whose turns continue its prompts"
        )
    return shared


def _shared(first: Sequence[object], second: Sequence[object]) -> int:
    """Length of the common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _joined(thought: str, text: str) -> str:
    return f"{thought.rstrip()}\n{text.lstrip()}" if thought.strip() and text.strip() else thought or text


def _until_end(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Without the white space that a template writes after the end-of-turn token, which no model has to generate."""
    bare = text.rstrip()
    ends = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return bare if any(bare.endswith(token) for token in ends) else text


def _uniform(messages: Messages) -> list[dict[str, Any]]:
    if not messages:
        raise DataError("a prompt needs at least one message")
    return [normalize_message(message) for message in messages]


def _wrap_tools(tools: Tools | None) -> list[Any] | None:
    return [{"type": "function", "function": normalize_tool(tool)} for tool in tools] if tools else None


def _open_turn(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[Any] | None, text: str
) -> str:
    """The conversation up to the end of `text` within the assistant's turn, as it stands in a whole turn."""
    head = _render(tokenizer, messages, tools, prompt=True)
    if not text.strip():
        return head
    whole = _render(tokenizer, [*messages, {"role": "assistant", "content": text}], tools, prompt=False)
    head = head[: _common(head, whole)] if not whole.startswith(head) else head
    for form in (text, text.strip()):  # many templates trim the content
        # a template may put something of its own first, such as an empty block of thought
        start = whole.find(form, len(head))
        if start >= 0:
            return whole[: start + len(form)]
    raise DataError(f"the chat template does not render the assistant's text as it is: {text!r:.80}")


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[Any] | None,
    prompt: bool,
) -> str:
    from jinja2 import TemplateError

    wrapped = [_wrap_calls(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(wrapped, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"the tokenizer's chat template refuses this conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _wrap_calls(message: dict[str, Any]) -> dict[str, Any]:
    calls = [{"type": "function", "function": call} for call in message.get("tool_calls") or []]
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "partial")}
    return {**plain, "tool_calls": calls} if calls else plain


def tokenize_step(
    tokenizer: PreTrainedTokenizerBase, step: Step, max_length: int, boundaries: Sequence[Sequence[int]] = ()
) -> Sample | None:
    """A step as tokens, at most `max_length` of them, or None where target and tools alone do not fit.

    With `boundaries` (token-id sequences) the sample says where the segments of its turn start.

    What does not fit is cut from the left of the messages: the oldest messages but the system's, whole; then the left
    of the system message's text; then the left of the last message's text. Target and tool schemas are never cut.

    Raises:
        DataError: see `render_step`.
    """

    def tokens(candidate: Step) -> tuple[list[int], list[int]]:
        prompt, target = render_step(tokenizer, candidate)
        return encode(tokenizer, prompt), encode(tokenizer, target)

    def fits(candidate: Step) -> bool:
        try:
            return sum(map(len, tokens(candidate))) <= max_length
        except DataError:  # a template may refuse a conversation that lost its first user message
            return False

    prompt, target = tokens(step)
    is_cut = len(prompt) + len(target) > max_length
    if is_cut:
        shortened = _cut(step, fits)
        if shortened is None:
            return None
        step = shortened
        prompt, target = tokens(step)
    ids = array("i", [*prompt, *target])
    thought = _thought_length(tokenizer, step, prompt) if boundaries else 0
    # a segment of the last token alone would govern nothing that is learned
    starts = tuple(p for p in boundary_ends(ids, boundaries, len(prompt) - thought) if p < len(ids) - 1)
    return Sample(ids, len(prompt), step.step_type, step.source, step.group, step.id, is_cut, thought, starts)


def _thought_length(tokenizer: PreTrainedTokenizerBase, step: Step, prompt: list[int]) -> int:
    """How many of the prompt's last tokens are of the turn's own thought."""
    *before, last = _uniform(step.messages)
    if not last.get("partial"):
        return 0
    head = _render(tokenizer, before, _wrap_tools(step.tools), prompt=True)
    return len(prompt) - _shared(encode(tokenizer, head), prompt)


def _cut(step: Step, fits: Callable[[Step], bool]) -> Step | None:
    """The longest cut of the step that fits; each stage is a search by halves, as rendering is what takes time."""
    system = [message for message in step.messages[:1] if message["role"] == "system" and len(step.messages) > 1]
    rest = step.messages[len(system) :]
    alone = rest[-1].get("partial") and not system and len(rest) > 1  # a thought alone is no conversation
    last = len(rest) - (2 if alone else 1)
    # a tool's answer does not stand first: the call that it answers is gone
    starts = [i for i in range(last + 1) if i == last or (i and rest[i]["role"] != "tool")]

    def without(start: int) -> Step:
        return replace(step, messages=[*system, *rest[start:]])

    shortest = without(starts[-1])
    if fits(shortest):
        return without(starts[_first_true(len(starts), lambda i: fits(without(starts[i])))])
    for position in range(len(shortest.messages)):
        bare = _with_content(shortest, position, "")
        if fits(bare):
            return _cut_text(shortest, position, fits)
        shortest = bare
    return None


def _cut_text(step: Step, position: int, fits: Callable[[Step], bool]) -> Step:
    text = step.messages[position]["content"]
    gone = _first_true(len(text) + 1, lambda start: fits(_with_content(step, position, text[start:])))
    return _with_content(step, position, text[gone:])


def _with_content(step: Step, position: int, text: str) -> Step:
    messages = list(step.messages)
    messages[position] = {**messages[position], "content": text}
    return replace(step, messages=messages)


def _first_true(count: int, holds: Callable[[int], bool]) -> int:
    """The first index from which `holds` is true, given that it holds for the last."""
    low, high = 0, count - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low
