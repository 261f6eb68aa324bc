"""The computations of the demo: functions of a :class:`World` and a visitor's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int

from gemma_scope_tl.demo.limits import number, whole_number
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interventions import steer
from gemma_scope_tl.latents.table import features
from gemma_scope_tl.viz.latent_facts import LatentFacts, latent_facts

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.demo.world import World
    from gemma_scope_tl.model.hooked import GemmaModel

SEEDS = 2**31 - 1


@dataclass(frozen=True)
class Reading:
    """The latents of an SAE on a text.

    Attributes:
        sae: its name.
        tokens: texts of all tokens, BOS first.
        table: rows of :func:`~gemma_scope_tl.features`; ``position`` counts in ``tokens``.
    """

    sae: str
    tokens: list[str]
    table: pd.DataFrame

    def activations(self, latent: int) -> list[float]:
        """The latent's activation on each token, 0 where it is silent."""
        values = [0.0] * len(self.tokens)
        rows = self.table[self.table["latent"] == latent]
        for position, value in zip(rows["position"].tolist(), rows["activation"].tolist(), strict=True):
            values[position] = value
        return values

    def top_latents(self, position: int, most: int = 12) -> pd.DataFrame:
        """``latent, activation`` of a token, strongest first; empty for BOS."""
        rows = self.table[self.table["position"] == position]
        return rows[["latent", "activation"]].head(most).reset_index(drop=True)

    def strongest(self) -> tuple[int, int]:
        """Position and latent of the strongest activation of a latent that few tokens share; (0, 0) without any.

        A latent that fires everywhere says little about a text, so those that fire on more than a quarter of the tokens
        are ignored unless there are no others.
        """
        if self.table.empty:
            return 0, 0
        counts = self.table.groupby("latent")["position"].transform("size")
        rare = self.table[counts <= max(2, len(self.tokens) // 4)]
        best = (self.table if rare.empty else rare).nlargest(1, "activation").iloc[0]
        return int(best["position"]), int(best["latent"])


def read_text(world: World, text: object, sae: str) -> Reading:
    """Run a text through the model and the SAE.

    Raises:
        GemmaScopeError: for a text beyond the limits, or an SAE that does not exist or fit.
    """
    tokens = world.tokens(text)
    source = world.sae(sae)
    with world.running():
        table = features(world.model, tokens, source)
    return Reading(sae, world.token_texts(tokens), table)


def checked_latent(world: World, sae: str, latent: Any) -> int:
    """A latent's index from the value of a form's field.

    Raises:
        GemmaScopeError: when the SAE has no such latent.
    """
    return whole_number("The latent", latent, 0, world.row(sae).d_sae - 1)


def page_facts(world: World, sae: str, latent: Any) -> LatentFacts:
    """The numbers of a latent's page.

    Raises:
        GemmaScopeError: for an SAE or latent that does not exist.
    """
    index = checked_latent(world, sae, latent)
    source, text = world.sae(sae), world.text
    with world.running():
        return latent_facts(text, source, index)


@dataclass(frozen=True)
class Continuations:
    """A prompt continued by the model as it is, and steered: prompt and new text of each."""

    plain: str
    steered: str


def steer_text(
    world: World,
    text: object,
    sae: str,
    latent: Any,
    strength: Any,
    new_tokens: Any = 40,
    temperature: Any = 0.0,
    seed: Any = 0,
) -> Continuations:
    """Continue a text twice, with and without a latent's decoder row added at every ordinary position.

    Args:
        world: what to run.
        text: the prompt.
        sae, latent: what to steer.
        strength: in norms of each position's own activation; negative steers away.
        new_tokens: to generate.
        temperature: 0 takes the likeliest token.
        seed: of sampling, the same for both.

    Raises:
        GemmaScopeError: for anything beyond the limits.
    """
    limits = world.limits
    index = checked_latent(world, sae, latent)
    scale = number("The strength", strength, -limits.strength, limits.strength)
    count = whole_number("The number of new tokens", new_tokens, 1, limits.new_tokens)
    heat = number("The temperature", temperature, 0.0, limits.temperature)
    start = whole_number("The seed", seed, 0, SEEDS)
    tokens = world.tokens(text)
    hook = steer(world.sae(sae), index, scale, unit="norm")
    with world.running():
        with world.model.hooks([world.check_hook]):
            plain = _continue(world.model, tokens, count, heat, start)
        with world.model.hooks([world.check_hook, hook]):
            steered = _continue(world.model, tokens, count, heat, start)
    return Continuations(plain, steered)


@torch.no_grad()
def _continue(model: GemmaModel, tokens: Int[torch.Tensor, "1 pos"], count: int, temperature: float, seed: int) -> str:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # keeps the process's random state
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        out = model.generate(tokens, max_new_tokens=count, return_type="tokens", verbose=False, **sampling)
    return model.tokenizer.decode(out[0], skip_special_tokens=True)


@dataclass(frozen=True)
class SpliceEffect:
    """The change of the loss on a text by splicing.

    Attributes:
        tokens: texts of all tokens, BOS first.
        table: ``position, token, clean, spliced, change`` of every token but the first, in nats: the loss of
            predicting that token from those before it.
        clean, spliced: means.
    """

    tokens: list[str]
    table: pd.DataFrame
    clean: float
    spliced: float

    @property
    def change(self) -> float:
        """Mean loss with the SAEs minus the model's own, in nats (delta loss, section 4.1)."""
        return self.spliced - self.clean


def splice_loss(world: World, text: object, saes: Sequence[str] | None, error_term: bool = False) -> SpliceEffect:
    """The loss of each token with and without SAEs spliced in.

    Args:
        world: what to run.
        text: two tokens or more.
        saes: names.
        error_term: add what the SAEs do not reconstruct, which gives the model's own loss.

    Raises:
        GemmaScopeError: for no SAE, too many, two at one place, or a text beyond the limits.
    """
    import pandas as pd

    names = list(saes or [])
    if not 1 <= len(names) <= world.limits.spliced:
        raise GemmaScopeError(f"Choose from 1 to {world.limits.spliced} SAEs; {len(names)} are chosen.")
    tokens = world.tokens(text)
    if tokens.shape[1] < 2:
        raise GemmaScopeError("Type more text: a loss needs a next token.")
    loaded = [world.sae(name) for name in names]
    with world.running():
        clean = _losses(world.model, tokens)
        with world.model.saes(loaded, use_error_term=bool(error_term)):
            spliced = _losses(world.model, tokens)
    texts = world.token_texts(tokens)
    columns = {
        "position": range(1, len(texts)),
        "token": texts[1:],
        "clean": clean.tolist(),
        "spliced": spliced.tolist(),
        "change": (spliced - clean).tolist(),
    }
    return SpliceEffect(texts, pd.DataFrame(columns), float(clean.mean()), float(spliced.mean()))


@torch.no_grad()
def _losses(model: GemmaModel, tokens: Int[torch.Tensor, "1 pos"]) -> Float[torch.Tensor, " pos_less_1"]:
    """Cross-entropy of each next token in nats, in float32 or wider."""
    logits = model(tokens)[0, :-1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, tokens[0, 1:].to(wide.device), reduction="none").cpu()
