"""This package's releases for stock SAELens: ``sae_lens.SAE.from_pretrained(release, id)`` finds them.

SAELens has no function that adds a release, but its directory is one dict that is made once and shared, and its loaders
are found by name in two more. Entries are added to these three; none of SAELens's own are changed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

from gemma_scope_tl.registry.catalog import header_of, load_release, releases, resolve

LOADER_NAME = "gemma_scope_tl"
_RELEASE_KEY = "gemma_scope_tl_release"
_UNKNOWN = float("nan")  # SAELens reads a number here; 0.0 or 1.0 would look measured


def register_with_sae_lens() -> list[str]:
    """Make every release of the registry, registered and contributed ones too, loadable by stock SAELens.

    ``sae_lens.SAE.from_pretrained(release, id)`` then gives an SAE of SAELens's own class, with the weights that this
    package's loader fetches and checks: the sha256 and the commit of the row, the embedding's scale on ``b_dec`` as
    well, ``reshape_activations="hook_z"`` at the att site, ``HookedTransformer`` hook names. Stock classes, because
    ``SAE.from_pretrained`` finds the class by an architecture word that SAELens's own SAEs share: giving these the
    package's classes would change what other releases load as. (For thresholds that stay float32 in a bfloat16 SAE,
    and for pickling, use ``gemma_scope_tl.JumpReLUSAE.from_pretrained``.)

    **Names that SAELens has already are left to it**: among them Google's Gemma Scope releases, which go on loading
    through SAELens's own loader. That loader does not scale ``b_dec`` of the embedding SAEs and checks no hash;
    ``gemma_scope_tl.JumpReLUSAE.from_pretrained`` is the way around it for those.

    Calling it again brings the entries up to date with the registry. Ids load live from the registry, but SAELens
    answers only for those that were there at the last call.

    Returns:
        The names that now load through this package, in natural order; a ``-canonical`` name has the canonical ids.
    """
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_LOADERS[LOADER_NAME] = load_for_sae_lens
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[LOADER_NAME] = config_for_sae_lens
    directory = pretrained_saes_directory.get_pretrained_saes_directory()
    for name in [name for name, entry in directory.items() if entry.conversion_func == LOADER_NAME]:
        del directory[name]
    free = [name for name in releases(canonical=True) if name not in directory]
    directory.update({name: _lookup(name) for name in free})
    return free


def load_for_sae_lens(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    """A loader in SAELens's shape: configuration, parameters on ``device``, and no sparsity.

    Args:
        repo_id: unused; the registry row has it.
        folder_name: the id of the SAE.
        device: where the parameters go.
        force_download: unused, since a cached file has passed its checks.
        cfg_overrides: from the directory's entry; holds the release.
    """
    from gemma_scope_tl.sae.loading import load_row

    overrides = dict(cfg_overrides or {})
    row = resolve(overrides.pop(_RELEASE_KEY), folder_name)
    sae = load_row(row, device=device, dtype=overrides.get("dtype", "float32"))
    overrides.pop("neuronpedia_id", None)  # the metadata have that of the row
    cfg = {**sae.cfg.to_dict(), **overrides, "device": device}
    return cfg, dict(sae.state_dict()), None


def config_for_sae_lens(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration alone; the weights file is fetched for it, because its header has the sizes."""
    return load_for_sae_lens(repo_id, folder_name, device, force_download, cfg_overrides)[0]


def _lookup(name: str) -> PretrainedSAELookup:
    release, only_canonical = load_release(name), header_of(name).release != name
    rows = [row for row in release.rows if row.canonical or not only_canonical]
    ids = {} if only_canonical else {row.id: row for row in rows}
    ids |= {row.canonical_id: row for row in rows if row.canonical_id}
    return PretrainedSAELookup(
        release=name,
        repo_id=release.rows[0].repo,
        model=release.model,
        conversion_func=LOADER_NAME,
        saes_map={id_: id_ for id_ in ids},  # SAELens passes the value to the loader as folder_name
        expected_var_explained=dict.fromkeys(ids, _UNKNOWN),
        expected_l0={id_: row.l0 or _UNKNOWN for id_, row in ids.items()},
        neuronpedia_id=cast("dict[str, str]", {id_: row.neuronpedia for id_, row in ids.items()}),
        norm_scaling_factor={},
        config_overrides={_RELEASE_KEY: name},
    )
