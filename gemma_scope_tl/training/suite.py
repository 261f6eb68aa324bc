"""Training many SAEs from one stream of activations: ``train_suite``."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import WriteError
from gemma_scope_tl.families import Family, ModelDims
from gemma_scope_tl.files import append_line, make_folder
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.training.checkpoint import (
    CHECKPOINTS,
    METRICS_NAME,
    RUN_NAME,
    RUNS_NAME,
    SUITE_NAME,
    alone,
    check_same_run,
    read_record,
    suite_table,
    write_run,
    write_suite,
)
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError, load_config
from gemma_scope_tl.training.earlier import EarlierRun
from gemma_scope_tl.training.grid import AnyGroup, groups_of
from gemma_scope_tl.training.plan import plan_suite
from gemma_scope_tl.training.release import STAGE, write_release
from gemma_scope_tl.training.running import TrainingRun, torch_threads
from gemma_scope_tl.training.same_model import check_same_model
from gemma_scope_tl.training.shard import Shard, agreed, led, process_mesh
from gemma_scope_tl.training.source_factory import OpenSource, load_run_model, source_opener
from gemma_scope_tl.training.start import check_starts
from gemma_scope_tl.weights.modes import ordinary_tensors

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


@ordinary_tensors()
def train_suite(
    config: str | Path | Mapping[str, Any] | SuiteConfig,
    *,
    overrides: Sequence[str] = (),
    model: GemmaModel | None = None,
    source: OpenSource | None = None,
    resume: bool = True,
    force: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Train the SAEs of a configuration together, and write them in Gemma Scope's layout.

    All SAEs are stepped from one stream. The activations of a place are divided by one scalar,
    ``C = sqrt(E ||x||^2)`` (section 3.1); the target of a transcoder by the scalar of its input (appendix B). A run
    that was stopped continues from its last checkpoint and ends with the same bits.

    The run's folder gets ``<site>/layer_L/width_W/average_l0_N/params.npz``, where N is the L0 on batches after
    training; ``clt/width_W_l0_N/params_layer_0.safetensors`` and so on for coders over several layers; ``suite.json``
    (configuration, scales, a row per SAE); ``metrics.jsonl``; and ``runs.jsonl``, which records each process's times.

    With ``mesh``, several processes (started by ``torchrun``, with one folder that all see) divide every SAE and every
    batch. Each calls this function; the result equals that of one process up to rounding. A run must continue with the
    mesh with which it began. Its memory and disk are not planned.

    Args:
        config: a YAML file or the name of one that comes with the package, its content, or a configuration.
        overrides: ``"key=value"``, as ``--set`` on the command line.
        model: a model from ``load_model``, the one of the folder's run; by default the configuration's model is loaded.
        source: a function that makes the source of some places, in place of the configuration's source.
        resume: continue an unfinished run, and return the table of a finished one. False starts over: after the first
            step of the new run all of the earlier one is removed, finished or not, but for packed tokens.
        force: train even if the plan says that memory or disk do not suffice.
        progress: show progress bars.

    Returns:
        A row for each SAE: the registry's columns, ``l0``, ``fvu``, ``silent``, and how the SAE was trained.

    Raises:
        TrainingStateError: the configuration, the folder's run or its model, or memory or disk do not suit.
        TrainingStopped: by a signal, after a checkpoint.
        GemmaScopeError: the model, the text or the store cannot be used.
    """
    checked = load_config(config, overrides)
    family, dims = (model.family, model.dims) if model is not None else _family_and_dims(checked.model.name)
    groups, folder, mesh = groups_of(checked, dims, family), make_folder(checked.output), checked.mesh
    with process_mesh(mesh.latents, mesh.data, device=checked.device) as shard, ExitStack() as held:
        agreed({"resume": resume, **checked.results})
        earlier: list[EarlierRun] = []  # none on processes that do not lead
        led(shard, lambda: earlier.append(held.enter_context(_held(folder))))
        streams = source is None and checked.source.path is None  # other sources do not read the model
        if resume and (folder / SUITE_NAME).exists():
            if streams and model is not None:
                led(shard, lambda: check_same_model(folder, model))
            return _finished(folder, checked, shard)
        if not (force or source or model) and mesh.processes == 1:  # the plan knows released models only
            plan_suite(checked, measure=False).check()
        led(shard, lambda: begin_run(folder, checked, groups, earlier[0], resume))
        reads = _recorded_model(folder, checked, model, shard) if streams else None
        opener = source or source_opener(checked, reads, progress and shard.leads)
        return _train(folder, checked, groups, family, opener, earlier, progress=progress, shard=shard)


def _recorded_model(folder: Path, config: SuiteConfig, model: GemmaModel | None, shard: Shard) -> GemmaModel:
    """The model whose activations are read, after a comparison with the one that the run's folder records."""
    reads = model or load_run_model(config)
    led(shard, lambda: check_same_model(folder, reads))
    return reads


@contextmanager
def _held(folder: Path) -> Generator[EarlierRun]:
    """Hold the lock of a run's folder, and what the folder holds of an earlier run."""
    with alone(folder), EarlierRun(folder) as earlier:
        yield earlier


def _family_and_dims(name: str) -> tuple[Family, ModelDims]:
    family, sizes = family_and_sizes(name)
    return family, sizes.dims


def _train(
    folder: Path,
    config: SuiteConfig,
    groups: Sequence[AnyGroup],
    family: Family,
    source: OpenSource,
    earlier: Sequence[EarlierRun],
    *,
    progress: bool,
    shard: Shard,
) -> pd.DataFrame:
    began = time.time()

    def begun() -> None:
        for run in earlier:
            run.discard()

    with torch_threads(config.threads or torch.get_num_threads()):
        run = TrainingRun(
            config, groups, source, folder / METRICS_NAME, folder / CHECKPOINTS, begun, progress=progress, shard=shard
        )
        first = run.step
        try:
            with _closing(run):
                saes = run.to_the_end()
        finally:
            if shard.leads:
                _record_process(folder, began, first, run)
    rows = write_release(folder, saes, family, shard)
    if shard.leads:
        write_suite(folder, config, family, run.scales, rows)
    return _finished(folder, config, shard)


@contextmanager
def _closing(run: TrainingRun) -> Generator[None]:
    """Close a run's loggers. If the run fails, errors of the loggers are suppressed, as they would hide the run's."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            run.close()
        raise
    run.close()


def _record_process(folder: Path, began: float, first: int, run: TrainingRun) -> None:
    """Append to ``runs.jsonl`` which steps this process did, and when."""
    facts = {"began": round(began), "seconds": round(time.time() - began, 1), "threads": run.threads}
    try:
        append_line(folder / RUNS_NAME, json.dumps({"from_step": first, "to_step": run.step, **facts}))
    except WriteError as error:  # results do not depend on the file, and raising would hide how the run ended
        warnings.warn(f"The times of this run are not recorded: {error}", stacklevel=2)


def _finished(folder: Path, config: SuiteConfig, shard: Shard) -> pd.DataFrame:
    """The table of a finished run, whose checkpoints are removed."""
    shard.gather(None)  # waits for the leading process, which writes it
    check_same_run(read_record(folder / SUITE_NAME)["config"], config.results, folder)
    table = suite_table(folder)
    if shard.leads:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return table


def begin_run(
    folder: Path, config: SuiteConfig, groups: Sequence[AnyGroup], earlier: EarlierRun, resume: bool = True
) -> None:
    """Begin a run in a folder, whose lock is held.

    Args:
        folder: the run's folder.
        config, groups: the run.
        earlier: the folder's earlier run.
        resume: False moves the files of the earlier run aside.

    Raises:
        TrainingStateError: the folder holds other files, or a run of another configuration; or the run would start from
            SAEs in its own folder.
    """
    for name in (RUN_NAME, SUITE_NAME):
        for left in folder.glob(f".{name}.*"):  # left by a process that was killed while writing
            left.unlink(missing_ok=True)
    shutil.rmtree(folder / STAGE, ignore_errors=True)
    if resume and (folder / RUN_NAME).exists():
        check_same_run(read_record(folder / RUN_NAME)["config"], config.results, folder)
        return
    check_starts(groups, folder)
    if (folder / RUN_NAME).exists():
        earlier.set_aside()
    folders = sorted({spec.folder for group in groups for spec in group.specs})
    taken = [name for name in (*folders, CHECKPOINTS, SUITE_NAME, METRICS_NAME) if (folder / name).exists()]
    if taken:
        raise TrainingStateError(f"{folder} holds {', '.join(taken)}, but no run: choose another output.")
    write_run(folder, config)
