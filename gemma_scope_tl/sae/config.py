"""SAELens configs for SAEs of this package: where the facts of a site and a row become SAELens' fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import JumpReLUSkipTranscoderConfig, JumpReLUTranscoderConfig

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.sites import ModelDims, get_site, site_of_hook
from gemma_scope_tl.weights.checks import Expected

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

UNFINISHED = "gemma_scope_jumprelu"
HOW_TO_FINISH = (
    "A finished run has saved an SAE beside its checkpoints. To make one of the checkpoint: "
    "sae = sae_lens.TrainingSAE.load_from_disk(checkpoint); sae.fold_activation_norm_scaling_factor(factor), with the "
    "factor in its activation_scaler.json unless that is null; sae.save_inference_model(folder)."
)


@dataclass
class UnfinishedConfig(JumpReLUSAEConfig):
    """The configuration that a checkpoint would have as an SAE: it cannot be made."""

    @classmethod
    def architecture(cls) -> str:
        """SAELens's word for the training class."""
        return UNFINISHED

    def __post_init__(self) -> None:
        """Raise :class:`GemmaScopeError`."""
        raise GemmaScopeError(f"This is a training checkpoint, not an SAE. {HOW_TO_FINISH}")


if UNFINISHED not in SAE_CLASS_REGISTRY:
    register_sae_class(UNFINISHED, JumpReLUSAE, UnfinishedConfig)


CONTEXT_SIZE = 1024
_GEMMA_SCOPE, _TEXT = "google/gemma-scope", "monology/pile-uncopyrighted"  # what SAELens's evaluations run Google's on
_ROW_FIELDS = ("release", "id", "width", "l0")


def make_config(sizes: dict[str, int], skip: bool, dtype: str, metadata: SAEMetadata) -> Any:
    """The config of an SAE (``d_in``, ``d_sae``) or transcoder (``d_out`` too) on the CPU.

    At the att site ``reshape_activations`` is ``"hook_z"``, without which SAELens cannot splice it.
    """
    common: dict[str, Any] = {**sizes, "dtype": dtype, "apply_b_dec_to_input": False, "metadata": metadata}
    if "d_out" in sizes:
        return (JumpReLUSkipTranscoderConfig if skip else JumpReLUTranscoderConfig)(**common)
    heads = metadata.get("site") == "att" or str(metadata.hook_name).endswith("_z")
    return JumpReLUSAEConfig(**common, reshape_activations="hook_z" if heads else "none")


def make_metadata(
    model_name: str | None,
    site: str | None,
    layer: int | None,
    row: SAERow | None = None,
    base: dict[str, Any] | None = None,
) -> SAEMetadata:
    """Metadata with hook names of ``HookedTransformer`` (what SAELens' users have).

    Args:
        model_name, site, layer: where the SAE belongs, as far as known.
        row: its registry row, whose release, id, width, L0 and Neuronpedia id are kept.
        base: metadata that it came with, which stays where nothing here says otherwise.

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
        **(base or {}),
    }
    if model_name is not None:
        fields["model_name"] = model_name
    if site is not None:
        spec = get_site(site)
        layer = layer if spec.per_layer else None
        fields |= {"site": site, "layer": layer, "hook_layer": layer}
        fields["hook_name"] = spec.hook_name(layer, "hooked_transformer")
        if spec.is_transcoder:
            fields |= {"hook_name_out": spec.hook_name_out(layer, "hooked_transformer"), "hook_head_index_out": None}
    if row is not None:
        if row.repo.startswith(_GEMMA_SCOPE):
            fields.setdefault("dataset_path", _TEXT)
        fields |= {name: getattr(row, name) for name in _ROW_FIELDS} | {"neuronpedia_id": row.neuronpedia}
    return SAEMetadata(**fields)


def site_in_metadata(metadata: dict[str, Any]) -> tuple[str | None, int | None]:
    """Site and layer that a config's hook names say, or (None, None) where no Gemma Scope site lives."""
    hook, out = metadata.get("hook_name"), metadata.get("hook_name_out")
    if not isinstance(hook, str) or not isinstance(out, str | None):
        return None, None
    try:
        site, layer = site_of_hook(hook, out)
    except UnknownNameError:
        return None, None
    return site.name, layer


def name_of(model: Any) -> str | None:
    """The name of a model given as name, model or config."""
    if model is None or isinstance(model, str):
        return model
    config = getattr(model, "cfg", None) or getattr(model, "config", None) or model
    return getattr(config, "model_name", None) or getattr(config, "_name_or_path", None) or None


def expected_sizes(model: Any, site: str | None, layer: int | None) -> Expected:
    """What a model and a site say about sizes; a name alone says nothing about d_in.

    Raises:
        WeightsError: when the model has no such layer.
    """
    transcoder = None if site is None else get_site(site).is_transcoder
    if model is None or isinstance(model, str) or site is None:
        return Expected(transcoder=transcoder)
    dims = ModelDims.from_config(getattr(model, "cfg", None) or getattr(model, "config", None) or model)
    spec = get_site(site)
    try:
        spec.check_layer(layer, dims)
    except SpliceError as error:
        raise WeightsError(str(error)) from error
    return Expected(d_in=spec.d_in(dims), d_out=spec.d_in(dims), transcoder=transcoder, said_by="the model")


def expected_of_row(row: SAERow) -> Expected:
    """What a registry row says about sizes. Both ends of a transcoder are d_model wide."""
    said_by = f"the registry ({row.release}/{row.id})"
    return Expected(row.d_in, row.d_sae, row.d_in, get_site(row.site).is_transcoder, said_by)
