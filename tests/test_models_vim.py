"""Vim against an independent forward, and each of its switches."""

from __future__ import annotations

import itertools
import math
from typing import Any

import naive
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

import famba  # noqa: F401 - registers the models
from famba.errors import ConfigError
from famba.fusion import schedule, tokens_per_layer
from famba.models import Vim, mixer
from famba.ops import bidirectional_mixer

SHAPE = {"img_size": (8, 12), "patch_size": (2, 4), "embed_dim": 20, "num_classes": 3, "d_state": 3}
CLS_POSITIONS = ("head", "middle", "none")
COMBINATIONS = [
    (cls, fusion, place, weighting, order)
    for cls in CLS_POSITIONS
    for fusion, place, weighting, order in [
        (None, "before_mixer", "mean", "sequence"),
        *itertools.product([(3, 0, 2)], ("before_mixer", "after_scan"), ("mean", "size"), ("sequence", "tome")),
    ]
]


def tiny(seed: int = 0, **changes: Any) -> Vim:
    torch.manual_seed(seed)
    return Vim(**{**SHAPE, "depth": 3, **changes})


def images(batch: int = 2, size: tuple[int, int] = (8, 12), channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def shaken(model: Vim) -> Vim:
    """All parameters away from their special first values, so that none can be left out unseen."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


@pytest.mark.parametrize(("cls", "fusion", "place", "weighting", "order"), COMBINATIONS)
def test_logits_and_gradients_agree_with_the_equations(
    cls: str, fusion: tuple[int, ...] | None, place: str, weighting: str, order: str
) -> None:
    options = {"fusion_place": place, "fusion_weighting": weighting, "fusion_order": order}
    model = shaken(tiny(cls_position=cls, fusion=fusion, **options)).double()
    x = images().double()
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    expected, _ = naive.vim(weights, x, fusion or (0, 0, 0), cls, order, weighting, place)
    logits = model(x)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    direction = torch.randn(logits.shape, dtype=torch.float64)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, p in model.named_parameters():
        wanted = weights[name].grad
        # Where the class token is the first of the last scan, that scan's decay meets no state.
        assert wanted.abs().max() > 0 or name.startswith("layers.2.mixer.A_"), name
        torch.testing.assert_close(p.grad, wanted, rtol=1e-5, atol=1e-6 * wanted.abs().max().item(), msg=name)


def parameters(width: int, depth: int, patch: int, tokens: int, classes: int) -> int:
    """Counted by hand from the official list of shapes."""
    inner, rank, states, taps = 2 * width, math.ceil(width / 16), 16, 4
    direction = inner * states + inner + inner * taps + inner + inner * (rank + 2 * states) + inner * rank + inner
    layer = width + 2 * inner * width + 2 * direction + inner * width
    stem = 3 * patch * patch * width + width + width + tokens * width
    return stem + depth * layer + width + classes * width + classes


@pytest.mark.parametrize(
    ("name", "width", "depth", "patch", "tokens"),
    [
        ("vim_micro_patch4_32", 64, 8, 4, 65),
        ("vim_tiny_patch16_224", 192, 24, 16, 197),
        ("vim_small_patch16_224", 384, 24, 16, 197),
        ("vim_base_patch16_224", 768, 24, 16, 197),
    ],
)
def test_parameter_counts(name: str, width: int, depth: int, patch: int, tokens: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    count = sum(p.numel() for p in model.parameters())
    assert count == parameters(width, depth, patch, tokens, 100)
    if name == "vim_tiny_patch16_224":
        assert count == 6_974_308


def test_names_and_shapes_are_those_of_the_official_checkpoints() -> None:
    d, inner, rank = 192, 384, 12
    expected = {
        "patch_embed.proj.weight": (d, 3, 16, 16),
        "patch_embed.proj.bias": (d,),
        "cls_token": (1, 1, d),
        "pos_embed": (1, 197, d),
        "norm_f.weight": (d,),
        "head.weight": (1000, d),
        "head.bias": (1000,),
    }
    for i in range(24):
        expected[f"layers.{i}.norm.weight"] = (d,)
        mixer = f"layers.{i}.mixer."
        expected[mixer + "in_proj.weight"] = (4 * d, d)
        expected[mixer + "out_proj.weight"] = (d, inner)
        for tail, rates in (("", "A_log"), ("_b", "A_b_log")):
            expected[mixer + rates] = (inner, 16)
            expected[mixer + f"D{tail}"] = (inner,)
            expected[mixer + f"conv1d{tail}.weight"] = (inner, 1, 4)
            expected[mixer + f"conv1d{tail}.bias"] = (inner,)
            expected[mixer + f"x_proj{tail}.weight"] = (rank + 32, inner)
            expected[mixer + f"dt_proj{tail}.weight"] = (inner, rank)
            expected[mixer + f"dt_proj{tail}.bias"] = (inner,)
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_224")
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == expected
    assert {k for k, _ in model.named_parameters()} == set(expected)


def test_first_weights() -> None:
    torch.manual_seed(0)
    model = Vim(img_size=32, patch_size=4, embed_dim=96, depth=4)
    for p in (model.pos_embed, model.cls_token, model.head.weight):
        assert 0.01 < p.std() < 0.03
    assert model.head.bias.eq(0).all()
    for layer in model.layers:
        mixer = layer.mixer
        for rates, skip, projection in (
            (mixer.A_log, mixer.D, mixer.dt_proj),
            (mixer.A_b_log, mixer.D_b, mixer.dt_proj_b),
        ):
            torch.testing.assert_close(rates.exp(), torch.arange(1.0, 17).expand(192, 16))
            assert skip.eq(1).all()
            steps = nn.functional.softplus(projection.bias)
            assert steps.ge(0.00099).all()
            assert steps.le(0.101).all()
            assert 0.3 < steps.lt(0.01).float().mean() < 0.7, "half of a log-uniform draw lies below the middle"
            assert projection.weight.abs().max() <= mixer.dt_rank**-0.5
        assert mixer.out_proj.weight.abs().max() <= 192**-0.5 / 2, "Kaiming-uniform over the root of depth 4"
        assert mixer.out_proj.weight.abs().max() > 0.4 * 192**-0.5


@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_no_fusion_is_the_plain_model_to_the_bit(cls: str) -> None:
    plain = tiny(cls_position=cls)
    assert plain.fusion == (0, 0, 0)
    for place, weighting, order in itertools.product(
        ("before_mixer", "after_scan"), ("mean", "size"), ("sequence", "tome")
    ):
        options = {"fusion_place": place, "fusion_weighting": weighting, "fusion_order": order}
        other = tiny(cls_position=cls, fusion=(0, 0, 0), **options)
        assert torch.equal(plain(images()), other(images()))


def test_equal_seeds_give_equal_weights_whatever_the_strategy() -> None:
    plain = tiny().state_dict()
    for strategy in ("all", "interleaved", "lower", "upper"):
        other = tiny(fusion=schedule(strategy, 3, 13, 3), fusion_weighting="size", drop_path_rate=0.2).state_dict()
        assert all(torch.equal(plain[k], other[k]) for k in plain)
    assert not torch.equal(plain["head.weight"], tiny(seed=1).state_dict()["head.weight"])


@pytest.mark.parametrize("strategy", ["none", "all", "interleaved", "lower", "upper"])
@pytest.mark.parametrize("place", ["before_mixer", "after_scan"])
@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_each_layer_holds_the_tokens_that_the_schedule_says(
    strategy: str, place: str, cls: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 12 + (cls != "none")
    counts = schedule(strategy, 4, tokens, 6, protected=int(cls != "none"))
    model = tiny(depth=4, fusion=counts, fusion_place=place, cls_position=cls)
    into_mixer: list[int] = []
    out_of_layer: list[tuple[int, int]] = []

    def mixing(x: Tensor, *weights: Any) -> Tensor:
        into_mixer.append(x.shape[1])
        return bidirectional_mixer(x, *weights)

    monkeypatch.setattr(mixer, "bidirectional_mixer", mixing)
    for layer in model.layers:
        layer.register_forward_hook(lambda m, x, y: out_of_layer.append((y[0].shape[1], y[1].shape[1])))
    features = model.forward_features(images())
    left = list(tokens_per_layer(counts, tokens))
    assert out_of_layer == [(n, n) for n in left]
    assert into_mixer == (left if place == "before_mixer" else [tokens, *left[:-1]])
    assert features.shape == (2, tokens, 20)


@pytest.mark.parametrize(("cls", "index"), [("head", 0), ("middle", 6), ("none", None)])
def test_place_of_the_class_token(cls: str, index: int | None) -> None:
    model = shaken(tiny(cls_position=cls, depth=1))
    assert model.cls_index == index
    assert model.num_tokens == 12 + (cls != "none")
    seen = []
    model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    features = model.forward_features(images())
    if index is None:
        torch.testing.assert_close(model(images()), model.head(features.mean(1)))
        return
    expected = model.cls_token[0, 0] + model.pos_embed[0, index]
    torch.testing.assert_close(seen[0][:, index], expected.expand(2, -1))
    assert torch.equal(model(images()), model.head(features[:, index]))


@pytest.mark.parametrize("weighting", ["mean", "size"])
@pytest.mark.parametrize("order", ["sequence", "tome"])
@pytest.mark.parametrize("cls", ["head", "middle"])
def test_the_class_token_is_read_after_it_moved(cls: str, order: str, weighting: str) -> None:
    model = shaken(tiny(cls_position=cls, fusion=(5, 3, 1), fusion_order=order, fusion_weighting=weighting)).double()
    x = images(4).double()
    logits, _ = naive.vim(dict(model.state_dict()), x, (5, 3, 1), cls, order, weighting, "before_mixer")
    torch.testing.assert_close(model(x), logits, rtol=1e-6, atol=1e-6)
    alone = torch.cat([model(image[None]) for image in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-9, atol=1e-9)


def test_drop_path_is_off_unless_asked_for_and_in_evaluation() -> None:
    model = tiny()
    assert not [m for m in model.modules() if isinstance(m, DropPath)]
    assert torch.equal(model.train()(images()), model.eval()(images()))
    dropping = tiny(drop_path_rate=0.5)
    assert torch.equal(dropping.eval()(images()), model(images()))
    dropping.train()
    torch.manual_seed(0)
    outs = [dropping(images()) for _ in range(6)]
    assert any(not torch.equal(outs[0], out) for out in outs)


def test_drop_path_rises_linearly_to_its_rate_at_the_last_layer() -> None:
    model = tiny(depth=5, drop_path_rate=0.4)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert isinstance(model.layers[0].drop_path, nn.Identity)
    # What layer 1 adds is dropped on the way into layer 2; what the last one adds, on the way to the final norm.
    assert model.layers[2].drop_path.drop_prob == pytest.approx(0.1)
    assert model.drop_path.drop_prob == pytest.approx(0.4)


def test_what_is_dropped_is_one_layers_whole_share_of_an_image() -> None:
    model = tiny(depth=2, drop_path_rate=0.999)
    short = tiny(depth=2)
    short.load_state_dict(model.state_dict())
    short.layers[1].mixer.out_proj.weight.data.zero_()
    torch.manual_seed(0)
    assert torch.equal(model.train()(images()), short(images()))


@pytest.mark.parametrize("options", [{}, {"fusion": (3, 0, 2), "cls_position": "middle"}, {"drop_path_rate": 0.5}])
def test_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    grads = []
    for enable in (False, True):
        model = tiny(**options).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model(images()).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_keeps_less() -> None:
    kept = []
    for enable in (False, True):
        model = tiny(depth=4).train()
        model.set_grad_checkpointing(enable)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.nbytes), x)[1], lambda x: x):
            model(images())
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing


@pytest.mark.parametrize(
    ("image", "patch", "patches"),
    [(8, 4, 4), ((8, 4), 4, 2), (9, 3, 9), ((6, 10), (3, 2), 10), (4, 4, 1), ((16, 4), (1, 4), 16)],
)
@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_images_and_patches_of_any_size(image: Any, patch: Any, patches: int, cls: str) -> None:
    model = tiny(img_size=image, patch_size=patch, depth=2, cls_position=cls, fusion=(patches // 2, 0))
    size = (image, image) if isinstance(image, int) else image
    assert model.num_patches == patches
    assert model(images(3, size)).shape == (3, 3)
    assert model.trace(images(1, size))[-1].max() < patches - patches // 2 + (cls != "none")
    assert model.forward_features(images(1, size)).shape[1] == patches + (cls != "none")


def test_other_channels_and_widths() -> None:
    model = tiny(in_chans=1, d_conv=2, expand=3, embed_dim=17)
    assert model(images(2, channels=1)).shape == (2, 3)
    assert model.layers[0].mixer.d_inner == 51
    assert model.layers[0].mixer.dt_rank == 2


@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_a_batch_of_no_images(cls: str) -> None:
    model = tiny(cls_position=cls, fusion=(3, 0, 2))
    assert model(images(0)).shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_weights_in_low_precision_train(cls: str, dtype: torch.dtype) -> None:
    model = tiny(cls_position=cls, fusion=(3, 0, 2), fusion_weighting="size").to(dtype)
    logits = model(images().to(dtype))
    assert logits.dtype == dtype
    logits.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == dtype for p in model.parameters())


def test_residual_stays_in_float32_under_autocast() -> None:
    model = tiny(fusion=(3, 0, 2))
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, x, y: seen.append(y))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images())
    assert logits.dtype == torch.bfloat16
    assert all(y[1].dtype == torch.float32 for y in seen)
    assert all(y[0].dtype == torch.bfloat16 for y in seen)
    torch.testing.assert_close(logits.float(), tiny()(images()), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("place", ["before_mixer", "after_scan"])
@pytest.mark.parametrize("order", ["sequence", "tome"])
@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_trace_agrees_with_the_sizes(cls: str, order: str, place: str) -> None:
    options = {"fusion_order": order, "fusion_place": place, "fusion_weighting": "size", "cls_position": cls}
    model = shaken(tiny(fusion=(3, 0, 2), **options)).double()
    held = model.trace(images().double())
    _, kept = naive.vim(dict(model.state_dict()), images().double(), (3, 0, 2), cls, order, "size", place)
    assert len(held) == 3
    start = [i for i in range(model.num_tokens) if i != model.cls_index]
    for image in range(2):
        at = start
        for layer in range(3):
            at = [kept["places"][layer][image][i] for i in at]
            assert held[layer][image].tolist() == at
            sizes = torch.bincount(held[layer][image], minlength=kept["sizes"][layer].shape[1])
            cls_alone = int(cls != "none")
            assert (kept["sizes"][layer][image] - sizes).sum() == cls_alone
            assert (kept["sizes"][layer][image] - sizes).count_nonzero() == cls_alone


def test_trace_without_fusion_and_without_gradients() -> None:
    model = tiny(cls_position="middle")
    held = model.trace(images())
    assert [h.tolist() for h in held] == [[[0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12]] * 2] * 3
    assert [h.shape for h in tiny(cls_position="none").trace(images(1))] == [(1, 12)] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cls_position": "center"}, "unknown cls_position 'center'.*; allowed: head, middle, none"),
        ({"cls_position": "heads"}, "did you mean 'head'"),
        ({"fusion_weighting": "sizes"}, "unknown fusion weighting 'sizes', did you mean 'size'.; allowed: mean, size"),
        ({"fusion_place": "after_scans"}, "place is .* did you mean 'after_scan'"),
        ({"fusion_order": "tomes"}, "unknown fusion order 'tomes', did you mean 'tome'"),
        ({"fusion": (1, 1)}, "the schedule has 2 entries, but the model has 3 layers"),
        ({"fusion": (7, 0, 0)}, "layer 0 removes 7 tokens of the 12 "),
        ({"fusion": (0, -1, 0)}, "layer 1 removes -1 tokens"),
        ({"img_size": 30, "patch_size": 16}, "image height 30 is not divisible by patch size 16; use 16 or 32"),
        ({"img_size": (32, 40), "patch_size": 16}, "image width 40 .* use 32 or 48"),
        ({"img_size": 8, "patch_size": 16}, "use 16 or 32"),
        ({"patch_size": 0}, "patch size 0"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**arguments)


def test_a_schedule_may_use_the_class_tokens_share_only_where_there_is_none() -> None:
    tiny(img_size=(2, 4), patch_size=(1, 4), cls_position="none", fusion=(1, 0, 0))
    with pytest.raises(ConfigError, match="layer 0 removes 1 tokens of the 1 that may fuse"):
        tiny(img_size=(1, 4), patch_size=(1, 4), cls_position="head", fusion=(1, 0, 0))


@pytest.mark.parametrize(
    "name", ["vim_micro_patch4_32", "vim_tiny_patch16_224", "vim_small_patch16_224", "vim_base_patch16_224"]
)
def test_timm_makes_the_models(name: str) -> None:
    assert timm.is_model(name)
    counts = schedule("upper", 24 if "micro" not in name else 8, 17, 8)
    with torch.device("meta"):
        model = timm.create_model(
            name,
            num_classes=5,
            img_size=32,
            patch_size=8,
            fusion=counts,
            fusion_order="tome",
            fusion_weighting="size",
            fusion_place="after_scan",
            cls_position="middle",
        )
    assert isinstance(model, Vim)
    assert model.fusion == counts
    assert model.pretrained_cfg["classifier"] == "head"
    if "micro" in name:
        assert model.to_empty(device="cpu")(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    data = timm.data.resolve_model_data_config(timm.create_model("vim_micro_patch4_32"))
    assert data["input_size"] == (3, 32, 32)
    assert data["interpolation"] == "bicubic"


def test_timm_conventions() -> None:
    model = timm.create_model("vim_micro_patch4_32", num_classes=7)
    assert model.num_classes == 7
    assert model.num_features == model.head_hidden_size == model.embed_dim == 64
    assert model.get_classifier() is model.head
    assert model.no_weight_decay() == {"pos_embed", "cls_token"}
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    model.double().reset_classifier(4)
    assert model.head.weight.dtype == torch.float64
    model.float().reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    features = model.forward_features(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 65, 64)
    assert torch.equal(model(torch.zeros(2, 3, 32, 32)), features[:, 0])
    with pytest.raises(ConfigError, match="cls_position"):
        model.reset_classifier(3, "avg")


def test_no_classes_gives_features() -> None:
    model = timm.create_model("vim_micro_patch4_32", num_classes=0)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 64)
    assert not [k for k in model.state_dict() if k.startswith("head")]


def test_weights_that_are_not_published_are_not_made_up() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True)
