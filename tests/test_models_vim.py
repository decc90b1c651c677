"""Vim against an independent forward, logits and features; each of its switches; timm's ways of asking."""

from __future__ import annotations

import itertools
from typing import Any

import naive
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import DropPath, Format
from torch import Tensor, nn

import famba  # noqa: F401 - registers the models
from famba.errors import ConfigError
from famba.fusion import schedule
from famba.models import Vim, create_network, load_vim_checkpoint
from famba.ops import use_backend
from famba.ops.availability import triton_obstacle

ROWS, COLUMNS = 4, 3
SHAPE = {"img_size": (8, 12), "patch_size": (2, 4), "embed_dim": 20, "num_classes": 3, "d_state": 3}
SCHEDULE, NOTHING = (3, 0, 2), (0, 0, 0)
CLS_POSITIONS = ("head", "middle", "none")
WAYS = list(itertools.product(("before_mixer", "after_scan"), ("mean", "size"), ("sequence", "tome")))
# For each place of the class token, every pair of switches.
PAIRS = [WAYS[i] for i in (0, 3, 5, 6)]
COMBINATIONS = [(cls, NOTHING, *WAYS[0]) for cls in CLS_POSITIONS] + [("none", SCHEDULE, *WAYS[4])]
COMBINATIONS += [(cls, SCHEDULE, *way) for cls in CLS_POSITIONS for way in PAIRS]


def tiny(seed: int = 0, **changes: Any) -> Vim:
    torch.manual_seed(seed)
    return Vim(**{**SHAPE, "depth": 3, **changes})


def images(batch: int = 2, size: tuple[int, int] = (8, 12), channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("cls", "fusion", "place", "weighting", "order"), COMBINATIONS)
def test_logits_features_and_gradients_agree_with_the_equations(
    cls: str, fusion: tuple[int, ...], place: str, weighting: str, order: str
) -> None:
    options = {"fusion_place": place, "fusion_weighting": weighting, "fusion_order": order}
    model, x = tiny(cls_position=cls, fusion=fusion, **options).double(), images().double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)  # away from special first values, so that none can be left out unseen
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected, kept = naive.vim(weights, x, fusion, cls, order, weighting, place)
    close(model(x), expected)

    # Follow each token of the first layer through the layers, one by one.
    patches = [i for i in range(model.num_tokens) if i != model.cls_index]
    final, maps = model.forward_intermediates(x)
    normed = model.forward_intermediates(x, None, True, norm=True, output_fmt="NLC", intermediates_only=True)
    held, at, wanted = model.trace(x), [list(range(model.num_tokens))] * 2, []
    for layer, stream in enumerate(kept["streams"]):
        at = [[places[i] for i in image] for places, image in zip(kept["places"][layer], at, strict=True)]
        assert held[layer].tolist() == [[image[i] for i in patches] for image in at]
        raw = torch.stack([stream[i, image] for i, image in enumerate(at)])
        wanted.append(raw[:, patches])
        close(maps[layer], wanted[-1].transpose(1, 2).unflatten(2, (ROWS, COLUMNS)))
        final_norm = naive.add_rms_norm(raw, None, weights["norm_f.weight"], 1e-5)[0]
        pair = normed[layer] if cls != "none" else (normed[layer], final_norm[:, :0])
        close(pair, (final_norm[:, patches], final_norm[:, [i for i in range(model.num_tokens) if i not in patches]]))
    close(final, final_norm)
    assert torch.equal(final, model.forward_features(x))

    directions = [torch.randn(t.shape, dtype=torch.float64) for t in (expected, wanted[1])]
    features = model.forward_intermediates(x, [1], output_fmt="NLC", intermediates_only=True)[0]
    sum((t * d).sum() for t, d in zip((model(x), features), directions, strict=True)).backward()
    sum((t * d).sum() for t, d in zip((expected, wanted[1]), directions, strict=True)).backward()
    for name, p in model.named_parameters():
        gradient = weights[name].grad
        # Where the class token is the first of the last scan, that scan's decay meets no state.
        assert gradient.abs().max() > 0 or name.startswith("layers.2.mixer.A_"), name
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item(), msg=name)

    if cls == "none" and weighting == "mean" and any(fusion):
        with pytest.raises(ConfigError, match="mean over its tokens.*weighting='size'"):
            model.forward_head(final)
        return
    close(model.forward_head(final), expected)
    close(model.head(model.forward_head(final, pre_logits=True)), expected)
    with pytest.raises(ConfigError, match=f"given {model.num_tokens - 1} tokens per image; allowed: .*"):
        model.forward_head(final[:, 1:])


COUNTS = {"micro_patch4_32": 340_068, "tiny_patch16_224": 6_974_308, "small_patch16_224": 25_450_084}
COUNTS |= {"base_patch16_224": 96_906_340}


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_timm_makes_the_models(name: str, count: int) -> None:
    shape = {"img_size": 32, "patch_size": 8, "cls_position": "middle"}
    counts = schedule("upper", 8 if "micro" in name else 24, 17, 8)
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(f"vim_{name}", num_classes=100).parameters()) == count
        model = timm.create_model(f"vim_{name}", fusion=counts, fusion_place="after_scan", fusion_order="tome", **shape)
    assert (model.fusion, model.settings.place, model.settings.order) == (counts, "after_scan", "tome")
    assert model.pretrained_cfg["classifier"] == "head"
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True)


def test_names_and_shapes_are_those_of_the_official_checkpoints() -> None:
    d, inner, rank = 192, 384, 12
    expected = {"patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,), "cls_token": (1, 1, d)}
    expected |= {"pos_embed": (1, 197, d), "norm_f.weight": (d,), "head.weight": (1000, d), "head.bias": (1000,)}
    for i in range(24):
        mixer = f"layers.{i}.mixer."
        expected |= {f"layers.{i}.norm.weight": (d,), mixer + "in_proj.weight": (4 * d, d)}
        expected |= {mixer + "out_proj.weight": (d, inner)}
        for tail, rates in (("", "A_log"), ("_b", "A_b_log")):
            expected |= {mixer + rates: (inner, 16), mixer + f"D{tail}": (inner,)}
            expected |= {mixer + f"conv1d{tail}.weight": (inner, 1, 4), mixer + f"conv1d{tail}.bias": (inner,)}
            expected[mixer + f"x_proj{tail}.weight"] = (rank + 32, inner)
            expected |= {mixer + f"dt_proj{tail}.weight": (inner, rank), mixer + f"dt_proj{tail}.bias": (inner,)}
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_224")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert {k for k, _ in model.named_parameters()} == set(expected)


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = Vim(img_size=32, patch_size=4, embed_dim=96, depth=4)
    assert all(0.01 < p.std() < 0.03 for p in (model.pos_embed, model.cls_token, model.head.weight))
    assert model.head.bias.eq(0).all()
    for of in (layer.mixer for layer in model.layers):
        forward = (of.A_log, of.D, of.dt_proj)
        for rates, skip, projection in (forward, (of.A_b_log, of.D_b, of.dt_proj_b)):
            torch.testing.assert_close(rates.exp(), torch.arange(1.0, 17).expand(192, 16))
            steps = nn.functional.softplus(projection.bias)
            assert (skip.eq(1) & steps.ge(0.00099) & steps.le(0.101)).all()
            assert 0.3 < steps.lt(0.01).float().mean() < 0.7, "half of a log-uniform draw lies below the middle"
            assert projection.weight.abs().max() <= of.dt_rank**-0.5
        largest = of.out_proj.weight.abs().max()
        assert 0.4 * 192**-0.5 < largest <= 192**-0.5 / 2, "Kaiming-uniform over the root of depth 4"
    assert not torch.equal(tiny().head.weight, tiny(seed=1).head.weight)


@pytest.mark.parametrize(
    ("cls", "dtype"), [("head", torch.bfloat16), ("middle", torch.float16), ("none", torch.float64)], ids=str
)
def test_weights_of_any_dtype_train(cls: str, dtype: torch.dtype) -> None:
    model = tiny(cls_position=cls, fusion=SCHEDULE, fusion_weighting="size").to(dtype)
    logits = model(images().to(dtype))
    final, maps = model.forward_intermediates(images().to(dtype))
    assert {logits.dtype, final.dtype, *(m.dtype for m in maps)} == {dtype}
    logits.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        final, raw = model.float().forward_intermediates(images())
        assert (model.forward_head(final).dtype, final.dtype, raw[0].dtype) == (torch.bfloat16,) * 2 + (torch.float32,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cls_position": "heads"}, "unknown cls_position 'heads', did you mean 'head'.*; allowed: head, middle, none"),
        ({"fusion_weighting": "sizes"}, "unknown fusion weighting 'sizes', did you mean 'size'.; allowed: mean, size"),
        ({"fusion_place": "after_scans"}, "place is .* did you mean 'after_scan'"),
        ({"fusion": (7, 0, 0)}, "layer 0 removes 7 tokens of the 12 "),
        ({"img_size": 30, "patch_size": 16}, "image height 30 is not divisible by patch size 16; use 16 or 32"),
        ({"patch_size": 0}, "patch size 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**arguments)


def test_layers_are_chosen_as_timm_has_it() -> None:
    model, reference = tiny(depth=4, fusion=(2, 0, 2, 0)), timm.create_model("test_vit", depth=4)
    _, everything = model.forward_intermediates(images())
    for indices in (None, 1, 3, 4, [0], [1, 3], (-1, 0), [-4, -2], [3, 1], [2, 2]):
        _, found = model.forward_intermediates(images(), indices, output_fmt=Format.NCHW)
        _, of_timm = reference.forward_intermediates(torch.zeros(1, 3, 160, 160), indices)
        assert len(found) == len(of_timm)
        taken = range(4)[-indices:] if isinstance(indices, int) else [i % 4 for i in indices or range(4)]
        wanted = [everything[i] for i in sorted(set(taken))]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    with naive.as_users_run_it():
        for strange in (0, 5, [4], [], [1.0]):
            with pytest.raises(ConfigError, match=r"indices is .*; allowed: a list of layers from 0 to 3"):
                model.forward_intermediates(images(), strange)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="unknown output_fmt 'NHWC', did you mean 'NCHW'.*allowed: NCHW, NLC"):
            model.forward_intermediates(images(), output_fmt="NHWC")


@pytest.mark.parametrize("pretrained", [False, True])
def test_timm_extracts_features(pretrained: bool) -> None:
    name, x, options = "vim_micro_patch4_32", torch.randn(2, 3, 32, 32), {"fusion": (0, 8, 8, 8, 8, 8, 8, 7)}
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained, features_only=True, out_indices=(1, -4, 5), **options).eval()
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained, **options).eval()
    assert (net.feature_info.channels(), net.feature_info.reduction()) == ([64, 64, 64], [4, 4, 4])
    assert net.feature_info.module_name() == ["layers.1", "layers.4", "layers.5"]
    found, wanted = net(x), model.forward_intermediates(x, [1, 4, 5], intermediates_only=True)
    assert [f.shape for f in found] == [(2, 64, 8, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    names = dict(net.model.named_parameters())
    assert not [n for n in names if n.startswith(("layers.6", "layers.7", "norm_f", "head"))]
    found[-1].sum().backward()
    assert all(p.grad is not None for p in names.values())


def test_timm_conventions() -> None:
    model, x = timm.create_model("vim_micro_patch4_32", num_classes=7), torch.zeros(2, 3, 32, 32)
    assert model.num_features == model.head_hidden_size == model.embed_dim == 64
    assert (model.num_classes, model.get_classifier()) == (7, model.head)
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    model.reset_classifier(3)
    assert (model.num_classes, model(x).shape) == (3, (2, 3))
    model.double().reset_classifier(4)
    assert model.head.weight.dtype == torch.float64
    model.float().reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert not [name for name in timm.create_model("vim_micro_patch4_32", num_classes=0).state_dict() if "head" in name]
    assert torch.equal(model(x), model.forward_features(x)[:, 0])


@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_pooling_is_that_of_timms_vits(cls: str) -> None:
    options = {"cls_position": cls, "fusion": SCHEDULE, "fusion_weighting": "size"}
    tokens, mean = tiny(**options, global_pool=""), tiny(**options, global_pool="avg")
    x, features = images(), tokens.forward_features(images())
    assert torch.equal(tokens(x), tokens.head(features))
    assert tokens(x).shape == (2, 12 + (cls != "none"), 3)
    assert torch.equal(tokens.forward_head(features), tokens(x))
    # By the patches that each token holds, without the class token.
    patches = features[:, [i for i in range(features.shape[1]) if i != tokens.cls_index]]
    torch.testing.assert_close(mean(x), mean.head(patches.mean(1)))
    torch.testing.assert_close(mean.forward_head(features, pre_logits=True), patches.mean(1))
    if cls != "none":
        usual = tiny(**options)
        assert torch.equal(tiny(**options, global_pool="token")(x), usual(x))
        usual.reset_classifier(3, "avg")
        usual.load_state_dict(mean.state_dict())
        assert torch.equal(usual(x), mean(x))
    with pytest.raises(ConfigError, match="global_pool is 'map'; allowed with cls_position="):
        mean.reset_classifier(3, "map")


def test_drop_path_and_dropout_are_off_unless_asked_for_and_in_evaluation() -> None:
    model, x = tiny(), images()
    assert not [m for m in model.modules() if isinstance(m, DropPath)]
    assert torch.equal(model.train()(x), model.eval()(x))
    for option in ("drop_path_rate", "drop_rate"):
        assert torch.equal(tiny(**{option: 0.5}).eval()(x), model(x))
    deep = tiny(depth=5, drop_path_rate=0.4)
    # What layer 1 adds is dropped on the way into layer 2; what the last one adds, on the way to the final norm.
    assert [layer.drop_path.drop_prob for layer in deep.layers[2:]] == pytest.approx([0.1, 0.2, 0.3])
    assert deep.drop_path.drop_prob == pytest.approx(0.4)
    dropped = tiny(drop_rate=0.5).train().forward_head(torch.ones(200, 13, 20), pre_logits=True)
    assert 0.3 < (dropped == 0).float().mean() < 0.7


@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_another_input_size_is_as_that_of_timms_vits_and_of_a_file(cls: str, tmp_path: Any) -> None:
    model = tiny(cls_position=cls, fusion="upper", budget=0.5)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    model.set_input_size((16, 16))
    other = tiny(seed=1, cls_position=cls, fusion="upper", budget=0.5, img_size=16)
    load_vim_checkpoint(other, tmp_path / "w.safetensors", grid=(4, 3))
    assert (model.fusion, model.num_tokens, model.special) == (other.fusion, other.num_tokens, other.special)
    x = images(size=(16, 16))
    assert torch.equal(model(x), other(x))
    model.set_input_size(patch_size=4)
    assert (model.num_patches, model.feature_info[0]["reduction"], model(x).shape) == (16, 4, (2, 3))
    assert [f.shape for f in model.forward_intermediates(x, [1], intermediates_only=True)] == [(2, 20, 4, 4)]
    model.set_fusion((8, 4, 2))
    for size, message in ((17, "divisible by patch size"), (8, "layer 0 removes 8 tokens of the 4 ")):
        with pytest.raises(ConfigError, match=message):
            model.set_input_size(size)
    assert model.image_size == (16, 16)
    grid = tiny(fusion="all", budget=0.5, fusion_rule="grid")
    grid.set_input_size((24, 24))
    assert sum(grid.fusion) == grid.num_patches // 2
    grid.prune_intermediate_layers([1])
    grid.set_input_size((24, 24))
    assert len(grid.fusion) == 2, "the part of the schedule that is left"


@pytest.mark.parametrize("name", ["vim_micro_patch4_32", "vit_micro_patch4_32"])
def test_a_strategy_has_its_budget_by_either_name(name: str) -> None:
    create = create_network if name.startswith("vit") else timm.create_model
    wanted = schedule("upper", 8, 65, 20, 3)
    with torch.device("meta"):
        for options in ({"budget": 20, "layers": 3}, {"fusion_budget": 20, "fusion_layers": 3}):
            assert create(name, fusion="upper", **options).fusion == wanted
        assert create(name, fusion="upper").fusion == schedule("upper", 8, 65, 6 / 7)
        for given, message in (
            ({"fusion": "uper"}, "unknown fusion strategy 'uper', did you mean 'upper'"),
            ({}, "budget is of a strategy; give the name of one"),
            ({"fusion": [1] * 8}, "budget is of a strategy; give the name of one"),
            ({"fusion": "upper", "fusion_budget": 20}, "budget and fusion_budget are the same"),
        ):
            with pytest.raises(ConfigError, match=message):
                create(name, budget=20, **given)
    model = create(name, fusion=[1] * 8)
    model.set_fusion("upper", budget=20, layers=3)
    assert model.fusion == wanted
    with pytest.raises(TypeError, match="no argument 'budgets', did you mean 'budget'"):
        tiny(budgets=20)
    assert timm.create_model("vim_micro_patch4_32", pretrained=True, fusion="lower", budget=20).settings.budget == 20


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["auto", "reference"]
BACKENDS += [pytest.param("triton", marks=pytest.mark.slow)] if triton_obstacle() is None else []  # type: ignore[list-item]


def push_to_extremes(model: Vim) -> None:
    """Steps near nothing and far above what training reaches, decays at once and never."""
    with torch.no_grad():
        for number, layer in enumerate(model.layers):
            for projection in (layer.mixer.dt_proj, layer.mixer.dt_proj_b):
                projection.bias[0::4] = 30.0
                projection.bias[1::4] = -30.0
                projection.weight[2::4] *= 100
            layer.mixer.A_log[number::5] = 6.0
            layer.mixer.A_b_log[number::5] = -20.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weighting", ["mean", "size"])
def test_training_on_extremes_stays_finite(backend: str, dtype: torch.dtype, weighting: str) -> None:
    # A step of one layer takes seconds in Triton's interpreter.
    interpreted = backend == "triton" and DEVICE == "cpu"
    depth, patch, steps = (1, 4, 2) if interpreted else (3, 2, 12)
    torch.manual_seed(0)
    how = {
        "fusion": schedule("all", depth, (8 // patch) ** 2 + 1, 5 if patch == 2 else 1),
        "fusion_weighting": weighting,
    }
    model = Vim(img_size=8, patch_size=patch, embed_dim=16, depth=depth, num_classes=5, d_state=4, **how).to(DEVICE)
    push_to_extremes(model)
    # Black, white, a single bright pixel, noise far beyond normalised pixels, next to nothing, and ordinary ones.
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6, device=DEVICE) % 5
    images[:3] = torch.tensor([0.0, 30.0, 0.0])[:, None, None, None]
    images[2, :, 3, 3] = 1000.0
    images = (images * torch.tensor([1, 1, 1, 300, 1e-6, 1])[:, None, None, None]).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(DEVICE, enabled=dtype == torch.float16, init_scale=2.0**12)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with use_backend(backend), torch.autocast(DEVICE, dtype=dtype):
            logits = model(images)
        losses.append(nn.functional.cross_entropy(logits.float(), labels))
        scaler.scale(losses[-1]).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert all(x.isfinite().all() for x in (*losses, *model.parameters()))
    assert losses[-1] < losses[0]
