"""LoRA folded into the weights: the same results up to rounding, and the same bits once it is taken out."""

import copy

import pytest
import torch

from layerroute import RoutedModel
from layerroute.errors import ConfigError

GREEDY = {"do_sample": False, "max_new_tokens": 6}
ROUTES = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)


def test_merged_results_are_those_of_peft(family, make_routed, delete_blocks, tokens):
    model = make_routed(family)
    ids = tokens(3, 12)
    before = model(ids, routes=ROUTES).logits
    plain = delete_blocks(model, torch.ones(4, dtype=torch.bool))  # merged by PEFT
    model.merge_adapter()
    assert model.merged
    torch.testing.assert_close(model(ids, routes=ROUTES).logits, before, rtol=1e-4, atol=1e-4)
    with model.disable_routing():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.route(ids), make_routed(family).route(ids))


def test_merged_generation(family, make_routed, tokens):
    model = make_routed(family)
    before = model.generate(tokens(3, 9), routes=ROUTES, **GREEDY)
    model.merge_adapter()
    assert torch.equal(model.generate(tokens(3, 9), routes=ROUTES, **GREEDY), before)


def test_bits_come_back(family, make_routed, make_backbone, tokens):
    """Design D7 holds while merged: the untouched backbone is reachable; and unmerging leaves nothing behind."""
    model = make_routed(family)
    ids = tokens(2, 12)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(ids, routes=ROUTES[:2]).logits
    model.merge_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, make_backbone(family)(ids).logits)
        assert torch.equal(
            model.generate(ids, **GREEDY),
            make_backbone(family).generate(ids, attention_mask=torch.ones_like(ids), **GREEDY),
        )
    assert model.merged and not torch.equal(model(ids, routes=ROUTES[:2]).logits, before)
    model.unmerge_adapter()
    model.unmerge_adapter()
    after = model.state_dict()
    assert weights.keys() == after.keys() and all(torch.equal(weights[name], after[name]) for name in weights)
    assert torch.equal(model(ids, routes=ROUTES[:2]).logits, before)


def test_merged_blocks_hold_plain_linear_layers(make_routed):
    """Which is why merging costs nothing per call."""
    model = make_routed()
    model.merge_adapter()
    kinds = {type(layer) for block in model.structure.blocks for layer in block.self_attn.children()}
    assert kinds == {torch.nn.Linear}
    with model.disable_adapter():
        assert torch.nn.Linear not in {type(layer) for layer in model.structure.blocks[0].self_attn.children()}


def test_a_merged_model_is_saved_and_counted_as_ever(make_routed, make_backbone, tokens, tmp_path, capsys):
    model = make_routed()
    ids = tokens(2, 9)
    before = model(ids).logits
    model.print_trainable_parameters()
    model.merge_adapter()
    assert len(list(model.lora_parameters())) == 4 * 2 * 4
    model.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    model.save_pretrained(tmp_path)
    assert torch.equal(RoutedModel.from_pretrained(tmp_path, make_backbone())(ids).logits, before)


def test_training_needs_lora_beside_the_weights(make_routed, tokens):
    model = make_routed()
    model.merge_adapter()
    with pytest.raises(ConfigError, match=r"call unmerge_adapter\(\)"):
        model.train()(tokens(1, 5))
    model.unmerge_adapter()
    model(tokens(1, 5), labels=torch.tensor([[-100, -100, 3, 4, 5]])).loss.backward()


def test_a_merged_model_can_be_copied_and_moved(make_routed, tokens):
    model = make_routed()
    before = model(tokens(1, 7)).logits
    model.merge_adapter()
    other = copy.deepcopy(model).to(torch.float64)
    assert other(tokens(1, 7)).logits.dtype == torch.float64
    model.unmerge_adapter()
    other.unmerge_adapter()
    assert torch.equal(model(tokens(1, 7)).logits, before)
    torch.testing.assert_close(other(tokens(1, 7)).logits.float(), before, rtol=1e-4, atol=1e-4)
