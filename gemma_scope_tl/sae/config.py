"""The description of an SAE apart from its arrays (:class:`Identity`), and its form in SAELens's configurations."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig

from gemma_scope_tl.counts import checked_layer
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.families import (
    Family,
    assumed_family,
    families,
    family_named,
    family_of_model,
    named_family,
    stated_family,
)
from gemma_scope_tl.sites import ModelDims, site_of_hook
from gemma_scope_tl.weights.checks import Expected
from gemma_scope_tl.weights.coder_config import place_of_modules

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

UNFINISHED = "gemma_scope_jumprelu"
"""SAELens's name of the architecture of a training checkpoint."""
HOW_TO_FINISH = (
    "A finished run has saved an SAE beside its checkpoints. To convert a checkpoint to an SAE: "
    "sae = sae_lens.TrainingSAE.load_from_disk(checkpoint); sae.fold_activation_norm_scaling_factor(factor), with the "
    "factor in its activation_scaler.json unless that is null; sae.save_inference_model(folder)."
)
CONTEXT_SIZE = 1024
# SAELens evaluates an SAE on the data set that its metadata names; this is the data set of Google's first releases.
_GEMMA_SCOPE, _TEXT = "google/gemma-scope", "monology/pile-uncopyrighted"
FAMILY = "family"  # the metadata key for a family that does not follow from the name of the model
_MODULES = ("hf_hook_name", "hf_hook_name_out")  # SAELens's keys for names of Hugging Face's modules
OF_IDENTITY = ("model_name", FAMILY, "hook_name", "hook_name_out", *_MODULES)
"""The metadata of an SAE from which its place and family follow."""
_ROW_FIELDS = ("release", "id", "width", "l0")


@dataclass
class UnfinishedConfig(JumpReLUSAEConfig):
    """The configuration class for training checkpoints. Its constructor raises an error with instructions."""

    @classmethod
    def architecture(cls) -> str:
        """SAELens's name of the architecture."""
        return UNFINISHED

    def __post_init__(self) -> None:
        """Raise :class:`GemmaScopeError`."""
        raise GemmaScopeError(f"This is a training checkpoint, not an SAE. {HOW_TO_FINISH}")


if UNFINISHED not in SAE_CLASS_REGISTRY:
    register_sae_class(UNFINISHED, JumpReLUSAE, UnfinishedConfig)


@dataclass(frozen=True)
class Identity:
    """The description of an SAE apart from its arrays.

    Attributes:
        source: the origin of the arrays, for messages.
        model: name of the model that the SAE was trained on, None if unknown.
        site, layer: the place that the SAE reads, None if unknown. The embedding has no layer.
        row: the registry row, if there is one.
        metadata: the metadata of a SAELens configuration.
        transcoder: whether the SAELens configuration describes a transcoder. None without a configuration; site and
            shapes decide then.
        of_model: the family that the user states, by its name or by a model; None for the family of the row, of the
            metadata or of the name of the model.

    Raises:
        SpliceError: for a layer that is no integer from 0.
    """

    source: str
    model: str | None = None
    site: str | None = None
    layer: int | None = None
    row: SAERow | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    transcoder: bool | None = None
    of_model: Family | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layer", checked_layer(self.layer, self.site))

    @classmethod
    def of(cls, row: SAERow, source: str) -> Identity:
        """The identity of a registry row, whose arrays come from ``source``."""
        return cls(source, row.model, row.site, row.layer, row)

    @cached_property
    def family(self) -> Family:
        """The family of the model, which defines the sites and units.

        Warns:
            AssumedFamilyWarning: it is unknown, and coders at this site differ between families.
        """
        how = "family=" if self.row is None else f"`family:` in the registry file of {self.row.release}"
        return self.known_family or assumed_family(self._model_name, self.site, self.source, how)

    @cached_property
    def known_family(self) -> Family | None:
        """The family of the model as far as anything says it.

        That is what the user or the row states, what the metadata state, what the name of the model tells, or the only
        family that has the tensors which the metadata name.
        """
        if self.of_model is not None:
            return self.of_model
        if self.row is not None:
            return named_family(self.row.model) if self.row.family is None else self.row.model_family
        stated = {family.name: family for family in families()}.get(str(self.metadata.get(FAMILY)))
        return stated or named_family(self._model_name) or self._family_of_tensors()

    @property
    def _model_name(self) -> str | None:
        name = self.model or self.metadata.get("model_name")
        return name if isinstance(name, str) else None

    def _family_of_tensors(self) -> Family | None:
        """The only family with a site at the hooks, or else at the modules, that the metadata name."""
        for names, place in ((("hook_name", "hook_name_out"), site_of_hook), (_MODULES, place_of_modules)):
            reads, writes = (self.metadata.get(name) for name in names)
            if not isinstance(reads, str) or not isinstance(writes, str | None):
                continue
            found: list[Family] = []
            for family in families():
                with suppress(UnknownNameError, SpliceError):
                    found += [family] if place(reads, writes, family) else []
            if found:
                return found[0] if len(found) == 1 else None
        return None

    def placed(self) -> Identity:
        """This identity, with an unknown site and layer taken from the hook names in the metadata if possible."""
        hook, out = self.metadata.get("hook_name"), self.metadata.get("hook_name_out")
        if self.site is not None or not isinstance(hook, str) or not isinstance(out, str | None):
            return self
        try:
            site, layer = site_of_hook(hook, out)
        except (UnknownNameError, SpliceError):
            return self._placed_by_modules()
        return replace(self, site=site.name, layer=layer) if site.name in self.family.sites else self

    def _placed_by_modules(self) -> Identity:
        """As :meth:`placed`, by the names of Hugging Face's modules that SAELens keeps of some releases.

        SAELens names ``blocks.L.hook_mlp_in`` for transcoders that read another tensor, which these names tell.
        """
        reads, writes = (self.metadata.get(name) for name in _MODULES)
        if not isinstance(reads, str) or not isinstance(writes, str | None):
            return self
        found = place_of_modules(reads, writes, self.family)
        return self if found is None else replace(self, site=found[0].name, layer=found[1])

    @property
    def reads_heads(self) -> bool:
        """Whether the SAE reads the outputs of attention heads, which hooks return with a dimension of heads."""
        if self.site is None:  # a TransformerLens hook without a site
            return str(self.metadata.get("hook_name")).endswith("_z")
        return self.family.site(self.site).width_rule == "heads"

    def sae_lens_metadata(self) -> SAEMetadata:
        """SAELens's metadata, with hook names of ``HookedTransformer``, as SAELens uses them.

        Raises:
            SpliceError: when a site that exists in every layer is given without a layer.
        """
        fields: dict[str, Any] = {
            "sae_lens_training_version": None,
            "prepend_bos": True,
            "context_size": CONTEXT_SIZE,
            "hook_head_index": None,
            "model_from_pretrained_kwargs": {},
            "neuronpedia_id": None,
            **self.metadata,
        }
        if self.model is not None:
            fields["model_name"] = self.model
        sites = () if self.site is None else (self.site,)
        if self.known_family and (stated := stated_family(self.known_family, self._model_name, *sites)):
            fields[FAMILY] = stated
        if self.site is not None:
            site = self.family.site(self.site)
            layer = self.layer if site.per_layer else None
            fields |= {"site": self.site, "layer": layer, "hook_layer": layer}
            fields["hook_name"] = site.hook_name(layer, "hooked_transformer")
            if site.is_transcoder:
                written = site.hook_name_out(layer, "hooked_transformer")
                fields |= {"hook_name_out": written, "hook_head_index_out": None}
        if self.row is not None:
            if self.row.format == "gemma-scope" and self.row.repo.startswith(_GEMMA_SCOPE):
                fields.setdefault("dataset_path", _TEXT)
            fields |= {name: getattr(self.row, name) for name in _ROW_FIELDS}
            fields["neuronpedia_id"] = self.row.neuronpedia
        return SAEMetadata(**fields)


def make_config(sizes: dict[str, int], skip: bool, dtype: str, metadata: SAEMetadata, heads: bool) -> Any:
    """The SAELens configuration of an SAE on the CPU.

    Args:
        sizes: ``d_in`` and ``d_sae``; for a transcoder ``d_out`` too.
        skip: whether a transcoder has a linear path around the latents.
        dtype: dtype of the parameters except the thresholds, such as ``"float32"``.
        metadata: SAELens's metadata.
        heads: whether the SAE reads concatenated heads. ``reshape_activations`` is then ``"hook_z"``, which SAELens
            needs to splice it.
    """
    common: dict[str, Any] = {**sizes, "dtype": dtype, "apply_b_dec_to_input": False, "metadata": metadata}
    if "d_out" in sizes:
        return (JumpReLUSkipTranscoderConfig if skip else JumpReLUTranscoderConfig)(**common)
    return JumpReLUSAEConfig(**common, reshape_activations="hook_z" if heads else "none")


def name_of(model: Any) -> str | None:
    """The name of a model, from the name, the model or its configuration."""
    if model is None or isinstance(model, str):
        return model
    config = _config_of(model)
    return getattr(config, "model_name", None) or getattr(config, "_name_or_path", None) or None


def family_given(model: Any, family: str | None) -> Family | None:
    """The family that a user states by its name, or by a model or its configuration; None without any of them.

    Raises:
        UnknownNameError: no family has this name.
        GemmaScopeError: the model is of another family.
    """
    known = getattr(model, "family", None)
    config = None if model is None or isinstance(model, str) else _config_of(model)
    for one in families():
        if known is None and config is not None:
            of_config = getattr(config, "model_type", None) in one.model_types
            known = one if of_config or getattr(config, "original_architecture", None) == one.architecture else None
    if family is None:
        return known
    stated, known = family_named(family), known or named_family(name_of(model))
    if known not in (None, stated):
        raise GemmaScopeError(f"The model {name_of(model)!r} is a {known.title}, but family={family!r} was given.")
    return stated


def expected_sizes(model: Any, site: str | None, layer: int | None, family: Family | None = None) -> Expected:
    """The sizes that follow from a model and a site. For a name, they say only whether it is a transcoder.

    Args:
        model: a model, its configuration or its name.
        site, layer: the place.
        family: the family of the model, if it is known.

    Raises:
        WeightsError: when the model has no such layer.
    """
    if site is None:
        return Expected()
    family = family or family_of_model(name_of(model), site)
    spec = family.site(site)
    if model is None or isinstance(model, str):
        return Expected(transcoder=spec.is_transcoder)
    dims = ModelDims.from_config(_config_of(model))
    try:
        spec.check_layer(layer, dims)
    except SpliceError as error:
        raise WeightsError(str(error)) from error
    return Expected(spec.d_in(dims), None, family.d_out(site, dims), spec.is_transcoder, said_by="the model")


def expected_of_row(row: SAERow) -> Expected:
    """The sizes in a registry row."""
    transcoder = row.model_family.site(row.base_site).is_transcoder
    said_by = f"the registry ({row.release}/{row.id})"
    return Expected(row.d_in, row.d_sae, row.d_out or row.d_in, transcoder, row.affine, said_by)


def _config_of(model: Any) -> Any:
    return getattr(model, "cfg", None) or getattr(model, "config", None) or model
