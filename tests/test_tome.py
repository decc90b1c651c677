"""Token merging in timm's vision transformers, against a straight-line computation written from the paper."""

from __future__ import annotations

import itertools
from typing import Any

import naive
import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from famba.errors import ConfigError
from famba.fusion import tokens_per_layer
from famba.models import apply_tome, remove_tome
from famba.training.measure import macs_per_image

SHAPE: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}
SHAPE |= {"num_classes": 5, "mlp_ratio": 2}
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "mean with class token": {"global_pool": "avg"},
    "mean of all tokens": {"global_pool": "avg", "pool_include_prefix": True},
    "registers": {"reg_tokens": 3},
    "layer scale, no bias": {"init_values": 0.5, "qkv_bias": False, "no_embed_class": True},
    "normed queries and keys": {"qk_norm": True, "pre_norm": True},
    "distilled": {"distilled": True},
}
FUSION = (5, 0, 4)


def build(kind: str, **changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    options = {**SHAPE, **KINDS[kind], **changes}
    vit = (VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer)(**options)
    with torch.no_grad():
        for p in vit.parameters():
            p += 0.2 * torch.randn_like(p)  # away from special first values, so that none can be left out unseen
    return vit.eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def merged(vit: VisionTransformer, images: Tensor, fusion: tuple[int, ...], way: dict[str, Any]) -> Tensor:
    """Logits, image by image and group by group."""
    prefix, by_size = vit.num_prefix_tokens, way["weighting"] == "size"
    logits = []
    for image in images:
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
        sizes = x.new_ones(len(x))
        for block, r in zip(vit.blocks, fusion, strict=True):
            assert isinstance(block, Block)
            attention = block.attn
            q, k, v = attention.qkv(block.norm1(x)).unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
            q, k = attention.q_norm(q), attention.k_norm(k)
            scores = q @ k.transpose(1, 2) * k.shape[-1] ** -0.5
            if way["proportional"]:
                scores = scores + sizes.log()
            heads = scores.softmax(-1) @ v
            x = x + block.ls1(attention.proj(attention.norm(heads.transpose(0, 1).flatten(1))))
            keys = k.mean(0)[None].detach()
            places = naive.match(keys, r, [list(range(prefix))], way["order"])[0]
            groups = [[i for i, at in enumerate(places) if at == place] for place in range(len(x) - r)]
            if way["mode"] == "prune":
                # The member of B stays: the free tokens are dealt in turn, as if the protected ones stood first.
                groups = [[i for i in group if len(group) == 1 or i % 2 == 1] for group in groups]
            weights = sizes if by_size else torch.ones_like(sizes)
            x = torch.stack([(x[g] * weights[g, None]).sum(0) / weights[g].sum() for g in groups])
            sizes = torch.stack([sizes[g].sum() for g in groups])
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = vit.norm(x)
        if vit.global_pool == "avg":
            first = 0 if vit.pool_include_prefix else prefix
            weights = (sizes if by_size else torch.ones_like(sizes))[first:, None]
            logits.append(vit.head(vit.fc_norm((x[first:] * weights).sum(0) / weights.sum())))
        else:
            logits.append(vit.forward_head(x[None])[0])
    return torch.stack(logits)


WAYS: dict[str, dict[str, Any]] = {
    "off the shelf": {"order": "tome", "weighting": "size", "mode": "fuse", "proportional": True},
    "in training": {"order": "sequence", "weighting": "size", "mode": "fuse", "proportional": False},
    "means": {"order": "tome", "weighting": "mean", "mode": "fuse", "proportional": True},
    "prune": {"order": "sequence", "weighting": "mean", "mode": "prune", "proportional": False},
}
# Every way with a class token and without one; every other kind with two of them.
EACH = [*itertools.product(list(KINDS)[:2], WAYS)]
EACH += [(kind, way) for i, kind in enumerate(list(KINDS)[2:]) for way in list(WAYS)[i % 2 :: 2]]


@pytest.mark.parametrize(("kind", "named"), EACH)
def test_logits_and_gradients_agree_with_the_paper(kind: str, named: str) -> None:
    way = WAYS[named]
    vit = build(kind).double()
    torch.testing.assert_close(apply_tome(vit, (0, 0, 0), **way)(images().double()), vit(images().double()))
    model = apply_tome(vit, FUSION, **way)
    expected = merged(vit, images().double(), FUSION, way)
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad((expected * direction).sum(), list(vit.parameters()), allow_unused=True)
    logits = model(images().double())
    found = torch.autograd.grad((logits * direction).sum(), list(vit.parameters()), allow_unused=True)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)  # None where a parameter has no part
    features = model.forward_features(images().double())
    assert features.shape == (3, model.num_tokens, 24)
    if vit.global_pool == "token" or (way["weighting"], way["mode"]) == ("size", "fuse"):
        torch.testing.assert_close(model.forward_head(features), logits, rtol=1e-9, atol=1e-9)
    else:
        with pytest.raises(ConfigError, match="call the model itself for logits"):
            model.forward_head(features)
    held = model.trace(images().double())
    for at, left in zip(held, tokens_per_layer(FUSION, model.num_tokens), strict=True):
        for image in at.tolist():
            # Protected tokens keep the head; each of the others holds a patch.
            assert sorted(set(image)) == list(range(vit.num_prefix_tokens, left))
    adapted = model.adapted_fusion(images().double(), 9)
    assert sum(adapted.schedule) == 9
    model.set_fusion(adapted.schedule)
    assert model(images().double()).shape == (3, 5)


def test_the_original_is_left_as_it_was_and_shares_its_weights_by_their_own_names(tmp_path: Any) -> None:
    vit, other = build("distilled"), build("distilled", weight_init="")
    before, names, model = vit(images()), list(vit.state_dict()), apply_tome(vit, FUSION)
    logits = model(images())
    assert not torch.allclose(logits, before)
    assert torch.equal(vit(images()), before)
    assert list(model.state_dict()) == list(vit.state_dict()) == names
    assert remove_tome(model) is vit
    model.train()(images()).sum().backward()
    assert all(p.grad is not None for p in vit.parameters())
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    weights = load_file(tmp_path / "model.safetensors")
    other.load_state_dict(weights)
    apply_tome(other, FUSION).load_state_dict(weights)
    assert torch.equal(apply_tome(other, FUSION)(images()), logits)
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    way: dict[str, Any] = {"order": "sequence", "weighting": "mean", "mode": "prune", "proportional": False}
    model.set_fusion((4, 4, 0), **way)
    assert torch.equal(model.eval()(images()), apply_tome(vit, (4, 4, 0), **way)(images()))
    with pytest.raises(ConfigError, match="place is 'before_mixer', where a vision transformer"):
        model.set_fusion((0, 0, 0), place="before_mixer")
    assert model.fusion == (4, 4, 0)


@pytest.mark.parametrize("kind", ["distilled", "no class token"])
def test_patches_get_the_features_of_their_tokens(kind: str) -> None:
    model = apply_tome(build(kind), FUSION)
    others = model.vit.num_prefix_tokens
    final, pairs = model.forward_intermediates(images(), [0, 2], return_prefix_tokens=True, norm=True)
    last, prefix = pairs[1] if others else (pairs[1], None)
    torch.testing.assert_close(final[:, others:], last.flatten(2).transpose(1, 2))
    assert prefix is None or prefix.shape == (3, others, 24)
    held = model.trace(images())[-1]
    for image, places in zip(last.flatten(2).transpose(1, 2), held, strict=True):
        assert all(torch.equal(image[a], image[b]) == bool(places[a] == places[b]) for a in range(16) for b in range(a))
    plain = apply_tome(model.vit, (0, 0, 0)).forward_intermediates(images(), norm=True, intermediates_only=True)
    for own, wanted in zip(plain, model.vit.forward_intermediates(images(), norm=True)[1], strict=True):
        torch.testing.assert_close(own, wanted)


def test_recomputation_changes_nothing() -> None:
    model, x = apply_tome(build("class token"), FUSION, proportional=False).double().train(), images(4).double()
    assert model(x[:0]).shape == (0, 5)
    model.vit.blocks[1].attn.register_forward_hook(lambda _, given, output: 2 * output)
    kept = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    assert all(map(torch.equal, torch.autograd.grad(model(x).sum(), list(model.parameters())), kept))


REFUSED: list[tuple[Any, Any, dict[str, Any], str]] = [
    (nn.Linear(2, 2), FUSION, {}, "Linear is no timm VisionTransformer; allowed: the ViT and DeiT models"),
    ({"block_fn": ParallelScalingBlock}, FUSION, {}, "block 0 is a ParallelScalingBlock"),
    ({"patch_drop_rate": 0.5}, FUSION, {}, "drops patches"),
    ({"dynamic_img_size": True}, FUSION, {}, "create it with img_size instead"),
    ({}, (9, 0, 0), {}, "layer 0 removes 9 tokens of the 16 that may fuse there; at most half of them"),
    ({}, 8, {}, r"tokens to remove in each block, such as \[8\] \* 3"),
    ({}, FUSION, {"order": "random"}, "unknown fusion order 'random'.*allowed: "),
]


@pytest.mark.parametrize(("changes", "fusion", "way", "message"), REFUSED)
def test_what_cannot_fuse_is_refused(changes: Any, fusion: Any, way: dict[str, Any], message: str) -> None:
    vit: Any = changes if isinstance(changes, nn.Module) else build("class token", **changes)
    with naive.as_users_run_it():
        with pytest.raises(ConfigError, match=message):
            apply_tome(vit, fusion, **way)
        with pytest.raises(ConfigError, match="was not made by apply_tome"):
            remove_tome(vit)


def test_multiply_adds_are_those_of_the_tokens_that_are_left() -> None:
    model = apply_tome(build("class token"), FUSION)
    width, patch = 24, 3 * 4 * 4
    total = 16 * width * patch + width * 5  # patches and classifier
    tokens = 17
    for r in FUSION:
        total += 4 * tokens * width**2 + 2 * tokens**2 * width  # products around attention, and its own
        total += ((tokens - 1) // 2) * ((tokens - 1) - (tokens - 1) // 2) * 8 * (r > 0)  # cosines of keys, 8 channels
        tokens -= r
        total += 2 * tokens * width * 2 * width  # the MLP
    assert macs_per_image(model, 16) == total


@pytest.mark.parametrize("name", ["", "attn", "attn.qkv", "attn.proj", "mlp.fc1"])
def test_hooks_act_as_without_fusion(name: str) -> None:
    vit = build("normed queries and keys", init_values=0.5)
    plain, fused = apply_tome(vit, (0, 0, 0)), apply_tome(vit, FUSION)
    before = fused(images())
    part = vit.blocks[1].get_submodule(name)
    seen = list[str]()
    for add in (part.register_forward_pre_hook, part.register_forward_hook, part.register_full_backward_hook):
        add(lambda *_, name=add.__name__: seen.append(name))
    logits = fused(images())
    assert torch.equal(logits, before)
    logits.sum().backward()
    assert len(seen) == len(set(seen)) == 3
    part.register_forward_hook(lambda _, given, output: output * 1.5 + 0.1)
    assert not torch.allclose(fused(images()), before, atol=1e-4)
    torch.testing.assert_close(plain(images()), vit(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("blocks.1", "block 1 is a ParallelScalingBlock; allowed: timm's Block"),
        ("blocks.1.attn", "the attention of block 1 had its forward replaced"),
    ],
)
def test_what_fusion_would_leave_out_is_refused_whenever_it_comes(part: str, message: str) -> None:
    vit = build("class token")
    model = apply_tome(vit, FUSION)
    if part == "blocks.1":
        vit.set_submodule(part, ParallelScalingBlock(24, 3))
    else:
        vit.get_submodule(part).forward = vit.get_submodule(part).forward  # type: ignore[method-assign]
    for ask in (lambda: apply_tome(vit, FUSION), lambda: model(images())):
        with naive.as_users_run_it(), pytest.raises(ConfigError, match=message):
            ask()
