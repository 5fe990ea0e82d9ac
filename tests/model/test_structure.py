"""Families are found by structure; anything else is refused with what was looked for."""

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from layerroute import get_routed_model
from layerroute.errors import BackboneError
from layerroute.model.structure import FAMILIES, find_structure


def test_every_family_is_found(family, make_backbone):
    backbone = make_backbone(family)
    structure = find_structure(backbone)
    assert family in FAMILIES
    assert len(structure.blocks) == 4
    assert structure.projections == (
        ("qkv_proj", "o_proj") if family == "phi3" else ("q_proj", "k_proj", "v_proj", "o_proj")
    )


def tiny_gpt2():
    config = AutoConfig.for_model("gpt2", vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return AutoModelForCausalLM.from_config(config)


def tiny_mamba():
    config = AutoConfig.for_model("mamba", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)
    return AutoModelForCausalLM.from_config(config)


def tiny_t5():
    config = AutoConfig.for_model("t5", vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    return AutoModel.from_config(config)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_mamba, tiny_t5, lambda: torch.nn.Linear(2, 2)])
def test_anything_else_is_refused(build):
    with pytest.raises(BackboneError, match=r"cannot be routed: .*Looked for .*self_attn.*Families that work: llama"):
        get_routed_model(build())
