"""From folders to the page, Markdown and JSON: all that was measured is there, and what is damaged is named."""

from __future__ import annotations

import html.parser
import json
import re
import subprocess
import sys
from itertools import pairwise

import pytest
from click.testing import CliRunner
from markdown_it import MarkdownIt

from layerroute.cli.report import report
from layerroute.errors import ConfigError, DataError
from layerroute.report.load import load, pick_examples
from layerroute.report.render import render

SECTIONS = ["Verdict", "Quality against compute", "Blocks by step type", "Skip rate per input"]
SECTIONS += ["Difference between step types, by source", "Is it the input?", "Free-running quality", "Sensitivity"]
SECTIONS += ["Seeds", "Example steps", "Provenance"]
VOID = {"meta", "br", "path", "rect", "circle", "line"}


class Page(html.parser.HTMLParser):
    """What is on a page, and whether its elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(" ".join(data.split()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_evaluation, make_ablation):
    root = tmp_path_factory.mktemp("evidence")
    return {
        "planted": make_evaluation(root / "planted"),
        "none": make_evaluation(root / "none", "none", 1),
        "bare": make_evaluation(root / "bare", "length", full=False, paired=False),
        "grid": make_ablation(root / "grid"),
    }


@pytest.fixture(scope="module")
def whole(folders):
    return load([folders["planted"], folders["grid"]])


def test_the_page_is_whole(whole):
    text = render(whole, "html")
    page = Page(text)
    assert page.texts["h2"] == SECTIONS
    assert page.all("html")[0]["lang"] == "en" and len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    idents = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(idents) == len(set(idents))
    for attributes in page.all("svg"):
        named = attributes.get("aria-labelledby", "").split()
        assert attributes.get("aria-hidden") == "true" or (len(named) == 2 and set(named) <= set(idents))
    assert len(page.all("caption")) == len(page.all("table")) > 10
    assert all(attributes["href"][1:] in idents for attributes in page.all("a"))


def test_the_page_loads_nothing(whole):
    text = render(whole, "html")
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b|\bsrc=|url\(|@import|https?:", text)
    assert "default-src 'none'" in text


def test_what_was_written_is_shown_and_never_obeyed(folders, tmp_path, make_evaluation):
    folder = make_evaluation(tmp_path / "x<script>alert(1)</script>", full=False)
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    for row in rows:
        row["id"], row["text"]["target"] = "<img src=x>|`id`", "```\n</pre><script>alert(2)</script> | `x`"
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evidence = load([folder, folders["none"]])
    page = Page(render(evidence, "html"))
    assert not page.all("script") and not page.all("img")
    assert any("</pre><script>alert(2)</script>" in text for text in page.texts["pre"])
    tokens = MarkdownIt("commonmark").enable("table").parse(render(evidence, "md"))
    inner = [child for token in tokens for child in token.children or []]
    assert not [token for token in [*tokens, *inner] if token.type in ("html_block", "html_inline", "image")]
    assert sum(token.type == "fence" and "alert(2)" in token.content for token in tokens) >= 3


def test_markdown_holds_the_same(whole):
    page = Page(render(whole, "html"))
    tokens = MarkdownIt("commonmark").enable("table").parse(render(whole, "md"))
    headings = [after.content for token, after in pairwise(tokens) if token.tag == "h2" and token.nesting == 1]
    assert headings == SECTIONS
    assert sum(token.type == "table_open" for token in tokens) == len(page.all("table"))
    cells = sum(token.type in ("th_open", "td_open") for token in tokens)
    assert cells == len(page.all("th")) + len(page.all("td"))


def test_json_is_verdict_and_summaries(whole, folders):
    content = json.loads(render(whole, "json"))
    assert content["format_version"] == 1
    (evaluation,) = content["evaluations"]
    assert evaluation["name"] == "planted" and evaluation["findings"][0]["status"] == "yes"
    assert evaluation["summary"] == json.loads((folders["planted"] / "summary.json").read_text())
    assert content["ablation"]["findings"][0]["key"] == "holds_over_seeds"
    assert content["ablation"]["ablation"] == json.loads((folders["grid"] / "ablation.json").read_text())


def test_figures_are_those_of_the_summary(whole):
    summary = whole.evaluations[0].summary
    text = render(whole, "md")
    effect = summary["differential"]["paired"]
    row = next(line for line in text.splitlines() if line.startswith("| all paired sources"))
    low, high = effect["ci95"]
    assert f"| +{effect['mean']:.1f} | {low:.1f} to {high:.1f} |" in row
    routed = next(line for line in text.splitlines() if line.startswith("| routed |") and "%" in line)
    arm = summary["baselines"]["routed"]
    assert f"| {100 * arm['flops']['all']:.1f}% | {arm['perplexity']['all']:.2f} |" in routed
    for name, part in summary["quality"]["gsm8k"]["arms"].items():
        assert f"{100 * part['accuracy']:.1f}% ({100 * part['ci95'][0]:.1f}%" in text, name


def test_several_evaluations_stand_side_by_side(folders):
    evidence = load([folders["planted"], folders["none"]])
    page = Page(render(evidence, "html"))
    assert page.texts["h3"].count("planted") == page.texts["h3"].count("none") == 9  # the verdict and eight sections
    lines = render(evidence, "md").splitlines()
    assert [line.split(" | ")[:2] for line in lines if line.startswith(("| planted |", "| none |"))] == [
        ["| planted", "yes"],
        ["| none", "no"],
    ]


def test_names_tell_folders_apart(tmp_path, make_evaluation):
    folders = [make_evaluation(tmp_path / f"seed-{i}" / "evaluation", full=False, groups=4) for i in (1, 2)]
    assert [each.name for each in load(folders).evaluations] == ["seed-1/evaluation", "seed-2/evaluation"]
    assert len({each.name for each in load([folders[0], folders[0]]).evaluations}) == 2


def test_what_is_missing_names_its_command(folders):
    text = render(load([folders["bare"]]), "md")
    for option in ("--baselines --calibration DATA", "--generate 100", "--sensitivity", "--seeds 5"):
        assert option in text
    alone = render(load([folders["grid"]]), "html")
    assert Page(alone).texts["h2"] == ["Verdict", "Sensitivity", "Seeds", "Provenance"]


@pytest.mark.parametrize("kind", ["planted", "static"])
def test_any_number_of_groups_gives_a_page(tmp_path, make_evaluation, kind):
    """One group, no pairs, types that are absent: a report all the same."""
    for groups in (1, 2, 12):
        evidence = load([make_evaluation(tmp_path / f"{groups}", kind, groups=groups, full=False, paired=groups > 1)])
        Page(render(evidence, "html"))
        assert not re.search(r"\b(nan|None|inf)\b", render(evidence, "md"))


def test_warnings_come_before_the_verdict(tmp_path, make_evaluation, provenance):
    seen = provenance()
    seen["training"]["overlap"] = ["fireact.jsonl.gz"]
    text = render(load([make_evaluation(tmp_path / "seen", full=False, provenance=seen)]), "html")
    assert 0 < text.index("TRAINED ON DATA OF THIS NAME") < text.index("Does it route by step type?")


def test_examples_are_typical_most_and_least():
    rows = [
        {"id": str(i), "step_type": "planning", "skip_rate": rate, "route": "1"}
        for i, rate in enumerate([10, 20, 20, 20, 30, 30])
    ]
    picked = pick_examples(rows, {"planning": 21.0}, seed=0)
    assert [(row["role"], row["skip_rate"]) for row in picked] == [
        ("typical", 20),
        ("skips most", 30),
        ("skips least", 10),
    ]
    assert pick_examples(rows, {"planning": 21.0}, seed=0) == picked
    assert len({pick_examples(rows, {"planning": 21.0}, seed=seed)[0]["id"] for seed in range(20)}) == 3
    assert [row["role"] for row in pick_examples(rows[1:4], {"planning": 20.0}, seed=0)] == ["typical"]


def test_samples_are_read_as_a_stream():
    """A handful is kept of a hundred thousand."""
    made = ({"id": str(i), "step_type": "answer", "skip_rate": i % 7, "route": "1"} for i in range(100_000))
    assert len(pick_examples(made, {"answer": 3.0}, seed=0)) == 3


def broken(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("summary.json", "{\"format_version\": 1,", r"summary\.json: not JSON, probably cut off.*write it again with"),
        ("summary.json", "[]", r"summary\.json: must hold one JSON object"),
        ("summary.json", '{"format_version": 7}', r"summary\.json: format_version 7 is not known here, only 1"),
        ("summary.json", '{"rows": {}}', r"summary\.json: format_version None"),
        ("summary.json", '{"format_version": 1, "rows": {}}', r"summary\.json: groups, skip_rate, .* missing; write"),
        ("samples.jsonl", '{"id": "a"', r"samples\.jsonl:1: not JSON"),
        ("samples.jsonl", '{"id": "a"}\n', r"samples\.jsonl:1: step_type, route, skip_rate missing"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, make_evaluation, name, damage, message):
    folder = make_evaluation(tmp_path / "damaged", full=False, groups=4)
    (folder / name).write_text(damage)
    with pytest.raises(DataError, match=message):
        load([folder])


def test_what_is_not_there_is_named(tmp_path, folders, make_ablation, make_evaluation):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"empty: holds neither summary\.json nor ablation\.json; `layerroute evaluate"):
        load([empty])
    with pytest.raises(DataError, match="nowhere: there is no such folder"):
        load([tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"summary\.json: is a file; give the folder"):
        load([folders["planted"] / "summary.json"])
    with pytest.raises(DataError, match=r"grid and .*other are both ablations"):
        load([folders["grid"], make_ablation(tmp_path / "other")])
    folder = make_evaluation(tmp_path / "partly", full=False, groups=4)
    (folder / "samples.jsonl").rename(folder / "moved")
    with pytest.raises(DataError, match=r"samples\.jsonl: missing; `layerroute evaluate .*` writes it"):
        load([folder])
    (folder / "moved").rename(folder / "samples.jsonl")
    (folder / "summary.json").unlink()
    with pytest.raises(DataError, match=r"holds samples\.jsonl but no summary\.json; .* it resumes"):
        load([folder])


def test_the_command_writes_a_file_or_stdout(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    done = run(report, [str(folders["planted"])], catch_exceptions=False)
    assert done.output == "report: report.html\n"
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert run(report, [str(folders["planted"]), "--format", "md"]).stdout.startswith(
        "# LayerRoute report: smollm2-135m"
    )
    written = run(report, [str(folders["planted"]), "--format", "json", "--output", "out.json"])
    assert written.stdout == "report: out.json\n" and json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    for output, message in ((tmp_path, "is a folder"), ("no/where.html", "there is no folder no")):
        with pytest.raises(ConfigError, match=message):
            run(report, [str(folders["planted"]), "--output", str(output)], catch_exceptions=False)


def test_no_model_code_is_imported(folders, tmp_path):
    script = (
        "import sys; from layerroute.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "heavy = ('torch', 'transformers', 'scipy', 'layerroute.model', 'layerroute.runtime', 'layerroute.training')\n"
        "print(*[name for name in sys.modules if name.startswith(heavy)])"
    )
    arguments = ["report", str(folders["planted"]), str(folders["grid"]), "--output", str(tmp_path / "report.html")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout == f"report: {tmp_path / 'report.html'}\n\n"
