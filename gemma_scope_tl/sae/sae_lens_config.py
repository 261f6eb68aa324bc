"""Checked SAELens configurations of JumpReLU SAEs, from ``cfg.json`` or a converter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sae_lens.loading.pretrained_sae_loaders import handle_config_defaulting
from sae_lens.saes.sae import SAEMetadata

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sae.config import HOW_TO_FINISH, UNFINISHED
from gemma_scope_tl.weights.checks import CFG_NAME, Expected, short, weights_error
from gemma_scope_tl.weights.safetensors_file import read_cfg

ARCHITECTURES = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
"""SAELens's names of the architectures that this package loads: SAEs, transcoders, and skip transcoders."""
_FOLD_FIRST = "Fold it into the weights with SAELens and save again."


@dataclass(frozen=True)
class SAELensConfig:
    """The values of a SAELens configuration that loading uses.

    Attributes:
        source: the origin of the configuration, for messages.
        architecture: one of :data:`ARCHITECTURES`.
        sizes: ``d_in``, ``d_sae`` and, for a transcoder, ``d_out``, if the configuration has them.
        metadata: SAELens's metadata.
        dtype: dtype in which the SAE was saved, in SAELens's spelling; None if unknown.
        subtracts_b_dec: whether the SAE subtracts ``b_dec`` from its input.
    """

    source: str | Path
    architecture: str
    sizes: dict[str, int | None]
    metadata: dict[str, Any]
    dtype: Any
    subtracts_b_dec: bool

    @classmethod
    def read(cls, folder: Path) -> SAELensConfig:
        """Read the ``cfg.json`` in a folder.

        Raises:
            WeightsError: when the file is missing, is not the configuration of a JumpReLU SAE, or describes an SAE that
                normalises activations.
        """
        path, raw = folder / CFG_NAME, read_cfg(folder)
        if raw.get("architecture") == UNFINISHED:
            raise weights_error(path, "is of a training checkpoint, not of an SAE", HOW_TO_FINISH)
        try:
            cfg = handle_config_defaulting(raw)
            _check_types(cfg)
            check_architecture(cfg["architecture"])
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            what = f"is not the configuration of a JumpReLU SAE ({str(error)[:300]})"
            raise weights_error(path, what, "Only JumpReLU SAEs and transcoders can be loaded.") from error
        return cls._of(cfg, path)

    @classmethod
    def given(cls, given: dict[str, Any], source: str) -> SAELensConfig:
        """Check a configuration from one of SAELens's converters, of any version of SAELens.

        Raises:
            UnknownNameError: for an architecture that is not in :data:`ARCHITECTURES`.
            GemmaScopeError: for an invalid configuration, or one of an SAE that normalises activations.
        """
        try:
            cfg = handle_config_defaulting(given)
            architecture = cfg["architecture"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GemmaScopeError(f"The converter's configuration of {source} is not SAELens's ({error}).") from error
        check_architecture(architecture)
        return cls._of(cfg, source)

    @classmethod
    def _of(cls, cfg: dict[str, Any], source: str | Path) -> SAELensConfig:
        if cfg.get("normalize_activations") not in (None, "none"):
            factor = short(cfg["normalize_activations"]).strip("'")
            what = f"normalises activations ({factor}) by a factor that is not in the file"
            raise weights_error(source, what, _FOLD_FIRST)
        transcoder = cfg["architecture"] != "jumprelu"
        return cls(
            source=source,
            architecture=cfg["architecture"],
            sizes={name: cfg.get(name) for name in ("d_in", "d_sae", *(("d_out",) if transcoder else ()))},
            metadata=dict(cfg.get("metadata") or {}),
            dtype=cfg.get("dtype"),
            subtracts_b_dec=bool(cfg.get("apply_b_dec_to_input")) and not transcoder,
        )

    @property
    def is_transcoder(self) -> bool:
        """Whether the configuration describes a transcoder."""
        return self.architecture != "jumprelu"

    @property
    def has_skip(self) -> bool:
        """Whether the configuration describes a transcoder with a linear path around the latents."""
        return self.architecture == "jumprelu_skip_transcoder"

    def complete(self, expected: Expected) -> Expected:
        """``expected``, completed with sizes from the configuration.

        Raises:
            WeightsError: when the two contradict each other.
        """
        if expected.transcoder not in (None, self.is_transcoder):
            kinds = "a transcoder, not an SAE" if self.is_transcoder else "an SAE, not a transcoder"
            raise weights_error(self.source, f"describes {kinds}", "Give the site that it belongs to.")
        completed: dict[str, Any] = {"transcoder": self.is_transcoder}
        for name, value in self.sizes.items():
            wanted = getattr(expected, name)
            if value is not None and wanted not in (None, value):
                what = f"has {name} {value}, should be {wanted} according to {expected.said_by}"
                raise weights_error(self.source, what)
            completed[name] = wanted or value
        return replace(expected, **completed, said_by=f"{expected.said_by} or {CFG_NAME}")


def check_architecture(architecture: Any) -> None:
    """Raise :class:`UnknownNameError` for an architecture that is not JumpReLU."""
    if architecture not in ARCHITECTURES:
        raise unknown_name("JumpReLU architecture", architecture, ARCHITECTURES)


def _check_types(cfg: dict[str, Any]) -> None:
    """Raise for values of types that SAELens does not write, and for metadata that would hide SAELens's methods."""
    if not isinstance(cfg["architecture"], str) or len(cfg["architecture"]) > 80:
        raise TypeError(f"its architecture is {short(cfg['architecture'])}")
    for name in ("d_in", "d_sae", "d_out"):
        if type(cfg.get(name)) not in (int, type(None)):
            raise TypeError(f"its {name} is {short(cfg[name])}")
    metadata = cfg.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise TypeError(f"its metadata is {short(metadata)}")
    for name in metadata:
        if name == "self" or hasattr(SAEMetadata, name):
            raise ValueError(f"its metadata has {short(name)}")
