"""The types that describe a model family: frozen values with what differs between families of models.

A *place* is a tensor of the model: a site's name and a layer. A *site* is a kind of place where coders (SAEs and
transcoders) are trained; it names the tensors that a coder reads and those that it writes. A *family* lists its sites
with their hooks, and defines how models of the family are named, loaded, checked and interpreted.

Sites of the same name have the same meaning in all families: they read and write sites of the same names. Hooks,
modules and widths may differ, so code that runs a model uses the family of that model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

from gemma_scope_tl.counts import checked_layer
from gemma_scope_tl.errors import SpliceError, checked_text, unknown_name
from gemma_scope_tl.families.layered import refused_layered

Backend = Literal["bridge", "hooked_transformer"]
BACKENDS: tuple[Backend, ...] = ("bridge", "hooked_transformer")
Side = Literal["output", "input", "normalized_input"]
Width = Literal["d_model", "heads"]
Joins = Literal["residual", "embedding", "branch", "attention", "nowhere"]
_EMBEDDING_HOOKS: Mapping[Backend, str] = {"bridge": "embed.hook_out", "hooked_transformer": "hook_embed"}


class Place(NamedTuple):
    """A tensor of a model, by site and layer.

    >>> Place("res", 3).key, Place("embedding", None).key
    ('res/layer_3', 'embedding')
    """

    site: str
    layer: int | None

    @property
    def key(self) -> str:
        """The name of the place in paths and logs."""
        return self.site if self.layer is None else f"{self.site}/layer_{self.layer}"


@dataclass(frozen=True)
class ModelDims:
    """The sizes of a model that determine the widths of its sites."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int

    @classmethod
    def from_config(cls, config: Any) -> ModelDims:
        """Read the sizes from a Hugging Face config, a TransformerLens config, or a mapping with the keys of either.

        A config without the size of a head means ``d_model / n_heads``, as in transformers.

        Raises:
            UnknownNameError: when the config has no value for another size.
        """

        def pick(*names: str, default: int | None = None) -> int:
            for name in names:
                value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
                if value is not None:
                    return int(cast(int, value))
            if default is None:
                raise unknown_name("model config", type(config).__name__, names, "The config has none of these keys.")
            return default

        d_model, n_heads = pick("hidden_size", "d_model"), pick("num_attention_heads", "n_heads")
        return cls(
            n_layers=pick("num_hidden_layers", "n_layers"),
            d_model=d_model,
            n_heads=n_heads,
            d_head=pick("head_dim", "d_head", default=d_model // n_heads),
        )


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model that determine the memory and time of a forward pass.

    Attributes:
        dims: the sizes that determine the widths of the sites.
        kv_heads: number of key and value heads.
        d_ff: width of the hidden layer of the MLP.
        d_vocab: number of rows of the embedding.
    """

    dims: ModelDims
    kv_heads: int
    d_ff: int
    d_vocab: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelSizes:
        """Read the sizes from a Hugging Face config as a mapping."""
        return cls(
            ModelDims.from_config(config),
            int(config["num_key_value_heads"]),
            int(config["intermediate_size"]),
            int(config["vocab_size"]),
        )

    @property
    def block_parameters(self) -> int:
        """Number of entries in the matrices of one block."""
        d, heads = self.dims.d_model, self.dims.n_heads * self.dims.d_head
        return 2 * d * heads + 2 * d * self.kv_heads * self.dims.d_head + 3 * d * self.d_ff

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, with the embedding counted once because the unembedding shares it."""
        norms = self.dims.d_model * (4 * self.dims.n_layers + 1)
        return self.dims.n_layers * self.block_parameters + self.d_vocab * self.dims.d_model + norms

    def flops_per_token(self, blocks: int, context: int) -> float:
        """Floating-point operations per token of a forward pass through ``blocks`` blocks.

        Each weight counts two. Each entry of a head counts four for each position attended to, which is half of the
        context on average.
        """
        heads = self.dims.n_heads * self.dims.d_head
        return blocks * (2.0 * self.block_parameters + 4.0 * heads * context / 2)


@dataclass(frozen=True)
class Site:
    """One row of a family's site table.

    Attributes:
        name: the word used in ids, registry rows and the command line.
        bridge, hooked_transformer: name of the hook on the tensor of this site, with ``{layer}`` in it.
        module: path, below the decoder, of the Hugging Face module that the tensor passes, with ``{layer}`` in it.
        side: whether the tensor is the module's ``"output"``, its ``"input"``, or its input divided by its root mean
            square (``"normalized_input"``, an RMSNorm without its gain).
        width_rule: ``"d_model"`` or ``"heads"`` (n_heads * d_head).
        per_layer: False for a tensor that exists once.
        reads, writes: names of the sites whose tensors a coder at this site reads and writes. The tensor that has the
            name of the site itself comes first among those read. An SAE writes what it reads, a transcoder does not.
        joins: how a tensor written here continues: it is the residual stream of the next block (``"residual"``) or of
            the first (``"embedding"``), it is added to the residual stream inside its block (``"branch"``), or it
            passes the rest of attention first (``"attention"``). ``"nowhere"`` is for a tensor that is only read.
        description: one line that names the tensor.
        folded_gain: the norm whose gain the tensor has, if a stock ``HookedTransformer`` has no hook behind that gain.
            Such a model gives the tensor without its gain, at ``blocks.L.<norm>.hook_normalized``, and needs a coder
            into which the gain is folded (:func:`gemma_scope_tl.model.gain.with_folded_gain`). Models of ``load_model``
            have a hook on the tensor itself.

    Raises:
        UnknownNameError: for an invalid ``side``, ``width_rule`` or ``joins``.
    """

    name: str
    bridge: str
    hooked_transformer: str
    module: str
    side: Side
    width_rule: Width
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    joins: Joins
    description: str
    per_layer: bool = True
    bridge_out: str = ""
    hooked_transformer_out: str = ""
    folded_gain: str = ""

    def __post_init__(self) -> None:
        for name, known in (("side", Side), ("width_rule", Width), ("joins", Joins)):
            if getattr(self, name) not in get_args(known):
                raise unknown_name(f"{name} of site {self.name!r}", getattr(self, name), get_args(known))

    @property
    def is_transcoder(self) -> bool:
        """Whether a coder at this site reads one tensor and reconstructs another."""
        return self.reads != self.writes

    def hook_name(self, layer: int | None = None, backend: Backend = "bridge") -> str:
        """Name of the hook that a coder at this site reads.

        Args:
            layer: counts from 0; ignored by a site that exists once.
            backend: ``"bridge"`` or ``"hooked_transformer"``.

        Raises:
            UnknownNameError: for an unknown backend.
            SpliceError: when the site needs a layer and none is given, or the layer is no integer from 0.
        """
        return self._format(self.bridge if _checked(backend) == "bridge" else self.hooked_transformer, layer)

    def hook_name_out(self, layer: int | None = None, backend: Backend = "bridge") -> str:
        """Name of the hook whose tensor a coder reconstructs: the hook that it reads, except for transcoders."""
        bridge, hooked_transformer = self.bridge_out or self.bridge, self.hooked_transformer_out
        written = bridge if _checked(backend) == "bridge" else hooked_transformer or self.hooked_transformer
        return self._format(written, layer)

    def module_name(self, layer: int | None = None) -> str:
        """Path, below the decoder, of the Hugging Face module that the tensor passes. Errors are those of hooks."""
        return self._format(self.module, layer)

    def reads_at(self, layer: int | None) -> tuple[Place, ...]:
        """The places that a coder at this site and layer reads."""
        return tuple(Place(name, layer) for name in self.reads)

    def writes_at(self, layer: int | None) -> tuple[Place, ...]:
        """The places that a coder at this site and layer writes."""
        return tuple(Place(name, layer) for name in self.writes)

    def d_in(self, dims: ModelDims) -> int:
        """Width of the site's activations, heads flattened, in a model of these sizes."""
        return dims.d_model if self.width_rule == "d_model" else dims.n_heads * dims.d_head

    def check_layer(self, layer: int | None, dims: ModelDims) -> None:
        """Raise :class:`SpliceError` when a model of these sizes has no such layer."""
        if not self.per_layer:
            return
        layer = checked_layer(layer, self.name)
        if layer is None or layer >= dims.n_layers:
            raise SpliceError(
                f"Site {self.name!r} has no layer {layer}: this model's layers are 0..{dims.n_layers - 1}."
            )

    def _format(self, template: str, layer: int | None) -> str:
        if not self.per_layer:
            return template
        number = checked_layer(layer, self.name)
        if number is None:
            raise SpliceError(f"Site {self.name!r} exists in every layer: give layer=N.")
        return template.format(layer=number)


@dataclass(frozen=True)
class Wrapper:
    """A Hugging Face class around the text models of a family, such as one that reads images too.

    Attributes:
        architecture: name of the class.
        config: attribute of the wrapper's configuration that holds the configuration of the text model.
        decoder, unembedding: paths of the text model's decoder and unembedding in the wrapper.
        weights: regular expressions for the beginnings of the names of the text model's weights in the wrapper's files,
            and the beginnings in the files of a text model that take their place.
    """

    architecture: str
    config: str
    decoder: str
    unembedding: str
    weights: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """What differs between families of models.

    Attributes:
        name: the key of the family, such as ``"gemma2"``.
        title: the name of the family in texts, such as ``"Gemma 2"``.
        model_types: values of ``model_type`` in the Hugging Face configurations of the family.
        architecture: name of the Hugging Face class with an unembedding, which TransformerLens uses too.
        sites: the site table, by name.
        sizes: sizes of the released models, by the name of the base model.
        owner: account on the Hub that publishes the models.
        tuned_suffix: suffix that an instruction-tuned model adds to the name of its base model.
        base_suffix: suffix that the Hub adds to the name of a base model. Names with and without it mean the same.
        hub_without_suffix: the base models to whose names the Hub does not add it.
        spellings: other beginnings of the names of models in published files, and the beginnings that they stand for.
        wrapper: the class that contains the text model in some repositories of the family; None if there is no such.
        embedding_hooks: the hook on the token embedding, as it enters the first block, by backend.
        refused_hooks: names of hooks, with ``{layer}`` in them, that are mistaken for a site, and why they are refused.
        hooked_transformer_config: function from a Hugging Face configuration and its :class:`ModelDims` to the keyword
            arguments of a ``HookedTransformerConfig`` that are specific to the family.
        hooked_transformer_weights: ``"module:function"`` of the weight conversion in TransformerLens.
        embedding_scale: function from ``d_model`` to the factor by which the model multiplies its token embedding.
        gain_offset: the number to add to the weight of an RMSNorm to obtain its gain, by backend.
        decoder: path of the decoder in the Hugging Face model.
        query, projections, final_norm: modules below the decoder: the query projection, all linear maps of a layer,
            and the norm before the unembedding.
        norm_before_mlp, norm_after_attention: the norms of a block, by their names in TransformerLens; None for a
            family whose blocks have no norm after attention.
        turn_start, turn_end: special tokens at the start and end of a turn of a chat.
        answer_role: the name of the model's own turns in a chat.
        gated: whether downloading the weights from the Hub requires accepting a licence.
        bundled: name of the small model of the family that comes with this package; empty if there is none.

    Raises:
        UnknownNameError: for a site that writes a site which is not in the table.
        SpliceError: for a site whose written hook is not the hook of the site that it writes.
    """

    name: str
    title: str
    model_types: tuple[str, ...]
    architecture: str
    sites: Mapping[str, Site]
    sizes: Mapping[str, ModelSizes]
    owner: str
    tuned_suffix: str
    hooked_transformer_config: Callable[[Any, ModelDims], dict[str, Any]]
    hooked_transformer_weights: str
    embedding_scale: Callable[[int], float]
    gain_offset: Mapping[Backend, float]
    norm_before_mlp: str
    norm_after_attention: str | None
    turn_start: str
    turn_end: str
    answer_role: str = "model"
    decoder: str = "model"
    query: str = "layers.{layer}.self_attn.q_proj"
    projections: tuple[str, ...] = (
        *(f"layers.{{layer}}.self_attn.{name}_proj" for name in "qkvo"),
        *(f"layers.{{layer}}.mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
    final_norm: str = "norm"
    gated: bool = True
    bundled: str = ""
    base_suffix: str = ""
    hub_without_suffix: tuple[str, ...] = ()
    spellings: Mapping[str, str] = field(default_factory=dict[str, str])
    wrapper: Wrapper | None = None
    embedding_hooks: Mapping[Backend, str] = field(default_factory=lambda: dict(_EMBEDDING_HOOKS))
    refused_hooks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for site in self.sites.values():
            written = [self.site(name) for name in site.writes]  # raises for a site that is not in the table
            for backend in BACKENDS:
                hooks = [one.hook_name(0, backend) for one in written]
                if len(written) == 1 and site.hook_name_out(0, backend) != hooks[0]:
                    raise SpliceError(
                        f"Coders at site {site.name!r} of {self.title} write {site.writes[0]!r}, whose hook on the "
                        f"backend {backend!r} is {hooks[0]!r}, but the site names {site.hook_name_out(0, backend)!r}."
                    )

    @property
    def hub_ids(self) -> dict[str, str]:
        """The Hub's id of each released model, base and instruction-tuned, by the model's name."""
        found: dict[str, str] = {}
        for name in self.sizes:
            suffix = "" if name in self.hub_without_suffix else self.base_suffix
            found[name] = f"{self.owner}/{name}{suffix}"
            found[f"{name}{self.tuned_suffix}"] = f"{self.owner}/{name}{self.tuned_suffix}"
        return found

    def site(self, name: str) -> Site:
        """The row of the site table with this name.

        Raises:
            UnknownNameError: with the nearest names.
        """
        if checked_text(f"site of {self.title}", name, self.sites) in self.sites:
            return self.sites[name]
        raise refused_layered(name) or unknown_name(f"site of {self.title}", name, self.sites)

    def d_out(self, site: str, dims: ModelDims) -> int:
        """Width of what a coder at a site writes, heads flattened, in a model of these sizes."""
        return sum(self.site(name).d_in(dims) for name in self.site(site).writes)

    def base_name(self, model: str) -> str:
        """The name of the base model of a released model, base or instruction-tuned; any other name unchanged."""
        base = self.plain_name(model).removesuffix(self.tuned_suffix)
        return base if base in self.sizes else model

    def plain_name(self, model: str) -> str:
        """The name of a released model in its first spelling, without ``base_suffix``; any other name unchanged."""
        name = model
        for spelled, meant in self.spellings.items():
            if name.startswith(spelled):
                name = meant + name.removeprefix(spelled)
        base = name.removesuffix(self.base_suffix)
        if base in self.sizes:
            return base
        return name if name.removesuffix(self.tuned_suffix) in self.sizes else model

    def decoder_of(self, hf_model: Any) -> Any:
        """The decoder of a Hugging Face model of the family, which may be a wrapper."""
        wrapped = self.wrapper if self.wrapper and type(hf_model).__name__ == self.wrapper.architecture else None
        return hf_model.get_submodule((wrapped or self).decoder)

    def dims_of(self, model: str) -> ModelDims | None:
        """The sizes of a released model, base or instruction-tuned; None for any other name."""
        sizes = self.sizes.get(self.base_name(model))
        return None if sizes is None else sizes.dims

    def text_config(self, config: Any) -> Any:
        """The part of a configuration, an object or a mapping, that describes the text model."""
        if self.wrapper is None:
            return config
        name = self.wrapper.config
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        return config if found is None else found


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    return backend
