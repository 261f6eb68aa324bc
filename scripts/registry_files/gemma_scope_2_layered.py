"""The releases of Gemma Scope 2 whose coders span several layers: crosscoders and cross-layer transcoders (CLTs).

No catalogue lists them. Their rows are the grid that the technical report describes (table 2), with the names of
folders that users have opened, so all of them are ``unverified``. A crosscoder reads and writes the residual stream at
the four layers of the subset. A CLT reads every MLP's input and writes the outputs of the same and later MLPs.

The latents are divided over the layers. In the two files whose shapes are known, a CLT has the largest multiple of 32
that fits into its width (14,560 in each of 18 layers and 10,080 in each of 26, of 262,144); wider ones are taken to
follow the same rule. The L0s of these labels are not known, for a layer or for all together: ``config.json`` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from gemma_scope_tl.registry.schema import parse_release
from gemma_scope_tl.registry.widths import parse_width
from scripts.registry_files.common import Derived, Row
from scripts.registry_files.gemma_scope_2 import KINDS as SINGLE
from scripts.registry_files.gemma_scope_2 import PREFIX, SIZES, SUBSET_LAYERS
from scripts.registry_files.gemma_scope_2 import Spec as SingleSpec

LABELS = ("medium", "big")
WIDTHS = {"crosscoder": ("65k", "262k", "524k", "1m"), "clt": ("262k", "524k")}
WITH_CLT = ("270m", "1b")
BLOCK = 32
"""The latents of a layer of a CLT are a multiple of this number."""
REPORTED = {
    ("gemma-scope-2-270m-it-clt", "width_262k_l0_medium_affine"): "one user reports that the file of layer 0 is empty"
}
_L0 = "The numbers of active latents that the labels stand for are not known, in total or in a layer."
_UNVERIFIED = "All rows are unverified: they are known from a pattern of names, which a few users' code confirms."
_DIVIDED = (
    "The latents are divided evenly over the layers, {least} in each at width {width}. Of the wider ones, that is "
    "derived and not seen."
)


@dataclass(frozen=True)
class Spec:
    """One release: the crosscoders or the CLTs of one model."""

    size: str
    tuned: bool
    site: str

    @property
    def single(self) -> SingleSpec:
        """A release of the same model, for its names and sizes."""
        return SingleSpec(self.size, self.tuned, SINGLE[0], "subset")

    @property
    def release(self) -> str:
        """The name of the release."""
        return f"{PREFIX}{self.size}-{'it' if self.tuned else 'pt'}-{self.site}"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of each coder."""
        return SUBSET_LAYERS[self.size] if self.site == "crosscoder" else tuple(range(self.single.dims.n_layers))

    def latents(self, width: str) -> int:
        """Number of latents of each layer."""
        each = parse_width(width) // len(self.layers)
        return each if self.site == "crosscoder" else each // BLOCK * BLOCK

    def rows(self) -> Iterator[Row]:
        """The rows of the complete grid."""
        skips = (False, True) if self.site == "clt" else (None,)
        place = "" if self.site == "clt" else f"layer_{'_'.join(map(str, self.layers))}_"
        for width, label, affine in product(WIDTHS[self.site], LABELS, skips):
            name = f"{place}width_{width}_l0_{label}{'_affine' if affine else ''}"
            row: Row = {
                "id": name,
                "site": self.site,
                "layer": None,
                "layers": list(self.layers),
                "width": width,
                "d_sae": self.latents(width) * len(self.layers),
                "d_in": self.single.dims.d_model,
                "l0": None,
                "label": label,
                "path": f"{self.site}/{name}",
                "unverified": True,
            }
            if affine is not None:
                row["affine"] = affine
            if (self.release, name) in REPORTED:
                row["note"] = REPORTED[self.release, name]
            yield row


SPECS = tuple(
    Spec(size, tuned, site)
    for site in WIDTHS
    for size in (SIZES if site == "crosscoder" else WITH_CLT)
    for tuned in (False, True)
)


def derive_all() -> list[Derived]:
    """Every release of the grid."""
    return [derive(spec) for spec in SPECS]


def derive(spec: Spec) -> Derived:
    """Derive one release file."""
    single, narrowest = spec.single, WIDTHS[spec.site][0]
    model = f"{single.family.title} {spec.size.upper()}{' IT' if spec.tuned else ''}"
    *most, last = map(str, spec.layers)
    what = {
        "crosscoder": f"Weakly causal crosscoders of the residual stream of {model} after layers "
        f"{', '.join(most)} and {last}",
        "clt": f"Cross-layer transcoders of {model}, with and without skip connections: MLP inputs of all "
        f"{len(spec.layers)} layers to MLP outputs of the same and later layers",
    }[spec.site]
    notes = [_L0, _UNVERIFIED]
    if spec.site == "clt":
        notes.append(_DIVIDED.format(least=f"{spec.latents(narrowest):,}", width=narrowest))
    data = {
        "release": spec.release,
        "repo": single.repo,
        "model": single.model,
        "license": "CC-BY-4.0",
        "description": what,
        "notes": notes,
        "format": "gemma_scope_2",
        "saes": list(spec.rows()),
    }
    return Derived(parse_release(data, f"{spec.release}.yaml"), [])
