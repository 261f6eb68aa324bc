"""A small random Gemma 2 and SAEs that fit its tensors, made in closed form: what is right is known exactly."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.text.rows import pack_texts
from gemma_scope_tl.verification.probe import Probe
from tests.helpers import DEFAULT, CharTokenizerFactory, hooked

COMPONENTS = 20
CONTEXT = 48
SPECIAL = (0, 1, 2)
BOS = 2


def small_gemma(seed: int = 0, layers: int = 4, **changes: Any) -> Gemma2ForCausalLM:
    """A random Gemma 2 whose norms have gains far from 1 and whose BOS has a huge embedding, as in the real ones."""
    torch.manual_seed(seed)
    config = Gemma2Config(**{**DEFAULT, "num_hidden_layers": layers, **changes}, attn_implementation="eager")
    model = Gemma2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.8 if "norm" in name else 0.15)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] *= 30
    return model.eval()


def plain_text() -> str:
    """The held-out text in the letters of the character tokenizer."""
    letters = HELD_OUT_TEXT.read_text(encoding="utf-8")[:60_000]
    return "".join(letter for letter in letters if 32 <= ord(letter) < 125 and letter not in '{}"\\')


def fitted(x: torch.Tensor, y: torch.Tensor, components: int = COMPONENTS, share: float = 0.5) -> dict[str, Any]:
    """The arrays of an SAE (``y`` is ``x``) or transcoder that fits: latents are the principal components of ``x``.

    ``2 * components`` latents read both directions of each component of the centred ``x``; a latent is active above
    ``share`` of the component's standard deviation. The decoder is the linear regression of ``y`` on the latents.
    """
    centre = x.mean(0)
    _, sizes, directions = torch.linalg.svd(x - centre, full_matrices=False)
    spread = sizes[:components] / len(x) ** 0.5
    w_enc = torch.cat([directions[:components], -directions[:components]]).T.contiguous()
    b_enc, threshold = -(centre @ w_enc), share * torch.cat([spread, spread])
    pre = x @ w_enc + b_enc
    latents = torch.cat([pre * (pre > threshold), torch.ones(len(x), 1)], dim=1)
    found = torch.linalg.lstsq(latents, y).solution
    return {
        "W_enc": w_enc,
        "b_enc": b_enc,
        "threshold": threshold,
        "W_dec": found[:-1].contiguous(),
        "b_dec": found[-1].contiguous(),
    }


@dataclass
class World:
    """A model, its tokens, and fitted SAEs.

    Attributes:
        model: the right model.
        rows: token rows; the second half is for the verification.
        probe: the tensors of the first half, on which SAEs are fitted.
    """

    model: Any
    rows: torch.Tensor
    probe: Probe
    _made: dict[tuple[str, int | None, float], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def make(cls) -> World:
        model = hooked(small_gemma(), "bridge")
        rows = pack_texts(CharTokenizerFactory.get(), [plain_text()], CONTEXT, 64)
        return cls(model, rows, Probe(model, rows[:48], SPECIAL, limit=48 * CONTEXT))

    def arrays(self, site: str, layer: int | None, share: float = 0.5) -> dict[str, Any]:
        """The arrays of the right SAE of a place."""
        key = (site, layer, share)
        if key not in self._made:
            place = Place(site, layer)
            self._made[key] = fitted(self.probe.at(place), self.probe.at(target_of(place)), share=share)
        return {name: array.clone() for name, array in self._made[key].items()}

    def l0(self, arrays: dict[str, Any], site: str, layer: int | None) -> float:
        """Mean number of active latents, in plain torch."""
        pre = self.probe.at(Place(site, layer)) @ arrays["W_enc"] + arrays["b_enc"]
        return float((pre > arrays["threshold"]).sum(1).double().mean())

    def tokens(self) -> torch.Tensor:
        """Token rows that no SAE was fitted on."""
        return self.rows[48:]


def row_of(site: str, layer: int | None, arrays: dict[str, Any], l0: float, **more: Any) -> SAERow:
    """A registry row of an SAE, without a file."""
    d_sae = arrays["b_enc"].shape[0]
    head = "embedding" if layer is None else f"layer_{layer}"
    id_ = f"{head}/width_{d_sae}/average_l0_{l0:.0f}"
    fields: dict[str, Any] = {
        "id": id_, "site": site, "layer": layer, "width": str(d_sae), "d_sae": d_sae, "l0": l0, "path": f"{site}/{id_}",
        "d_in": arrays["W_enc"].shape[0], "release": "small", "model": "small", "repo": "/nowhere", **more,
    }  # fmt: skip
    return SAERow.model_validate(fields)


def sae_of(site: str, layer: int | None, arrays: dict[str, Any]) -> Any:
    """The SAE of arrays."""
    return JumpReLUSAE.from_arrays(arrays, site=site, layer=layer).requires_grad_(False)


def write_release(folder: Path, entries: list[tuple[SAERow, dict[str, Any]]], repo: str = "./saes") -> Path:
    """Files of SAEs in a folder, and their registry file ``small.yaml``."""
    lines = [f"release: small\nrepo: {repo}\nmodel: small\nlicense: MIT\ndescription: d\nsaes:"]
    for row, arrays in entries:
        save_sae(sae_of(row.site, row.layer, arrays), folder / "saes" / row.path)
        layer = "null" if row.layer is None else row.layer
        lines.append(
            f"  - {{id: {row.path}, site: {row.site}, layer: {layer}, width: '{row.width}', d_sae: {row.d_sae}, "
            f"d_in: {row.d_in}, l0: {row.l0}, path: {row.path}}}"
        )
    (folder / "small.yaml").write_text("\n".join([*lines, ""]))
    return folder / "small.yaml"
