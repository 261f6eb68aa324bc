"""Registration of this package's releases with stock SAELens, for ``sae_lens.SAE.from_pretrained(release, id)``.

SAELens has no function that adds a release, but its directory is one dict that is made once and shared, and two more
dicts hold its loaders by name. Entries are added to these three; those of SAELens are not changed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

from gemma_scope_tl.registry.catalog import header_of, load_release, releases, resolve

LOADER_NAME = "gemma_scope_tl"
_RELEASE_KEY = "gemma_scope_tl_release"
_UNKNOWN = float("nan")  # SAELens expects a number, and 0.0 or 1.0 would look like a measurement


def register_with_sae_lens() -> list[str]:
    """Make every release of the registry, including registered and contributed ones, loadable by stock SAELens.

    ``sae_lens.SAE.from_pretrained(release, id)`` then returns an SAE of SAELens's own class, with the weights that this
    package's loader fetches and checks: the sha256 and the commit of the row, the embedding's scale applied to
    ``b_dec`` as well, ``reshape_activations="hook_z"`` at the att site, and ``HookedTransformer`` hook names. The class
    is SAELens's, because ``SAE.from_pretrained`` finds the class by an architecture name that SAELens's own SAEs share:
    this package's classes would also be used for other releases. (For thresholds that stay float32 in a bfloat16 SAE,
    and for pickling, use ``gemma_scope_tl.JumpReLUSAE.from_pretrained``.)

    **Names that SAELens already has are not changed.** Among them are Google's Gemma Scope releases, which SAELens
    continues to load with its own loader. That loader does not scale ``b_dec`` of the embedding SAEs and checks no
    hash; use ``gemma_scope_tl.JumpReLUSAE.from_pretrained`` for these.

    Another call updates the entries from the registry. Ids are loaded from the current registry, but SAELens accepts
    only the ids that existed at the last call.

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
    """A loader with SAELens's signature, which returns configuration, parameters on ``device``, and no sparsity.

    Args:
        repo_id: unused, since the registry row names the repository.
        folder_name: the id of the SAE.
        device: device of the parameters.
        force_download: unused, since a cached file has passed its checks.
        cfg_overrides: overrides of the directory's entry, which include the release.
    """
    from gemma_scope_tl.sae.loading import load_row

    overrides = dict(cfg_overrides or {})
    row = resolve(overrides.pop(_RELEASE_KEY), folder_name)
    sae = load_row(row, device=device, dtype=overrides.get("dtype", "float32"))
    overrides.pop("neuronpedia_id", None)  # the metadata contain the row's id
    cfg = {**sae.cfg.to_dict(), **overrides, "device": device}
    return cfg, dict(sae.state_dict()), None


def config_for_sae_lens(
    repo_id: str,
    folder_name: str,
    device: str = "cpu",
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration alone. The weights file is still fetched, because the sizes are in its header."""
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
