"""The folder of a run: its lock, the records ``run.json`` and ``suite.json``, and its checkpoints.

A checkpoint is a folder ``step_N`` with a safetensors file for each group of SAEs and ``manifest.json``, which is
written last and has every file's sha256. The folder is made under another name, flushed to the disk and renamed, so
that no incomplete checkpoint has the final name. Where several processes divide the latents, each writes its own files
(``group.0_of_2``) into the same folder, and all wait for each other.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemma_scope_tl import __version__
from gemma_scope_tl.families import Family
from gemma_scope_tl.files import file_sha256, reason, sync_folder, sync_to_disk, write_atomically, writing
from gemma_scope_tl.registry.schema import LAYER_FILE
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError
from gemma_scope_tl.training.shard import WHOLE, Shard
from gemma_scope_tl.weights.checks import PARAMS_NAME

if TYPE_CHECKING:
    import pandas as pd

RUN_NAME, SUITE_NAME, METRICS_NAME, CHECKPOINTS = "run.json", "suite.json", "metrics.jsonl", "checkpoints"
RUNS_NAME = "runs.jsonl"
RECIPE = "recipe"
"""The key of the recipe in a row of ``suite.json``, which is no column of the table."""
LOCK_NAME = ".lock"
MANIFEST_NAME, UNFINISHED, KEPT = "manifest.json", ".unfinished", 2


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """Hold the lock of a run's folder, so that no other process trains in it.

    Raises:
        TrainingStateError: another process holds it.
    """
    lock = FileLock(folder / LOCK_NAME)
    with writing(folder / LOCK_NAME):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            what = f"Another process trains in {folder}"
            raise TrainingStateError(f"{what}: wait for it, or give another output.") from None
    try:
        yield
    finally:
        lock.release()


def write_run(folder: Path, config: SuiteConfig) -> None:
    """Record in ``run.json`` that a run of ``config`` has begun in ``folder``."""
    _write_record(folder / RUN_NAME, "run", config, {})


def write_suite(
    folder: Path,
    config: SuiteConfig,
    family: Family,
    scales: Mapping[Place, float],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Record in ``suite.json`` that the suite is complete: the model's family, all scales, and a row for each SAE.

    A row has the SAE's recipe, as it was used.
    """
    facts: dict[str, Any] = {"family": family.name}
    facts |= {"scales": {place.key: scale for place, scale in scales.items()}, "saes": list(rows)}
    _write_record(folder / SUITE_NAME, "suite", config, facts)


def read_record(path: Path) -> dict[str, Any]:
    """The content of ``run.json`` or ``suite.json``.

    Raises:
        TrainingStateError: the file cannot be read, or is not such a record.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("config"), dict):
            return found
        why = "it has no configuration"
    except FileNotFoundError:
        why = "it is missing"
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        why = str(error)
    raise TrainingStateError(f"{path} is not what a run writes: {why}. Restore it, or choose another output.")


def suite_table(folder: Path) -> pd.DataFrame:
    """The table of a finished run, with one row for each SAE.

    It has a column ``affine`` if there are skip transcoders among them.

    Raises:
        TrainingStateError: ``suite.json`` cannot be read, or SAEs that it lists are not in the folder.
    """
    import pandas as pd

    rows = read_record(folder / SUITE_NAME)["saes"]
    missing = [
        row["path"] for row in rows if not all((folder / row["path"] / name).is_file() for name in files_of(row))
    ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise TrainingStateError(
            f"The run in {folder} is finished, but {len(missing)} of its {len(rows)} SAEs are missing: "
            f"{', '.join(missing[:3])}{more}. Restore their files, or train them again with resume=False "
            "(gemma-scope train --restart)."
        )
    rows = [{key: value for key, value in row.items() if key != RECIPE} for row in rows]
    if any(row.get("affine") for row in rows):
        rows = [{**row, "affine": bool(row.get("affine"))} for row in rows]
    return pd.DataFrame(rows).astype({"layer": "Int64"})


def files_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the files of an SAE, or of a coder over several layers, in its row of ``suite.json``."""
    count = len(row.get("layers") or ())
    return tuple(LAYER_FILE.format(number) for number in range(count)) or (PARAMS_NAME,)


def _write_record(path: Path, kind: str, config: SuiteConfig, facts: Mapping[str, Any]) -> None:
    head = {"format": f"gemma_scope_tl {kind}", "version": __version__, "config": config.results}
    write_atomically(path, json.dumps({**head, **facts}, indent=1) + "\n")


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class CheckpointManifest(BaseModel):
    """The manifest of a checkpoint.

    Attributes:
        step: number of steps done.
        config: the part of the configuration on which results depend.
        scales: ``C`` of every place, by the place's key.
        metrics_bytes: length of ``metrics.jsonl`` at this step.
        threads: PyTorch's number of threads, on which the last bits of results depend.
        status: the last metrics of every SAE.
        files: sha256 of every file, by the group's name and, where latents are divided, the part.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["gemma_scope_tl checkpoint"] = "gemma_scope_tl checkpoint"
    version: Literal[1] = 1
    step: Annotated[int, Field(ge=0)]
    config: dict[str, Any]
    scales: dict[str, float]
    metrics_bytes: Annotated[int, Field(ge=0)]
    threads: int
    status: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])
    files: dict[str, Sha256]


def save_checkpoint(
    root: Path, manifest: CheckpointManifest, states: Mapping[str, Mapping[str, Tensor]], shard: Shard = WHOLE
) -> Path:
    """Write a checkpoint, then remove all but the last two.

    Args:
        root: the folder of the run's checkpoints, which all processes must see.
        manifest: the manifest of the leading process; this function fills in ``files``.
        states: this process's part of the tensors of every group, by the group's name.
        shard: the part of latents and batch that this process has.

    Returns:
        The checkpoint's folder. An existing one of the same step is kept, as its content would be the same.

    Raises:
        TrainingStateError: the disk is full or cannot be written to; earlier checkpoints are unchanged.
    """
    final, partial = root / f"step_{manifest.step}", root / UNFINISHED
    if final.exists():
        return final
    problem = _attempt(lambda: _empty(partial)) if shard.leads else ""
    hashes: dict[str, str] = {}
    if not any(shard.gather(problem)) and shard.data_rank == 0:
        problem = _attempt(lambda: hashes.update(_write_states(partial, states, shard)))
    found = shard.gather((problem, hashes))
    problem = next((other for other, _ in found if other), "")
    if not problem and shard.leads:
        problem = _attempt(
            lambda: _complete(partial, final, manifest, {k: v for _, own in found for k, v in own.items()})
        )
    problem = next((other for other in shard.gather(problem) if other), "")
    if problem:
        shutil.rmtree(partial, ignore_errors=True)
        steps = steps_of(root)
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "there is no earlier one"
        raise TrainingStateError(
            f"The checkpoint of step {manifest.step} could not be written to {root} ({problem}); {kept}. Make room and "
            "start the same run again: it continues there."
        )
    if shard.leads:
        for step in steps_of(root)[:-KEPT]:
            shutil.rmtree(root / f"step_{step}", ignore_errors=True)
    return final


def _attempt(write: Callable[[], object]) -> str:
    """Call ``write``. Return the reason of a failure, for all processes to learn, or an empty text."""
    try:
        write()
    except (OSError, SafetensorError) as error:
        return reason(error)
    return ""


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write_states(folder: Path, states: Mapping[str, Mapping[str, Tensor]], shard: Shard) -> dict[str, str]:
    names = {f"{name}{shard.part}": state for name, state in states.items()}
    return {name: _write_tensors(folder / f"{name}.safetensors", state) for name, state in names.items()}


def _complete(partial: Path, final: Path, manifest: CheckpointManifest, hashes: Mapping[str, str]) -> None:
    """Write the manifest, then give the checkpoint its final name."""
    text = manifest.model_copy(update={"files": dict(hashes)}).model_dump_json(indent=1)
    write_atomically(partial / MANIFEST_NAME, text + "\n")
    partial.rename(final)
    sync_folder(final.parent)


def steps_of(root: Path) -> list[int]:
    """The steps of the checkpoints in a folder, in rising order."""
    names = [path.name.removeprefix("step_") for path in root.glob("step_*")]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def load_manifest(folder: Path) -> CheckpointManifest:
    """The manifest of a checkpoint.

    Raises:
        TrainingStateError: it is missing or damaged.
    """
    path = folder / MANIFEST_NAME
    try:
        found = CheckpointManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise TrainingStateError(f"{path} is missing. {_remedy(folder)}") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise TrainingStateError(f"{path} is not the manifest of a checkpoint: {why}. {_remedy(folder)}") from None
    if folder.name != f"step_{found.step}":
        raise TrainingStateError(f"{path} is of step {found.step}, in folder {folder.name}. {_remedy(folder)}")
    return found


def load_state(folder: Path, manifest: CheckpointManifest, name: str) -> dict[str, Tensor]:
    """Load the tensors of one group, after comparing the sha256 of its file with the manifest.

    Raises:
        TrainingStateError: the file is missing, changed or truncated, or the manifest has no such group.
    """
    path = folder / f"{name}.safetensors"
    if name not in manifest.files:
        raise TrainingStateError(f"{folder} has no group {name!r}: it belongs to another run. {_remedy(folder)}")
    try:
        digest = file_sha256(path)
        if digest != manifest.files[name]:
            raise TrainingStateError(
                f"{path} is not the file that was written: its sha256 is {digest}, and the manifest records "
                f"{manifest.files[name]}. {_remedy(folder)}"
            )
        return load_file(path)
    except FileNotFoundError:
        raise TrainingStateError(f"{path} is missing. {_remedy(folder)}") from None
    except OSError as error:
        raise _unreadable(path, error) from error
    except SafetensorError as error:
        raise TrainingStateError(f"{path} cannot be read: {error}. {_remedy(folder)}") from error


def check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise unless two configurations give the same results.

    Raises:
        TrainingStateError: they differ; the message names the keys.
    """
    differing = [
        f"{key} is {_short(old)}, not {_short(new)}" for key, old, new in _differences(found, wanted, "") if old != new
    ]
    if differing:
        raise TrainingStateError(
            f"{folder} holds a run with another configuration: {'; '.join(differing[:5])}. Use that one to go on, or "
            "choose another output."
        )


def _differences(recorded: Any, wanted: Any, at: str) -> list[tuple[str, Any, Any]]:
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        keys: dict[str, None] = dict.fromkeys([*recorded, *wanted])
        return [d for key in keys for d in _differences(recorded.get(key), wanted.get(key), f"{at}.{key}".lstrip("."))]
    if isinstance(recorded, list) and isinstance(wanted, list) and len(recorded) == len(wanted):
        pairs = enumerate(zip(recorded, wanted, strict=True))
        return [d for i, (old, new) in pairs for d in _differences(old, new, f"{at}.{i}")]
    return [(at, recorded, wanted)]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


def _write_tensors(path: Path, state: Mapping[str, Tensor]) -> str:
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(contiguous, path)
    sync_to_disk(path)
    return file_sha256(path)


def _unreadable(path: Path, error: OSError) -> TrainingStateError:
    why = f"{path} cannot be read: {error.strerror or error}"
    return TrainingStateError(f"{why}. Check its permissions and the disk; its content may be sound.")


def _remedy(folder: Path) -> str:
    return f"Restore it, or remove {folder} to continue from the checkpoint before it."
