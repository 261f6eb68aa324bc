"""Files of coders that span several layers: their values, and damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_scope_tl.sae.loading import load_folder
from tests.layered_files import KINDS, outputs


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_the_equations(name: str, mapped: bool, tmp_path: Path) -> None:
    kind = KINDS[name]
    kind.write(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.chmod(0o444 if mapped else 0o644)
    coder = load_folder(tmp_path)
    rng = np.random.default_rng(1)
    inputs = [rng.standard_normal((5, kind.d)).astype(np.float32) for _ in kind.layers]
    found = coder([torch.from_numpy(x) for x in inputs])
    for y, wanted in zip(found, outputs(kind.arrays(), inputs), strict=True):
        # sums of at most 64 float32 products and 24 terms of the skip connection
        assert torch.allclose(y.double(), torch.from_numpy(wanted), rtol=0, atol=5e-6)
    assert (coder.kind, coder.layers, coder.l0) == (kind.type, kind.layers, 12)
    rows = kind.width * len(kind.layers) * kind.d
    for k, plane in enumerate(coder.W_dec):
        assert plane.shape == (kind.width, len(kind.layers) - k, kind.d)
        # a mapped file is not copied: the view steps over the planes of earlier layers
        assert plane.stride(0) * kind.width == (rows if mapped else plane.numel())
