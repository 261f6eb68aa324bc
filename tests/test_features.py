"""The feature table against encode, token by token."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.latents.table import features
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import BACKENDS, Place, get_site
from gemma_scope_tl.text.batch import as_batch
from tests.helpers import hooked, random_sae, random_tokens, shared_model

COLUMNS = ["sequence", "position", "token", "sae", "site", "layer", "latent", "activation"]


@pytest.fixture(scope="module")
def model() -> Any:
    return shared_model("grouped", "bridge")


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_active_latent_is_listed_once(backend: str) -> None:
    model = shared_model("grouped", backend)
    places = (("att", 1), ("transcoder", 2), ("embedding", None), ("res", 3))
    saes = [random_sae(model.dims, site, layer) for site, layer in places]
    table = features(model, "hello", saes)
    tokens = model.to_tokens("hello")
    for i, sae in enumerate(saes):
        name = get_site(sae.site).hook_name(sae.layer, backend)  # pyright: ignore
        _, cache = model.run_with_cache(tokens, names_filter=name)
        acts = sae.encode(cache[name].reshape(1, 6, -1))[0]
        mine = table[table["sae"] == i]
        assert set(mine["site"]) == {sae.site}
        assert mine["layer"].isna().all() if sae.layer is None else (mine["layer"] == sae.layer).all()
        assert len(mine) == int((acts[1:] > 0).sum())
        assert not mine.duplicated(["position", "latent"]).any()
        for row in mine.itertuples():
            assert row.activation == pytest.approx(acts[row.position, row.latent].item(), rel=1e-6)
            assert row.token == "hello"[row.position - 1]
        assert mine["position"].is_monotonic_increasing
        for _, rows in mine.groupby("position"):
            assert rows["activation"].is_monotonic_decreasing
    assert table["position"].min() == 1  # BOS is position 0 and left out
    assert table.columns.tolist() == COLUMNS


def test_one_forward_pass_for_all(model: Any) -> None:
    saes = [random_sae(model.dims, "res", layer, seed=seed) for layer in (0, 1) for seed in (0, 1)]
    passes: list[int] = []
    handle = model.embedding_module().register_forward_hook(lambda *_: passes.append(1))
    table = features(model, ["hi", "hello"], saes)
    handle.remove()
    assert len(passes) == 1
    for i, sae in enumerate(saes):  # two SAEs of one place stay apart
        alone = features(model, ["hi", "hello"], sae).drop(columns="sae")
        together = table[table["sae"] == i].drop(columns="sae").reset_index(drop=True)
        pd.testing.assert_frame_equal(together, alone)


def test_padding_does_not_shift_positions(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    together = features(model, ["hi", "hello"], sae)
    alone = features(model, "hi", sae)
    first = together[together["sequence"] == 0].reset_index(drop=True)
    assert first[["position", "token", "latent"]].equals(alone[["position", "token", "latent"]])
    torch.testing.assert_close(
        torch.tensor(first["activation"]), torch.tensor(alone["activation"]), rtol=1e-4, atol=1e-5
    )


def test_top_min_activation_and_special_tokens(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    everything = features(model, "hello", sae)
    top = features(model, "hello", sae, top=3)
    wanted = everything.groupby("position").head(3).reset_index(drop=True)  # strongest first
    pd.testing.assert_frame_equal(top, wanted)
    assert (top.groupby("position").size() == 3).all()
    floor = float(everything["activation"].median())
    strong = everything[everything["activation"] >= floor].reset_index(drop=True)
    assert 0 < len(strong) < len(everything)
    pd.testing.assert_frame_equal(features(model, "hello", sae, min_activation=floor), strong)
    both = features(model, "hello", sae, top=3, min_activation=floor)
    pd.testing.assert_frame_equal(both, wanted[wanted["activation"] >= floor].reset_index(drop=True))
    pd.testing.assert_frame_equal(features(model, "hello", sae, top=10_000), everything)
    special = features(model, "hello", sae, exclude_special_tokens=False)
    assert special["position"].min() == 0
    assert set(special[special["position"] == 0]["token"]) == {"<bos>"}
    pd.testing.assert_frame_equal(special[special["position"] > 0].reset_index(drop=True), everything)


def test_loaded_latents_make_the_rows_of_their_sae(model: Any) -> None:
    sae, chosen = random_sae(model.dims, "res", 1), [200, 3, 17, 99, 54]
    some = Latents(
        tuple(chosen),
        sae.W_dec[chosen],
        sae.b_enc[chosen],
        sae.threshold[chosen],
        W_enc=sae.W_enc[:, chosen],
        site="res",
        layer=1,
    )
    whole = features(model, "hello", sae)
    wanted = whole[whole["latent"].isin(chosen)].reset_index(drop=True)
    assert len(wanted) > 5
    pd.testing.assert_frame_equal(features(model, "hello", some), wanted, rtol=1e-5)
    pd.testing.assert_frame_equal(
        features(model, "hello", [some, sae]).query("sae == 1")[COLUMNS[4:]].reset_index(drop=True), whole[COLUMNS[4:]]
    )


def test_errors(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    for wrong in ({"top": 0}, {"min_activation": -1.0}, {"min_activation": float("nan")}, {"batch_size": 0}):
        with pytest.raises(GemmaScopeError, match="must be (1 or more|a number of at least 0)"):
            features(model, "hello", sae, **wrong)
    rows = Latents((0,), sae.W_dec[:1], sae.b_enc[:1], sae.threshold[:1], site="res", layer=1)
    with pytest.raises(SpliceError, match="encoder columns"):
        features(model, "hello", rows)


ENDS = [("embedding", None, 0), ("att", 1, 1), ("res", 1, 1), ("mlp", 3, 3)]
"""Sites, layers, and the number of blocks that end: a hook on the residual stream behind a block runs inside it."""


def _watched(model: Any, ran: list[str]) -> list[Any]:
    """Hooks that note the blocks that end and the unembedding."""

    def note(name: str) -> Any:
        return lambda *_: ran.append(name)

    handles = [block.register_forward_hook(note(f"block {i}")) for i, block in enumerate(model.blocks)]
    return [
        *handles,
        model.ln_final.register_forward_pre_hook(note("end")),
        model.unembed.register_forward_hook(note("logits")),
    ]


class Sizes(TorchDispatchMode):
    """Notes the entries of every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("site", "layer", "ended"), [("embedding", None, 0), ("att", 1, 1), ("res", 1, 1), ("mlp", 3, 3)]
)
def test_a_pass_ends_at_the_site(backend: str, site: str, layer: int | None, ended: int) -> None:
    model, ran = shared_model("grouped", backend), list[str]()
    handles = _watched(model, ran)
    try:
        features(model, ["hello", "hi"], random_sae(model.dims, site, layer))
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [f"block {i}" for i in range(ended)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_places_are_those_of_a_whole_pass_to_the_bit(backend: str) -> None:
    model = shared_model("grouped", backend)
    places = [
        Place("embedding", None),
        *(Place(site, i) for i in range(4) for site in ("res", "mlp", "att", "transcoder")),
    ]
    batch = as_batch(model, ["hello", "hi"])
    names = {place: get_site(place.site).hook_name(place.layer, backend) for place in places}  # pyright: ignore
    _, cache = model.run_with_cache(batch.ids, attention_mask=batch.attention_mask, names_filter=list(names.values()))
    for chosen in (*([place] for place in places), places[::-1]):
        found = read_places(model, batch.ids, chosen, batch.attention_mask)
        assert set(found) == set(chosen)
        for place, value in found.items():
            assert torch.equal(value, cache[names[place]].reshape(value.shape)), place


def _wide(vocabulary: int, layers: int = 2) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    config = Gemma2Config(vocab_size=vocabulary, num_hidden_layers=layers, attn_implementation="eager", **sizes)
    return Gemma2ForCausalLM(config).eval()


def _few(model: Any, d_sae: int) -> Any:
    """An SAE whose latents rarely fire on the first layer's residual stream."""
    sae = random_sae(model.dims, "res", 0, d_sae=d_sae)
    with torch.no_grad():
        sae.threshold.add_(3.5)
    return sae


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_of_the_vocabulary_or_of_all_latents_is_made(backend: str) -> None:
    model = hooked(_wide(40_000), backend, check=False)
    sae = _few(model, 1 << 17)
    tokens = random_tokens(model, 4, 32)
    with Sizes() as sizes:
        table = features(model, tokens, sae)
    assert 0 < len(table) < 100_000
    assert sizes.largest <= sae.W_enc.numel() < 4 * 32 * sae.cfg.d_sae  # the largest is a view of the weights
    with Sizes() as whole, torch.no_grad():
        model(tokens)
    assert whole.largest >= 4 * 32 * 40_000  # which the first assertion would see


PEAK = """
import sys
from pathlib import Path
import torch
import gemma_scope_tl as gs
from tests.helpers import random_tokens, hooked
from tests.test_features import _few, _wide
model = hooked(_wide(256_000), sys.argv[1], check=False)
sae, tokens = _few(model, 16384), random_tokens(model, 4, 128)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
gs.features(model, tokens[:1, :8], sae)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
table = gs.features(model, tokens, sae)
print(len(table), (peak() - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads the peak from /proc")
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_memory_at_a_vocabulary_of_256k(backend: str) -> None:
    """Logits of the four texts would take 500 MiB twice, and dense latents 32 MiB; a block of these takes 8."""
    out = subprocess.run([sys.executable, "-c", PEAK, backend], capture_output=True, text=True, check=True)
    rows, peak = out.stdout.split()
    assert 2_000 < int(rows) < 40_000
    assert float(peak) < 24


def test_batches_change_nothing_but_rounding(model: Any) -> None:
    """Passes of other sizes round differently: float32 at 64 dimensions, relative to activations of order one."""
    texts = ["hello", "hi", "a longer text than the others", "", "three", "hello there"]
    saes = [random_sae(model.dims, "res", 1), random_sae(model.dims, "att", 2)]
    whole = features(model, texts, saes)
    passes: list[tuple[int, ...]] = []
    handle = model.embedding_module().register_forward_hook(lambda _m, args, _o: passes.append(tuple(args[0].shape)))
    try:
        parts = features(model, texts, saes, batch_size=2)
    finally:
        handle.remove()
    assert passes == [(2, 3), (2, 6), (2, 30)]  # by length, without the padding of longer texts
    assert sorted(set(whole["sequence"])) == [0, 1, 2, 4, 5]  # "" is BOS alone
    key = ["sae", "sequence", "position", "latent"]
    one, other = (table.sort_values(key).reset_index(drop=True) for table in (whole, parts))
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)
    order = parts[["sae", "sequence", "position"]]
    pd.testing.assert_frame_equal(order, order.sort_values(list(order)).reset_index(drop=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hooks_and_saes_before_the_end_act_and_those_behind_do_not_run(backend: str) -> None:
    model, ran = shared_model("grouped", backend), list[int]()
    sae = random_sae(model.dims, "res", 1)
    plain = features(model, "hello", sae)

    def double(value: torch.Tensor, hook: Any) -> torch.Tensor:
        ran.append(0)
        return 2 * value

    def behind(value: torch.Tensor, hook: Any) -> None:
        ran.append(1)

    hooks = [("blocks.1.hook_resid_post", double), ("blocks.2.hook_resid_post", behind)]
    with model.hooks(fwd_hooks=hooks):
        edited = features(model, "hello", sae)
    assert ran == [0]
    assert not edited["activation"].equals(plain["activation"])
    with model.saes([random_sae(model.dims, "res", 0, seed=3)]):
        spliced = features(model, "hello", sae)
    assert not spliced["activation"].equals(plain["activation"])
    with model.saes([random_sae(model.dims, "res", 3, seed=3)]):
        pd.testing.assert_frame_equal(features(model, "hello", sae), plain)
    pd.testing.assert_frame_equal(features(model, "hello", sae), plain)  # nothing is left behind
