"""docs/guide.md, command by command, on a small log and a tiny backbone: what it tells people to type works."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
QUICK = " ".join(f"--set {change}" for change in ("batch_size=2", "validation_rows=3", "length_window=1"))
SMALLER = {
    "--steps 200": f"--steps 2 {QUICK}",
    "--output evaluation": "--output evaluation --limit 12 --max-new-tokens 4",
    "--generate 50": "--generate 1",
    "--max-new-tokens 64": "--max-new-tokens 4",
    "max_new_tokens=64": "max_new_tokens=4",
    "1024": "2048",  # a token per byte
}
"""What the guide says, and what is run in its place; the backbone's name is replaced by the tiny one's folder."""

CITIES = ("Lima", "Oslo", "Cairo", "Quito", "Delhi", "Turin", "Lagos", "Perth")
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "", "parameters": PARAMETERS}}]


def conversation(rng: random.Random) -> dict[str, Any]:
    """A thought with a call, its answer, and a call without a thought, as an agent's last request has them."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": f"You serve user {rng.randrange(10**6)}."}]
    for thought in rng.sample(("I should look that up first.", None), 2):
        city = rng.choice(CITIES)
        function = {"name": "weather", "arguments": json.dumps({"city": city})}
        call = {"id": f"c{len(messages)}", "type": "function", "function": function}
        messages += [
            {"role": "user", "content": f"How is it in {city}?" + " Please." * rng.randrange(3)},
            {"role": "assistant", "content": thought, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": str(rng.randrange(24))},
            {"role": "assistant", "content": f"In {city} it is so."},
        ]
    return {"messages": messages, "tools": TOOLS}


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the guide takes for granted."""
    for name, count in (("train", 30), ("test", 12)):
        rng = random.Random(name)
        rows = [json.dumps(conversation(rng)) + "\n" for _ in range(count)]
        (tmp_path / f"{name}-logs.jsonl").write_text("".join(rows))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks() -> list[tuple[str, str]]:
    """The guide's fenced blocks, in order: `(language, text)`."""
    tokens = MarkdownIt().parse(GUIDE.read_text(encoding="utf-8"))
    return [(token.info, token.content) for token in tokens if token.type == "fence"]


def commands(text: str) -> list[tuple[str, str]]:
    """`(command, what it prints)` of a console block; what is not shown is ''."""
    parts = re.split(r"^\$ ", text.replace("\\\n", ""), flags=re.MULTILINE)[1:]
    return [(command, output) for command, _, output in (part.partition("\n") for part in parts)]


def test_every_command_of_the_guide_runs(run, backbone, workplace):
    def smaller(text: str) -> str:
        for said, instead in {**SMALLER, "smollm2-135m": str(backbone)}.items():
            text = text.replace(said, instead)
        return text

    for language, text in blocks():
        if language == "python":
            exec(compile(smaller(text), GUIDE.name, "exec"), {})
            continue
        assert language == "console"
        for command, shown in commands(text):
            program, *args = shlex.split(smaller(command))
            outcome = run(*args)
            assert program == "layerroute" and outcome.status == 0, f"{command}\n{outcome.stderr}"
            assert not shown or outcome.stdout == shown
    assert {path.name for path in workplace.iterdir()} >= {"my-adapter", "evaluation", "report.html"}
    assert (workplace / "my-adapter" / "calibration.json").exists()


def test_what_is_replaced_stands_in_the_guide():
    text = GUIDE.read_text(encoding="utf-8")
    assert [said for said in SMALLER if said not in text] == []
