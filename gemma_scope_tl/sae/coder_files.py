"""Gemma Scope 2's files as SAEs: what a ``config.json`` adds to an identity, and what is written for an SAE."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.families import hub_ids, named_family, names_with, stated_family
from gemma_scope_tl.sae.config import FAMILY, Identity
from gemma_scope_tl.sae.provenance import still_said
from gemma_scope_tl.weights.checks import weights_error
from gemma_scope_tl.weights.coder_config import ARCHITECTURE, CoderConfig, module_hooks

if TYPE_CHECKING:
    from gemma_scope_tl.families import Family

_OTHER_LAYOUT = "Save it with format='gemma-scope' or 'sae-lens'."


def described(config: CoderConfig, identity: Identity) -> Identity:
    """An identity without a registry row, completed with the model, site, layer and L0 of a ``config.json``.

    A model that the user gives stands, since an SAE may be used with another model, such as a fine-tuned one.

    Raises:
        WeightsError: when the file names another place than the user, or a tensor that is no site's.
    """
    found = config.place(identity.of_model)
    metadata: dict[str, Any] = {} if config.l0 is None else {"l0": config.l0}
    model = identity.model or config.model
    if found is None:
        return replace(identity, model=model, transcoder=config.is_transcoder, metadata=metadata)
    family, site, layer = found
    for name, given, said in (("site", identity.site, site.name), ("layer", identity.layer, layer)):
        if given not in (None, said):
            what = f"has {name} {said}, but {name}={given!r} was given"
            raise weights_error(config.source, what, "Leave the argument out, or check the file.")
    if identity.of_model is None and (stated := stated_family(family, model, site.name)):
        metadata[FAMILY] = stated
    return replace(identity, model=model, site=site.name, layer=layer, transcoder=site.is_transcoder, metadata=metadata)


def refuse_table_units(identity: Identity) -> None:
    """Raise :class:`GemmaScopeError` for an SAE of the token embedding, which this layout does not define units for."""
    if identity.site is not None and identity.family.site(identity.site).joins == "embedding":
        what = f"{identity.source}: Gemma Scope 2's layout does not say in which units an embedding SAE is"
        raise GemmaScopeError(f"{what}. {_OTHER_LAYOUT}")


def written_config(sae: Any, identity: Identity) -> dict[str, Any]:
    """The content of ``config.json`` for an SAE, without keys whose values are unknown.

    Args:
        sae: an SAE or transcoder of this package or of SAELens.
        identity: its place and the family of its model.

    Raises:
        GemmaScopeError: when no module takes or returns the tensor of the site, so that the layout has no name for it.
    """
    crosses = "transcoder" in sae.cfg.architecture()
    name = identity.model or sae.cfg.metadata.get("model_name")
    said: dict[str, Any] = {
        "width": int(sae.cfg.d_sae),
        "model_name": None if name is None else hub_ids().get(str(name).rpartition("/")[2], name),
        "architecture": ARCHITECTURE,
        "l0": still_said(sae, "l0"),
        "affine_connection": getattr(sae, "W_skip", None) is not None,
        "type": "transcoder" if crosses else "sae",
    }
    if identity.site is not None:
        family: Family = identity.family
        hooks = module_hooks(family, identity.site, identity.layer)
        if hooks is None:
            what = f"No module of {family.title} takes or returns the tensor of site {identity.site!r}"
            own = "" if named_family(None if name is None else str(name)) else (
                f" If the model is of another family, give family= ({names_with(identity.site)}) when the SAE is made."
            )  # fmt: skip
            raise GemmaScopeError(f"{what}, so Gemma Scope 2's layout has no name for it. {_OTHER_LAYOUT}{own}")
        said = {"hf_hook_point_in": hooks[0], "hf_hook_point_out": hooks[1], **said}
        said[FAMILY] = stated_family(family, None if name is None else str(name), identity.site)
    return {key: value for key, value in said.items() if value is not None}
