"""Prompts, targets, tokens, and what is cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import layerroute
from layerroute.data.builtin import builtin_steps
from layerroute.data.render import encode_prompt, render_prompt, render_step, tokenize_step
from layerroute.errors import DataError


def whole_turn(tokenizer, step):
    """The reference: the finished conversation as transformers renders it, calls in OpenAI's form."""

    def plain(message):
        calls = [{"type": "function", "function": call} for call in message.get("tool_calls") or []]
        return {**message, "content": message["content"] or "", "tool_calls": calls}

    messages = [plain(m) for m in step.messages]
    target = plain(step.target)
    if messages[-1].get("partial"):
        thought = messages.pop()["content"]
        target["content"] = f"{thought}\n{target['content']}" if target["content"] else thought
    tools = [{"type": "function", "function": tool} for tool in step.tools or []] or None
    return tokenizer.apply_chat_template([*messages, target], tools=tools, tokenize=False)


HERMES = Path(layerroute.__file__).parent / "templates" / "hermes.jinja"


@pytest.mark.parametrize("name", ["chatml", "hermes"])
def test_prompt_and_target_make_up_the_whole_turn(make_tokenizer, chatml, name):
    tokenizer = make_tokenizer(chatml if name == "chatml" else HERMES.read_text(encoding="utf-8"))
    for step in builtin_steps(120, seed=1):
        prompt, target = render_step(tokenizer, step)
        turn = whole_turn(tokenizer, step)
        if step.target.get("partial"):
            assert turn.startswith(prompt + target) and target == step.target["content"]
        else:
            assert prompt + target + "\n" == turn and target.endswith("<|im_end|>")
        assert prompt == render_prompt(tokenizer, step.messages, step.tools)


def test_a_call_after_a_thought_continues_the_turn(tokenizer, make_step, weather):
    thought = {"role": "assistant", "content": "Look it up.", "partial": True}
    step = make_step("tool_call", [{"role": "user", "content": "Weather?"}, thought], tools=[weather])
    prompt, target = render_step(tokenizer, step)
    assert prompt.endswith("<|im_start|>assistant\nLook it up.")
    assert target == '\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>'


def test_every_spelling_of_a_call_and_a_tool_gives_one_prompt(tokenizer, weather):
    def history(call):
        return [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
        ]

    arguments = {"city": "Lima", "nested": {"b": [1, "ü"]}}
    short = {"name": "get_weather", "arguments": arguments}
    spellings = [
        short,
        {**short, "arguments": json.dumps(arguments)},
        {"id": "c1", "type": "function", "function": {**short, "arguments": json.dumps(arguments, indent=2)}},
    ]
    prompts = {
        render_prompt(tokenizer, history(call), tools)
        for call in spellings
        for tools in ([weather], [{"type": "function", "function": weather}])
    }
    assert len(prompts) == 1


TRIMMED = """{%- for m in messages %}{{- '[' + m.role + ']' + m.content | trim }}
{%- if m.role == 'assistant' %}{{- '<|im_end|>' }}{%- endif %}{{- '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '[assistant] ' }}{%- endif %}"""
THINKING = """{%- for m in messages %}{{- '[' + m.role + ']' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{{- m.content }}{{- '<|im_end|>\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{- '[assistant]' }}{%- endif %}"""
UNLIKE = (
    "{%- for m in messages %}{{- m.role + m.content }}{%- endfor %}{%- if add_generation_prompt %}ANSWER{%- endif %}"
)
STRICT = "{%- if messages[0].role != 'user' %}{{- raise_exception('user first') }}{%- endif %}" + TRIMMED


def test_white_space_at_the_joint_goes_to_the_target(make_tokenizer, make_step):
    step = make_step("answer", target={"role": "assistant", "content": " Sunny. "})
    prompt, target = render_step(make_tokenizer(TRIMMED), step)
    assert prompt.endswith("[assistant]") and target == "Sunny.<|im_end|>"


def test_what_a_template_puts_before_the_text_stands_in_the_target_or_before_the_thought(make_tokenizer, make_step):
    tokenizer = make_tokenizer(THINKING)
    assert render_step(tokenizer, make_step("answer"))[1] == "<think>\n\n</think>\n\nIt is sunny.<|im_end|>"
    messages = [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "So so.", "partial": True}]
    prompt, target = render_step(tokenizer, make_step("answer", messages))
    assert prompt == "[user]Hm?<|im_end|>\n[assistant]<think>\n\n</think>\n\nSo so."
    assert target == "\nIt is sunny.<|im_end|>"


def test_templates_that_cannot_be_used_are_refused(make_tokenizer, make_step):
    with pytest.raises(DataError, match="renders the whole turn differently"):
        render_step(make_tokenizer(UNLIKE), make_step("answer"))
    with pytest.raises(DataError, match="refuses this conversation: user first"):
        render_prompt(make_tokenizer(STRICT), [{"role": "assistant", "content": "x"}])
    with pytest.raises(DataError, match="refuses this conversation"):
        render_prompt(make_tokenizer(None), [{"role": "user", "content": "x"}])
    with pytest.raises(DataError, match="at least one message"):
        render_prompt(make_tokenizer(), [])


def test_a_samples_prompt_is_what_inference_sees(tokenizer):
    for step in builtin_steps(40, seed=2):
        sample = tokenize_step(tokenizer, step, 100_000)
        assert list(sample.input_ids[: sample.prompt_length]) == encode_prompt(tokenizer, step.messages, step.tools)
        assert tokenizer.decode(sample.input_ids[sample.prompt_length :]) == render_step(tokenizer, step)[1]
        assert not sample.cut and sample.step_type == step.step_type and sample.id == step.id


def turns(*pairs):
    return [{"role": role, "content": text} for role, text in pairs]


def decoded(tokenizer, sample):
    return tokenizer.decode(sample.input_ids)


def test_the_oldest_messages_go_first_and_whole(tokenizer, make_step, weather):
    messages = turns(("system", "RULES"), ("user", "A" * 50), ("assistant", "B" * 50), ("user", "C" * 50))
    step = make_step("tool_call", messages, tools=[weather])
    full = tokenize_step(tokenizer, step, 10_000)
    fits = tokenize_step(tokenizer, step, len(full.input_ids))
    assert not fits.cut and fits.input_ids == full.input_ids
    one_less = tokenize_step(tokenizer, step, len(full.input_ids) - 1)
    text = decoded(tokenizer, one_less)
    assert one_less.cut and "A" * 5 not in text and "B" * 50 in text and "RULES" in text
    assert list(one_less.input_ids[: one_less.prompt_length]) == encode_prompt(
        tokenizer, [messages[0], *messages[2:]], [weather]
    )
    two_less = tokenize_step(tokenizer, step, len(full.input_ids) - 90)
    assert "B" * 5 not in decoded(tokenizer, two_less) and "C" * 50 in decoded(tokenizer, two_less)


def test_a_tools_answer_does_not_outlive_its_call(tokenizer, make_step):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    messages = [*turns(("user", "A" * 99)), call, *turns(("tool", "RESULT"), ("user", "and now?"))]
    step = make_step("answer", messages)
    length = len(tokenize_step(tokenizer, step, 10_000).input_ids) - 120
    text = decoded(tokenizer, tokenize_step(tokenizer, step, length))
    assert "<tool_call>" not in text and "RESULT" not in text and "and now?" in text


def test_a_thought_keeps_the_message_that_it_answers(tokenizer, make_step):
    """No template renders a thought alone, so such a step would be dropped."""
    thought = {"role": "assistant", "content": "T" * 20, "partial": True}
    step = make_step("tool_call", [*turns(("user", "A" * 50), ("assistant", "B" * 50), ("user", "C" * 50)), thought])
    length = len(tokenize_step(tokenizer, step, 10_000).input_ids)
    text = decoded(tokenizer, tokenize_step(tokenizer, step, length - 150))
    assert "B" not in text and "C" * 10 in text and "C" * 50 not in text and "T" * 20 in text


def test_then_the_system_text_then_the_last_message_lose_their_left(tokenizer, make_step, weather):
    step = make_step("tool_call", turns(("system", "S" * 40 + "E"), ("user", "x" * 40 + "y")), tools=[weather])
    length = len(tokenize_step(tokenizer, step, 10_000).input_ids)
    text = decoded(tokenizer, tokenize_step(tokenizer, step, length - 10))
    assert "\n" + "S" * 30 + "E\n<tools>" in text and "x" * 40 in text
    text = decoded(tokenizer, tokenize_step(tokenizer, step, length - 50))
    assert "S" not in text.split("<tools>")[0].replace("<|im_start|>system", "") and "\n" + "x" * 31 + "y<" in text


def test_target_and_tools_are_never_cut(tokenizer, make_step, weather):
    step = make_step("tool_call", turns(("user", "u" * 60)), tools=[weather])
    full = tokenize_step(tokenizer, step, 10_000)
    smallest = len(full.input_ids) - 60
    target = list(full.input_ids[full.prompt_length :])
    bare = tokenize_step(tokenizer, step, smallest)
    assert len(bare.input_ids) == smallest and list(bare.input_ids[bare.prompt_length :]) == target
    assert json.dumps(weather["parameters"]) in decoded(tokenizer, bare)
    assert tokenize_step(tokenizer, step, smallest - 1) is None


def test_cuts_fit_and_keep_the_most_that_fits(tokenizer):
    """Against an exhaustive search over whole messages."""
    for step in builtin_steps(60, seed=5):
        full = tokenize_step(tokenizer, step, 10**6)
        limit = int(len(full.input_ids) * 0.8)
        sample = tokenize_step(tokenizer, step, limit)
        if sample is None:
            continue
        assert len(sample.input_ids) <= limit and sample.cut
        system = step.messages[:1] if step.messages[0]["role"] == "system" else []
        rest = step.messages[len(system) :]
        room = limit - (len(full.input_ids) - full.prompt_length)
        alone = not system and rest[-1].get("partial", False)
        for start in range(1, len(rest) - alone):
            prompt = encode_prompt(tokenizer, [*system, *rest[start:]], step.tools)
            if len(prompt) <= room and rest[start]["role"] != "tool":
                assert list(sample.input_ids[: sample.prompt_length]) == prompt
                break


def test_a_cut_that_the_template_refuses_is_passed_over(make_tokenizer, make_step):
    tokenizer = make_tokenizer(STRICT)
    messages = turns(("user", "A" * 40), ("assistant", "B" * 40), ("user", "C" * 10))
    step = make_step("answer", messages)
    length = len(tokenize_step(tokenizer, step, 10_000).input_ids) - 5
    sample = tokenize_step(tokenizer, step, length)
    assert decoded(tokenizer, sample).startswith("[user]CCC")
