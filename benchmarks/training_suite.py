"""Training a suite: 12 SAEs of the bundled model from one stream of forward passes, against SAELens's multi-SAE runner.

For speed, the peer trains its own JumpReLU class as its documentation recommends. For loss, the peer's runner trains
this package's class with its recipe (``GemmaScopeMultiTrainingRunner``), on the same rows of tokens, with three seeds
each. All train on the same four fifths of the bundled text, and are measured on activations of the rest.

``python -m benchmarks.training_suite`` takes about fourteen minutes on two idle cores; ``--quick`` is a short test run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAEConfig
from torch import Tensor

import gemma_scope_tl as gs
from benchmarks.frontier import Arrays, measure
from benchmarks.pareto import HELDOUT, MODEL
from benchmarks.timing import compared, main
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.activations.streaming import StreamSource
from gemma_scope_tl.interop.runners import GemmaScopeMultiTrainingRunner
from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.sites import Place, get_site
from gemma_scope_tl.text.rows import pack_texts
from gemma_scope_tl.text.token_rows import TokenRows
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import FAST, Recipe
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.weights.fold import fold
from scripts.bundled.files import read_jsonl
from scripts.bundled.tokenizer import BOS, EOS, PAD

CONTEXT, D_SAE = 256, 1_024
BATCH_ROWS, PEER_BATCH_ROWS = 8, 16
"""Rows of tokens in a forward pass, for each the number with which it is fastest on two cores."""
SITES = ("res", "mlp", "att")
ALL = [Place(site, layer) for layer in range(4) for site in SITES]
ONE_LAYER = [Place(site, 2) for site in SITES]
SEEDS = (0, 1, 2)
RUNS = 3
PEER = "SAELens MultiSAETrainingRunner"


@dataclass(frozen=True)
class Job:
    """The training of both: an SAE at each place on ``steps`` batches, shuffled in buffers of ``bucket`` rows."""

    places: list[Place]
    recipe: Recipe
    steps: int
    bucket: int
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Number of activations on which each SAE is trained."""
        return self.steps * self.recipe.batch_size

    @property
    def norm_batches(self) -> int:
        """Number of batches on which the scale is measured."""
        return min(16, self.steps)


class Data:
    """The model on both backends, and the rows of tokens that both train on."""

    def __init__(self) -> None:
        self.model = gs.load_model(MODEL)
        self.peer_model = gs.load_model(MODEL, backend="hooked_transformer")
        texts = [row["text"] for row in read_jsonl(HELDOUT)]
        self.rows = self._packed(text for number, text in enumerate(texts) if number % 5)
        self.held = self._packed(texts[::5])

    def _packed(self, texts: Iterable[str]) -> TokenRows:
        """Rows in a shuffled order, since the text is sorted by domain and the buffers mix over different ranges."""
        rows = pack_texts(self.model.tokenizer, texts, CONTEXT)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return TokenRows.from_ids(rows[order], special=(BOS, EOS, PAD))

    @cached_property
    def dataset(self) -> Dataset:
        """The training rows as SAELens reads them."""
        return Dataset.from_dict({"tokens": self.rows[: len(self.rows)].tolist()})

    @cached_property
    def held_activations(self) -> dict[Place, Tensor]:
        """Activations ``[n, d]`` of the held-out rows."""
        harvester, parts = Harvester(self.model, ALL), list[dict[Place, Tensor]]()
        for first in range(0, len(self.held), BATCH_ROWS):
            tokens = self.held[first : first + BATCH_ROWS]
            parts.append(harvester.run(tokens, self.held.keep_mask(tokens)))
        return {place: torch.cat([part[place] for part in parts]) for place in ALL}


def train_ours(data: Data, job: Job) -> dict[Place, Arrays]:
    """This package's trainers on a streaming source; each place is stepped in its own thread."""
    source = StreamSource(
        data.model, data.rows, job.places, bucket_rows=job.bucket, seed=job.seed, batch_rows=BATCH_ROWS
    )
    squares = source.mean_squares(job.norm_batches * job.recipe.batch_size)
    trainers = {place: _trainer(source, place, job) for place in job.places}
    scales = {place: squares[place] ** 0.5 for place in job.places}
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        batches = source.batches(job.recipe.batch_size)
        for _ in range(job.steps):
            batch = next(batches)
            list(pool.map(lambda place, x=batch: trainers[place].step(x[place].div_(scales[place])), job.places))
    torch.set_num_threads(threads)
    return {place: trainers[place].released(0, scales[place]) for place in job.places}


def _trainer(source: StreamSource, place: Place, job: Job) -> PlaceTrainer:
    width = source.widths[place]
    spec = SAESpec(place.key, place, D_SAE, job.recipe, job.seed)
    return PlaceTrainer(width, width, [spec], total_steps=job.steps)


def train_peer(data: Data, job: Job, *, our_class: bool) -> dict[Place, Arrays]:
    """SAELens's runner, with its own class and recommended settings or with this package's class and recipe."""
    hooks = {place.key: get_site(place.site).hook_name(place.layer, "hooked_transformer") for place in job.places}
    widths = {place.key: get_site(place.site).d_in(data.model.dims) for place in job.places}
    recipe = job.recipe
    if our_class:
        saes: dict[str, Any] = {
            key: GemmaScopeTrainingSAEConfig(d_in=width, d_sae=D_SAE, **recipe.sae_settings())
            for key, width in widths.items()
        }
        more: dict[str, Any] = recipe.runner_settings(CONTEXT, shuffle_tokens=job.bucket)
    else:
        saes = {key: _recommended(width, job.steps) for key, width in widths.items()}
        more = {"lr": 1e-3, "lr_decay_steps": job.steps // 5, "n_batches_in_buffer": job.bucket // CONTEXT}
        more |= {"train_batch_size_tokens": recipe.batch_size, "context_size": CONTEXT}
    settings: dict[str, Any] = {
        **more,
        "saes": saes,
        "hook_names": hooks,
        "model_name": "bundled",
        "dataset_path": "bundled",
        "training_tokens": job.tokens,
        "store_batch_size_prompts": PEER_BATCH_ROWS,
        "exclude_special_tokens": [PAD, EOS, BOS],
        "n_batches_for_norm_estimate": job.norm_batches,
        "seed": job.seed,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    cfg = MultiSAETrainingRunnerConfig(**settings)
    given: dict[str, Any] = {"override_model": data.peer_model, "override_dataset": data.dataset}
    if not our_class:
        torch.manual_seed(job.seed)
        MultiSAETrainingRunner(cfg, **given).run()
        return {}
    trained = GemmaScopeMultiTrainingRunner(cfg, recipe=recipe, **given).run()
    return {place: _released(trained[place.key]) for place in job.places}


def _recommended(d_in: int, steps: int) -> JumpReLUTrainingSAEConfig:
    """The settings of SAELens's documentation for the penalty that it recommends."""
    return JumpReLUTrainingSAEConfig(
        d_in=d_in,
        d_sae=D_SAE,
        normalize_activations="expected_average_only_in",
        jumprelu_sparsity_loss_mode="tanh",
        jumprelu_bandwidth=2.0,
        jumprelu_init_threshold=0.1,
        pre_act_loss_coefficient=3e-6,
        l0_coefficient=1.0,
        l0_warm_up_steps=steps,
    )


@torch.no_grad()
def _released(sae: Any) -> Arrays:
    """A trained SAE of this package's class, with the scale (by SAELens's trainer) and the pre-encoder bias folded."""
    assert isinstance(sae, GemmaScopeTrainingSAE)
    named = {"W_enc": sae.W_enc, "W_dec": sae.W_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec, "threshold": sae.threshold}
    folded = fold({name: value.detach().double() for name, value in named.items()}, 1.0)
    return {name: value.float() for name, value in folded.items()}


def losses(data: Data, job: Job, released: dict[Place, Arrays]) -> dict[str, float]:
    """``fvu``, ``l0`` and the training loss on held-out activations, means over the places.

    ``loss = E ||x - x_hat||^2 / E ||x||^2 + lambda E ||f||_0``, the training objective with the held-out scale.
    """
    found: list[dict[str, float]] = []
    for place, arrays in released.items():
        x = data.held_activations[place]
        row, square = measure(arrays, x), x.double().square().sum(1).mean().item()
        variance = (x - x.mean(0)).double().square().sum(1).mean().item()
        loss = row["fvu"] * variance / square + job.recipe.l0_coefficient * row["l0"]
        found.append({"fvu": row["fvu"], "l0": row["l0"], "loss": loss})
    return {name: statistics.mean(row[name] for row in found) for name in found[0]}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """A row per number of the README."""
    data = Data()
    return [_speed(data, quick), *_equal_loss(data, quick)]


def _speed(data: Data, quick: bool) -> dict[str, Any]:
    job = Job(ALL, replace(FAST, batch_size=2_048), steps=4 if quick else 200, bucket=8_192 if quick else 32_768)
    sides = (lambda: train_ours(data, job), lambda: train_peer(data, job, our_class=False))
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 if quick else RUNS):
        for train, found in zip(sides, speeds, strict=True):
            started = time.perf_counter()
            train()
            found.append(job.tokens / (time.perf_counter() - started))
    return {
        "id": "speed",
        "what": f"train {len(ALL)} SAEs of the bundled model (res, mlp, att; {D_SAE} latents), model included",
        "peer": PEER,
        "tokens": job.tokens,
        **compared(*speeds, "tokens/s", more_is_better=True),
    }


def _equal_loss(data: Data, quick: bool) -> list[dict[str, Any]]:
    recipe = replace(FAST, batch_size=1_024)
    steps, bucket, seeds = (8, 8_192, SEEDS[:2]) if quick else (400, 32_768, SEEDS)
    jobs = [Job(ONE_LAYER, recipe, steps, bucket, seed) for seed in seeds]
    mine = [losses(data, job, train_ours(data, job)) for job in jobs]
    theirs = [losses(data, job, train_peer(data, job, our_class=True)) for job in jobs]
    return [
        {
            "id": f"held-out-{name}",
            "what": f"held-out {label}, equal recipe and {jobs[0].tokens:,} tokens, {len(seeds)} seeds, 3 SAEs",
            "peer": f"{PEER}, our class",
            **compared([row[name] for row in mine], [row[name] for row in theirs], unit),
            "ours_seeds": [row[name] for row in mine],
            "peer_seeds": [row[name] for row in theirs],
        }
        for name, label, unit in (("loss", "loss", ""), ("fvu", "FVU", ""), ("l0", "L0", "latents"))
    ]


if __name__ == "__main__":
    main("training_suite", run)
