"""Test the choice of a backend, and the errors of ops."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import naive
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from famba.errors import BackendError, ConfigError
from famba.ops import (
    add_rms_norm,
    backends,
    causal_conv1d,
    fuse_tokens,
    reference,
    registry,
    selective_scan,
    use_backend,
)
from famba.ops.definition import check_shapes

NAMES = ["cuda", "triton", "mamba_ssm", "native", "reference"]


@pytest.fixture(autouse=True)
def no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_chosen", None)
    monkeypatch.setattr(registry, "_warned", False)
    monkeypatch.delenv("FAMBA_BACKEND", raising=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions called on a further backend, "counted", which is the reference's otherwise."""
    called: list[str] = []

    class Counting(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            function = getattr(reference, name)
            return lambda *args: (called.append(name), function(*args))[1]

    monkeypatch.setitem(sys.modules, "counted_kernels", Counting("counted_kernels"))
    monkeypatch.setitem(registry._BACKENDS, "counted", registry.Backend("counted_kernels", ("cpu",), lambda: None))
    return called


def run_all() -> torch.Tensor:
    x = torch.ones(1, 2, 3, requires_grad=True)
    states = torch.ones(1, 2, 4)
    y = selective_scan(x, x, -torch.ones(3, 4), states, states)
    return add_rms_norm(causal_conv1d(y, torch.ones(3, 2)), x, torch.ones(3), 1e-5)[0].sum()


def test_backends_maps_each_name_to_what_hinders_it_and_such_a_choice_changes_nothing() -> None:
    known = backends()
    assert list(known) == NAMES
    assert known["reference"] is None
    for name, obstacle in known.items():
        if obstacle is not None:
            reason, _, remedy = obstacle.rpartition("; ")
            assert reason, f"{name} names no reason"
            assert remedy.startswith(("use ", "pip ", "export ", "install ")), f"{name} names no remedy"
            before = registry.resolve("cpu")
            with pytest.raises(BackendError, match=name) as caught:
                use_backend(name)
            assert obstacle in str(caught.value)
            assert registry.resolve("cpu") == before


def test_unknown_backends_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(BackendError, match="did you mean 'reference'") as caught:
        use_backend("refrence")
    assert all(name in str(caught.value) for name in [*NAMES, "auto"])
    assert isinstance(caught.value, RuntimeError)


def test_use_backend_in_a_block_restores_the_choice_before_it(calls: list[str]) -> None:
    with use_backend("counted"):
        run_all()
        with use_backend("reference"):
            before = list(calls)
            run_all()
            assert calls == before
        run_all()
        assert len(calls) == 2 * len(before)
        with pytest.raises(ZeroDivisionError), use_backend("reference"):
            _ = 1 / 0
        assert registry.resolve("cpu") == "counted"
    calls.clear()
    run_all()
    assert not calls


def test_use_backend_alone_is_a_switch_and_the_backward_runs_where_the_forward_ran(calls: list[str]) -> None:
    use_backend("counted")
    loss = run_all()
    assert sorted(calls) == ["add_rms_norm", "causal_conv1d", "selective_scan"]
    use_backend("auto")
    calls.clear()
    run_all()
    assert not calls
    loss.backward()
    assert sorted(calls) == ["add_rms_norm_backward", "causal_conv1d_backward", "selective_scan_backward"]


def test_the_environment_variable_chooses(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAMBA_BACKEND", "counted")
    run_all()
    assert calls
    calls.clear()
    with use_backend("reference"):
        run_all()
    assert not calls, "a choice in the program goes before the environment's"
    monkeypatch.setenv("FAMBA_BACKEND", "nativ")
    with pytest.raises(BackendError, match="'nativ', did you mean 'native'"):
        run_all()


def test_auto_passes_over_what_cannot_be_used_or_serves_another_device(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = registry._BACKENDS["counted"]
    known = {name: registry._BACKENDS[name] for name in ("native", "reference")}
    monkeypatch.setattr(registry, "_BACKENDS", {"counted": counted, **known})
    assert registry.resolve("cpu") == "counted"
    assert registry.resolve("cuda") == "reference"
    broken = registry.Backend(counted.module, counted.devices, lambda: "broken; mend it")
    monkeypatch.setattr(registry, "_BACKENDS", {"counted": broken, "reference": registry._BACKENDS["reference"]})
    assert registry.resolve("cpu") == "reference"
    assert registry.explain("cpu") == "reference (counted: broken)"


def replace_gpu_backends(monkeypatch: pytest.MonkeyPatch, **obstacles: str | None) -> None:
    """Let backends of GPUs be usable, or hindered by what is given."""
    for name, obstacle in obstacles.items():
        known = registry._BACKENDS[name]
        usable = replace(known, obstacle=lambda obstacle=obstacle: obstacle, on_request=tuple)
        monkeypatch.setitem(registry._BACKENDS, name, usable)


def test_auto_takes_what_is_fastest_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_gpu_backends(monkeypatch, cuda=None, triton=None, mamba_ssm=None)
    assert registry.resolve("cuda", torch.bfloat16) == "cuda"
    assert registry.explain("cuda", torch.bfloat16) == "cuda"
    replace_gpu_backends(monkeypatch, cuda="no compiler; install one")
    assert registry.explain("cuda", torch.bfloat16) == "triton (cuda: no compiler)"
    replace_gpu_backends(monkeypatch, triton="too old a GPU; buy another")
    assert registry.explain("cuda", torch.bfloat16) == "mamba_ssm (cuda: no compiler; triton: too old a GPU)"


def run_on_a_gpu_without_values(dtype: torch.dtype) -> None:
    with FakeTensorMode():
        x, weight = torch.empty(1, 2, 4, dtype=dtype, device="cuda"), torch.empty(4, device="cuda")
        add_rms_norm(x, None, weight, 1e-5)


def test_the_reference_on_a_gpu_is_warned_of_once_but_not_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace_gpu_backends(monkeypatch, cuda="missing; install it", triton="not installed; pip install triton")
    with use_backend("reference"):
        run_on_a_gpu_without_values(torch.float32)
    run_all()
    registry.resolve("cuda")
    assert not caplog.records, "a question is no use"
    for _ in range(2):
        run_on_a_gpu_without_values(torch.float32)
    (warning,) = caplog.records
    assert (warning.name, warning.levelname) == ("famba.ops.registry", "WARNING")
    assert "hundreds of times slower" in warning.getMessage()
    assert warning.getMessage().endswith("triton: not installed; pip install triton")


def test_the_reference_for_a_dtype_that_no_kernel_serves_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    replace_gpu_backends(monkeypatch, triton=None)
    run_on_a_gpu_without_values(torch.float64)
    assert "triton: serves float32 and bfloat16 and float16 alone; cast the tensors" in caplog.text


def test_the_interpreter_of_triton_is_named_where_auto_passes_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if registry.backends()["triton"] is None:
        slow = registry.slow_choice("cuda")
        assert slow is not None
        assert slow.endswith("triton: taken only by name where TRITON_INTERPRET=1 is set; unset it")


def test_a_backend_for_another_device_is_refused(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = registry.Backend("counted_kernels", ("cuda",), lambda: None)
    monkeypatch.setitem(registry._BACKENDS, "counted", elsewhere)
    use_backend("counted")
    with pytest.raises(BackendError, match="'counted' does not serve 'cpu' tensors, only cuda; use 'auto'"):
        run_all()


def scan_arguments(**changes: Any) -> dict[str, Any]:
    shapes = dict.fromkeys(("u", "delta"), (2, 3, 4)) | {"A": (4, 5)} | dict.fromkeys(("B", "C"), (2, 3, 5))
    shapes |= {"D": (4,), "z": (2, 3, 4), "delta_bias": (4,)}
    return {name: torch.zeros(shape) for name, shape in shapes.items()} | changes


def conv_arguments(**changes: Any) -> dict[str, Any]:
    return {"x": torch.zeros(2, 3, 4), "weight": torch.zeros(4, 2), "bias": torch.zeros(4)} | changes


def norm_arguments(**changes: Any) -> dict[str, Any]:
    tensors = {"x": torch.zeros(2, 3, 4), "residual": torch.zeros(2, 3, 4), "weight": torch.zeros(4)}
    return tensors | {"eps": 1e-5} | changes


OPS = {
    "selective_scan": (selective_scan, scan_arguments),
    "causal_conv1d": (causal_conv1d, conv_arguments),
    "add_rms_norm": (add_rms_norm, norm_arguments),
}
ARGUMENTS = [
    (op, name) for op, (_, make) in OPS.items() for name, value in make().items() if isinstance(value, torch.Tensor)
]


@pytest.mark.parametrize(("op", "name"), ARGUMENTS)
@pytest.mark.parametrize("fault", ["shape", "rank", "dtype", "complex", "device"])
def test_what_does_not_fit_is_refused_by_name(op: str, name: str, fault: str) -> None:
    function, make = OPS[op]
    good = make()[name]
    changed = 2 if name in ("u", "x") else 0
    bad = {
        "shape": torch.zeros([n + (i == changed) for i, n in enumerate(good.shape)]),
        "rank": good.unsqueeze(0),
        "dtype": good.long(),
        "complex": good.to(torch.complex64),
        "device": good.to("meta"),
    }[fault]
    with naive.as_users_run_it(), pytest.raises(ConfigError) as caught:
        function(**make(**{name: bad}))
    message = str(caught.value)
    assert message.startswith(f"{op}: ")
    # Where the shapes are measured by this very argument, another one is the first that does not fit.
    measure = name in ("u", "x") and fault in ("shape", "device")
    if not measure:
        assert f" {name} " in message
    told = {"device": ("meta", "cpu"), "shape": ("has shape", "expected"), "rank": ()}.get(fault, (str(bad.dtype),))
    assert all(text in message for text in told)


def test_unknown_activations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"activation 'relu'; allowed: None, 'silu'"):
        causal_conv1d(**conv_arguments(activation="relu"))


def test_tensors_without_data_give_shapes() -> None:
    on_meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in scan_arguments().items()}
    assert selective_scan(**on_meta).shape == (2, 3, 4)


def test_what_may_not_be_left_out_is_named() -> None:
    x = torch.ones(1, 2, 3)
    check_shapes("selective_scan", "u", u=(x, (1, 2, 3)), z=(None, (1, 2, 3)))
    with pytest.raises(ConfigError, match=r"selective_scan: delta is None, expected a tensor of shape \(1, 2, 3\)"):
        check_shapes("selective_scan", "u", u=(x, (1, 2, 3)), delta=(None, (1, 2, 3)))


def test_a_length_that_no_sequence_has_is_refused() -> None:
    x = torch.ones(1, 2, 3)
    for length in (-1, 2**62):
        with pytest.raises(ConfigError, match="expected 0 to 2147483647"):
            fuse_tokens(x, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2), length)
