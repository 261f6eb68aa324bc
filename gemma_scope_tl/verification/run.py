"""``verify``: a sample of released SAEs measured on the real model, and everything that is wrong named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import AdapterMismatch, GemmaScopeError
from gemma_scope_tl.model.identity import digest_of, model_facts, refuse_hooks
from gemma_scope_tl.registry.catalog import checked_model
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.verification.bands import bounds
from gemma_scope_tl.verification.diagnosis import Fault
from gemma_scope_tl.verification.downloads import Plan, offline_hub, plan_downloads
from gemma_scope_tl.verification.examine import Examiner, Settings, shared_faults, skipped
from gemma_scope_tl.verification.measure import token_rows
from gemma_scope_tl.verification.model_checks import check_model, not_finite
from gemma_scope_tl.verification.ordering import orderings
from gemma_scope_tl.verification.probe import Probe
from gemma_scope_tl.verification.report import CACHE_FOLDER, Report, Store, make_report, surroundings
from gemma_scope_tl.verification.sample import Chosen, candidates, draw

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

GIB = 1 << 30


@dataclass(frozen=True)
class Prepared:
    """What a verification will do, before anything is downloaded.

    Attributes:
        model: the model's name, folder or id, or the loaded model.
        registry_model: the model whose SAEs are sampled.
        sample: the rows.
        left_out: number of rows that are too large for the sample.
        seed: seed of the draw.
        plan: the files that are needed.
        rows: all rows that the sample was drawn from.
    """

    model: Any
    registry_model: str
    sample: tuple[Chosen, ...]
    left_out: int
    seed: int
    plan: Plan
    rows: tuple[SAERow, ...]


class Conditions(TypedDict, total=False):
    """What is sampled; the keywords of :func:`prepare`.

    Attributes:
        sample: number of SAEs, 12 by default.
        seed: seed of the sample, 0 by default.
        sites, layers, widths, releases: conditions on the rows; all by default.
        sae_model: the registry's model, if it is not that of the model.
        largest: rows whose arrays take more than so many GiB in float32 are left out; 4 by default.
    """

    sample: int
    seed: int
    sites: Sequence[str] | None
    layers: Sequence[int] | None
    widths: Sequence[str | int] | None
    releases: Sequence[str] | None
    sae_model: str | None
    largest: float


def prepare(
    model: str | PathLike[str] | GemmaModel,
    *,
    sample: int = 12,
    seed: int = 0,
    sites: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    widths: Sequence[str | int] | None = None,
    releases: Sequence[str] | None = None,
    sae_model: str | None = None,
    largest: float = 4.0,
    offline: bool = False,
) -> Prepared:
    """Draw the sample and list the files that it needs. Nothing is downloaded.

    Args:
        model: a name, folder or id as for ``load_model``, or a loaded model.
        sample, seed, sites, layers, widths, releases, sae_model, largest: :class:`Conditions`.
        offline: whether to send no request at all.

    Raises:
        GemmaScopeError: the registry has no such SAEs.
    """
    named = isinstance(model, (str, PathLike))
    name = str(model) if named else str(getattr(model, "model_id", None))
    registry_model = checked_model(sae_model or Path(name).name)
    rows, left_out = candidates(registry_model, sites, layers, widths, releases, largest)
    chosen = draw(rows, sample, seed)
    plan = plan_downloads(name if named else None, [one.row for one in chosen], offline)
    return Prepared(name if named else model, registry_model, tuple(chosen), left_out, seed, plan, tuple(rows))


def verify(
    model: str | PathLike[str] | GemmaModel,
    *,
    texts: str | PathLike[str] | None = None,
    tokens: int = 8192,
    context: int = 256,
    out: str | PathLike[str] | None = None,
    backend: str = "bridge",
    device: str | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    memory_budget: int = GIB,
    download: bool = False,
    offline: bool = False,
    neuronpedia: bool = False,
    progress: bool = True,
    prepared: Prepared | None = None,
    **conditions: Unpack[Conditions],
) -> Report:
    """Measure a sample of released SAEs on their model, compare them with what is known, and name what is wrong.

    docs/how-to/verify.md lists what is compared, with the bounds and their reasons.

    Args:
        model: a name, folder or id as for ``load_model``, or a loaded model.
        texts: a file or a data set (``read_texts``); the bundled held-out text by default.
        tokens, context: tokens of the text, and of one row.
        out: folder for the report and the results of single SAEs, from which an interrupted run continues.
        backend, device, dtype: as for ``load_model``. SAEs are in float32, some in bfloat16 too.
        batch_size, memory_budget: as for ``evaluate``.
        download: whether missing files may be downloaded.
        offline: whether to send no request at all.
        neuronpedia: whether to compare latents with Neuronpedia's stored examples, which sends requests to it.
        progress: show a progress bar.
        prepared: what :func:`prepare` returned, in place of ``conditions``.
        **conditions: what is sampled (:class:`Conditions`).

    Raises:
        GemmaScopeError: files are missing and ``download`` is False; the model or the text cannot be loaded; there are
            hooks on the model, with ``out``.
    """
    ready = prepared or prepare(model, offline=offline, **conditions)
    if ready.plan.to_download and (offline or not download):
        advice = "Leave offline out and allow downloads." if offline else "Allow it with download=True."
        raise GemmaScopeError(f"{summary(ready.plan)} {advice}")
    folder = None if out is None else Path(out).expanduser()
    loading = {"backend": backend, "device": device, "dtype": dtype}
    settings = Settings(batch_size, memory_budget, folder and folder / CACHE_FOLDER, neuronpedia, ready.seed)
    with offline_hub(offline):
        return _run(ready, loading, _Text(texts, tokens, context), settings, folder, progress)


@dataclass(frozen=True)
class _Text:
    source: str | PathLike[str] | None
    tokens: int
    context: int

    def rows(self, model: GemmaModel, tuned: bool) -> tuple[Any, tuple[int, ...]]:
        return token_rows(model, self.source, self.tokens, self.context, tuned)


def _run(
    ready: Prepared, loading: dict[str, Any], text: _Text, settings: Settings, folder: Path | None, progress: bool
) -> Report:
    """Load, check the model, examine the sample, compare the SAEs with each other, and write the report."""
    facts: dict[str, Any] = {
        "model": {"name": _name_of(ready.model), "registry_model": ready.registry_model, **loading},
        "sample": {"number": len(ready.sample), "seed": ready.seed, "too_large": ready.left_out},
    }
    try:
        model = _load(ready.model, loading)
    except AdapterMismatch as error:
        fault = _refusal(ready.model, loading, text, str(error))
        facts |= surroundings(loading["device"] or "cpu")
        return make_report(facts, [fault], [], [], [], folder)
    if folder is not None:
        refuse_hooks(model, "remove them, or verify without out=.")
    rows, special = text.rows(model, _is_tuned(model, ready.registry_model))
    probe = Probe(model, rows, special)
    checks = check_model(model, probe)
    facts = _facts(facts, model, rows, special, text.source) | {"model_checks": checks.facts}
    if not checks.finite:
        results = [skipped(one.row, "the model's activations are not finite") for one in ready.sample]
        return make_report(facts, checks.faults, results, [], [], folder)
    corrected = None
    if checks.embedding_factor != 1.0:
        corrected = Probe(model, rows, special, embedding_factor=checks.embedding_factor)
    examiner = Examiner(model, rows, special, probe, corrected, settings)
    results = _examine_all(examiner, ready, Store(folder), facts, progress)
    compared = orderings([one | one["measured"] for one in results if one["measured"] and not one["faults"]])
    found = [fault for one in compared if (fault := one.fault) is not None]
    shared = [*shared_faults(results), *found]
    return make_report(facts, checks.faults, results, shared, [asdict(one) for one in compared], folder)


def summary(plan: Plan) -> str:
    """One sentence about the files to download."""
    files = plan.to_download
    listed = ", ".join(f"{file.repo}/{file.path}" for file in files[:3])
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return f"Not on this machine: {plan.amount}: {listed}{more}."


def _load(model: Any, loading: dict[str, Any], check: bool = True) -> GemmaModel:
    if not isinstance(model, str):
        return model
    from gemma_scope_tl.model.loading import load_model

    return load_model(model, check=check, **loading)


def _refusal(model: Any, loading: dict[str, Any], text: _Text, said: str) -> Fault:
    """The fault behind a failed check. Activations that overflow look like a difference, so they are looked for."""
    if parse_dtype(loading["dtype"]).itemsize == 2:
        loaded = _load(model, loading, check=False)
        overflow = not_finite(loaded, Probe(loaded, *text.rows(loaded, tuned=False)))
        if overflow is not None:
            return overflow
    return Fault("model", said)


def _name_of(model: Any) -> str | None:
    return model if isinstance(model, str) else getattr(model, "model_id", None)


def _is_tuned(model: GemmaModel, registry_model: str) -> bool:
    name = model.model_id or registry_model
    return name.endswith(model.family.tuned_suffix)


def _facts(facts: dict[str, Any], model: GemmaModel, rows: Any, special: Any, texts: Any) -> dict[str, Any]:
    device, identity = str(model.cfg.device), model_facts(model)
    described = {
        **facts["model"],
        "backend": model.backend,
        "family": model.family.name,
        "dims": asdict(model.dims),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": device,
        "fingerprint": identity["weights"],
        "configuration": digest_of(identity["config"]),
        "check": "every site agrees with plain Hugging Face, with and without a cache",
        "worked_around": list(model.fixes),
    }
    text = {
        "source": "bundled held-out text" if texts is None else str(texts),
        "rows": rows.shape[0],
        "context": rows.shape[1],
        "sha256": hashlib.sha256(rows.contiguous().numpy().tobytes()).hexdigest(),
        "left_out_ids": list(special),
    }
    return {**facts, "model": described, "text": text, "bounds": bounds(), **surroundings(device)}


def _examine_all(
    examiner: Examiner, ready: Prepared, store: Store, facts: dict[str, Any], progress: bool
) -> list[dict[str, Any]]:
    """The results of all SAEs; those that an earlier run kept are read."""
    from rich.console import Console
    from rich.progress import Progress

    same = {
        "model": [facts["model"][name] for name in ("fingerprint", "configuration", "backend", "dtype")],
        "text": [facts["text"]["sha256"], facts["text"]["left_out_ids"]],
        "version": facts["versions"]["gemma-scope-tl"],
    }
    absent = {(row.repo, row.path) for row in ready.plan.missing}
    results: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True, disable=not progress) as bar:
        task = bar.add_task("verifying", total=len(ready.sample))
        for chosen in ready.sample:
            row = chosen.row
            bar.update(task, description=f"{row.site} {row.id}")
            if (row.repo, row.path) in absent:
                results.append(_absent(row))
            else:
                name, key = f"{row.release}/{row.id}", examiner.key(chosen, same)
                kept = store.load(name, key)
                if kept is None:
                    kept = examiner.examine(chosen, _siblings(ready.rows, row))
                    store.save(name, examiner.key(chosen, same), kept)  # the file may have been downloaded meanwhile
                results.append(kept)
            bar.advance(task)
    return results


def _absent(row: SAERow) -> dict[str, Any]:
    """The result for a file that the Hub does not have: expected of an unverified row, else a fault."""
    from gemma_scope_tl.verification.examine import described, failed

    why = f"{row.repo} has no {row.weights_path}"
    return skipped(row, f"{why}, and the row is unverified") if row.unverified else described(row) | failed(
        Fault("file", f"{row.release}/{row.id}: {why}.")
    )  # fmt: skip


def _siblings(rows: Sequence[SAERow], row: SAERow) -> list[SAERow]:
    return [one for one in rows if (one.release, one.site, one.layer, one.width) == (
        row.release, row.site, row.layer, row.width)]  # fmt: skip
