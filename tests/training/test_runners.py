"""The SAELens runners with the recipe, on a tiny random Gemma 2."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from datasets import Dataset
from gemma_scope_tl.interop import runners
from gemma_scope_tl.interop.runners import GemmaScopeMultiTrainingRunner, GemmaScopeTrainingRunner
from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAEConfig
from sae_lens import SAE
from sae_lens.config import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.recipe import Recipe

STEPS, CONTEXT, VOCAB, BOS = 60, 16, 32, 2
RECIPE = Recipe(
    lr=3e-3,
    lr_warm_up_steps=5,
    batch_size=64,
    l0_coefficient=3e-3,
    l0_warm_up_steps=10,
    init_threshold=0.05,
    bandwidth=0.1,
)
SITES = {
    "res": "blocks.0.hook_resid_post",
    "mlp": "blocks.0.hook_mlp_out",
    "att": "blocks.0.attn.hook_z",
    "emb": "hook_embed",
}
D_IN = {"res": 8, "mlp": 8, "att": 6, "emb": 8}


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_heads=2, d_head=3, n_key_value_heads=1, d_mlp=16, n_ctx=CONTEXT, d_vocab=VOCAB,
        act_fn="gelu_pytorch_tanh", gated_mlp=True, normalization_type="RMS", use_normalization_before_and_after=True,
        positional_embedding_type="rotary", rotary_dim=2, attn_scores_soft_cap=50.0, output_logits_soft_cap=30.0,
        final_rms=True, device="cpu", seed=0,
    )  # fmt: skip
    return HookedTransformer(cfg)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    tokens = torch.randint(3, VOCAB, (256, CONTEXT), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = BOS
    return Dataset.from_dict({"tokens": tokens.tolist()})


@pytest.fixture(autouse=True)
def no_signal_handlers_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners.signal, "signal", lambda *_: None)


def _sae_cfg(site: str, **changes: Any) -> GemmaScopeTrainingSAEConfig:
    return GemmaScopeTrainingSAEConfig(d_in=D_IN[site], d_sae=24, **{**RECIPE.sae_settings(), **changes})


def _shared(tmp_path: Path, recipe: Recipe = RECIPE, **changes: Any) -> dict[str, Any]:
    common = {
        **recipe.runner_settings(CONTEXT, shuffle_tokens=512),
        "exclude_special_tokens": [BOS],
        "training_tokens": STEPS * recipe.batch_size,
        "store_batch_size_prompts": 8,
        "n_batches_for_norm_estimate": 10,
        "model_name": "tiny",
        "dataset_path": "local",
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": str(tmp_path / "checkpoints"),
        "output_path": str(tmp_path / "out"),
    }
    return {**common, **changes}


def _single(tmp_path: Path, model: Any, dataset: Any, **changes: Any) -> GemmaScopeTrainingRunner:
    changes = {"hook_name": SITES["res"], "verbose": False, **changes}
    cfg = LanguageModelSAERunnerConfig(sae=changes.pop("sae", None) or _sae_cfg("res"), **_shared(tmp_path, **changes))
    return GemmaScopeTrainingRunner(cfg, recipe=RECIPE, override_model=model, override_dataset=dataset)


def _record_losses(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[float]]:
    """Reconstruction errors of every SAE by id, as its trainer steps."""
    losses: dict[int, list[float]] = {}
    step = SAETrainer.step

    def recording(self: SAETrainer[Any, Any], batch: torch.Tensor) -> Any:
        output = step(self, batch)
        losses.setdefault(id(self.sae), []).append(output.losses["mse_loss"].item())
        return output

    monkeypatch.setattr(SAETrainer, "step", recording)
    return losses


def _assert_learned(losses: list[float]) -> None:
    assert len(losses) == STEPS
    assert losses[0] < 4.0, "activations are scaled to E ||x||^2 = 1"
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def _assert_unit_rows(sae: Any) -> None:
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae), rtol=1e-5, atol=1e-5)


def test_single_runner(tmp_path: Path, model: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = _record_losses(monkeypatch)
    sae = _single(tmp_path, model, dataset).run()
    _assert_learned(losses[id(sae)])
    _assert_unit_rows(sae)
    assert sae.grad_scale == 1.0

    stock = SAE.load_from_disk(tmp_path / "out")
    assert type(stock) is JumpReLUSAE
    assert not stock.cfg.apply_b_dec_to_input
    tokens = torch.as_tensor(dataset[:8]["tokens"])
    _, cache = model.run_with_cache(tokens)
    x = cache[SITES["res"]][:, 1:].reshape(-1, 8)
    with torch.no_grad():
        torch.testing.assert_close(stock(x), sae(x), rtol=1e-4, atol=1e-4)
        fvu = (x - stock(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu < 0.5


def test_multi_runner_at_all_sites(tmp_path: Path, model: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = _record_losses(monkeypatch)
    cfg = MultiSAETrainingRunnerConfig(
        saes={site: _sae_cfg(site, init_threshold=0.03) for site in SITES}, hook_names=SITES, **_shared(tmp_path)
    )
    saes = GemmaScopeMultiTrainingRunner(cfg, recipe=RECIPE, override_model=model, override_dataset=dataset).run()
    assert set(saes) == set(SITES)
    for site, sae in saes.items():
        _assert_learned(losses[id(sae)])
        _assert_unit_rows(sae)
        stock = SAE.load_from_disk(tmp_path / "out" / site)
        assert type(stock) is JumpReLUSAE
        assert stock.cfg.reshape_activations == ("hook_z" if site == "att" else "none")
        x = model.run_with_cache(torch.as_tensor(dataset[:4]["tokens"]))[1][SITES[site]]
        assert stock(x).shape == x.shape, "fits the hook as it is"


def test_the_scale_is_the_root_mean_square(
    tmp_path: Path, model: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    fit = SAETrainer.fit

    def recording(self: SAETrainer[Any, Any]) -> Any:
        seen.append(self.activation_scaler.scaling_factor or 0.0)
        return fit(self)

    monkeypatch.setattr(SAETrainer, "fit", recording)
    _single(tmp_path, model, dataset, training_tokens=64, n_batches_for_norm_estimate=60).run()
    acts = model.run_with_cache(torch.as_tensor(dataset[:]["tokens"]))[1][SITES["res"]][:, 1:]
    assert 1 / seen[0] == pytest.approx(acts.square().sum(-1).mean().sqrt().item(), rel=0.02)


def test_an_interrupted_run_resumes(tmp_path: Path, model: Any, dataset: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step: Any = SAETrainer.step
    scales: list[Any] = []
    rates: list[Any] = []

    def interrupted(self: SAETrainer[Any, Any], batch: torch.Tensor) -> Any:
        if self.n_training_steps == 20:
            raise KeyboardInterrupt
        return step(self, batch)

    def recording(self: SAETrainer[Any, Any], batch: torch.Tensor) -> Any:
        scales.append(self.activation_scaler.scaling_factor)
        rates.append((self.n_training_steps, self.optimizer.param_groups[0]["lr"]))
        return step(self, batch)

    monkeypatch.setattr(SAETrainer, "step", interrupted)
    runner = _single(tmp_path, model, dataset)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    (checkpoint,) = Path(str(runner.cfg.checkpoint_path)).iterdir()
    saved = json.loads((checkpoint / "activation_scaler.json").read_text())["scaling_factor"]
    stopped = cast("torch.Tensor", runner.sae.log_threshold).detach().clone()

    monkeypatch.setattr(SAETrainer, "step", recording)
    resumed = _single(tmp_path, model, dataset, resume_from_checkpoint=str(checkpoint), seed=7)
    sae = resumed.run()
    assert set(scales) == {saved}, "the scale that the weights were trained with is kept"
    assert rates[0] == (20, RECIPE.lr_at(20))
    assert len(rates) == STEPS - 20
    log_threshold = cast("torch.Tensor", sae.log_threshold).detach()
    moved = (log_threshold + math.log(saved) - stopped).abs().max()
    assert moved < (STEPS - 20) * 2 * RECIPE.lr, "training went on from the checkpoint's weights"
    _assert_unit_rows(sae)


def test_one_seed_gives_one_run(tmp_path: Path, model: Any, dataset: Any) -> None:
    first, again, other = (
        _single(tmp_path / str(i), model, dataset, training_tokens=640, seed=seed).run()
        for i, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_contradictions_are_reported_at_once(tmp_path: Path, model: Any, dataset: Any) -> None:
    with pytest.raises(GemmaScopeError, match=r"lr=0\.1 .*adam_beta1=0\.9 .*lr_warm_up_steps=9 .*bandwidth=0\.7 "):
        _single(
            tmp_path, model, dataset, lr=0.1, adam_beta1=0.9, lr_warm_up_steps=9, sae=_sae_cfg("res", bandwidth=0.7)
        )


def test_other_sae_classes_are_refused(tmp_path: Path, model: Any, dataset: Any) -> None:
    with pytest.raises(GemmaScopeError, match="GemmaScopeTrainingSAEConfig"):
        _single(tmp_path, model, dataset, sae=JumpReLUTrainingSAEConfig(d_in=8, d_sae=24))
