"""The site table: where Gemma Scope's SAEs read and write in Gemma 2.

One row per site; nothing else in the package knows a hook name or how wide a site is. Layers count from 0.

========== ======================================= ================================== ============================
site       tensor (section 3.1, appendix B)        HookedTransformer hook             TransformerBridge hook
========== ======================================= ================================== ============================
res        residual stream after the MLP           ``blocks.L.hook_resid_post``       ``blocks.L.hook_out``
mlp        MLP output after the post-MLP RMSNorm   ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
att        heads, concatenated, before W_O         ``blocks.L.attn.hook_z``           ``blocks.L.attn.o.hook_in``
embedding  scaled token embedding                  ``hook_embed``                     ``embed.hook_out``
transcoder in: pre-MLP RMSNorm without its gain    ``blocks.L.ln2.hook_normalized``   the same
           out: the mlp site                       ``blocks.L.hook_mlp_out``          ``blocks.L.ln2_post.hook_out``
========== ======================================= ================================== ============================

``blocks.L.mlp.hook_out`` on the bridge is the MLP's output *before* the post-MLP norm: not a Gemma Scope site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, unknown_name

if TYPE_CHECKING:
    import torch

Backend = Literal["bridge", "hooked_transformer"]
SiteName = Literal["res", "mlp", "att", "embedding", "transcoder"]
BACKENDS: tuple[Backend, ...] = ("bridge", "hooked_transformer")


@dataclass(frozen=True)
class ModelDims:
    """The sizes of a Gemma 2 that decide the width of its sites."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int

    @classmethod
    def from_config(cls, config: Any) -> ModelDims:
        """Read the sizes from a Hugging Face config, a TransformerLens config, or a mapping with either's names."""

        def pick(*names: str) -> int:
            for name in names:
                value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
                if value is not None:
                    return int(cast(int, value))
            raise unknown_name("model config", type(config).__name__, names, "The config has none of these keys.")

        return cls(
            n_layers=pick("num_hidden_layers", "n_layers"),
            d_model=pick("hidden_size", "d_model"),
            n_heads=pick("num_attention_heads", "n_heads"),
            d_head=pick("head_dim", "d_head"),
        )


@dataclass(frozen=True)
class Site:
    """One row of the site table.

    Attributes:
        name: the word used in ids, registry rows and the command line.
        bridge, hooked_transformer: name of the hook that an SAE reads, with ``{layer}`` in it (none for the embedding).
        bridge_out, hooked_transformer_out: name of the hook that the SAE writes; equal to the read hook but for
            transcoders.
        per_layer: False for the embedding, which exists once.
        width_rule: ``"d_model"`` or ``"heads"`` (n_heads * d_head).
        description: one line for people.
    """

    name: SiteName
    bridge: str
    hooked_transformer: str
    bridge_out: str
    hooked_transformer_out: str
    per_layer: bool
    width_rule: Literal["d_model", "heads"]
    description: str

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAE reads one tensor and predicts another."""
        return self.bridge != self.bridge_out

    def hook_name(self, layer: int | None = None, backend: Backend = "bridge") -> str:
        """Name of the hook that an SAE at this site reads.

        Args:
            layer: counts from 0; ignored by the embedding.
            backend: ``"bridge"`` or ``"hooked_transformer"``.

        Raises:
            UnknownNameError: for another backend.
            SpliceError: when a layer is needed and missing.

        >>> get_site("res").hook_name(20, backend="bridge")
        'blocks.20.hook_out'
        """
        return self._format(getattr(self, _checked(backend)), layer)

    def hook_name_out(self, layer: int | None = None, backend: Backend = "bridge") -> str:
        """Name of the hook whose tensor an SAE at this site reconstructs.

        >>> get_site("transcoder").hook_name_out(3, backend="hooked_transformer")
        'blocks.3.hook_mlp_out'
        """
        return self._format(getattr(self, f"{_checked(backend)}_out"), layer)

    def d_in(self, dims: ModelDims) -> int:
        """Width of the site's (flattened) activations in a model of these sizes.

        >>> get_site("att").d_in(ModelDims(26, 2304, 8, 256))
        2048
        """
        return dims.d_model if self.width_rule == "d_model" else dims.n_heads * dims.d_head

    def check_layer(self, layer: int | None, dims: ModelDims) -> None:
        """Raise :class:`SpliceError` when a model of these sizes has no such layer."""
        if not self.per_layer:
            return
        if layer is None or not 0 <= layer < dims.n_layers:
            raise SpliceError(
                f"Site {self.name!r} has no layer {layer}: this model's layers are 0..{dims.n_layers - 1}."
            )

    def _format(self, template: str, layer: int | None) -> str:
        if not self.per_layer:
            return template
        if layer is None:
            raise SpliceError(f"Site {self.name!r} exists in every layer: give layer=.")
        return template.format(layer=layer)


_RES = ("blocks.{layer}.hook_out", "blocks.{layer}.hook_resid_post")
_MLP = ("blocks.{layer}.ln2_post.hook_out", "blocks.{layer}.hook_mlp_out")
_ATT = ("blocks.{layer}.attn.o.hook_in", "blocks.{layer}.attn.hook_z")
_EMB = ("embed.hook_out", "hook_embed")
_PRE_MLP = ("blocks.{layer}.ln2.hook_normalized", "blocks.{layer}.ln2.hook_normalized")

SITES: Mapping[str, Site] = {
    site.name: site
    for site in (
        Site("res", *_RES, *_RES, True, "d_model", "residual stream after the MLP sub-layer"),
        Site("mlp", *_MLP, *_MLP, True, "d_model", "MLP output after the post-MLP RMSNorm"),
        Site("att", *_ATT, *_ATT, True, "heads", "concatenated head outputs before W_O"),
        Site("embedding", *_EMB, *_EMB, False, "d_model", "token embedding, scaled by sqrt(d_model)"),
        Site("transcoder", *_PRE_MLP, *_MLP, True, "d_model", "pre-MLP RMSNorm without gain -> MLP output"),
    )
}


def get_site(name: str) -> Site:
    """The row of the site table with this name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    try:
        return SITES[name]
    except KeyError:
        raise unknown_name("site", name, SITES) from None


def site_of_hook(hook_name: str, hook_name_out: str | None = None) -> tuple[Site, int | None]:
    """The site and layer that a hook name of either backend belongs to.

    Args:
        hook_name: the hook that an SAE reads.
        hook_name_out: the hook it writes, for a transcoder.

    Raises:
        UnknownNameError: when no site lives there, with the nearest hook names.

    >>> site, layer = site_of_hook("blocks.7.attn.hook_z")
    >>> site.name, layer
    ('att', 7)
    """
    layer = layer_of_hook(hook_name)
    for site in SITES.values():
        if site.per_layer == (layer is None):
            continue
        reads = {site.hook_name(layer, b) for b in BACKENDS}
        writes = {site.hook_name_out(layer, b) for b in BACKENDS}
        if hook_name in reads and (hook_name_out or (hook_name if not site.is_transcoder else None)) in writes:
            return site, layer
    known = [s.hook_name(layer or 0, b) for s in SITES.values() for b in BACKENDS]
    given = hook_name if hook_name_out in (None, hook_name) else f"{hook_name} -> {hook_name_out}"
    raise unknown_name("Gemma Scope hook", given, sorted(set(known)))


class Place(NamedTuple):
    """A tensor of the model: what the SAEs of one site and layer read.

    >>> Place("res", 3).key, Place("embedding", None).key
    ('res/layer_3', 'embedding')
    """

    site: str
    layer: int | None

    @property
    def key(self) -> str:
        """Its name in paths and logs."""
        return self.site if self.layer is None else f"{self.site}/layer_{self.layer}"

    @property
    def target(self) -> Place:
        """The place whose tensor the SAEs here reconstruct: another one only for transcoders, the MLP's output."""
        return Place("mlp", self.layer) if get_site(self.site).is_transcoder else self

    @classmethod
    def parse(cls, key: str) -> Place:
        """The place with this ``key``.

        Raises:
            UnknownNameError: no such site.
            GemmaScopeError: the layer is missing, or not a number.

        >>> Place.parse("att/layer_0")
        Place(site='att', layer=0)
        """
        name, _, rest = key.partition("/layer_")
        if name not in SITES:
            raise unknown_name("site", name, SITES)
        if not SITES[name].per_layer:
            number = None if not rest else "?"
        else:
            number = int(rest) if rest.isascii() and rest.isdigit() and len(rest) < 10 else "?"
        if number == "?":
            raise GemmaScopeError(f"{key!r} is no place: write 'res/layer_3', or 'embedding'.")
        return cls(name, number)


def with_targets(places: Sequence[Place]) -> list[Place]:
    """``places`` and the targets of the transcoders among them, each once."""
    return list(dict.fromkeys([*places, *(place.target for place in places)]))


def layer_of_hook(hook_name: str) -> int | None:
    """The layer in ``blocks.L.…``, or None."""
    parts = hook_name.split(".")
    numbered = len(parts) > 2 and parts[0] == "blocks" and parts[1].isascii() and parts[1].isdigit()
    return int(parts[1]) if numbered and len(parts[1]) < 10 else None


def flatten_heads(z: torch.Tensor) -> torch.Tensor:
    """``[batch, pos, head, d_head]`` -> ``[batch, pos, head * d_head]``; a tensor without heads apart stays."""
    return z.flatten(-2) if z.ndim == 4 else z


def unflatten_heads(z: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[batch, pos, head * d_head]`` -> the shape of ``like``, which has heads apart or not."""
    return z.reshape(like.shape)


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    return backend
