"""What an SAE is beside its arrays (:class:`Identity`), and how SAELens's configurations say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.families import Family, families, family_of_model
from gemma_scope_tl.sites import ModelDims, site_of_hook
from gemma_scope_tl.weights.checks import Expected

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

UNFINISHED = "gemma_scope_jumprelu"
"""SAELens's word for the architecture of a training checkpoint."""
HOW_TO_FINISH = (
    "A finished run has saved an SAE beside its checkpoints. To make one of the checkpoint: "
    "sae = sae_lens.TrainingSAE.load_from_disk(checkpoint); sae.fold_activation_norm_scaling_factor(factor), with the "
    "factor in its activation_scaler.json unless that is null; sae.save_inference_model(folder)."
)
CONTEXT_SIZE = 1024
# SAELens's evaluations run an SAE on the data set that its metadata names; this is the one for Google's releases.
_GEMMA_SCOPE, _TEXT = "google/gemma-scope", "monology/pile-uncopyrighted"
_FAMILY = "family"  # the key in metadata, for a family that the model's name does not tell
_ROW_FIELDS = ("release", "id", "width", "l0")


@dataclass
class UnfinishedConfig(JumpReLUSAEConfig):
    """The configuration that a training checkpoint would have as an SAE. Making one raises an error."""

    @classmethod
    def architecture(cls) -> str:
        """SAELens's word for the architecture."""
        return UNFINISHED

    def __post_init__(self) -> None:
        """Raise :class:`GemmaScopeError`."""
        raise GemmaScopeError(f"This is a training checkpoint, not an SAE. {HOW_TO_FINISH}")


if UNFINISHED not in SAE_CLASS_REGISTRY:
    register_sae_class(UNFINISHED, JumpReLUSAE, UnfinishedConfig)


@dataclass(frozen=True)
class Identity:
    """What is known of an SAE beside its arrays.

    Attributes:
        source: where its arrays come from, for messages.
        model: name of the model that it was trained on, None when unknown.
        site, layer: where it reads, None when unknown. The embedding has no layer.
        row: its registry row, if it has one.
        metadata: what a SAELens configuration says of it.
        transcoder: whether that configuration is a transcoder's; None without one, where site and shapes tell.
        of_model: the family of a model that was given; None for that of the row, or of the model's name.
    """

    source: str
    model: str | None = None
    site: str | None = None
    layer: int | None = None
    row: SAERow | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])
    transcoder: bool | None = None
    of_model: Family | None = None

    @classmethod
    def of(cls, row: SAERow, source: str) -> Identity:
        """The identity of a registry row, whose arrays come from ``source``."""
        return cls(source, row.model, row.site, row.layer, row)

    @cached_property
    def family(self) -> Family:
        """The family of the model, whose sites and units hold."""
        if self.of_model is not None:
            return self.of_model
        if self.row is not None:
            return self.row.model_family
        named = {family.name: family for family in families()}.get(str(self.metadata.get(_FAMILY)))
        return named or self._family_of_name

    @property
    def _family_of_name(self) -> Family:
        name = self.model or self.metadata.get("model_name")
        return family_of_model(name if isinstance(name, str) else None, self.site)

    def placed(self) -> Identity:
        """This identity at the site and layer that the metadata's hook names say, where none is known and they do."""
        hook, out = self.metadata.get("hook_name"), self.metadata.get("hook_name_out")
        if self.site is not None or not isinstance(hook, str) or not isinstance(out, str | None):
            return self
        try:
            site, layer = site_of_hook(hook, out)
        except UnknownNameError:
            return self
        return replace(self, site=site.name, layer=layer) if site.name in self.family.sites else self

    @property
    def reads_heads(self) -> bool:
        """Whether the SAE reads the outputs of attention heads, which hooks give with heads apart."""
        if self.site is None:  # a hook of TransformerLens at which no site lies
            return str(self.metadata.get("hook_name")).endswith("_z")
        return self.family.site(self.site).width_rule == "heads"

    def sae_lens_metadata(self) -> SAEMetadata:
        """SAELens's metadata, with hook names of ``HookedTransformer``, which SAELens's users have.

        Raises:
            SpliceError: when a site that exists in every layer comes without a layer.
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
            fields[_FAMILY] = self.family.name
        if self.site is not None:
            site = self.family.site(self.site)
            layer = self.layer if site.per_layer else None
            fields |= {"site": self.site, "layer": layer, "hook_layer": layer}
            fields["hook_name"] = site.hook_name(layer, "hooked_transformer")
            if site.is_transcoder:
                written = site.hook_name_out(layer, "hooked_transformer")
                fields |= {"hook_name_out": written, "hook_head_index_out": None}
        if self.row is not None:
            if self.row.repo.startswith(_GEMMA_SCOPE):
                fields.setdefault("dataset_path", _TEXT)
            fields |= {name: getattr(self.row, name) for name in _ROW_FIELDS}
            fields["neuronpedia_id"] = self.row.neuronpedia
        return SAEMetadata(**fields)


def make_config(sizes: dict[str, int], skip: bool, dtype: str, metadata: SAEMetadata, heads: bool) -> Any:
    """The SAELens configuration of an SAE on the CPU.

    Args:
        sizes: ``d_in`` and ``d_sae``; for a transcoder ``d_out`` too.
        skip: whether a transcoder has a linear path around the latents.
        dtype: of the parameters but the thresholds, such as ``"float32"``.
        metadata: SAELens's.
        heads: whether the SAE reads concatenated heads. ``reshape_activations`` is then ``"hook_z"``, without which
            SAELens cannot splice it.
    """
    common: dict[str, Any] = {**sizes, "dtype": dtype, "apply_b_dec_to_input": False, "metadata": metadata}
    if "d_out" in sizes:
        return (JumpReLUSkipTranscoderConfig if skip else JumpReLUTranscoderConfig)(**common)
    return JumpReLUSAEConfig(**common, reshape_activations="hook_z" if heads else "none")


def name_of(model: Any) -> str | None:
    """The name of a model that is given as its name, itself or its configuration."""
    if model is None or isinstance(model, str):
        return model
    config = _config_of(model)
    return getattr(config, "model_name", None) or getattr(config, "_name_or_path", None) or None


def expected_sizes(model: Any, site: str | None, layer: int | None) -> Expected:
    """The sizes that a model and a site say; of a model's name alone only whether the site is a transcoder's.

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
    return Expected(spec.d_in(dims), None, family.d_out(site, dims), spec.is_transcoder, "the model")


def expected_of_row(row: SAERow) -> Expected:
    """The sizes that a registry row says."""
    transcoder = row.model_family.site(row.site).is_transcoder
    return Expected(row.d_in, row.d_sae, row.d_out or row.d_in, transcoder, f"the registry ({row.release}/{row.id})")


def _config_of(model: Any) -> Any:
    return getattr(model, "cfg", None) or getattr(model, "config", None) or model
