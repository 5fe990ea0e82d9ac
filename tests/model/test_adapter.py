"""The adapter folder: identical after a round trip, refused when damaged or on another backbone, never half-written."""

import json
import os

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import layerroute.model.adapter as adapter_module
from layerroute import RoutedModel, RouterConfig
from layerroute.data.steps import digest
from layerroute.errors import AdapterError

FILES = ["adapter_config.json", "adapter_model.safetensors", "router_config.json", "router_model.safetensors"]


def test_round_trip_is_exact(family, make_routed, make_backbone, tokens, tmp_path):
    """Invariant 7: identical logits and routes."""
    model = make_routed(family)
    model.save_pretrained(tmp_path / "adapter", recipe={"name": "test"}, data={"builtin:4": "00ff"})
    loaded = RoutedModel.from_pretrained(tmp_path / "adapter", make_backbone(family))
    ids = tokens(4, 12)
    mine, theirs = model(ids), loaded(ids)
    assert torch.equal(mine.logits, theirs.logits)
    assert torch.equal(mine.routes, theirs.routes) and torch.equal(mine.gate_probs, theirs.gate_probs)
    assert loaded.router_config == model.router_config
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == sorted([*FILES, "README.md"])
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "builtin:4" in card and "00ff" in card


def test_a_trainable_load_trains_the_same_set(make_routed, make_backbone, tmp_path):
    make_routed().save_pretrained(tmp_path)
    loaded = RoutedModel.from_pretrained(tmp_path, make_backbone(), is_trainable=True)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"routers.weight", "routers.bias"}
    assert len(trained) == 2 + 4 * 4 * 2


def test_plain_peft_reads_the_lora_part(make_routed, make_backbone, tokens, tmp_path):
    model = make_routed()
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(make_backbone(), str(tmp_path)).eval()
    ids = tokens(2, 9)
    with model.disable_routing():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def test_another_backbone_is_refused_with_both_names(make_routed, make_backbone, tmp_path):
    """Invariant 7."""
    model = make_routed()
    model.backbone.name_or_path = "the/first"
    model.save_pretrained(tmp_path)
    other = make_backbone(seed=7)
    other.name_or_path = "the/second"
    with pytest.raises(AdapterError, match=r"'the/first' \(fingerprint .*'the/second' \(fingerprint"):
        RoutedModel.from_pretrained(tmp_path, other)
    deeper = make_backbone(blocks=5)
    with pytest.raises(AdapterError, match="fingerprint"):
        RoutedModel.from_pretrained(tmp_path, deeper)


def test_fingerprint_ignores_dtype_and_adapters_but_no_weight(make_routed, make_backbone):
    expected = adapter_module.fingerprint(make_backbone())
    assert adapter_module.fingerprint(make_backbone().bfloat16()) == expected
    assert adapter_module.fingerprint(make_routed().backbone) == expected
    changed = make_backbone()
    with torch.no_grad():
        changed.get_decoder().layers[3].mlp.up_proj.weight.mul_(1.02)
    assert adapter_module.fingerprint(changed) != expected


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(name, make_routed, make_backbone, tmp_path):
    make_routed().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(AdapterError, match=f"not a complete adapter folder: {name} missing"):
        RoutedModel.from_pretrained(tmp_path, make_backbone())


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_are_named(name, make_routed, make_backbone, tmp_path):
    make_routed().save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdapterError, match=name):
        RoutedModel.from_pretrained(tmp_path, make_backbone())


def test_another_format_version_is_refused(make_routed, make_backbone, tmp_path):
    make_routed().save_pretrained(tmp_path)
    path = tmp_path / "router_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(AdapterError, match=r"format 99.*reads format 1"):
        RoutedModel.from_pretrained(tmp_path, make_backbone())


def test_routers_of_the_wrong_width_are_refused(make_routed, make_backbone, tmp_path):
    make_routed().save_pretrained(tmp_path)
    state = load_file(tmp_path / "router_model.safetensors")
    save_file(
        {"weight": state["weight"][:, :-1].contiguous(), "bias": state["bias"]}, tmp_path / "router_model.safetensors"
    )
    path = tmp_path / "router_config.json"
    config = json.loads(path.read_text())
    config["files"]["router_model.safetensors"] = digest(tmp_path / "router_model.safetensors")
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"(?s)cannot be loaded: .*weight"):
        RoutedModel.from_pretrained(tmp_path, make_backbone())


def test_unknown_adapter_lists_the_built_in_ones():
    with pytest.raises(AdapterError, match="neither a folder nor a built-in adapter"):
        RoutedModel.from_pretrained("no-such-adapter")


@pytest.mark.parametrize("stage", ["weights", "config"])
def test_a_full_disk_leaves_the_old_adapter(stage, make_routed, make_backbone, tokens, tmp_path, monkeypatch):
    """The write that fails is the operating system's: a file size limit stands in for the full disk."""
    import resource
    import signal

    model = make_routed()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        model.routers.bias.add_(1)
    limit = 2000 if stage == "weights" else max(len(before[name]) for name in FILES if "safetensors" in name) + 100
    recipe = {"note": "x" * 200_000}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(AdapterError, match=r"could not save .* what stood there stays"):
            model.save_pretrained(tmp_path, recipe=recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    RoutedModel.from_pretrained(tmp_path, make_backbone())(tokens(1, 4))


def test_an_interrupted_rename_is_detected(make_routed, make_backbone, tmp_path, monkeypatch):
    """A kill between two renames mixes old and new files; the digests tell."""
    model = make_routed()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.routers.bias.add_(1)
    real, done = os.replace, []

    def replace_then_die(source, target):
        real(source, target)
        done.append(target)
        if str(target).endswith("router_model.safetensors"):
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_then_die)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="truncated or was changed"):
        RoutedModel.from_pretrained(tmp_path, make_backbone())


def test_no_pickle(make_routed, tmp_path):
    make_routed(config=RouterConfig(protect_first=1, protect_last=1)).save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".md"}


def test_a_readme_that_is_not_ours_is_kept(make_routed, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    make_routed().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
