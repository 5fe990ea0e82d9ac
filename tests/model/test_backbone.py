"""Backbones by name, the refusals, and the exact text of the tool template."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import layerroute
from layerroute import load_backbone
from layerroute.errors import BackboneError
from layerroute.model.backbone import backbone_config, load_model

# as SmolLM2-135M-Instruct writes a conversation that has a system message
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CLOCK = {"name": "clock", "description": "The time", "parameters": {"type": "object", "properties": {}}}
ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Paris & Rome?"}]
CALL = {"name": "get_weather", "arguments": {"city": "Zürich"}}


def tokenizer_of(template: Any = None, **special: str) -> PreTrainedTokenizerFast:
    """A character-level tokenizer of fewer than the tiny models' 97 tokens."""
    names = [*special.values(), *(chr(code) for code in range(32, 122))]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="z"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **{"unk_token": "z", **special})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path, make_backbone: Callable[..., PreTrainedModel]) -> Path:
    path = tmp_path / "tiny"
    make_backbone("llama").save_pretrained(path)
    tokenizer_of(CHATML, eos_token="<|im_end|>", bos_token="<|im_start|>").save_pretrained(path)
    return path


@pytest.fixture
def render(folder: Path) -> Callable[..., str]:
    _, tokenizer = load_backbone(folder)

    def make(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))

    return make


def test_a_folder_loads_as_saved(folder: Path, make_backbone: Callable[..., PreTrainedModel], tokens: Any) -> None:
    model, tokenizer = load_backbone(folder)
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 9)).logits, make_backbone("llama")(tokens(2, 9)).logits)
    assert not model.training
    assert model.name_or_path == model.config.name_or_path == str(folder)
    assert (tokenizer.pad_token, tokenizer.padding_side) == ("<|im_end|>", "left")
    assert len(tokenizer) <= model.get_input_embeddings().num_embeddings


def test_dtype_is_the_checkpoints_own_unless_given(folder: Path) -> None:
    load_model(folder).to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder).dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float32, device="cpu").dtype == torch.float32


def test_generation_stops_where_the_templates_turns_end(folder: Path) -> None:
    model, tokenizer = load_backbone(folder)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id is not None


@pytest.fixture
def marked(folder: Path) -> Path:
    """The folder with two plain tokens, `<call>` (95) and `</call>` (96), and a special one before them."""
    tokenizer = tokenizer_of(CHATML, eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    tokenizer.add_tokens(["<call>", "</call>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_that_the_model_has_learned_stay_tokens(marked: Path) -> None:
    tokenizer = load_backbone(marked)[1]
    call, end, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<call>", "</call>", "<|image|>"))
    assert tokenizer.encode("a<call>b</call><|image|>")[1::2] == [call, end] and image in tokenizer.all_special_ids


def test_tokens_that_the_model_never_learned_are_spelt_out(marked: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = load_backbone(marked)
    call, end, image = (tokenizer.convert_tokens_to_ids(token) for token in ("<call>", "</call>", "<|image|>"))
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[call] = rows[image] * (1 + 1e-4)  # as quantisation leaves them
    model.save_pretrained(marked)
    spelt = load_backbone(marked)[1]
    text = "a<call>b</call><|image|>"
    ids = spelt.encode(text)
    assert "have the same output row" in caplog.text and "<call>" in caplog.text and "</call>" not in caplog.text
    assert call not in ids and [token for token in ids if token in (end, image)] == [end, image]
    assert spelt.decode(ids) == tokenizer.decode(tokenizer.encode(text)).replace("<call>", " ".join("<call>"))
    assert len(spelt) == len(tokenizer) and spelt.eos_token_id == tokenizer.eos_token_id


def test_a_template_that_knows_tools_is_kept(folder: Path) -> None:
    knowing = "{% generation %}{{ tools }}{% endgeneration %}"
    tokenizer_of(knowing, eos_token="<|im_end|>").save_pretrained(folder)
    assert load_backbone(folder)[1].chat_template == knowing
    several = {"default": CHATML, "tool_use": knowing}
    tokenizer_of(several, eos_token="<|im_end|>").save_pretrained(folder)
    assert load_backbone(folder)[1].chat_template == several


@pytest.mark.parametrize("template", [None, "You have no tools.{# tools #}{{ messages[0].content }}"])
def test_a_template_that_only_speaks_of_tools_is_replaced(folder: Path, template: str | None) -> None:
    (folder / "chat_template.jinja").unlink()
    tokenizer_of(template, eos_token="<|im_end|>").save_pretrained(folder)
    assert "<tool_call>" in load_backbone(folder)[1].chat_template


def test_without_the_turn_token_turns_end_with_the_tokenizers_own(folder: Path) -> None:
    tokenizer_of(None, eos_token="$").save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    model, tokenizer = load_backbone(folder)
    text = tokenizer.apply_chat_template(ASK, tokenize=False)
    assert "<|im_end|>" not in text
    assert text.count("$\n") == 2
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_a_config_alone_is_enough_for_its_shape(tmp_path: Path, folder: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text((folder / "config.json").read_text())
    assert backbone_config(alone).num_hidden_layers == 4
    assert backbone_config(alone).name_or_path == str(alone)
    with pytest.raises(BackboneError, match=r"its weights cannot be loaded"):
        load_backbone(alone)


def test_missing_names_say_what_was_looked_for(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BackboneError, match=r"no such folder or \.gguf file.*built in: smollm2-135m"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(BackboneError, match=r"no such folder or \.gguf file"):
        load_backbone("nowhere.gguf")
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        load_backbone(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"it is an adapter folder"):
        load_backbone(tmp_path)
    with pytest.raises(BackboneError, match=r"is a file, but no \.gguf"):
        load_backbone(folder / "config.json")


def test_a_hub_id_without_a_hub_is_one_clear_error() -> None:
    with pytest.raises(BackboneError, match=r"'someone/some-model' is no built-in name.*HF_HUB_OFFLINE is set"):
        load_backbone("someone/some-model")
    with pytest.raises(BackboneError, match=r"the hub did not give its config"):
        backbone_config("someone/some-model")


def test_a_misspelt_name_never_reaches_the_hub() -> None:
    with pytest.raises(BackboneError, match=r"OWNER/NAME \(did you mean 'smollm2-135m'\?\)"):
        load_backbone("smollm2-135")


def test_damaged_folders_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BackboneError, match=r"its weights cannot be loaded"):
        load_backbone(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"its config cannot be loaded"):
        backbone_config(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    torch.save(load_model(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"its weights cannot be loaded.*safetensors"):
        load_backbone(folder)


def test_a_folder_without_a_tokenizer_is_refused_but_its_model_loads(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(BackboneError, match=r"its tokenizer cannot be loaded"):
        load_backbone(folder)
    assert load_model(folder).config.num_hidden_layers == 4


def test_names_can_be_listed_without_torch() -> None:
    code = "import sys; from layerroute.model.assets import ASSETS; print('torch' in sys.modules, *ASSETS)"
    environment = os.environ | {"PYTHONPATH": str(Path(layerroute.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["False", "smollm2-135m"]


# --- the template --------------------------------------------------------------------------------------------------


def test_without_tools_a_conversation_is_plain_chatml(render: Callable[..., str]) -> None:
    plain = tokenizer_of(CHATML, eos_token="<|im_end|>")
    talk = [*ASK, {"role": "assistant", "content": "Both."}, {"role": "user", "content": "é <b>"}]
    for prompt in (False, True):
        assert render(talk, prompt=prompt) == plain.apply_chat_template(
            talk, tokenize=False, add_generation_prompt=prompt
        )


def test_without_a_system_message_none_is_made_up(render: Callable[..., str]) -> None:
    assert render(ASK[1:], prompt=True) == "<|im_start|>user\nParis & Rome?<|im_end|>\n<|im_start|>assistant\n"


def test_the_whole_text_with_tools(render: Callable[..., str]) -> None:
    talk = [
        *ASK,
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, {"name": "clock", "arguments": {}}]},
        {"role": "tool", "name": "get_weather", "content": '{"sky": "clear"}'},
        {"role": "tool", "name": "clock", "content": "12:00"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "Clear, then rain."},
    ]
    expected = """<|im_start|>system
Be brief.

You can call functions. Each line between <tools> and </tools> describes one:
<tools>
{"type": "function", "function": {"name": "get_weather", "description": "Weather of a city", \
"parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
{"type": "function", "function": {"name": "clock", "description": "The time", \
"parameters": {"type": "object", "properties": {}}}}
</tools>
To call a function, answer with its name and arguments as a JSON object:
<tool_call>
{"name": <function name>, "arguments": <arguments object>}
</tool_call>
Several calls follow one another, each in its own <tool_call>.<|im_end|>
<|im_start|>user
Paris & Rome?<|im_end|>
<|im_start|>assistant
Let me look.
<tool_call>
{"name": "get_weather", "arguments": {"city": "Zürich"}}
</tool_call>
<tool_call>
{"name": "clock", "arguments": {}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
{"sky": "clear"}
</tool_response>
<tool_response>
12:00
</tool_response><|im_end|>
<|im_start|>assistant
<tool_call>
{"name": "get_weather", "arguments": {"city": "Zürich"}}
</tool_call><|im_end|>
<|im_start|>user
<tool_response>
rain
</tool_response><|im_end|>
<|im_start|>assistant
Clear, then rain.<|im_end|>
"""
    assert render(talk, [WEATHER, CLOCK]) == expected


def test_both_forms_of_tools_and_calls_render_the_same(render: Callable[..., str]) -> None:
    wrapped_tools = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]
    assert render(ASK, wrapped_tools) == render(ASK, [WEATHER, CLOCK])
    assert render(ASK[1:], wrapped_tools).startswith("<|im_start|>system\nYou can call functions.")
    text = {"name": "get_weather", "arguments": json.dumps(CALL["arguments"], ensure_ascii=False)}
    forms = [CALL, text, {"id": "1", "type": "function", "function": text}, {"function": CALL}]
    turns = {render([*ASK, {"role": "assistant", "tool_calls": [form]}], [WEATHER]) for form in forms}
    assert len(turns) == 1


TURNS = [
    {"role": "assistant", "content": "Yes."},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "assistant", "content": "I look it up.", "tool_calls": [CALL, CALL]},
]
TALKS = [
    ASK,
    ASK[1:],
    [*ASK, TURNS[2], {"role": "tool", "content": "rain"}],
    [*ASK, TURNS[3], {"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"}],
    [*ASK, TURNS[0], {"role": "user", "content": " spaces \n"}],
]


@pytest.mark.parametrize("tools", [None, [WEATHER, CLOCK]])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("turn", TURNS)
def test_the_generation_prompt_is_a_prefix_of_the_rendered_turn(
    render: Callable[..., str], tools: Any, talk: list[dict[str, Any]], turn: dict[str, Any]
) -> None:
    prompt, whole = render(talk, tools, prompt=True), render([*talk, turn], tools)
    assert whole.startswith(prompt)
    assert prompt.startswith(render(talk, tools))
    assert whole[len(prompt) :].endswith("<|im_end|>\n")
    thought = turn["content"] or ""
    assert whole[len(prompt) :].startswith(thought)
