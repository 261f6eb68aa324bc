"""The site table says what the paper and the backends say."""

from __future__ import annotations

import pytest

from gemma_scope_tl.errors import SpliceError, UnknownNameError
from gemma_scope_tl.sites import BACKENDS, SITES, ModelDims, get_site, layer_of_hook, site_of_hook

GEMMA_2_2B = ModelDims(n_layers=26, d_model=2304, n_heads=8, d_head=256)
GEMMA_2_9B = ModelDims(n_layers=42, d_model=3584, n_heads=16, d_head=256)
GEMMA_2_27B = ModelDims(n_layers=46, d_model=4608, n_heads=32, d_head=128)


@pytest.mark.parametrize(
    ("dims", "att", "other"), [(GEMMA_2_2B, 2048, 2304), (GEMMA_2_9B, 4096, 3584), (GEMMA_2_27B, 4096, 4608)]
)
def test_widths_of_the_released_models(dims: ModelDims, att: int, other: int) -> None:
    widths = {name: site.d_in(dims) for name, site in SITES.items()}
    assert widths == {"res": other, "mlp": other, "att": att, "embedding": other, "transcoder": other}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SITES)
def test_hook_names_lead_back_to_the_site(name: str, backend: str) -> None:
    site = get_site(name)
    layer = 7 if site.per_layer else None
    read, write = site.hook_name(layer, backend), site.hook_name_out(layer, backend)  # pyright: ignore
    assert site_of_hook(read, write) == (site, layer)
    assert (read == write) is (not site.is_transcoder)


def test_hooks_before_the_post_norm_are_no_sites() -> None:
    for name in ("blocks.3.mlp.hook_out", "blocks.3.attn.hook_out", "blocks.3.hook_in", "hook_out"):
        with pytest.raises(UnknownNameError, match="Nearest"):
            site_of_hook(name)


def test_errors_name_what_is_valid() -> None:
    with pytest.raises(UnknownNameError, match="Unknown site 'ress'. Nearest: res"):
        get_site("ress")
    with pytest.raises(UnknownNameError, match="bridge"):
        get_site("res").hook_name(1, backend="brige")  # pyright: ignore
    with pytest.raises(SpliceError, match="give layer="):
        get_site("res").hook_name()
    with pytest.raises(SpliceError, match=r"0\.\.25"):
        get_site("res").check_layer(26, GEMMA_2_2B)
    get_site("embedding").check_layer(None, GEMMA_2_2B)


def test_dims_from_either_librarys_names() -> None:
    hf = {"num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8, "head_dim": 256}
    tl = {"n_layers": 26, "d_model": 2304, "n_heads": 8, "d_head": 256}
    assert ModelDims.from_config(hf) == ModelDims.from_config(tl) == GEMMA_2_2B
    with pytest.raises(UnknownNameError):
        ModelDims.from_config({"n_layers": 26})


def test_layer_of_hook() -> None:
    assert layer_of_hook("blocks.12.hook_out") == 12
    assert layer_of_hook("embed.hook_out") is None
