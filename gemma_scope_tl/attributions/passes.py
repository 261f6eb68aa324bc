"""One forward pass with a probe at every site of interest, so that one backward pass gives all gradients.

A probe is a tensor of zeros added to a site: the gradient with respect to it is the gradient at the site. The pass is
that of the unchanged model. Splicing an SAE with its error term also leaves the pass unchanged, so the gradient at the
output of the splice is the same tensor, and no splice is needed here. It also follows that several SAEs do not change
each other's gradients: each has the gradient of the model, as if it alone were spliced. Editing a latent under
``use_error_term=True`` has the same property, because the errors of SAEs downstream are computed in the edited pass.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.model.counted import counted_tokens
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.access import locate
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.batch import Text, TokenBatch, as_batch
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids
from gemma_scope_tl.weights.modes import make_ordinary

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


@dataclass(frozen=True)
class PlacedSAE:
    """An SAE, the place that it reads, and its hooks.

    Attributes:
        sae: an SAE or transcoder.
        place: the place that the SAE reads.
        read, write: the hooks of the tensors that the SAE encodes and reconstructs, under HookedTransformer's names,
            which both backends accept.
    """

    sae: Any
    place: Place
    read: str
    write: str


@dataclass
class ProbedPass:
    """A probed forward pass.

    Attributes:
        logits: ``[batch, pos, vocab]``.
        values: the tensor at each hook, by the hook's name, in the order of the pass.
        probes: the probe at each write hook.
    """

    logits: torch.Tensor
    values: dict[str, torch.Tensor] = field(default_factory=dict)
    probes: dict[str, torch.Tensor] = field(default_factory=dict)

    def gradients(self, scalar: torch.Tensor) -> dict[str, torch.Tensor]:
        """The gradient of ``scalar`` at every probe, zero where it does not depend on the probe. Keeps the graph."""
        if not scalar.requires_grad:  # there is no probe upstream
            return {name: torch.zeros_like(probe) for name, probe in self.probes.items()}
        found = torch.autograd.grad(
            scalar, list(self.probes.values()), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return dict(zip(self.probes, found, strict=True))


@dataclass(frozen=True)
class SplicedPrompt(TokenBatch):
    """Token ids, and the positions at which SAEs apply.

    Attributes:
        spliced: True where SAEs are spliced: in the text at the chosen positions, except at special tokens.
    """

    spliced: Bool[torch.Tensor, "batch pos"]


def placed_saes(
    model: GemmaModel, saes: Any | Iterable[Any], exclude: ExcludeTokens, positions: Positions = None
) -> list[PlacedSAE]:
    """Find the place of each SAE in ``model``, with the checks that splicing makes.

    Raises:
        SpliceError: no SAE was given, or one does not fit the model, has an occupied place, or rescales its input.
    """
    found: list[PlacedSAE] = []
    for sae in as_saes(saes, whole=True):
        with model.saes([sae], exclude_special_tokens=exclude, positions=positions):
            pass  # every check of add_sae was made, and the SAE is detached
        if sae.cfg.normalize_activations not in ("none", None):
            raise SpliceError(
                f"This SAE normalises its input ({sae.cfg.normalize_activations!r}), so a latent's contribution is not "
                "its activation times its decoder row: fold the normalisation into the weights first."
            )
        site, layer = locate(sae, model.family)
        hooks = site.hook_name(layer, "hooked_transformer"), site.hook_name_out(layer, "hooked_transformer")
        found.append(PlacedSAE(sae, Place(site.name, layer), *hooks))
    return found


def prompt_of(
    model: GemmaModel, text: Text, exclude: ExcludeTokens, attention_mask: Any = None, positions: Positions = None
) -> SplicedPrompt:
    """Token ids of ``text`` on the model's device, and the positions that are spliced.

    Metrics concern the next token, so chat messages end where the model's answer begins, as for ``generate``, unless
    the last message is one of the model.
    """
    with torch.inference_mode(False):
        batch = as_batch(model, text, attention_mask, add_generation_prompt=None)
        spliced = counted_tokens(batch, excluded_ids(model.tokenizer, exclude), positions)
        # copies, because autograd refuses tensors made in inference mode
        return SplicedPrompt(batch.ids.clone(), batch.mask.clone(), spliced.clone())


def one_prompt(
    model: GemmaModel, text: Text, exclude: ExcludeTokens, attention_mask: Any, positions: Positions, what: str
) -> SplicedPrompt:
    """The prompt of one text.

    Raises:
        GemmaScopeError: several texts were given, or the row holds only padding.
    """
    prompt = prompt_of(model, text, exclude, attention_mask, positions)
    if len(prompt.ids) != 1:
        raise GemmaScopeError(f"{what} one text, but {len(prompt.ids)} were given: call the function for each.")
    if not bool(prompt.mask.any()):
        raise GemmaScopeError("The text holds only padding, so there is nothing to explain.")
    return prompt


def token_row(prompt: SplicedPrompt, position: int) -> int:
    """Index along the tensor of the ``position``-th token of a single prompt, which may be padded.

    Raises:
        GemmaScopeError: the prompt has no such position.
    """
    length = int(prompt.length[0])
    if not 0 <= position < length:
        raise GemmaScopeError(f"No position {position}: the text has 0..{length - 1}.")
    return position + int(prompt.start[0])


@contextmanager
def differentiable(model: GemmaModel, placed: Sequence[PlacedSAE]) -> Generator[None]:
    """Enable gradients, also inside ``no_grad`` and ``inference_mode``, and freeze the model's parameters.

    The tensors of a model or an SAE that was made or moved in inference mode are replaced by ordinary ones.
    """
    for module in (model, *model.acts_to_saes.values(), *(one.sae for one in placed)):
        make_ordinary(module)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def run_probed(
    model: GemmaModel,
    batch: TokenBatch,
    placed: Sequence[PlacedSAE],
    cut: bool = False,
    replaced: Mapping[str, torch.Tensor] | None = None,
) -> ProbedPass:
    """Run a forward pass with a probe at the place that each SAE writes.

    Args:
        model: a model from ``load_model``.
        batch: token ids and their mask.
        placed: the SAEs whose tensors are kept, and whose write hooks get a probe.
        cut: stop gradients at each write hook, so that they follow only the direct paths between neighbouring SAEs.
        replaced: tensors that replace those at write hooks, by the hook's name.
    """
    values: dict[str, torch.Tensor] = {}
    probes: dict[str, torch.Tensor] = {}
    writes = {one.write for one in placed}

    def visit(value: torch.Tensor, name: str) -> torch.Tensor | None:
        if replaced and name in replaced:
            value = replaced[name].reshape(value.shape).to(value.dtype)
        if name in values:
            raise GemmaScopeError(f"{name} ran twice in one forward pass: attributions need one pass over the prompt.")
        values[name] = value
        if name not in writes:
            return None
        probes[name] = torch.zeros_like(value, requires_grad=True)
        return (value.detach() if cut else value) + probes[name]

    names = dict.fromkeys(name for one in placed for name in (one.read, one.write))
    hooks = [(name, lambda value, hook, name=name: visit(value, name)) for name in names]
    logits = model.run_with_hooks(batch.ids, attention_mask=batch.attention_mask, fwd_hooks=hooks)
    return ProbedPass(logits, values, probes)
