"""The design's invariants on the routed forward (numbered as in docs/invariants.md), over every family."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from layerroute import RoutedModel, RouterConfig, get_routed_model
from layerroute.errors import BackboneError, ConfigError, GenerationError

READS = [
    {"position": position, "context": context, "pooling": pooling}
    for position, context, pooling in itertools.product(
        ["early", "block"], ["full", "window"], ["mean", "tail", "last", "joint"]
    )
    if context == "full" or (position == "early" and pooling != "joint")
]
each_read = pytest.mark.parametrize("read", READS, ids=lambda read: "-".join(read.values()))


def configured(**read):
    return RouterConfig(protect_first=1, protect_last=1, window=4, **read)


def mixed_routes(batch, blocks):
    routes = torch.rand(batch, blocks, generator=torch.Generator().manual_seed(5)) > 0.4
    assert 0 < routes.sum() < routes.numel()
    return routes


def without_dropout(model):
    """Training mode, but with LoRA's dropout off, so that masked and skipping passes can be compared."""
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    return model


def test_fresh_attach_gives_the_backbones_logits(family, make_backbone, tokens):
    """Invariant 1."""
    ids = tokens(2, 12)
    expected = make_backbone(family)(ids).logits
    model = get_routed_model(make_backbone(family), configured()).eval()
    out = model(ids)
    assert out.routes.all()
    assert torch.equal(out.logits, expected)
    assert torch.equal(
        without_dropout(model)(ids, labels=torch.where(torch.arange(12) < 6, -100, ids)).logits, expected
    )


def test_trained_set_is_routers_and_lora(family, make_routed):
    """Invariant 2, the set."""
    model = make_routed(family, trained=False)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    lora = {name for name in trained if "lora_" in name}
    assert trained - lora == {"routers.weight", "routers.bias"}
    assert lora and all(".self_attn." in name for name in lora)
    fused = family == "phi3"
    assert len(lora) == 4 * 2 * (2 if fused else 4)
    assert sum(p.numel() for p in model.router_parameters()) == 2 * (32 + 1)
    assert {id(p) for p in model.lora_parameters()} == {id(p) for n, p in model.named_parameters() if "lora_" in n}


def test_counts_on_a_qwen_half_billion_shape(capsys):
    """Invariant 2, the published counts."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        backbone = AutoModelForCausalLM.from_config(config)
    model = get_routed_model(backbone, RouterConfig(position="block", pooling="mean", protect_first=0, protect_last=0))
    assert sum(p.numel() for p in model.router_parameters()) == 21_528
    assert sum(p.numel() for p in model.lora_parameters()) == 1_081_344
    model.print_trainable_parameters()
    assert "trainable params: 1,102,872" in capsys.readouterr().out


@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_equals_skipping(family, side, make_routed, tokens, pad):
    """Invariant 3: the same forced route, mixed over the rows, computed-then-gated against not called."""
    model = make_routed(family)
    rows = [tokens(1, length, seed=length)[0] for length in (14, 9, 11)]
    ids, mask = pad(rows, side)
    routes = mixed_routes(3, 4)
    skipped = model(ids, attention_mask=mask, routes=routes)
    masked = without_dropout(model)(ids, attention_mask=mask, routes=routes)
    assert torch.equal(skipped.routes, routes) and torch.equal(masked.routes, routes)
    kept = mask.bool()
    torch.testing.assert_close(masked.logits[kept], skipped.logits[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_equals_a_model_without_those_blocks(family, side, make_routed, delete_blocks, tokens, pad):
    """Invariants 3 and 5: each row of a mixed, padded batch is what plain transformers gives it alone."""
    model = make_routed(family)
    rows = [tokens(1, length, seed=length)[0] for length in (14, 9, 11)]
    ids, mask = pad(rows, side)
    routes = mixed_routes(3, 4)
    out = model(ids, attention_mask=mask, routes=routes)
    for i, row in enumerate(rows):
        alone = delete_blocks(model, routes[i])(row[None]).logits[0]
        torch.testing.assert_close(out.logits[i][mask[i].bool()], alone, rtol=1e-4, atol=1e-4)


def test_open_gates_equal_lora_only_bit_for_bit(family, make_routed, make_backbone, tokens):
    """Design D7: with every gate open the routed path is the LoRA-only path; with the adapter off, the backbone."""
    model = make_routed(family)
    ids = tokens(2, 12)
    lora_only = get_peft_model(
        make_backbone(family), LoraConfig(r=8, lora_alpha=16, target_modules=list(model.structure.projections))
    ).eval()
    own = model.peft_model.state_dict()
    lora_only.load_state_dict({name: own[name] for name in lora_only.state_dict()})
    expected = lora_only(ids).logits
    everything = torch.ones(4, dtype=torch.bool)
    assert torch.equal(model(ids, routes=everything).logits, expected)
    assert torch.equal(without_dropout(model)(ids, routes=everything).logits, expected)
    model.eval()
    with model.disable_routing():
        out = model(ids)
        assert torch.equal(out.logits, expected) and out.routes.all()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, make_backbone(family)(ids).logits)
    assert not torch.equal(expected, make_backbone(family)(ids).logits)


def test_skipped_blocks_are_never_called(family, make_routed, tokens):
    """Invariant 6, on the forward: forward hooks and the rows that reached each block's attention."""
    model = make_routed(family)
    seen = {}

    def count(index):
        def hook(block, args, output):
            seen.setdefault(index, []).append(len(args[0]))

        return hook

    for index, block in enumerate(model.structure.decoder.layers):
        block.register_forward_hook(count(index))
        block.mlp.register_forward_hook(count(index))
    routes = torch.tensor([[True, False, True, False], [True, False, False, True], [True, False, False, True]])
    model(tokens(3, 10), routes=routes)
    assert seen == {0: [3, 3], 2: [1, 1], 3: [2, 2]}


@each_read
def test_route_never_depends_on_a_later_token(family, read, make_routed, tokens):
    """Invariant 8: the future is replaced, the route and its probabilities stay; the last context token moves them."""
    model = make_routed(family, config=configured(**read))
    ids = tokens(4, 20)
    context = torch.arange(20).expand(4, 20) < 12
    future = ids.clone()
    future[:, 12:] = tokens(4, 8, seed=9)
    before, after = (model(x, context_mask=context) for x in (ids, future))
    assert torch.equal(before.routes, after.routes)
    torch.testing.assert_close(before.gate_probs, after.gate_probs, rtol=0, atol=1e-6)
    past = ids.clone()
    past[:, 11] = (past[:, 11] + 7) % 90 + 3
    assert not torch.allclose(model(past, context_mask=context).gate_probs, before.gate_probs, atol=1e-4)


@each_read
@pytest.mark.parametrize("side", ["left", "right"])
def test_training_and_inference_decide_alike(family, read, side, make_routed, tokens, pad):
    """Invariants 5 and 9: masked training over prompt and target, and `route` on the prompt alone, row by row."""
    model = make_routed(family, config=configured(**read))
    prompts = [tokens(1, length, seed=length)[0] for length in (14, 3, 9)]
    targets = [tokens(1, 5, seed=40 + i)[0] for i in range(3)]
    ids, mask = pad([torch.cat(pair) for pair in zip(prompts, targets, strict=True)], side)
    labels, _ = pad([torch.cat([torch.full_like(p, -100), t]) for p, t in zip(prompts, targets, strict=True)], side)
    labels = labels.masked_fill(mask == 0, -100)
    out = without_dropout(model)(ids, attention_mask=mask, labels=labels)
    model.eval()
    alone = torch.cat([model.route(prompt[None]) for prompt in prompts])
    assert torch.equal(out.routes, alone)
    assert torch.equal(model.route(*pad(prompts, side)), alone)
    skipping = model(ids, attention_mask=mask, labels=labels)
    assert torch.equal(skipping.routes, alone)
    torch.testing.assert_close(skipping.loss, out.loss, rtol=1e-5, atol=1e-6)


def test_routes_differ_between_inputs(make_routed, tokens):
    """The tests above compare routes, so there must be different ones to compare."""
    model = make_routed()
    assert len(model.route(tokens(16, 10)).unique(dim=0)) > 1


def test_early_route_is_one_matmul_and_stops_there(make_routed, tokens):
    model = make_routed()
    called = []
    for index, block in enumerate(model.structure.decoder.layers):
        block.register_forward_pre_hook(lambda *_, i=index: called.append(i))
    model.route(tokens(2, 10))
    assert called == [0]


def test_gradients_reach_routers_and_lora_alone(family, make_routed, tokens):
    model = without_dropout(make_routed(family))
    ids = tokens(2, 12)
    out = model(ids, labels=torch.where(torch.arange(12) < 6, -100, ids))
    (out.loss + out.gates.mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert model.routers.weight.grad.abs().sum() > 0


def test_straight_through_gradient_is_that_of_the_soft_gate(make_routed, tokens):
    """Value 0 or 1, gradient of the sigmoid: against autograd through the soft formula."""
    model = without_dropout(make_routed())
    ids = tokens(4, 12)
    out = model(ids)
    assert set(out.gates.unique().tolist()) <= {0.0, 1.0}
    hard = torch.autograd.grad(out.gates.sum(), model.routers.bias, retain_graph=True)[0]
    soft = torch.autograd.grad(out.gate_probs.sum(), model.routers.bias)[0]
    torch.testing.assert_close(hard, soft)


def test_masked_gradient_matches_the_interpolation_formula(make_routed, tokens):
    """d(loss)/d(gate) of the masked forward equals that of gate * block(x) + (1 - gate) * x, written out plainly."""
    model = without_dropout(make_routed(blocks=3))
    ids = tokens(3, 8)
    loss = model(ids).logits.square().mean()
    got = torch.autograd.grad(loss, [model.routers.weight, model.routers.bias])

    decoder = model.structure.decoder
    hidden = decoder.embed_tokens(ids)
    arguments = {"position_embeddings": decoder.rotary_emb(hidden, torch.arange(8)[None]), "attention_mask": None}
    hidden = decoder.layers[0](hidden, **arguments)
    vector = hidden[:, -4:].mean(1)
    vector = vector / vector.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    soft = torch.sigmoid(vector @ model.routers.weight.T + model.routers.bias)
    gate = ((soft > 0.5).float() + soft - soft.detach())[:, :, None]
    hidden = gate * decoder.layers[1](hidden, **arguments) + (1 - gate) * hidden
    hidden = decoder.layers[2](hidden, **arguments)
    loss = model.backbone.lm_head(decoder.norm(hidden)).square().mean()
    expected = torch.autograd.grad(loss, [model.routers.weight, model.routers.bias])
    for mine, plain in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("position", ["early", "block"])
def test_gradient_checkpointing_changes_nothing(position, make_routed, tokens):
    ids = tokens(2, 12)
    labels = torch.where(torch.arange(12) < 6, -100, ids)
    gradients = []
    for checkpointing in (False, True):
        model = without_dropout(make_routed(config=configured(position=position)))
        if checkpointing:
            model.activation_checkpointing_enable()
        out = model(ids, labels=labels)
        (out.loss + out.gates.mean()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_logit_noise_explores_in_training_only(make_routed, tokens):
    model = make_routed()
    ids = tokens(8, 10)
    quiet = model(ids)
    without_dropout(model)
    torch.manual_seed(0)
    draws = [model(ids, logit_noise=3.0) for _ in range(4)]
    assert any(not torch.equal(draw.routes, quiet.routes) for draw in draws)
    for draw in draws:
        torch.testing.assert_close(draw.gate_probs, quiet.gate_probs)


def test_deepcopy_is_independent(make_routed, tokens):
    model = make_routed()
    ids = tokens(2, 8)
    before = model(ids).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.routers.bias.fill_(-9)
    assert not twin.route(ids)[:, 1:3].any()
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        (torch.ones(5, dtype=torch.bool), r"bool of shape \(5,\); expected bool of shape \(4,\) or \(2, 4\)"),
        (torch.ones(3, 4, dtype=torch.bool), r"shape \(3, 4\)"),
        (torch.ones(4), r"float32 of shape"),
    ],
)
def test_forced_route_of_the_wrong_shape(routes, message, make_routed, tokens):
    with pytest.raises(ConfigError, match=message):
        make_routed()(tokens(2, 8), routes=routes)


def test_labels_without_a_prompt_are_refused(make_routed, tokens):
    ids = tokens(2, 8)
    with pytest.raises(ConfigError, match="context_mask"):
        make_routed()(ids, labels=ids)


def test_a_foreign_cache_is_refused(make_routed, tokens):
    from transformers import DynamicCache

    with pytest.raises(GenerationError, match="DynamicCache"):
        make_routed()(tokens(1, 4), past_key_values=DynamicCache())


def test_attaching_twice_is_refused(make_routed):
    with pytest.raises(BackboneError, match="routed already"):
        get_routed_model(make_routed().backbone)


def test_a_backbone_that_bypasses_the_seam_is_found_out(make_routed, tokens):
    """Its forward runs a block without asking for it through `layers`: the route would be reported but not obeyed."""
    model = make_routed()
    decoder = model.structure.decoder
    plain = list(decoder.layers._modules.values())
    decoder.layers.__class__ = type(
        "Bypassed", (type(decoder.layers),), {"__getitem__": lambda self, index: plain[index]}
    )
    with pytest.raises(BackboneError, match=r"did not run blocks \[0, 1, 2, 3\] through its list of layers"):
        model(tokens(1, 5), routes=torch.tensor([True, False, True, True]))


@pytest.mark.parametrize(
    "change", [{"bias": "lora_only"}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}], ids=str
)
def test_lora_that_changes_the_backbone_is_refused(change, make_backbone):
    with pytest.raises(ConfigError, match=f"lora_config.{next(iter(change))}=.* would change the backbone"):
        get_routed_model(make_backbone(), lora_config=LoraConfig(**change))


def test_the_callers_lora_config_serves_another_family(make_backbone):
    lora = LoraConfig(r=4)
    get_routed_model(make_backbone("llama"), configured(), lora)
    model = get_routed_model(make_backbone("phi3"), configured(), lora)
    assert any("qkv_proj.lora_A" in name for name, _ in model.named_parameters())


def test_disable_adapter_leaves_a_loaded_model_frozen(make_routed, make_backbone, tokens, tmp_path):
    make_routed().save_pretrained(tmp_path)
    model = RoutedModel.from_pretrained(tmp_path, make_backbone())
    with model.disable_adapter():
        model(tokens(1, 4))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(BackboneError, match="routed already"):
        RoutedModel.from_pretrained(tmp_path, model.backbone)


def test_settings_that_cannot_be_obeyed_are_refused(make_routed, tokens):
    model, ids, route = make_routed(), tokens(1, 6), torch.ones(4, dtype=torch.bool)
    cache = model(ids, use_cache=True).past_key_values
    with model.disable_routing():
        with pytest.raises(ConfigError, match="routing is disabled"):
            model(ids, routes=route)
        with pytest.raises(GenerationError, match="carries a route"):
            model(ids, past_key_values=cache)
    with pytest.raises(ConfigError, match="past_key_values carry a route"):
        model(ids, past_key_values=cache, routes=route)
    with pytest.raises(ConfigError, match="use_cache=True in training mode"):
        model.train()(ids, use_cache=True)
