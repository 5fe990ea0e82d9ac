"""A tiny backbone in a folder, and the command line run in this process."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from layerroute.cli import main

BLOCKS = 5


@dataclass
class Outcome:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """Run `layerroute ARGS`."""
    logger = logging.getLogger("layerroute")
    before = logger.handlers, logger.level, logger.propagate

    def call(*args: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    yield call
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer, make_config) -> Path:
    """One token per byte, ChatML marks, no chat template of its own."""
    folder = tmp_path_factory.mktemp("backbone")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = make_config(
        "llama", BLOCKS, vocab_size=300, max_position_embeddings=2048, initializer_range=0.02, eos_token_id=eos
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def train_args(backbone: Path, tmp_path: Path) -> list[object]:
    """Two quick updates on the built-in data."""
    settings = ["batch_size=2", "gradient_accumulation=1", "max_length=2048", "validation_rows=3"]
    options = [part for setting in settings for part in ("--set", setting)]
    return ["train", "--model", backbone, "--data", "builtin:24", "--steps", 2, *options, "--output", tmp_path / "out"]


@pytest.fixture(scope="session")
def adapter(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on `backbone` that closes blocks 2 and 3 for every input."""
    from layerroute import RouterConfig, get_routed_model, load_backbone

    model = get_routed_model(load_backbone(str(backbone))[0], RouterConfig(protect_first=1))
    with torch.no_grad():
        model.routers.bias[1:3] = -1.0
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def press_control_c() -> Iterator[Callable[[str, str], AbstractContextManager[None]]]:
    """A context in which Ctrl-C is pressed once a logger says a text."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    @contextmanager
    def pressing(name: str, text: str) -> Iterator[None]:
        def press(record: logging.LogRecord) -> bool:
            if text in record.getMessage():
                signal.raise_signal(signal.SIGINT)
            return True

        logger = logging.getLogger(name)
        logger.addFilter(press)
        try:
            yield
        finally:
            logger.removeFilter(press)

    yield pressing
    signal.signal(signal.SIGINT, before)
