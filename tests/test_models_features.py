"""Features of patches, whatever has fused, against a straight-line computation; timm's ways of asking for them."""

from __future__ import annotations

import itertools
from typing import Any

import naive
import pytest
import timm
import torch
from timm.layers import Format
from torch import Tensor, nn

import famba  # noqa: F401 - registers the models
from famba.errors import ConfigError
from famba.fusion import unfuse
from famba.models import Vim

ROWS, COLUMNS = 4, 3
SHAPE = {"img_size": (8, 12), "patch_size": (2, 4), "embed_dim": 20, "num_classes": 3, "d_state": 3}
SCHEDULE = (3, 0, 2)
CLS_POSITIONS = ("head", "middle", "none")
WAYS = list(
    itertools.product(CLS_POSITIONS, ("sequence", "tome"), ("before_mixer", "after_scan"), ("mean", "size"))
)  # fmt: skip


def tiny(seed: int = 0, **changes: Any) -> Vim:
    """A small Vim, no parameter of which has a special first value."""
    torch.manual_seed(seed)
    model = Vim(**{**SHAPE, "depth": 3, **changes})
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def spread(model: Vim, kept: dict[str, Any], streams: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer each patch's features (b, patches, d), and the class token's (b, d): token by token."""
    patches = [i for i in range(model.num_tokens) if i != model.cls_index]
    found, classes = [], []
    for layer, stream in enumerate(streams):
        rows, cls = [], []
        for image in range(len(stream)):
            at = list(range(model.num_tokens))
            for places in kept["places"][: layer + 1]:
                at = [places[image][i] for i in at]
            rows.append(torch.stack([stream[image, at[i]] for i in patches]))
            if model.cls_index is not None:
                cls.append(stream[image, at[model.cls_index]])
        found.append(torch.stack(rows))
        classes.append(torch.stack(cls) if cls else stream[:, 0])
    return found, classes


def grid(patches: Tensor) -> Tensor:
    """Patches (b, n, d) as a picture (b, d, rows, columns), pixel by pixel."""
    picture = patches.new_zeros(len(patches), patches.shape[2], ROWS, COLUMNS)
    for row, column in itertools.product(range(ROWS), range(COLUMNS)):
        picture[:, :, row, column] = patches[:, row * COLUMNS + column]
    return picture


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# Unfusing


def test_each_patch_gets_its_tokens_features() -> None:
    tokens = torch.randn(2, 4, 5)
    places = torch.tensor([[0, 3, 3, 1, 2, 0], [2, 2, 2, 2, 0, 1]])
    found = unfuse(tokens, places)
    assert found.shape == (2, 6, 5)
    for image, patch in itertools.product(range(2), range(6)):
        assert torch.equal(found[image, patch], tokens[image, int(places[image, patch])])
    assert unfuse(tokens.bfloat16(), places).dtype == torch.bfloat16
    assert unfuse(tokens[:0], places[:0]).shape == (0, 6, 5)


def test_gradients_of_patches_add_up_in_their_token() -> None:
    tokens = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([[0, 3, 3, 1, 2, 0], [2, 2, 2, 2, 0, 1]])
    assert torch.autograd.gradcheck(lambda t: unfuse(t, places), (tokens,))
    unfuse(tokens, places).sum().backward()
    assert tokens.grad is not None
    held = torch.stack([torch.bincount(row, minlength=4) for row in places])
    assert torch.equal(tokens.grad, held[:, :, None].expand(-1, -1, 3).double())


def test_tokens_and_places_of_other_images_are_refused() -> None:
    with naive.as_users_run_it(), pytest.raises(ConfigError, match="tokens of 4 images and places of 2"):
        unfuse(torch.randn(4, 3, 2), torch.zeros(2, 5, dtype=torch.int64))


# Against the straight line


@pytest.mark.parametrize(("cls", "order", "place", "weighting"), WAYS)
def test_features_are_those_of_the_equations(cls: str, order: str, place: str, weighting: str) -> None:
    options = {"fusion_order": order, "fusion_place": place, "fusion_weighting": weighting}
    model = tiny(cls_position=cls, fusion=SCHEDULE, **options).double()
    x = images().double()
    weights = dict(model.state_dict())
    _, kept = naive.vim(weights, x, SCHEDULE, cls, order, weighting, place)
    raw, _ = spread(model, kept, kept["streams"])
    norms = [naive.add_rms_norm(stream, None, weights["norm_f.weight"], 1e-5)[0] for stream in kept["streams"]]
    normed, normed_cls = spread(model, kept, norms)

    final, maps = model.forward_intermediates(x)
    assert [m.shape for m in maps] == [(2, 20, ROWS, COLUMNS)] * 3
    for found, wanted in zip(maps, raw, strict=True):
        close(found, grid(wanted))
    pairs = model.forward_intermediates(x, None, True, norm=True, output_fmt="NLC", intermediates_only=True)
    for found, wanted, of_cls in zip(pairs, normed, normed_cls, strict=True):
        if cls == "none":
            close(found, wanted)
        else:
            close(found[0], wanted)
            close(found[1], of_cls[:, None])

    assert torch.equal(final, model.forward_features(x))
    assert final.shape == (2, model.num_tokens, 20)
    patches = [i for i in range(model.num_tokens) if i != model.cls_index]
    close(final[:, patches], normed[-1])
    if model.cls_index is not None:
        close(final[:, model.cls_index], normed_cls[-1])


@pytest.mark.parametrize(("cls", "order", "place", "weighting"), WAYS[::3])
def test_gradients_are_those_of_the_equations(cls: str, order: str, place: str, weighting: str) -> None:
    options = {"fusion_order": order, "fusion_place": place, "fusion_weighting": weighting}
    model = tiny(cls_position=cls, fusion=SCHEDULE, **options).double()
    weights = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    _, kept = naive.vim(weights, images().double(), SCHEDULE, cls, order, weighting, place)
    wanted, _ = spread(model, kept, kept["streams"])
    maps = model.forward_intermediates(images().double(), (0, 2), output_fmt="NLC", intermediates_only=True)
    loss = torch.zeros((), dtype=torch.float64)
    expected = torch.zeros((), dtype=torch.float64)
    for found, layer in zip(maps, (0, 2), strict=True):
        direction = torch.randn(found.shape, dtype=torch.float64)
        loss, expected = loss + (found * direction).sum(), expected + (wanted[layer] * direction).sum()
    loss.backward()
    expected.backward()
    for name, p in model.named_parameters():
        if name.startswith(("head", "norm_f")):
            assert p.grad is None
            continue
        gradient = weights[name].grad
        assert gradient is not None, name
        torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item(), msg=name)


@pytest.mark.parametrize("mode", ["fuse", "prune"])
@pytest.mark.parametrize("order", ["sequence", "tome"])
def test_patches_that_are_alike_share_features(order: str, mode: str) -> None:
    # Patches 0 and 1 are equal, and 2 and 3, so these are the pairs.
    torch.manual_seed(0)
    options = {"fusion": (2, 0), "fusion_order": order, "fusion_mode": mode}
    model = Vim(img_size=(4, 16), patch_size=4, embed_dim=24, depth=2, num_classes=3, **options)
    with torch.no_grad():
        model.pos_embed.zero_()
    x = torch.randn(3, 3, 4, 2, 4).repeat_interleave(2, dim=3).reshape(3, 3, 4, 16)
    tokens = model.trace(x)[0]
    assert tokens.tolist() == [[1, 1, 2, 2]] * 3
    features = model.forward_intermediates(x, [0], output_fmt="NLC", intermediates_only=True)[0]
    assert torch.equal(features[:, 0], features[:, 1])
    assert torch.equal(features[:, 2], features[:, 3])
    assert not torch.allclose(features[:, 0], features[:, 2])


# Without fusion


@pytest.mark.parametrize("cls", CLS_POSITIONS)
def test_without_fusion_they_are_the_plain_features(cls: str) -> None:
    model = tiny(cls_position=cls)
    left: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda m, args, out: left.append(out[0] + out[1]))
    final, maps = model.forward_intermediates(images(), output_fmt="NLC")
    patches = [i for i in range(model.num_tokens) if i != model.cls_index]
    for found, stream in zip(maps, left, strict=True):
        assert torch.equal(found, stream[:, patches])
    assert torch.equal(final, model.norm_f(left[-1], None)[0])
    pictures = model.forward_intermediates(images(), intermediates_only=True)
    assert all(torch.equal(picture, grid(found)) for picture, found in zip(pictures, maps, strict=True))
    assert all(picture.is_contiguous() for picture in pictures)


def test_asking_for_features_changes_no_logits() -> None:
    model = tiny(fusion=SCHEDULE, cls_position="middle", drop_path_rate=0.5).train()
    torch.manual_seed(5)
    alone = model(images())
    torch.manual_seed(5)
    final, _ = model.forward_intermediates(images())
    assert torch.equal(model.forward_head(final), alone)


# Classification from features


@pytest.mark.parametrize(("cls", "order", "place", "weighting"), WAYS)
def test_the_head_finds_the_class_token_where_it_began(cls: str, order: str, place: str, weighting: str) -> None:
    options = {"fusion_order": order, "fusion_place": place, "fusion_weighting": weighting}
    model = tiny(cls_position=cls, fusion=(5, 1, 0), **options)
    features, logits = model.forward_features(images(3)), model(images(3))
    if cls == "none" and weighting == "mean":
        with pytest.raises(ConfigError, match="mean over its tokens.*weighting='size'"):
            model.forward_head(features)
        return
    close(model.forward_head(features), logits)
    if cls != "none":
        assert torch.equal(model.forward_head(features), logits)
        _, pairs = model.forward_intermediates(images(3), 1, return_prefix_tokens=True, norm=True)
        assert torch.equal(model.head(pairs[0][1][:, 0]), logits)
    before = model.forward_head(features, pre_logits=True)
    assert before.shape == (3, 20)
    assert torch.equal(model.head(before), model.forward_head(features))


def test_the_mean_of_all_patches_needs_no_sizes_where_nothing_fuses() -> None:
    model = tiny(cls_position="none")
    assert torch.equal(model.forward_head(model.forward_features(images())), model(images()))


def test_the_head_refuses_other_numbers_of_tokens() -> None:
    with pytest.raises(ConfigError, match="given 12 tokens per image; allowed: .*13"):
        tiny().forward_head(torch.zeros(2, 12, 20))


# Which layers


def test_layers_are_chosen_as_timm_has_it() -> None:
    model, reference = tiny(depth=4, fusion=(2, 0, 2, 0)), timm.create_model("test_vit", depth=4)
    _, everything = model.forward_intermediates(images())
    for indices in (None, 1, 3, 4, [0], [1, 3], (-1, 0), [-4, -2], [3, 1], [2, 2]):
        _, found = model.forward_intermediates(images(), indices)
        _, of_timm = reference.forward_intermediates(torch.zeros(1, 3, 160, 160), indices)
        assert len(found) == len(of_timm)
        taken = range(4)[-indices:] if isinstance(indices, int) else [i % 4 for i in indices or range(4)]
        wanted = [everything[i] for i in sorted(set(taken))]
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (0, "indices is 0, a number of last layers; allowed: 1 to 3"),
        (4, "indices is 4"),
        (-1, "indices is -1"),
        (True, "indices is True"),
        ([3], r"indices is \[3\]; allowed: a list of layers from 0 to 2 \(or from -3 to -1"),
        ([0, -4], r"indices is \[0, -4\]"),
        ([], r"indices is \[\]"),
        ([1.0], r"indices is \[1.0\]"),
        ("12", "indices is '12'"),
        (2.0, "indices is 2.0"),
    ],
)
def test_layers_that_do_not_exist_are_refused(indices: Any, message: str) -> None:
    for ask in (lambda: tiny().forward_intermediates(images(), indices),
                lambda: tiny().prune_intermediate_layers(indices)):  # fmt: skip
        with naive.as_users_run_it(), pytest.raises(ConfigError, match=message):
            ask()


def test_other_formats_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown output_fmt 'NHWC', did you mean 'NCHW'.*allowed: NCHW, NLC"):
        tiny().forward_intermediates(images(), output_fmt="NHWC")
    _, by_enum = tiny().forward_intermediates(images(), 1, output_fmt=Format.NLC)
    assert by_enum[0].shape == (2, 12, 20)


def test_stopping_early_leaves_out_the_layers_behind() -> None:
    model = tiny(depth=4, fusion=(2, 0, 2, 0))
    ran: list[int] = []
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda m, args, out, i=i: ran.append(i))
    whole, found = model.forward_intermediates(images(), [0, 2])
    assert ran == [0, 1, 2, 3]
    ran.clear()
    final, early = model.forward_intermediates(images(), [0, 2], stop_early=True)
    assert ran == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(found, early, strict=True))
    _, normed = model.forward_intermediates(images(), [2], norm=True, output_fmt="NLC")
    assert torch.equal(final[:, 1:], normed[0])
    assert not torch.equal(final, whole)


# How a model runs


@pytest.mark.parametrize("cls", CLS_POSITIONS)
@pytest.mark.parametrize("batch", [0, 1])
def test_few_images(batch: int, cls: str) -> None:
    model = tiny(cls_position=cls, fusion=SCHEDULE, fusion_weighting="size")
    final, maps = model.forward_intermediates(images(batch))
    assert final.shape == (batch, model.num_tokens, 20)
    assert [m.shape for m in maps] == [(batch, 20, ROWS, COLUMNS)] * 3
    if batch:
        together = model.forward_features(images(3))
        alone = torch.cat([model.forward_features(image[None]) for image in images(3)])
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"fusion": SCHEDULE, "cls_position": "middle"}, {"drop_path_rate": 0.5}])
def test_checkpointing_changes_nothing(options: dict[str, Any]) -> None:
    found = []
    for enable in (False, True):
        model = tiny(**options).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        final, maps = model.forward_intermediates(images(), [0, 1])
        loss = final.square().sum() + sum(m.square().sum() for m in maps)
        loss.backward()
        found.append([final, *maps, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_keeps_the_stream_precise() -> None:
    model = tiny(fusion=SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16):
        final, raw = model.forward_intermediates(images())
        _, normed = model.forward_intermediates(images(), norm=True)
        assert model.forward_head(final).dtype == torch.bfloat16
    assert {m.dtype for m in raw} == {torch.float32}
    assert {m.dtype for m in normed} == {final.dtype} == {torch.bfloat16}
    # Before anything fuses, by the same tokens: bfloat16 may choose others.
    _, exact = tiny().forward_intermediates(images(), [0])
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = tiny().forward_intermediates(images(), [0])
    torch.testing.assert_close(rounded[0], exact[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_features_are_of_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    final, maps = tiny(fusion=SCHEDULE).to(dtype).forward_intermediates(images().to(dtype))
    assert {final.dtype, *(m.dtype for m in maps)} == {dtype}


def test_what_drop_path_drops_is_in_no_features() -> None:
    model = tiny(drop_path_rate=0.999).train()
    torch.manual_seed(0)
    _, maps = model.forward_intermediates(images())
    # Of layers 1 and 2 all images drop what they add: half of it is let through with chance 0.5, 0.001.
    assert torch.equal(maps[2], maps[1])
    _, whole = model.eval().forward_intermediates(images())
    assert not torch.equal(whole[2], whole[1])


# timm's features_only


@pytest.mark.parametrize("pretrained", [False, True])
def test_timm_extracts_features(pretrained: bool) -> None:
    name, x = "vim_micro_patch4_32", torch.randn(2, 3, 32, 32)
    schedule = (0, 8, 8, 8, 8, 8, 8, 7)
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained, features_only=True, out_indices=(1, -4, 5), fusion=schedule)
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained, fusion=schedule)
    assert net.feature_info.channels() == [64, 64, 64]
    assert net.feature_info.reduction() == [4, 4, 4]
    assert net.feature_info.module_name() == ["layers.1", "layers.4", "layers.5"]
    found = net.eval()(x)
    wanted = model.eval().forward_intermediates(x, [1, 4, 5], intermediates_only=True)
    assert [f.shape for f in found] == [(2, 64, 8, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    names = dict(net.model.named_parameters())
    assert not [n for n in names if n.startswith(("layers.6", "layers.7", "norm_f", "head"))]
    found[-1].sum().backward()
    assert all(p.grad is not None for p in names.values())


def test_timm_extracts_features_at_any_size() -> None:
    with torch.device("meta"):
        net = timm.create_model("vim_tiny_patch16_224", features_only=True, out_indices=(5, 11, 17, 23), img_size=64)
        assert [f.shape for f in net(torch.zeros(2, 3, 64, 64))] == [(2, 192, 4, 4)] * 4
    assert net.feature_info.channels() == [192] * 4
    assert net.feature_info.reduction() == [16] * 4
    with torch.device("meta"):
        default = timm.create_model("vim_micro_patch4_32", features_only=True)
        wide = timm.create_model("vim_micro_patch4_32", features_only=True, patch_size=(2, 8))
    assert default.feature_info.module_name() == [f"layers.{i}" for i in (5, 6, 7)]
    assert set(wide.feature_info.reduction()) == {8}
    with pytest.raises(ConfigError, match=r"indices is \(0, 24\); allowed: a list of layers from 0 to 23"):
        timm.create_model("vim_tiny_patch16_224", features_only=True, out_indices=(0, 24))


def test_pruning_takes_what_it_is_told() -> None:
    model = tiny(depth=4, fusion=(2, 0, 2, 1), drop_path_rate=0.3)
    rest = tiny(depth=4, fusion=(2, 0, 2, 1), drop_path_rate=0.3)
    assert rest.prune_intermediate_layers([-3, 0], prune_head=False) == [1, 0]
    assert len(rest.layers) == 2
    assert rest.fusion == (2, 0)
    assert rest.drop_path.drop_prob == pytest.approx(model.layers[2].drop_path.drop_prob)
    final, _ = model.eval().forward_intermediates(images(), [1], stop_early=True)
    assert torch.equal(rest.eval().forward_features(images()), final)
    assert rest(images()).shape == (2, 3)
    assert rest.prune_intermediate_layers(2, prune_norm=True) == [0, 1]
    assert isinstance(rest.head, nn.Identity)
    _, maps = model.forward_intermediates(images(), [1], output_fmt="NLC")
    assert torch.equal(rest.forward_features(images())[:, 1:], maps[0])
    rest.set_fusion((1, 1))
    assert rest(images()).shape == (2, 20)
