"""Every entry point on a Gemma 3 of the user's own with coders in Gemma Scope 2's layout, against plain Hugging Face.

Tolerances: two float32 programs whose logits are of size 5 differ by less than 1e-4. Random thresholds are so sparse
that no latent is within rounding of its own (asserted where counts are compared).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.contributing.draft import Options, draft_release
from gemma_scope_tl.registry import catalog, locate
from gemma_scope_tl.release.release_saes import About
from gemma_scope_tl.sae.access import trained_family
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sites import BACKENDS
from tests.families.gemma3_world import KINDS, LAYERS, NAME, RELEASE, TENSORS, World, make, module_of, path_of

TEXT = "The city of Paris is in France, and the river Seine runs through it to the sea."
PLACES = [(site, layer, affine) for site, affine in KINDS for layer in LAYERS]
ATOL = 2e-4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = make(tmp_path_factory.mktemp("world"))
    gs.register_release(made.registry)
    yield made
    locate.remove_file(made.registry.absolute())
    catalog.clear_cache()


@pytest.fixture(scope="module")
def plain(world: World) -> Any:
    return world.plain()


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest, world: World) -> Any:
    return gs.load_model(world.root / "model", backend=request.param)


def load(site: str, layer: int, affine: bool) -> Any:
    chosen = affine if site == "transcoder" else None
    return gs.load_sae(NAME, site, layer, "256", l0="medium", affine=chosen).requires_grad_(False)


@contextmanager
def reading(hf: Any, layer: int, name: str, seen: dict[str, torch.Tensor]) -> Generator[None]:
    """Keep a tensor of Hugging Face's model, as ``seen[name]``."""
    module, side = module_of(hf, layer, name)

    def keep(_module: Any, args: Any, out: Any) -> None:
        seen[name] = args[0] if side == "input" else out

    handle = module.register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def writing(hf: Any, layer: int, name: str, edit: Any) -> Generator[None]:
    """Replace a tensor of Hugging Face's model by ``edit`` of it."""
    module, side = module_of(hf, layer, name)
    if side == "input":
        handle = module.register_forward_pre_hook(lambda _module, args: (edit(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda _module, _args, out: edit(out))
    try:
        yield
    finally:
        handle.remove()


def ids_of(model: Any) -> torch.Tensor:
    return model.to_tokens(TEXT)


def test_each_coder_is_of_the_family_that_its_release_states(world: World) -> None:
    """Not of the first one, which the name of the user's model would mean."""
    for site, layer, affine in PLACES:
        sae = load(site, layer, affine)
        assert trained_family(sae).name == "gemma3"
        assert (sae.site, sae.layer) == (site, layer)
        names = sae.cfg.metadata
        assert names.hook_name == trained_family(sae).site(site).hook_name(layer, "hooked_transformer")
        latents = gs.load_latents(RELEASE, path_of(site, layer, affine), [3, 5])
        assert trained_family(latents).name == "gemma3"
        np.testing.assert_array_equal(latents.W_dec, world.arrays[path_of(site, layer, affine)]["w_dec"][[3, 5]])


@torch.no_grad()
def test_features_and_pages_list_what_the_equations_give(world: World, plain: Any, model: Any) -> None:
    ids, table = ids_of(model), None
    for site, layer, affine in PLACES:
        seen: dict[str, torch.Tensor] = {}
        with reading(plain, layer, TENSORS[site][1], seen):
            plain(ids)
        f = world.coder(site, layer, affine).encode(seen[TENSORS[site][1]][0].numpy())
        table = gs.features(model, ids, load(site, layer, affine), top=256)
        assert len(table) == (f[1:] > 0).sum()  # all but BOS
        wanted = f[table["position"], table["latent"]]
        np.testing.assert_allclose(table["activation"], wanted, rtol=1e-3, atol=ATOL)
    assert table is not None
    page = gs.feature_page(model, load("transcoder", 3, True), int(table["latent"][0]), [TEXT] * 8, context=32)
    assert "transcoder" in str(page.html if hasattr(page, "html") else page)


@torch.no_grad()
@pytest.mark.parametrize("unit", ["activation", "norm", "mean_norm"])
def test_steering_adds_the_decoder_row_where_the_coder_writes(world: World, plain: Any, model: Any, unit: str) -> None:
    """Strengths in norms mean the length of the tensor that is written, which on Gemma 3 differs much between sites."""
    ids, latent, strength = ids_of(model), 7, 0.5
    for site, layer, affine in PLACES:
        sae, row = load(site, layer, affine), torch.from_numpy(world.coder(site, layer, affine).arrays["w_dec"][7])
        ordinary = torch.ones(ids.shape[1], 1)
        ordinary[0] = 0
        seen: dict[str, torch.Tensor] = {}
        with reading(plain, layer, TENSORS[site][2], seen):
            clean = plain(ids).logits
        lengths = seen[TENSORS[site][2]].norm(dim=-1, keepdim=True)
        options: dict[str, Any] = {"unit": unit}
        if unit == "mean_norm":
            options["mean_norm"] = gs.mean_norms(model, ids, site, layer)
            lengths = lengths[:, 1:].mean()
        row = row if unit == "activation" else row / row.norm() * lengths

        with writing(plain, layer, TENSORS[site][2], lambda x, by=strength * row * ordinary: x + by):
            wanted = plain(ids).logits
        got = model.run_with_hooks(ids, fwd_hooks=[gs.steer(sae, latent, strength, **options)])
        assert float((wanted - clean).abs().max()) > 1e-2
        torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)


@torch.no_grad()
@pytest.mark.parametrize("edit", ["clamp", "ablate", "scale"])
def test_edits_of_latents_on_spliced_coders(world: World, plain: Any, model: Any, edit: str) -> None:
    """With the error term: the tensor changes by the change of the latents times their decoder rows."""
    ids, latents = ids_of(model), [3, 7, 11]
    function = {"clamp": lambda f: 2.0 - f, "ablate": lambda f: -f, "scale": lambda f: f}[edit]
    more = {"clamp": (2.0,), "ablate": (), "scale": (2.0,)}[edit]
    for site, layer, affine in PLACES:
        sae, coder, (_, reads, writes) = load(site, layer, affine), world.coder(site, layer, affine), TENSORS[site]
        seen: dict[str, torch.Tensor] = {}

        def change(y: torch.Tensor, at: str = reads, equations: Any = coder, kept: Any = seen) -> torch.Tensor:
            x = kept.get(at, y)  # an SAE reads what it writes
            by = function(equations.encode(x[0].numpy())[:, latents]) @ equations.wide["w_dec"][latents]
            by[0] = 0
            return y + torch.from_numpy(by).float()

        with ExitStack() as held:
            if reads != writes:
                held.enter_context(reading(plain, layer, reads, seen))
            held.enter_context(writing(plain, layer, writes, change))
            wanted = plain(ids).logits
        with gs.splice(model, sae, error_term=True):
            hook = getattr(gs, edit)(sae, latents, *more, on="features")
            got = model.run_with_hooks(ids, fwd_hooks=[hook])
        torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)


@torch.no_grad()
def test_evaluation_is_that_of_plain_hooks(world: World, plain: Any, model: Any) -> None:
    """L0, FVU and delta loss, without a soft-cap; losses are those of predictions at ordinary tokens, all but BOS."""
    ids = torch.cat([ids_of(model), ids_of(model).flip(1).roll(1, 1)])
    assert plain.config.final_logit_softcapping is None

    def loss() -> float:
        logits = plain(ids).logits[:, 1:-1].double()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten()))

    clean = loss()
    table = gs.evaluate(model, [load(*place) for place in PLACES], ids)
    for (site, layer, affine), (_, row) in zip(PLACES, table.iterrows(), strict=True):
        coder, (_, reads, writes) = world.coder(site, layer, affine), TENSORS[site]
        seen: dict[str, torch.Tensor] = {}
        with reading(plain, layer, reads, seen), reading(plain, layer, writes, seen):
            plain(ids)
        x, y = (seen[name][:, 1:].flatten(0, 1).double().numpy() for name in (reads, writes))
        f, out = coder.encode(x), coder.forward(x)
        assert row["l0"] == pytest.approx((f > 0).sum(1).mean(), abs=1e-6)
        wanted = ((out - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
        assert row["fvu"] == pytest.approx(wanted, rel=1e-4)

        def replaced(y: torch.Tensor, out: np.ndarray = out) -> torch.Tensor:
            new = torch.from_numpy(out).float().unflatten(0, (len(ids), -1))
            return torch.cat([y[:, :1], new], 1)

        with writing(plain, layer, writes, replaced):
            assert row["delta_loss"] == pytest.approx(loss() - clean, abs=1e-4)


def test_logit_lens_and_attribution(world: World, plain: Any, model: Any) -> None:
    """Effects of latents are activation times the gradient at the written tensor times the decoder row."""
    ids, target = ids_of(model), 40
    for site, layer, affine in [
        ("transcoder", 3, True),
        ("transcoder", 5, False),
        ("att", 3, False),
        ("res", 5, False),
    ]:
        sae, coder, (_, reads, writes) = load(site, layer, affine), world.coder(site, layer, affine), TENSORS[site]
        seen: dict[str, torch.Tensor] = {}
        with reading(plain, layer, reads, seen), reading(plain, layer, writes, seen):
            logit = plain(ids).logits[0, -1, target]
        (gradient,) = torch.autograd.grad(logit, seen[writes])
        f = coder.encode(seen[reads][0].detach().numpy())
        effects = f * (gradient[0].double().numpy() @ coder.wide["w_dec"].T)
        table = gs.attribute(model, ids, sae, lambda logits: logits[0, -1, target])
        rows = table[table["latent"].notna()]
        wanted = effects[rows["position"].to_numpy(int), rows["latent"].to_numpy(int)]
        assert len(rows) > 100
        np.testing.assert_allclose(rows["attribution"], wanted, atol=1e-4, rtol=1e-3)
        if affine:
            skips = table[table["kind"] == "skip"].set_index("position")["attribution"]
            x_s = seen[reads][0].detach().double().numpy() @ coder.wide["affine_skip_connection"]
            through = (x_s * gradient[0].double().numpy()).sum(-1)
            np.testing.assert_allclose(skips, through[skips.index.to_numpy(int)], atol=1e-4, rtol=1e-3)
    sae = load("res", 5, False)
    row = torch.from_numpy(world.coder("res", 5, False).arrays["w_dec"][7])
    logits = plain.lm_head(row * (1 + plain.model.norm.weight)).detach()
    top = gs.top_tokens(model, sae, 7, k=5)
    highest = top[top["logit"] > 0].sort_values("logit", ascending=False)
    np.testing.assert_allclose(highest["logit"][:5], logits.topk(5).values, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_first_positions_of_a_tuned_models_chat_are_left_out(world: World, plain: Any, model: Any) -> None:
    """Those of ``<bos><start_of_turn>user\\n``, by ``positions=slice(4, None)``."""
    ids = ids_of(model)
    sae, coder = load("transcoder", 3, True), world.coder("transcoder", 3, True)
    _, reads, writes = TENSORS["transcoder"]
    seen: dict[str, torch.Tensor] = {}

    def replaced(y: torch.Tensor) -> torch.Tensor:
        out = torch.from_numpy(coder.forward(seen[reads][0].numpy())).float()
        return torch.cat([y[:, :4], out[None, 4:]], 1)

    with reading(plain, 3, reads, seen), writing(plain, 3, writes, replaced):
        wanted = plain(ids).logits
    got = model.run_with_saes(ids, saes=sae, positions=slice(4, None))
    torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)
    assert float((model.run_with_saes(ids, saes=sae) - wanted).abs().max()) > 1e-2


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps at all sites of the user's own model."""
    folder = tmp_path_factory.mktemp("trained")
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{number} {TEXT * 3}"}) for number in range(60)))
    common: dict[str, Any] = {"layers": [3], "widths": [64], "target_l0s": [6], "steps": 3}
    config = {
        "output": str(folder / "run"),
        "model": {"name": str(world.root / "model")},
        "data": {"dataset": str(texts), "context": 32},
        "source": {"bucket_rows": 256, "batch_rows": 8},
        "recipe": {"preset": "gemma_scope_2", "batch_size": 64},
        "grid": [{"sites": ["res", "att"], **common}, {"sites": ["transcoder"], "skip": [False, True], **common}],
    }
    gs.train_suite(config)
    return folder / "run"


@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens", "gemma_scope_2"])
def test_a_trained_suite_is_exported_with_its_family(trained: Path, layout: Any, tmp_path: Path) -> None:
    """``suite.json`` states the family, so hooks and tensors are those of the model that it was trained on."""
    out = tmp_path / "out"
    gs.export_suite(trained, out, About(license="MIT"), layout=layout)
    report = check_release(out / "out.yaml")
    assert report.problems == []
    assert {row.model_family.name for row in report.rows} == {"gemma3"}
    hooks = {"blocks.3.hook_resid_post", "blocks.3.attn.hook_z", "blocks.3.mlp.hook_in"}
    if layout == "sae-lens":
        configs = [json.loads(file.read_text()) for file in out.rglob("cfg.json")]
        assert {config["metadata"]["hook_name"] for config in configs} == hooks
    if layout == "gemma_scope_2":
        configs = [json.loads(file.read_text()) for file in out.rglob("config.json")]
        assert "model.layers.3.pre_feedforward_layernorm.output" in {one["hf_hook_point_in"] for one in configs}
        assert {one["family"] for one in configs} == {"gemma3"}
    again = tmp_path / "again"  # SAEs in memory state it too
    gs.export_suite([load_row(row) for row in report.rows], again, About(license="MIT"), layout="sae-lens")
    configs = [json.loads(file.read_text()) for file in again.rglob("cfg.json")]
    assert {config["metadata"]["hook_name"] for config in configs} == hooks
    assert catalog.read_release(again / "again.yaml").family == "gemma3"


def test_a_release_with_labels_is_exported_as_it_is(world: World, tmp_path: Path) -> None:
    """Files are copied to the bit below their released names, and the card does not take labels for numbers."""
    gs.export_suite(RELEASE, tmp_path / "out", About(license="MIT"), layout="gemma_scope_2")
    for path in world.arrays:
        for name in ("params.safetensors", "config.json"):
            copied = (tmp_path / "out" / path / name).read_bytes()
            assert copied == (world.root / "coders" / path / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a label in a folder's name stands for the target L0." in card and "rounded L0" not in card
    gs.export_suite(RELEASE, tmp_path / "numbers", About(license="MIT"), layout="gemma-scope")
    assert "is its rounded L0." in (tmp_path / "numbers" / "README.md").read_text()


def test_a_draft_states_the_family_that_the_files_tell(world: World) -> None:
    options = Options(release="drafted", license="MIT")
    draft = draft_release(str(world.root / "coders"), world.root, options)
    assert draft.release.family == "gemma3"  # from the transcoders' tensors, which only one family has
    given = draft_release(str(world.root / "coders"), world.root, Options(release="d", license="MIT", family="gemma3"))
    assert given.release.family == "gemma3"
    assert draft_release(str(world.root / "coders" / "resid_post"), world.root, options).release.family is None
