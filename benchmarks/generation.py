"""Generating token by token through 12 SAEs at the sizes of Gemma 2 2B, against SAELens and the reading of weights.

SAELens has two models that take SAEs: ``SAETransformerBridge``, which runs Hugging Face's model as this package does by
default, and ``HookedSAETransformer``, whose attention copies its weights in every step. Both are peers here.

A step for one token does little arithmetic: its time is that of reading the weights of the model and of every encoder
once from memory. So that is the floor: a step of the same model without SAEs, and the product of one row with the
encoder of each SAE. Four layers stand for the model's 26. Layers share one set of weights, and so do SAEs of one width;
none of them fits a cache, so a step reads as much as with weights of its own. Thresholds let about ``L0`` latents fire.
No token is excluded, because SAELens cannot exclude tokens at heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import HookedSAETransformer, SAETransformerBridge
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.sparse import stock_sae
from benchmarks.timing import main, paired
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE as OurSAE
from gemma_scope_tl.sites import Place

LAYERS, PROMPT = 4, 16
SITES = ("res", "mlp", "att")
PEERS = {"bridge": "SAELens SAETransformerBridge", "hooked_transformer": "SAELens HookedSAETransformer"}
NAMES: tuple[str, ...] = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")


@dataclass(frozen=True)
class Sizes:
    """Sizes of model, SAEs and text; those of Gemma 2 2B."""

    width: int = 2304
    inner: int = 9216
    heads: int = 8
    head: int = 256
    latents: int = 16384
    l0: int = 70
    new_tokens: int = 32


QUICK = Sizes(64, 128, 2, 32, 512, 8, 3)


def _hf_model(dtype: torch.dtype, sizes: Sizes) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads // 2,
        "head_dim": sizes.head,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
    }
    return random_model(Gemma2Config(**settings), dtype)


def random_model(config: Gemma2Config, dtype: torch.dtype = torch.float32) -> Any:
    """A random Gemma 2 of which all layers share one set of weights."""
    torch.manual_seed(0)
    model: Any = Gemma2ForCausalLM(config)
    share(model.model.layers)
    return model.to(dtype).eval()


def share(layers: Any) -> None:
    """Let all layers hold the weights of the first."""
    for layer in list(layers)[1:]:
        for path, parameter in layers[0].named_parameters():
            module, _, name = path.rpartition(".")
            setattr(layer.get_submodule(module), name, parameter)


@torch.no_grad()
def _saes(model: Any, prompt: torch.Tensor, sizes: Sizes) -> tuple[list[Any], dict[str, list[Any]]]:
    """Twelve SAEs of this package, and SAELens's own with the same tensors for each of its models."""
    places = [Place(site, layer) for layer in range(LAYERS) for site in SITES]
    values, dtype = read_places(model, prompt, places), next(model.parameters()).dtype
    shared: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    ours: list[Any] = []
    stock: dict[str, list[Any]] = {backend: [] for backend in PEERS}
    for place in places:
        x = values[place][0, 1:]
        if x.shape[1] not in shared:
            rows = torch.randn(sizes.latents, x.shape[1], generator=torch.Generator().manual_seed(0)).div_(
                x.shape[1] ** 0.5
            )
            shared[x.shape[1]] = rows.T.contiguous().to(dtype), rows.to(dtype)
        w_enc, w_dec = shared[x.shape[1]]
        theta = (x.float() @ w_enc.float()).topk(sizes.l0, dim=1).values[:, -1].mean()
        latents = sizes.latents
        weights = [w_enc, torch.zeros(latents, dtype=dtype), torch.full((latents,), float(theta)), w_dec, w_dec[0] * 0]
        kind = str(dtype).removeprefix("torch.")
        ours.append(
            OurSAE.from_arrays(dict(zip(NAMES, weights, strict=True)), site=place.site, layer=place.layer, dtype=kind)
        )
        for backend, saes in stock.items():
            saes.append(stock_sae(weights))
            saes[-1].cfg.metadata.hook_name = model.family.site(place.site).hook_name(place.layer, backend)
            if place.site == "att" and backend == "hooked_transformer":
                saes[-1].turn_on_forward_pass_hook_z_reshaping()
    return ours, stock


def _stock_bridge(hf_model: Any) -> Any:
    """SAELens's bridge around a model in memory, as its ``boot_transformers`` makes one."""
    dtype = next(hf_model.parameters()).dtype
    config = build_bridge_config_from_hf(hf_model.config, "Gemma2ForCausalLM", "gemma-2", dtype)
    adapter: Any = ArchitectureAdapterFactory.select_architecture_adapter(config)
    adapter.cfg.device = "cpu"
    adapter.prepare_model(hf_model)
    return SAETransformerBridge(hf_model, adapter, None).eval()


class Case:
    """A model of each side with its SAEs, in one dtype."""

    def __init__(self, dtype: torch.dtype, peer: bool = True, sizes: Sizes | None = None) -> None:
        self.sizes = sizes or Sizes()
        self.prompt = torch.randint(3, 1024, (1, PROMPT), generator=torch.Generator().manual_seed(1))
        self.prompt[0, 0] = 2
        hf_model = _hf_model(dtype, self.sizes)
        self.peers: dict[str, Any] = {}
        if peer:  # before the bridge, which wraps the model in place
            ht = load_model(hf_model=hf_model, backend="hooked_transformer", check=False)
            share(ht.blocks)
            stock = self.peers["hooked_transformer"] = HookedSAETransformer(ht.cfg)
            share(stock.blocks)
            stock.load_state_dict(ht.state_dict(), strict=False)
            self.peers["bridge"] = _stock_bridge(_hf_model(dtype, self.sizes))
        self.model = load_model(hf_model=hf_model, check=False)
        self.saes, self.stock = _saes(self.model, self.prompt, self.sizes)
        self.rows = [torch.randn(1, sae.cfg.d_in).to(dtype) for sae in self.saes]

    def generate(self, model: Any, saes: list[Any], **options: Any) -> Callable[[], torch.Tensor]:
        """A function that generates greedily from the prompt, with a cache."""
        how: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}

        def run_once() -> torch.Tensor:
            with model.saes(saes, **options):
                return model.generate(self.prompt, max_new_tokens=self.sizes.new_tokens, use_past_kv_cache=True, **how)

        return run_once

    def ours(self, **options: Any) -> Callable[[], torch.Tensor]:
        """Generation through this package's SAEs."""
        return self.generate(self.model, self.saes, exclude_special_tokens=False, **options)

    def floor(self) -> Callable[[], None]:
        """Generation without SAEs, and one row times the encoder of each SAE for each new token."""
        alone = self.generate(self.model, [])

        def run_once() -> None:
            alone()
            for _ in range(self.sizes.new_tokens):
                for row, sae in zip(self.rows, self.saes, strict=True):
                    torch.mm(row, sae.W_enc)

        return run_once

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on the prompt, BOS left out."""
        places = [Place(sae.site, sae.layer) for sae in self.saes]
        values = read_places(self.model, self.prompt, places)
        counts = [
            float((sae.encode(values[place][0, 1:]) > 0).sum(1).float().mean())
            for sae, place in zip(self.saes, places, strict=True)
        ]
        return sum(counts) / len(counts)


@torch.no_grad()
def run(quick: bool = False) -> list[dict[str, Any]]:
    """A row against SAELens, one against the floor, one for positions and one for bfloat16."""
    sizes, runs = (QUICK, 1) if quick else (Sizes(), 3)
    case = Case(torch.float32, sizes=sizes)
    what = f"generate through 12 SAEs, cached, {LAYERS} layers of {sizes.width}, {sizes.latents} latents"
    what += f", L0 {case.l0:.0f}"
    mine = case.model.run_with_saes(case.prompt, saes=case.saes, exclude_special_tokens=False)
    ours = case.ours()
    rows: list[dict[str, Any]] = []
    for backend, name in PEERS.items():
        model, saes = case.peers[backend], case.stock[backend]
        difference = (mine - model.run_with_saes(case.prompt, saes=saes)).abs().max().item()
        row = {"id": f"saelens-{backend}", "what": what, "peer": name}
        times = paired(ours, case.generate(model, saes), runs=runs)
        rows.append({**row, **times, "max_difference": difference})
    at_chosen = case.ours(positions=slice(0, None))
    floor = "the model alone, and 12 x W_enc once a token"
    for name, title, peer, a, b in (
        ("floor", "generate through 12 SAEs", floor, ours, case.floor()),
        ("positions", "generate through 12 SAEs at chosen positions", "at all positions", at_chosen, ours),
    ):
        rows.append({"id": name, "what": title, "peer": peer, **paired(a, b, runs=runs)})
    half = Case(torch.bfloat16, peer=False, sizes=sizes)
    title = "generate through 12 SAEs in bfloat16"
    rows.append({"what": title, "peer": "float32", **paired(half.ours(), ours, runs=runs)})
    rows.append({"what": title, "peer": floor, **paired(half.ours(), half.floor(), runs=runs)})
    return [{**row, "tokens_per_s": sizes.new_tokens / row["ours_s"]} for row in rows]


if __name__ == "__main__":
    main("generation", run)
