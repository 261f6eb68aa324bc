"""Registration of this package's releases with stock SAELens, for ``sae_lens.SAE.from_pretrained(release, id)``.

SAELens has no function that adds a release, but its directory is one dict that is made once and shared, and two more
dicts hold its loaders by name. Entries are added to these three; those of SAELens are not changed.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from sae_lens.loading import pretrained_sae_loaders, pretrained_saes_directory
from sae_lens.loading.pretrained_saes_directory import PretrainedSAELookup

from gemma_scope_tl.families import hub_ids
from gemma_scope_tl.registry.catalog import header_of, releases, resolve, rows_of

LOADER_NAME = "gemma_scope_tl"
PREFIX = f"{LOADER_NAME}/"
"""What precedes the name of a release that SAELens has too."""
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

    **Names that SAELens already has are not changed**, and SAELens continues to load them with its own loaders. Among
    them are Google's releases. They are added under another name, ``gemma_scope_tl/`` and the name of the release, so
    that ``SAE.from_pretrained("gemma_scope_tl/gemma-scope-2-1b-pt-transcoders", id)`` loads through this package.

    What stays wrong under SAELens's own names (SAELens 6.54):

    - The ``b_dec`` of Gemma Scope's embedding SAEs is not scaled, and no hash is checked.
    - All transcoders of Gemma Scope 2 name the hook ``hook_mlp_in``, which never fires. SAELens then takes the MLP's
      *output* for their input, without a word.
    - Attention SAEs of Gemma Scope 2 have no ``hook_z`` reshaping, so ``HookedSAETransformer`` raises.

    What stays wrong under all names, because it is in SAELens's models and not in its directory:

    - SAELens's splices leave out the skip connection of affine transcoders on both models; calling the transcoder
      itself (``transcoder(x)``) is right.

    Of the other metadata, ``prepend_bos`` and ``context_size`` are those of the evaluations in the technical reports
    (rows of 1,024 tokens that begin with BOS), not records of training. ``model_name`` is a name that TransformerLens
    has.

    Crosscoders and cross-layer transcoders have no class in SAELens, so their releases are left out.

    Another call updates the entries from the registry. Ids are loaded from the current registry, but SAELens accepts
    only the ids that existed at the last call.

    Returns:
        The names that now load through this package: first the releases' own, then those with the prefix, in natural
        order. A ``-canonical`` name has the canonical ids.
    """
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_LOADERS[LOADER_NAME] = load_for_sae_lens
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[LOADER_NAME] = config_for_sae_lens
    directory = pretrained_saes_directory.get_pretrained_saes_directory()
    for name in [name for name, entry in directory.items() if entry.conversion_func == LOADER_NAME]:
        del directory[name]
    known = [name for name in releases(canonical=True) if not _spans_layers(name)]
    names = {name: name for name in known if name not in directory}
    names |= {f"{PREFIX}{name}": name for name in known if name in directory}
    directory.update({added: _lookup(added, name) for added, name in names.items()})
    return list(names)


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
    cfg: dict[str, Any] = {**sae.cfg.to_dict(), **overrides, "device": device}
    cfg["metadata"] = {**cfg["metadata"], "model_name": _model_name(row.model)}
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


def _model_name(model: str) -> str:
    """The Hub's name of a released model without the publisher, which TransformerLens has; other names unchanged."""
    return hub_ids().get(model, model).rpartition("/")[2]


def _spans_layers(name: str) -> bool:
    """Whether a release has coders of several layers, alone or among others."""
    return any(row.layers is not None for row in rows_of(header_of(name)))


def _lookup(added: str, name: str) -> PretrainedSAELookup:
    header = header_of(name)
    only_canonical = header.release != name
    rows = [row for row in rows_of(header) if row.canonical or not only_canonical]
    ids = {} if only_canonical else {row.id: row for row in rows}
    ids |= {row.canonical_id: row for row in rows if row.canonical_id}
    return PretrainedSAELookup(
        release=added,
        repo_id=rows[0].repo,
        model=_model_name(header.model),
        conversion_func=LOADER_NAME,
        saes_map={id_: id_ for id_ in ids},  # SAELens passes the value to the loader as folder_name
        expected_var_explained=dict.fromkeys(ids, _UNKNOWN),
        expected_l0={id_: row.l0 or _UNKNOWN for id_, row in ids.items()},
        neuronpedia_id=cast("dict[str, str]", {id_: row.neuronpedia for id_, row in ids.items()}),
        norm_scaling_factor={},
        config_overrides={_RELEASE_KEY: name},
    )
