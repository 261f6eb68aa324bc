"""Dtypes and devices by name: a name is right, or the error says what is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.dtypes import available_devices, parse_device, parse_dtype
from gemma_scope_tl.errors import DeviceError, GemmaScopeError, UnknownNameError


@pytest.mark.parametrize(
    ("given", "device"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), (torch.device("cpu"), "cpu"), ("meta", "meta")],
)
def test_devices_that_are_everywhere(given: Any, device: str) -> None:
    assert parse_device(given) == torch.device(device)


def test_no_device_means_cuda_where_there_is_one() -> None:
    assert parse_device(None) == torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("given", ["cuda:99", "cpu:3", "CUDA", "cuda:x", "nonsense", "", "hpu", 99, True, 1.5])
def test_other_devices_are_refused_with_those_that_are_there(given: Any) -> None:
    with pytest.raises(DeviceError, match=r"Available: cpu") as caught:
        parse_device(given)
    assert repr(str(given)) in str(caught.value)
    assert isinstance(caught.value, GemmaScopeError)
    assert isinstance(caught.value, RuntimeError)  # what torch raises for the same strings


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_accelerators_count_as_torch_counts_them(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = getattr(torch, kind)
    monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(module, "device_count", lambda: 2)
    assert parse_device(kind) == torch.device(kind)
    assert parse_device(f"{kind}:1") == torch.device(kind, 1)
    with pytest.raises(DeviceError):
        parse_device(f"{kind}:2")
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="not available here"):
        parse_device(kind)


def test_tensors_can_be_made_on_every_device_listed() -> None:
    for name in available_devices():
        assert torch.zeros(1, device=parse_device(name)).item() == 0


@pytest.mark.parametrize("given", ["float31", "", None, 32, torch.int8, True])
def test_a_dtype_that_is_none(given: Any) -> None:
    with pytest.raises(UnknownNameError, match="Unknown dtype"):
        parse_dtype(given)
