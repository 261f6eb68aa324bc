"""The part of the latents and of the batch that a process has, and the sums over all parts.

Training is divided as in the paper's section 3.3: over latents (each process has some latents of every SAE and sees
every row), over the batch (each has all latents and sees some rows), or both. :data:`WHOLE` is a single process with
all latents and rows. A distributed shard overrides the sums; no other part of a training step communicates.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardedDim

from gemma_scope_tl.errors import GemmaScopeError


@dataclass(frozen=True)
class Shard:
    """The part of one process among ``latent_ranks * data_ranks``. This class itself is the case of one process.

    Attributes:
        latent_rank, latent_ranks: index and number of the equal, contiguous parts of every SAE's latents.
        data_rank, data_ranks: index and number of the equal, contiguous parts of every batch.
    """

    latent_rank: int = 0
    latent_ranks: int = 1
    data_rank: int = 0
    data_ranks: int = 1

    def __post_init__(self) -> None:
        for name, rank, ranks in (
            ("latent", self.latent_rank, self.latent_ranks),
            ("data", self.data_rank, self.data_ranks),
        ):
            if not 0 <= rank < ranks:
                raise GemmaScopeError(f"{name}_rank must be 0 to {ranks - 1}, not {rank}.")
        if type(self) is Shard and self.latent_ranks * self.data_ranks > 1:
            raise GemmaScopeError("A Shard of more than one process needs a subclass that sums over the processes.")

    def latents(self, d_sae: int) -> slice:
        """This process's latents of an SAE.

        Raises:
            GemmaScopeError: ``d_sae`` cannot be divided equally.
        """
        return _part(d_sae, self.latent_rank, self.latent_ranks, "latents")

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch.

        Raises:
            GemmaScopeError: ``batch_size`` cannot be divided equally.
        """
        return _part(batch_size, self.data_rank, self.data_ranks, "rows of a batch")

    @property
    def leads(self) -> bool:
        """Whether this process writes the files that all processes have in common."""
        return self.latent_rank == 0 and self.data_rank == 0

    @property
    def part(self) -> str:
        """The ending of the names of files that hold this process's latents."""
        return "" if self.latent_ranks == 1 else f".{self.latent_rank}_of_{self.latent_ranks}"

    def gather(self, value: Any) -> list[Any]:
        """The (small) values of all processes. Every process waits for the others here."""
        return [value]

    def most(self, value: int) -> int:
        """The greatest value of all processes."""
        return value

    def whole(self, local: Tensor, chunk: int | None = None) -> Generator[Tensor, None, None]:
        """The whole of a tensor whose first dimension is divided as the latents are, ``chunk`` columns at a time.

        Every process must take part. With ``chunk`` no process holds more than ``[latents, chunk]`` of it.
        """
        if local.ndim == 1 or chunk is None:
            yield local
        else:
            yield from local.split(chunk, dim=1)

    def sum_latents(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the processes with the same rows and other latents, possibly in place."""
        return tensor

    def sum_data(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the processes with the same latents and other rows, possibly in place."""
        return tensor


def _part(total: int, rank: int, ranks: int, what: str) -> slice:
    if total % ranks:
        raise GemmaScopeError(f"{total} {what} cannot be divided equally among {ranks} processes.")
    return slice(total // ranks * rank, total // ranks * (rank + 1))


WHOLE = Shard()
"""One process with all latents and all rows."""


AXES = ("data", "latents")
SECONDS = 600.0
"""Seconds that a process waits for the others. Two exchanges are as far apart as a step, or as writing a checkpoint."""


@dataclass(frozen=True)
class MeshShard(Shard):
    """The part of a process in a DeviceMesh with the axes ``data`` and ``latents``.

    Sums are all-reduces, so every process of an axis gets the same bits.
    """

    mesh: DeviceMesh | None = field(default=None, repr=False)

    def sum_latents(self, tensor: Tensor) -> Tensor:
        """All-reduce along ``latents``, in place."""
        return self._sum(tensor, "latents", self.latent_ranks)

    def sum_data(self, tensor: Tensor) -> Tensor:
        """All-reduce along ``data``, in place."""
        return self._sum(tensor, "data", self.data_ranks)

    def _sum(self, tensor: Tensor, axis: str, ranks: int) -> Tensor:
        if ranks == 1 or self.mesh is None:
            return tensor
        whole = tensor.to(self.mesh.device_type).contiguous()  # NCCL adds tensors on GPUs only
        with _exchange():
            dist.all_reduce(whole, group=self.mesh.get_group(axis))
        return whole.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """All-gather of small values over all processes."""
        if self.mesh is None:
            return [value]
        return _gathered(value)

    def most(self, value: int) -> int:
        """All-reduce of the greatest value over all processes."""
        if self.mesh is None:
            return value
        found = torch.tensor(value, device=self.mesh.device_type)
        with _exchange():
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def whole(self, local: Tensor, chunk: int | None = None) -> Generator[Tensor, None, None]:
        """Like :meth:`Shard.whole`, by means of DTensor."""
        if self.mesh is None or self.latent_ranks == 1:
            yield from super().whole(local, chunk)
            return
        for part in [local] if local.ndim == 1 or chunk is None else local.split(chunk, dim=1):
            here = part.to(self.mesh.device_type).contiguous()
            placed = DTensor.from_local(here, self.mesh, [Replicate(), ShardedDim(0)], run_check=False)
            with _exchange():
                whole = placed.full_tensor()
            yield whole.to(local.device)


@contextmanager
def _exchange() -> Generator[None, None, None]:
    """Explain a failed exchange, because the messages of the backend are about sockets."""
    try:
        yield
    except RuntimeError as error:
        raise GemmaScopeError(
            "Another process of this job ended, or did not answer in time; its own message says why. End what is left "
            "of the job and start the same command again: the run resumes from its last checkpoint, to the same bits. "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _gathered(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    with _exchange():
        dist.all_gather_object(found, value)
    return found


def led(shard: Shard, act: Callable[[], object]) -> None:
    """Call ``act`` on the leading process while all others wait. An error of ``act`` is raised on all processes.

    Raises:
        GemmaScopeError: ``act`` failed on the leading process.
    """
    problem: GemmaScopeError | None = None
    if shard.leads:
        try:
            act()
        except GemmaScopeError as error:
            problem = error
    said = next((words for words in shard.gather(None if problem is None else str(problem)) if words is not None), None)
    if problem is not None:
        raise problem
    if said is not None:
        raise GemmaScopeError(said)


@contextmanager
def process_mesh(
    latent_ranks: int = 1,
    data_ranks: int = 1,
    *,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    seconds: float | None = None,
) -> Generator[Shard, None, None]:
    """This process's shard of ``latent_ranks * data_ranks`` processes; the group is closed on leaving.

    Args:
        latent_ranks, data_ranks: number of parts into which the latents and the batch are divided.
        device: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL; each process takes the GPU of its local rank).
        backend: a backend other than the device's default.
        seconds: how long a process waits for the others, by default :data:`SECONDS`. If a process ends, the others
            notice at once; if it hangs or its machine is lost, they notice after this time.

    Raises:
        GemmaScopeError: the launcher started a different number of processes, or another process ended or did not
            answer.
    """
    wanted = latent_ranks * data_ranks
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != wanted:
        raise GemmaScopeError(
            f"{data_ranks} x {latent_ranks} (data x latents) needs {wanted} processes, this run has {world}: "
            f"start it with torchrun --nproc-per-node {wanted}, or state in mesh how the processes divide the work."
        )
    if wanted == 1:
        yield WHOLE
        return
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    limit = timedelta(seconds=SECONDS if seconds is None else seconds)
    begun = not dist.is_initialized()
    if begun:
        with _exchange():
            dist.init_process_group(backend or ("nccl" if kind == "cuda" else "gloo"), timeout=limit)
    try:
        mesh = _mesh(kind, latent_ranks, data_ranks, limit)
        yield MeshShard(
            latent_rank=mesh.get_local_rank("latents"),
            latent_ranks=latent_ranks,
            data_rank=mesh.get_local_rank("data"),
            data_ranks=data_ranks,
            mesh=mesh,
        )
        with _exchange():
            dist.barrier()  # a process that leaves early would abort the others
    finally:
        if begun:
            dist.destroy_process_group()


def _mesh(kind: str, latent_ranks: int, data_ranks: int, limit: timedelta) -> DeviceMesh:
    """A mesh whose groups have this time limit; ``init_device_mesh`` would use the backend's limit of half an hour."""
    ranks = torch.arange(data_ranks * latent_ranks).reshape(data_ranks, latent_ranks)
    with _exchange():
        data, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=limit)
        latents, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=limit)
    groups = cast("list[dist.ProcessGroup]", [data, latents])  # every process is in one of each
    return DeviceMesh.from_group(groups, kind, mesh=ranks, mesh_dim_names=AXES)


def agreed(values: Mapping[str, Any]) -> None:
    """Raise on every process unless all were given the same ``values``.

    Raises:
        GemmaScopeError: the values differ; the message names the settings.
    """
    if not dist.is_initialized():
        return
    found = _gathered(dict(values))
    different = sorted(key for key in values if any(other.get(key) != values[key] for other in found))
    if different:
        raise GemmaScopeError(f"The processes of this job do not agree on: {', '.join(different)}.")
