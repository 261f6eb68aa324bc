"""The examination of one SAE of the sample: load, compare with the alternatives, measure, judge."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.verification.bands import judge
from gemma_scope_tl.verification.diagnosis import Diagnosis, Fault, diagnose
from gemma_scope_tl.verification.measure import measure
from gemma_scope_tl.verification.neuronpedia import compare
from gemma_scope_tl.verification.probe import Probe
from gemma_scope_tl.verification.sample import Chosen
from gemma_scope_tl.weights.fetch import find_local
from gemma_scope_tl.weights.fingerprint import fingerprint
from gemma_scope_tl.weights.seen import mark_seen

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


UNITS = {"not-folded", "folded-twice", "bias-not-folded"}
"""The kinds of faults about the units of the weights."""


@dataclass(frozen=True)
class Settings:
    """How SAEs are examined.

    Attributes:
        batch_size: rows in a forward pass.
        memory_budget: bytes that tensors may take besides weights.
        cache: folder of sums that SAEs share.
        neuronpedia: whether requests are sent to Neuronpedia.
        seed: seed of the draws.
    """

    batch_size: int = 8
    memory_budget: int = 1 << 30
    cache: Path | None = None
    neuronpedia: bool = False
    seed: int = 0


@dataclass
class Examiner:
    """Examines SAEs on one model and text.

    Attributes:
        model: from ``load_model``.
        tokens: ``[rows, pos]``.
        special: ids that do not count.
        probe: the short pass.
        corrected: the short pass with another scale of the embedding, if the model's is in doubt.
        settings: how SAEs are examined.
    """

    model: GemmaModel
    tokens: torch.Tensor
    special: tuple[int, ...]
    probe: Probe
    corrected: Probe | None = None
    settings: Settings = field(default_factory=Settings)

    def examine(self, chosen: Chosen, others: Sequence[SAERow]) -> dict[str, Any]:
        """The result of one SAE, as plain data; an SAE that cannot be loaded is a result too.

        Args:
            chosen: the row.
            others: the rows of its place and width, for comparison.
        """
        row, start = chosen.row, time.perf_counter()
        result = described(row)
        try:
            sae = load_row(row, device=self.model.cfg.device).requires_grad_(False)
            self.model.check_fits(sae, self.model.family.site(row.site), row.layer)
        except GemmaScopeError as error:
            return result | failed(Fault("file", f"{row.release}/{row.id}: {error}"))
        mark_seen([row])
        diagnosis = diagnose(self.model, sae, row, self.probe, self.corrected)
        faults, notes = list(diagnosis.faults), list(diagnosis.notes)
        result["fit"] = _fit_facts(diagnosis)
        result["weights"] = fingerprint(sae)
        result["measured"] = None
        if not any(fault.kind == "not-finite" for fault in faults):
            try:
                measured, bfloat16 = self._measured(sae, chosen)
            except GemmaScopeError as error:
                faults.append(Fault("model", f"{row.release}/{row.id} cannot be measured: {error}"))
            else:
                verdict = judge(row, measured, bfloat16, others)
                faults, explained = combined(faults, verdict.faults)
                notes += [*verdict.notes, *(fault.text for fault in explained)]
                result |= {"measured": measured, "bfloat16": bfloat16}
                wanted = self.settings.neuronpedia
                beside = compare(self.model, sae, row, self._fired(sae, row), self.settings.seed, wanted)
                faults += beside.faults
                result["neuronpedia"] = {"skipped": beside.skipped, "latents": list(beside.latents)}
        status = "fail" if faults else "pass"
        seconds = round(time.perf_counter() - start, 2)
        return result | {
            "status": status,
            "faults": [asdict(fault) for fault in faults],
            "notes": notes,
            "seconds": seconds,
        }

    def key(self, chosen: Chosen, model: Mapping[str, Any]) -> dict[str, Any]:
        """What a result depends on, for its reuse. ``model`` identifies model and text."""
        row, file = chosen.row, None
        with suppress(GemmaScopeError):
            file = find_local(row)
        stat = file.stat() if file is not None and file.is_file() else None
        return {
            **model,
            "row": [row.repo, row.path, row.revision, row.site, row.layer, row.l0, chosen.bfloat16],
            "file": [stat.st_size, stat.st_mtime_ns] if stat else None,
            "neuronpedia": self.settings.neuronpedia,
        }

    def _measured(self, sae: Any, chosen: Chosen) -> tuple[dict[str, float], dict[str, float] | None]:
        saes = [sae]
        if chosen.bfloat16:
            rounded = load_row(chosen.row, device=self.model.cfg.device, dtype="bfloat16")
            saes.append(rounded.requires_grad_(False))
        found = measure(
            self.model, saes, self.tokens, self.special, batch_size=self.settings.batch_size,
            memory_budget=self.settings.memory_budget, cache=self.settings.cache,
        )  # fmt: skip
        return found[0], found[1] if chosen.bfloat16 else None

    def _fired(self, sae: Any, row: SAERow) -> list[int]:
        """Latents that fire on the tokens of the short pass."""
        if not self.settings.neuronpedia or row.neuronpedia is None or row.neuronpedia_warning is not None:
            return []
        from gemma_scope_tl.evals.saes import latents_of

        return latents_of(sae, self.probe.at(Place(row.site, row.layer))).latents.unique().tolist()


def combined(fits: Sequence[Fault], bands: Sequence[Fault]) -> tuple[list[Fault], list[Fault]]:
    """The faults that count, and those that another one explains.

    Numbers outside their bands are explained by an alternative that fits better. An L0 that is exactly another row's is
    the simpler explanation, if the reconstruction is good: other units change L0 and FVU as well.
    """
    kinds = {fault.kind for fault in bands}
    if "label" in kinds and "fvu" not in kinds and {fault.kind for fault in fits} <= UNITS:
        return list(bands), list(fits)
    return (list(fits), list(bands)) if fits else (list(bands), [])


def described(row: SAERow) -> dict[str, Any]:
    """The fields of a result that identify the SAE."""
    names = ("release", "id", "site", "layer", "width", "d_sae", "unverified", "repo", "path", "revision")
    return {**{name: getattr(row, name) for name in names}, "row_l0": row.l0, "name": f"{row.release}/{row.id}"}


def failed(fault: Fault) -> dict[str, Any]:
    """The rest of a result for an SAE that could not be measured."""
    return {"status": "fail", "faults": [asdict(fault)], "notes": [], "measured": None}


def skipped(row: SAERow, why: str) -> dict[str, Any]:
    """The result of an SAE that was not examined."""
    return described(row) | {"status": "skipped", "faults": [], "notes": [why], "measured": None}


def _fit_facts(diagnosis: Diagnosis) -> dict[str, Any]:
    def facts(one: Any) -> dict[str, Any] | None:
        return None if one is None else {"what": one.what, "kind": one.kind, "l0": one.l0, "fvu": one.fvu}

    return {"own": facts(diagnosis.own), "better": facts(diagnosis.best), "alternatives": diagnosis.tried}


def shared_faults(saes: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """Faults that all measured SAEs of a site share: then the site's hook is wrong, and not the files."""
    found: list[Fault] = []
    by_site: dict[str, list[Mapping[str, Any]]] = {}
    for sae in saes:
        if sae.get("fit"):
            by_site.setdefault(sae["site"], []).append(sae)
    for site, here in by_site.items():
        better = [sae["fit"]["better"] for sae in here]
        if len(here) < 2 or any(one is None for one in better):
            continue
        relative = {_relative(one, sae["layer"]) for one, sae in zip(better, here, strict=True)}
        if len(relative) == 1:
            (kind, what) = relative.pop()
            if kind in ("layer", "hook", "target"):
                place = f"one layer apart ({what})" if kind == "layer" else what
                text = f"All {len(here)} SAEs of site {site!r} fit {place} better: the hook of the site "
                text += f"({target_of(Place(site, here[0]['layer'])).key}) is wrong, and not the files."
                found.append(Fault(kind, text))
    return found


def _relative(fit: Mapping[str, Any], layer: int | None) -> tuple[str, str]:
    """A better fit without the number of the layer: the same for all SAEs of a site whose hook is wrong."""
    if fit["kind"] == "layer" and layer is not None:
        return "layer", f"{int(fit['what'].rpartition('_')[2]) - layer:+d}"
    return fit["kind"], fit["what"].replace(f"blocks.{layer}.", "blocks.L.")
