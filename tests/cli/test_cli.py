"""The command line: one JSON object or readable text on stdout, one clear line and status 2 for a user's mistake."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from layerroute.data.builtin import builtin_steps

TOOLS = [{"name": "get_weather", "description": "", "parameters": {"type": "object", "properties": {}}}]


def test_train_info_generate(run, train_args, tmp_path):
    trained = run(*train_args, "--json")
    assert trained.status == 0, trained.stderr
    assert json.loads(trained.stdout)["updates"] == 2
    assert "train rows" in trained.stderr

    facts = json.loads(run("info", "--adapter", tmp_path / "out", "--json").stdout)
    assert facts["blocks"] == 5 and facts["routable"] == [2, 3]
    assert facts["parameters"]["router"] == 2 * 33
    assert facts["recipe"]["training"]["steps"] == 2
    assert len(facts["data"]["sources"]["builtin:24"]) == 64

    generated = run("generate", "--adapter", tmp_path / "out", "--prompt", "Hi", "--max-new-tokens", 4, "--json")
    result = json.loads(generated.stdout)
    assert result["new_tokens"] <= 4 and len(result["route"]) == 5


def test_several_files_after_one_data_option(run, train_args, tmp_path):
    where = train_args.index("builtin:24")
    outcome = run(*train_args[: where + 1], "builtin:12", *train_args[where + 1 :])
    assert outcome.status == 0, outcome.stderr
    facts = json.loads(run("info", "--adapter", tmp_path / "out", "--json").stdout)
    assert list(facts["data"]["sources"]) == ["builtin:24", "builtin:12"]


def test_generate_writes_the_text_to_stdout_and_the_route_to_stderr(run, adapter, tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "Weather?"}]))
    common = ("generate", "--adapter", adapter, "--tools", tmp_path / "tools.json", "--max-new-tokens", 5)
    outcome = run(*common, "--messages", tmp_path / "chat.json")
    assert outcome.status == 0
    assert "route ██··█  40% of blocks skipped" in outcome.stderr
    result = json.loads(run(*common, "--prompt", "Weather?", "--json").stdout)
    assert result["text"] == outcome.stdout.removesuffix("\n")
    assert result["route"] == [True, True, False, False, True] and result["skip_rate"] == pytest.approx(0.4)
    assert result["flops"]["prefill"] < result["backbone_flops"]["prefill"]


def test_sampling_is_seeded(run, adapter):
    common = ("generate", "--adapter", adapter, "--prompt", "Hi", "--max-new-tokens", 8, "--temperature", 5)
    first, again, other = (run(*common, "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other


def test_calibrate_then_generate_under_a_budget(run, adapter, tmp_path):
    """The adapter closes blocks 2 and 3 on any input; the dial opens them, and closes block 1 as well."""
    mine = shutil.copytree(adapter, tmp_path / "mine")
    calibrate = ("calibrate", "--adapter", mine, "--data", "builtin:24", "--rows", 12, "--max-length", 2048)
    outcome = run(*calibrate)
    assert outcome.status == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].startswith("measured on ") and lines[-1] == f"calibration: {mine / 'calibration.json'}"
    assert lines[1].split()[:4] == ["skip", "budget", "threshold", "all"]

    def route(budget):
        return json.loads(run("generate", "--adapter", mine, *request, "--skip-budget", budget).stdout)["route"]

    request = ("--prompt", "Hi", "--max-new-tokens", 3, "--json")
    assert route("0") == [True] * 5
    assert route("0.4") == route("answer=0.4") == [True, True, False, False, True]
    assert route("0.6") == [True, False, False, False, True]


def test_calibrate_prints_one_object_and_writes_where_it_is_told(run, adapter, tmp_path):
    calibrate = ("calibrate", "--adapter", adapter, "--data", "builtin:24", "builtin:12", "--max-length", 2048)
    result = json.loads(run(*calibrate, "--output", tmp_path / "new" / "folder", "--json").stdout)
    written = json.loads((tmp_path / "new" / "folder" / "calibration.json").read_text())
    assert result["output"] == str(tmp_path / "new" / "folder" / "calibration.json")
    assert list(written["data"]) == ["builtin:24", "builtin:12"] and written["rows"] == result["rows"]
    assert result["largest_skip_budget"] == 0.6 and result["checks"][0]["skip_budget"] == 0.1
    assert not (adapter / "calibration.json").exists()


def test_a_stale_calibration_is_refused_and_made_anew(run, adapter, tmp_path):
    mine = shutil.copytree(adapter, tmp_path / "mine")
    calibrate = ("calibrate", "--adapter", mine, "--data", "builtin:12", "--max-length", 2048)
    assert run(*calibrate).status == 0
    path = mine / "calibration.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["routers"], "0" * 64))
    refused = run("generate", "--adapter", mine, "--prompt", "Hi", "--skip-budget", "0.4")
    assert refused.status == 2 and "belongs to other routers" in refused.stderr
    assert run(*calibrate).status == 0
    assert run("generate", "--adapter", mine, "--prompt", "Hi", "--max-new-tokens", 2).status == 0


def test_demo_shows_both_routes_beside_the_backbone(run, adapter):
    outcome = run("demo", "--adapter", adapter, "--max-new-tokens", 3)
    assert outcome.status == 0, outcome.stderr
    assert outcome.stdout.count("██··█  40% of 5 blocks skipped: 2, 3") == 2
    assert "TOOL CALL" in outcome.stdout and "PLANNING" in outcome.stdout and "tokens/s" in outcome.stdout
    figures = json.loads(run("demo", "--adapter", adapter, "--max-new-tokens", 3, "--json").stdout)
    assert figures["planning"]["flops_share"]["total"] < 1 < figures["planning"]["tokens_per_second"]


def test_info_counts_the_published_system_on_a_config_alone(run, tmp_path):
    """Invariant 2: 24 * 897 router and 1,081,344 LoRA parameters beside 494M."""
    shape = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    facts = json.loads(run("info", "--model", tmp_path, "--recipe", "paper", "--json").stdout)
    assert facts["parameters"]["router"] == 21_528
    assert facts["parameters"]["lora"] == 1_081_344
    assert facts["parameters"]["backbone"] == 494_032_768
    assert "lora parameters: 1,081,344" in run("info", "--model", tmp_path, "--recipe", "paper").stdout


def test_info_lists_the_keys_of_a_recipe(run):
    assert "recipe: objective.budgets.tool_call = " in run("info", "--recipe", "default").stdout


GENERATE = ("generate", "--adapter", "{adapter}", "--max-new-tokens", "4")
CALIBRATE = ("calibrate", "--adapter", "{adapter}")
TRAIN = ("train", "--model", "{backbone}", "--output", "{tmp}/out")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("trian",),
            "no command 'trian' (did you mean 'train'?); commands: ablate, benchmark, benchmark-training, ",
        ),
        (("train", "--modle", "x"), "No such option '--modle'. Did you mean '--model'?"),
        ((*TRAIN,), "Missing option '--data'"),
        ((*TRAIN, "--data", "builtin", "--recipe", "papre"), "did you mean 'paper'?"),
        ((*TRAIN, "--data", "builtin", "--set", "routr_lr=1"), "(did you mean 'router_lr'?)"),
        ((*TRAIN, "--data", "builtin", "--set", "router_lr"), "expected KEY=VALUE"),
        ((*TRAIN, "--data", "builtin", "--set", "router_lr=fast"), "router_lr='fast'"),
        ((*TRAIN, "--data", "builtin", "--steps", "9", "--set", "steps=8"), "--steps and --set steps are given both"),
        ((*TRAIN, "--data", "{tmp}/none.jsonl"), "none.jsonl"),
        ((*TRAIN, "--data", "{tmp}/empty.jsonl"), "empty.jsonl"),
        ((*TRAIN, "--data", "{tmp}/bad.jsonl"), "bad.jsonl:2: "),
        ((*TRAIN, "--data", "builtin", "--resume"), "holds no complete checkpoint"),
        (("train", "--model", "{tmp}", "--data", "builtin", "--output", "{tmp}/out"), "no config.json"),
        (("info",), "give --adapter, --model or --recipe"),
        (("info", "--adapter", "smollm2-135n"), "adapter 'smollm2-135n'"),
        (("info", "--adapter", "{tmp}"), "adapter_config.json"),
        (("info", "--adapter", "{adapter}", "--recipe", "paper"), "--adapter and --recipe are given both"),
        (CALIBRATE, "Missing option '--data'"),
        (("calibrate", "--adapter", "smollm2-135n", "--data", "builtin"), "(did you mean 'smollm2-135m'?)"),
        ((*CALIBRATE, "--data", "{tmp}/none.jsonl"), "none.jsonl"),
        ((*CALIBRATE, "--data", "builtin:12", "--max-length", "4096"), "reads at most 2048 tokens"),
        ((*CALIBRATE, "--data", "builtin:12", "--max-length", "9"), "steps fits into 9 tokens"),
        ((*CALIBRATE, "--data", "builtin:12", "--rows", "1"), "'--rows'"),
        (
            (*CALIBRATE, "--data", "builtin:12", "--max-length", "2048", "--output", "{tmp}/role.json"),
            "could not write",
        ),
        ((*GENERATE, "--prompt", "x", "--skip-budget", "lots"), "--skip-budget 'lots': expected a share"),
        ((*GENERATE, "--prompt", "x", "--skip-budget", "answer="), "--skip-budget 'answer=': expected a share"),
        ((*GENERATE, "--prompt", "x", "--skip-budget", "0.3"), "run `layerroute calibrate` on it"),
        (GENERATE, "give either --prompt TEXT or --messages FILE"),
        ((*GENERATE, "--prompt", "x", "--messages", "y"), "give either --prompt TEXT or --messages FILE"),
        ((*GENERATE, "--messages", "{tmp}/bad.json"), "bad.json: not valid JSON"),
        ((*GENERATE, "--messages", "{tmp}/none.json"), "none.json: cannot be read"),
        ((*GENERATE, "--messages", "{tmp}/role.json"), "'role' is 'wizard'"),
        (
            (*GENERATE, "--prompt", "x", "--tools", "{tmp}/schema.json"),
            "tool 'f': 'parameters' is no valid JSON Schema",
        ),
        ((*GENERATE, "--prompt", "long " * 500), "the backbone's context holds 2048"),
        ((*GENERATE, "--prompt", "x", "--device", "toaster"), "--device toaster"),
        ((*GENERATE, "--prompt", "x", "--max-new-tokens", "0"), "'--max-new-tokens'"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(args, message, run, adapter, backbone, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text(json.dumps(builtin_steps(1, 0)[0].to_row()) + "\n{]\n")
    (tmp_path / "bad.json").write_text("[")
    (tmp_path / "role.json").write_text('[{"role": "wizard", "content": "x"}]')
    (tmp_path / "schema.json").write_text('[{"name": "f", "parameters": {"type": "thing"}}]')
    places = {"{adapter}": str(adapter), "{backbone}": str(backbone), "{tmp}": str(tmp_path)}
    for place, path in places.items():
        args = [arg.replace(place, path) for arg in args]
    outcome = run(*args)
    assert outcome.status == 2 and outcome.stdout == ""
    last = outcome.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("command", ["benchmark-training", "calibrate", "demo", "generate", "info", "train"])
def test_help_shows_examples(command, run):
    outcome = run(command, "--help")
    assert outcome.status == 0 and f"layerroute {command} -" in outcome.stdout


def test_help_and_mistakes_do_not_wait_for_torch():
    code = (
        "import sys\nfrom layerroute.cli import main\n"
        "for args in (['--help'], ['train', '--help'], ['train', '--data', 'builtin', '--modle', 'x']):\n"
        "    try: main(args)\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_runs_as_a_module():
    outcome = subprocess.run([sys.executable, "-m", "layerroute", "--version"], capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stdout.startswith("layerroute, version ")


def test_control_c_exits_130_and_resume_goes_on(train_args, run, tmp_path):
    """The real signal to a real process; the message names the checkpoint, and --resume finishes the run."""
    where = train_args.index("--steps") + 1
    train_args[where] = 12
    command = [sys.executable, "-m", "layerroute", *map(str, train_args), "--set", "log_every=1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "out" / "train_log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and stdout == "" and "Traceback" not in stderr
    assert stderr.splitlines()[-1].startswith("error: interrupted after update ")
    outcome = run(*train_args, "--set", "log_every=1", "--resume", "--json")
    assert outcome.status == 0 and json.loads(outcome.stdout)["updates"] == 12
