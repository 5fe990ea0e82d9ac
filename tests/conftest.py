"""Tiny random models of every supported family, and reference models made from them by plain means."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib.resources import files

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from layerroute import RoutedModel, RouterConfig, get_routed_model

torch.set_num_threads(1)

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "olmo2", "granite"]
VOCAB = 97


def tiny_config(family: str, blocks: int = 4, **changes):
    special = {
        "qwen3": {"head_dim": 8},
        # a window shorter than the tests' sequences, and one full-attention block among sliding ones
        "gemma3_text": {
            "head_dim": 8,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
            "layer_types": ["full_attention" if i == 2 else "sliding_attention" for i in range(blocks)],
        },
        "mistral": {"head_dim": 8, "sliding_window": 8},
        "phi3": {"original_max_position_embeddings": 128},
    }
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        # large enough that every block matters to the greedy token
        initializer_range=0.3,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **special.get(family, {}),
    )
    return AutoConfig.for_model(family, **{**settings, **changes})


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for each ChatML mark, without a chat template: lengths are easy to reason about."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def build_backbone(family: str = "llama", blocks: int = 4, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, blocks), attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # tests count tokens
    model.generation_config.max_length = None
    return model.eval()


def build_routed(
    family: str = "llama", config: RouterConfig | None = None, blocks: int = 4, seed: int = 0, trained: bool = True
) -> RoutedModel:
    """A routed model; `trained` gives routers and LoRA random weights, so that routes differ and LoRA matters."""
    model = get_routed_model(
        build_backbone(family, blocks, seed), config or RouterConfig(protect_first=1, protect_last=1, window=4)
    )
    if trained:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            width = model.routers.weight.shape[1]
            model.routers.weight.copy_(torch.randn(model.routers.weight.shape, generator=generator) * 2 / width**0.5)
            model.routers.bias.zero_()
            for name, parameter in model.peft_model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def without_blocks(model: RoutedModel, route: torch.Tensor) -> PreTrainedModel:
    """The independent reference: plain transformers, LoRA merged by PEFT, the closed blocks deleted from the list."""
    backbone = copy.deepcopy(model).peft_model.merge_and_unload()
    decoder = backbone.get_decoder()
    kept = [i for i, is_open in enumerate(route.tolist()) if is_open]
    decoder.layers = nn.ModuleList([decoder.layers[i] for i in kept])
    for position, block in enumerate(decoder.layers):
        block.self_attn.layer_idx = position
    backbone.config.num_hidden_layers = len(kept)
    if getattr(backbone.config, "layer_types", None) is not None:
        backbone.config.layer_types = [backbone.config.layer_types[i] for i in kept]
    return backbone.eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[], PreTrainedTokenizerFast]:
    return build_byte_tokenizer


@pytest.fixture(scope="session")
def hermes_tokenizer() -> PreTrainedTokenizerFast:
    """The same, with the package's own chat template."""
    tokenizer = build_byte_tokenizer()
    tokenizer.chat_template = (files("layerroute") / "templates" / "hermes.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="session")
def make_config() -> Callable[..., PreTrainedConfig]:
    return tiny_config


@pytest.fixture
def make_backbone() -> Callable[..., PreTrainedModel]:
    return build_backbone


@pytest.fixture
def make_routed() -> Callable[..., RoutedModel]:
    return build_routed


@pytest.fixture
def delete_blocks() -> Callable[..., PreTrainedModel]:
    return without_blocks


@pytest.fixture
def tokens() -> Callable[..., torch.Tensor]:
    """int64 `[batch, length]` without padding ids, seeded."""

    def make(batch: int, length: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def pad() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Rows of different lengths to one batch: (input_ids, attention_mask), padded on the given side."""

    def make(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            where = slice(longest - len(row), None) if side == "left" else slice(len(row))
            ids[i, where], mask[i, where] = row, 1
        return ids, mask

    return make
