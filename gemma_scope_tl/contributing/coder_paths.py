"""Names of folders in Gemma Scope 2's layout: ``{site}/layer_{L}_width_{W}_l0_{label}[_affine|_seed_N]``.

The released labels are ``small``, ``medium`` and ``big``. Coders without such a label have their L0 in its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gemma_scope_tl.registry.schema import LABELS
from gemma_scope_tl.registry.widths import width_label

FOLDERS = {"res": "resid_post", "att": "attn_out", "mlp": "mlp_out", "transcoder": "transcoder"}
"""The folder of each site. Releases of every layer add ``_all`` to it. Other sites keep their own name."""
_NAME = re.compile(
    rf"layer_(?P<layer>\d{{1,4}})_width_(?P<width>[0-9]+[km]?)_l0_(?P<l0>{'|'.join(LABELS)}|\d{{1,9}}(?:\.\d{{1,9}})?)"
    r"(?P<affine>_affine)?(?:_seed_(?P<seed>\d{1,4}))?"
)


@dataclass(frozen=True)
class CoderPath:
    """What the path of a folder says.

    Attributes:
        site: None for a folder that is not below one of :data:`FOLDERS`.
        layer: counts from 0.
        width: label of the number of latents.
        label: ``small``, ``medium`` or ``big``; None for a folder named after its L0.
        l0: the L0 in the name; None for a folder with a label.
        affine: whether the name says that there is a skip connection.
        seed: number of the seed; None if the name has none.
    """

    site: str | None
    layer: int
    width: str
    label: str | None
    l0: float | None
    affine: bool
    seed: int | None


def parse_coder_path(path: str) -> CoderPath | None:
    """Read a path of this layout; None for any other path.

    >>> found = parse_coder_path("transcoder_all/layer_5_width_16k_l0_small_affine")
    >>> found.site, found.layer, found.width, found.label, found.affine, found.seed
    ('transcoder', 5, '16k', 'small', True, None)
    """
    *above, name = path.split("/")
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    sites = {folder: site for site, folder in FOLDERS.items()}
    site = sites.get(above[-1].removesuffix("_all")) if above else None
    labelled = match["l0"] in LABELS
    return CoderPath(
        site=site,
        layer=int(match["layer"]),
        width=match["width"],
        label=match["l0"] if labelled else None,
        l0=None if labelled else float(match["l0"]),
        affine=match["affine"] is not None,
        seed=None if match["seed"] is None else int(match["seed"]),
    )


def coder_path(site: str, layer: int, d_sae: int, l0: str, affine: bool = False, seed: int | None = None) -> str:
    """The path of a coder's folder, whose ``l0`` is a label or a number as text.

    >>> coder_path("res", 13, 65536, "medium")
    'resid_post/layer_13_width_65k_l0_medium'
    """
    end = f"{'_affine' if affine else ''}{'' if seed is None else f'_seed_{seed}'}"
    return f"{FOLDERS.get(site, site)}/layer_{layer}_width_{width_label(d_sae)}_l0_{l0}{end}"
