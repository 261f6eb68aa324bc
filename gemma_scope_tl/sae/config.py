"""The description of an SAE apart from its arrays (:class:`Identity`), and its form in SAELens's configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig

from gemma_scope_tl.counts import checked_layer
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.families import Family, families, family_of_model
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
        of_model: the family of a given model object; None for the family of the row or of the name of the model.

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
        """The family of the model, which defines the sites and units."""
        if self.of_model is not None:
            return self.of_model
        if self.row is not None:
            return self.row.model_family
        named = {family.name: family for family in families()}.get(str(self.metadata.get(FAMILY)))
        return named or self._family_of_name

    @property
    def _family_of_name(self) -> Family:
        name = self.model or self.metadata.get("model_name")
        return family_of_model(name if isinstance(name, str) else None, self.site)

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
        reads, writes = self.metadata.get("hf_hook_name"), self.metadata.get("hf_hook_name_out")
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
        if self.family.name != self._family_of_name.name:
            fields[FAMILY] = self.family.name
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


def expected_sizes(model: Any, site: str | None, layer: int | None) -> Expected:
    """The sizes that follow from a model and a site. For a name, they say only whether it is a transcoder.

    Raises:
        WeightsError: when the model has no such layer.
    """
    if site is None:
        return Expected()
    family = getattr(model, "family", None) or family_of_model(name_of(model), site)
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
    transcoder = row.model_family.site(row.site).is_transcoder
    said_by = f"the registry ({row.release}/{row.id})"
    return Expected(row.d_in, row.d_sae, row.d_out or row.d_in, transcoder, row.affine, said_by)


def _config_of(model: Any) -> Any:
    return getattr(model, "cfg", None) or getattr(model, "config", None) or model
