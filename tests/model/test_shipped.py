"""The adapters inside the package: whole, described, and within what the documentation asks of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from layerroute.model.adapter import BUILTIN, read_config
from layerroute.model.calibration import read_calibration

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(folder for folder in BUILTIN.iterdir() if folder.is_dir())


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_an_adapter_ships_with_card_report_and_command(folder):
    config, card = read_config(folder), (folder / "README.md").read_text(encoding="utf-8")
    assert config["backbone"]["name"] == folder.name and read_calibration(folder) is not None
    assert f"layerroute train --model {folder.name}" in card and "## Licence and credits" in card
    assert all(f"- `{name}` {digest}" in card for name, digest in config["data"]["sources"].items())
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert all(digest in report for digest in config["files"].values())


def test_documented_budgets_can_be_served():
    largest = min(read_calibration(folder).budgets[-1] for folder in SHIPPED)
    """The log apart, which tells of what was refused."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("[!l]*.md"), *(ROOT / "src" / "layerroute" / "cli").glob("*.py")]
    for page in pages:
        for budget in re.findall(r"skip[-_]budget[= ](?:tool_call=)?([\d.]*\d)", page.read_text(encoding="utf-8")):
            assert float(budget) <= largest, f"{page.name}: {budget}"
