"""All SAEs of one place, stepped together from one stream of batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.dense_pass import DensePass
from gemma_scope_tl.training.optimizer import (
    Lambda,
    Matrix,
    Moments,
    Prices,
    Rate,
    adam_,
    on_sphere_,
    update_rows_,
)
from gemma_scope_tl.training.shard import WHOLE, Shard
from gemma_scope_tl.training.sparse_pass import SparsePass
from gemma_scope_tl.training.spec import SAESpec, check_one_place
from gemma_scope_tl.training.stack import Batch, Chunk, Member, Pass, Weights, folded, initialize, members_of
from gemma_scope_tl.training.window import Window, check_state

DENSE_ENTRIES = 0.06
"""Share of pre-activations above the kernel's lower end from which on dense products are faster."""

TEAM_VALUES = 1 << 20
"""SAEs are computed together while their reconstructions of a batch have at most this many values. Above that a single
SAE keeps the processor busy, and holding the errors of all SAEs in memory at once would be slower."""

_STEPS, _STEERING = "steps_done", "steering"


class PlaceTrainer:
    """Trains all SAEs of one place, each by its recipe, in units of ``E ||x||^2 = 1``.

    A step first computes the losses of all SAEs, then changes their parameters. The same batches give the same bits
    with the same number of threads. The other SAEs of a place change an SAE's numbers by rounding only, because the
    encoder's product and the order of some sums depend on them.

    Attributes:
        specs: the SAEs.
        members: the position of each SAE in the stack.
        weights: the parameters.
        first, second: Adam's moments; ``first`` is None if no recipe has momentum. Rows of ``enc`` and ``dec`` are up
            to date as of the step in ``last``.
        last: ``[latents]``, the last step in which the rows of each latent were read.
        lambdas: the sparsity coefficient of each SAE.
        windows: the counts of each SAE since the last report.
        steps_done: number of steps done.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        specs: Sequence[SAESpec],
        *,
        total_steps: int,
        device: str | torch.device = "cpu",
        shard: Shard = WHOLE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            d_in, d_out: widths of the input and of the reconstruction; equal except for transcoders.
            specs: SAEs of one place with one batch size.
            total_steps: length of the run, for recipes that decay the learning rate.
            device: device of parameters and batches.
            shard: this process's part of latents and batch.
            dtype: float32 as in the paper, or float64.

        Raises:
            GemmaScopeError: the SAEs cannot be trained together.
        """
        check_one_place(specs)
        _check(d_in, d_out, specs, total_steps, dtype)
        self.specs, self.total_steps, self.shard = tuple(specs), total_steps, shard
        self.d_in, self.d_out, self.dtype, self.device = d_in, d_out, dtype, torch.device(device)
        self.members = members_of(specs, shard)
        latents = self.members[-1].rows.stop
        skips = sum(spec.skip for spec in specs)
        sizes: tuple[Any, ...] = (latents, len(specs), d_in, d_out, dtype, self.device, skips)
        self.weights, self.second = Weights.zeros(*sizes), Weights.zeros(*sizes)
        momentum = any(member.momentum for member in self.members)
        self.first = Weights.zeros(*sizes) if momentum else None
        initialize(self.weights, specs, self.members, shard)
        self.last = torch.zeros(latents, dtype=torch.int64, device=self.device)
        self.lambdas = [Lambda(spec.recipe, spec.target_l0, total_steps) for spec in specs]
        self.windows = [Window(m.rows.stop - m.rows.start, self.device) for m in self.members]
        self._started: set[int] = set()
        self.entries = [1.0] * len(specs)  # share of pre-activations above the kernel's lower end in the last step
        self.steps_done = 0

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAEs reconstruct a tensor other than their input."""
        return self.specs[0].is_transcoder

    @torch.no_grad()
    def start_from(self, index: int, params: Mapping[str, Tensor]) -> None:
        """Replace the initial weights of an SAE before the first step; ``b_dec_start`` does not apply to it then.

        Args:
            index: index of the SAE in ``specs``.
            params: all latents', as :func:`~gemma_scope_tl.training.start.unfolded` returns them; without ``skip`` the
                matrix of a skip transcoder stays 0.

        Raises:
            GemmaScopeError: the trainer has stepped already.
        """
        if self.steps_done:
            raise GemmaScopeError(f"The weights of {self.specs[index].name} can be set before the first step only.")
        member, own = self.members[index], self.shard.latents(self.specs[index].d_sae)
        for name, value in self.weights.of(index, member.rows, member.skip).items():
            if name in params:
                value.copy_(params[name] if name in ("b_dec", "skip") else params[name][own])
        self._started.add(index)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor | None = None) -> None:
        """Step all SAEs once.

        Args:
            x: ``[rows, d_in]``, this process's rows of the batch divided by ``C``; not changed.
            y: for transcoders the tensor that they reconstruct, ``[rows, d_out]``, divided by the input's ``C``
                (appendix B).

        Raises:
            GemmaScopeError: a shape is wrong, SAEs were given a target or transcoders none, or a loss is not finite.
                No parameter has changed in these cases.
        """
        batch = self._batch(x, y)
        self._start(batch)
        passes = self._passes(batch)
        found = [row for each in passes for row in each.sums.tolist()]
        self._check_finite(found)
        for each in passes:
            self._update(each, found, batch.n)
        self.steps_done += 1

    def _batch(self, x: Tensor, y: Tensor | None) -> Batch:
        if (y is None) == self.is_transcoder:
            what = "need a target y" if self.is_transcoder else "reconstruct their input: give no y"
            raise GemmaScopeError(f"The SAEs of {self.specs[0].place.key} {what}.")
        for name, tensor, width in (("x", x, self.d_in), ("y", x if y is None else y, self.d_out)):
            if tensor.ndim != 2 or tensor.shape != (x.shape[0], width) or not x.shape[0]:
                raise GemmaScopeError(f"{name} must be [{x.shape[0] or 'rows'}, {width}], not {list(tensor.shape)}.")
        x = x.to(self.device, self.dtype).contiguous()
        target = x if y is None else y.to(self.device, self.dtype)
        return Batch(x, target, x.shape[0] * self.shard.data_ranks, not self.is_transcoder, self.shard)

    def _start(self, batch: Batch) -> None:
        """Before the first step, set the ``b_dec`` that start at the mean of the target."""
        if self.steps_done or all(spec.recipe.b_dec_start == "zero" for spec in self.specs):
            return
        mean = batch.shard.sum_data(batch.y.sum(0)) / batch.n
        if not bool(torch.isfinite(mean).all()):
            return  # the loss is not finite either, and the step will say so
        for member, spec in zip(self.members, self.specs, strict=True):
            if spec.recipe.b_dec_start == "mean" and member.index not in self._started:
                self.weights.b_dec[member.index] = mean

    def _passes(self, batch: Batch) -> list[Pass]:
        """The forward half: a pass for each dense SAE, and one for neighbouring sparse SAEs together."""
        found: list[Pass] = []
        for team in self._teams(batch.x.shape[0]):
            if self._is_dense(team[0]):
                found.append(DensePass(self.weights, team[0], batch))
            else:
                found.append(SparsePass(self.weights, team, batch))
        return found

    def _is_dense(self, member: Member) -> bool:
        return self.entries[member.index] > DENSE_ENTRIES

    def _teams(self, rows: int) -> list[list[Member]]:
        teams: list[list[Member]] = []
        values = 0
        for member in self.members:
            size = rows * self.d_out * len(member.segments)
            joins = bool(teams) and not (self._is_dense(member) or self._is_dense(teams[-1][0]))
            if joins and values + size <= TEAM_VALUES:
                teams[-1].append(member)
                values += size
            else:
                teams.append([member])
                values = size
        return teams

    def _check_finite(self, found: Sequence[Sequence[float]]) -> None:
        bad = [spec.name for spec, sums in zip(self.specs, found, strict=True) if not math.isfinite(sums[0] + sums[1])]
        if bad:
            names = ", ".join(bad)
            raise GemmaScopeError(f"Step {self.steps_done}: the loss of {names} is not finite. Nothing was changed.")

    def _prices(self, member: Member) -> Prices:
        spec, step = self.specs[member.index], self.steps_done
        recipe = spec.recipe
        around = spec.target_l0 if recipe.l0_penalty == "quadratic" else None
        frequency = recipe.frequency_coefficient * recipe.warm_up_at(step)
        to_input = recipe.ste_to_input_at(step, self.total_steps)
        return Prices(self.lambdas[member.index].at(step), around, frequency, recipe.frequency_limit, to_input)

    def _update(self, each: Pass, found: Sequence[Sequence[float]], n: int) -> None:
        """The backward half of a pass, and Adam."""
        each.backward([self._prices(member) for member in each.members])
        first = each.members[0].rows.start
        for number, member in enumerate(each.members):
            rate = self._rate(member)
            for chunk in each.chunks(number):
                self._update_rows(chunk, rate, moved_latents(member, each, chunk.rows, first))
            own, index = slice(member.rows.start - first, member.rows.stop - first), member.index
            moved = moved_latents(member, each, member.rows, first)
            for name in ("b_enc", "log_threshold"):
                grad = getattr(each.vectors, name)[own]
                moments = self._moments(name, member.rows)
                adam_(getattr(self.weights, name)[member.rows], moments, grad, rate, moved=moved)
            adam_(self.weights.b_dec[index], self._moments("b_dec", index), each.b_dec[number], rate)
            skip = each.skip[number]
            if skip is not None and member.skip is not None:
                adam_(self.weights.skip[member.skip], self._moments("skip", member.skip), skip, rate)
            squares, _, active, entries = found[index]
            self.entries[index] = entries / (n * member.d_sae)
            self.lambdas[index].update(self.steps_done, active / n)
            self.windows[index].update(self.steps_done + 1, squares / n, active / n, each.vectors.fired[own])

    def _rate(self, member: Member) -> Rate:
        recipe = self.specs[member.index].recipe
        lr = recipe.lr_at(self.steps_done, self.total_steps)
        return Rate(lr, *recipe.betas, recipe.eps, self.steps_done + 1)

    def _moments(self, name: str, at: slice | int) -> Moments:
        """Views of a parameter's moments."""
        return Moments(None if self.first is None else getattr(self.first, name)[at], getattr(self.second, name)[at])

    def _update_rows(self, chunk: Chunk, rate: Rate, moved: Tensor | None) -> None:
        """Adam on both matrices where a chunk has gradients; ``moved [rows of the chunk]`` as for :func:`adam_`."""
        matrices = [
            (Matrix(getattr(self.weights, name)[chunk.rows], self._moments(name, chunk.rows), update), grad)
            for name, grad, update in (("enc", chunk.enc, adam_), ("dec", chunk.dec, on_sphere_))
        ]
        update_rows_(matrices, self.last[chunk.rows], chunk.touched, rate, moved)

    def status(self) -> list[dict[str, float | int | str]]:
        """Report one row for each SAE, and reset the counts of the window.

        ``error`` and ``l0`` are means since the last call; ``error`` is ``||y - y_hat||^2`` in scaled units (1 is the
        mean square of the input). ``lambda`` and ``lr`` are those of the next step, and ``threshold`` is the geometric
        mean. ``silent`` is the share of latents that were not active since the last call, and ``dead`` the share of
        those that were not active in the last 1,000 steps.
        """
        rows: list[dict[str, float | int | str]] = []
        for spec, member, steer, window in zip(self.specs, self.members, self.lambdas, self.windows, strict=True):
            log = self.weights.log_threshold[member.rows].double().sum()
            row: dict[str, float | int | str] = {"name": spec.name, "step": self.steps_done}
            row |= window.report(self.steps_done, spec.d_sae, self.shard)
            row["lambda"] = steer.at(self.steps_done)
            row["lr"] = spec.recipe.lr_at(self.steps_done, self.total_steps)
            row["threshold"] = math.exp(self.shard.sum_latents(log).item() / spec.d_sae)
            rows.append(row)
        return rows

    def state(self) -> dict[str, Tensor]:
        """Everything that a step reads or changes, as copies on the CPU, named ``<name of the SAE>/<what>``.

        A run that loads it continues to the same bits. A divided trainer returns the tensors of this process's latents.
        """
        found = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self._live().items()}
        for spec, steer, entries in zip(self.specs, self.lambdas, self.entries, strict=True):
            found[f"{spec.name}/{_STEERING}"] = torch.tensor((steer.base, steer.error, entries), dtype=torch.float64)
        found[_STEPS] = torch.tensor(self.steps_done)
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state` returned; all tensors are checked before any is changed.

        Raises:
            UnknownNameError: the state has a tensor that this trainer does not have.
            GemmaScopeError: a tensor is missing, its shape or dtype is wrong, or a value is not finite.
        """
        live = self._live()
        expected = {name: (value.shape, value.dtype) for name, value in live.items()}
        expected |= {f"{spec.name}/{_STEERING}": (torch.Size((3,)), torch.float64) for spec in self.specs}
        expected[_STEPS] = (torch.Size(()), torch.int64)
        check_state(state, expected)
        for name, value in live.items():
            value.copy_(state[name])
        for index, spec in enumerate(self.specs):
            steer = self.lambdas[index]
            steer.base, steer.error, self.entries[index] = state[f"{spec.name}/{_STEERING}"].tolist()
        self.steps_done = int(state[_STEPS])

    def _live(self) -> dict[str, Tensor]:
        """The trainer's own tensors: writing to them changes it."""
        found: dict[str, Tensor] = {}
        for spec, member, window in zip(self.specs, self.members, self.windows, strict=True):
            own = (member.index, member.rows, member.skip)
            parts = self.weights.of(*own)
            parts |= {f"second.{name}": value for name, value in self.second.of(*own).items()}
            if self.first is not None:
                parts |= {f"first.{name}": value for name, value in self.first.of(*own).items()}
            parts |= {"last": self.last[member.rows], **window.tensors()}
            found |= {f"{spec.name}/{name}": value for name, value in parts.items()}
        return found

    def released(self, index: int, scale: float) -> dict[str, Tensor]:
        """An SAE for raw activations under Gemma Scope's names and layout; folded in float64 (appendix A).

        Args:
            index: index of the SAE in ``specs``.
            scale: ``C``, by which the (input) activations were divided.

        Returns:
            ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_out]``, ``b_enc``, ``b_dec``, ``threshold``, and
            ``affine_skip_connection [d_in, d_out]`` of skip transcoders, in the trainer's dtype on the CPU. A divided
            trainer returns those of this process's latents.
        """
        member = self.members[index]
        weights = self.weights.of(index, member.rows, member.skip)
        return folded(weights, scale, pre_encoder_bias=not self.is_transcoder)


def moved_latents(member: Member, each: Pass, rows: slice, first: int) -> Tensor | None:
    """1 for latents of ``rows`` that are active or near their thresholds, else 0; None if all are, or no momentum.

    Args:
        rows: rows of the stack, of this member.
        first: the first row of the pass.
    """
    if not member.momentum:
        return None
    at = slice(rows.start - first, rows.stop - first)
    touched = (each.vectors.fired[at] + each.vectors.near[at]) > 0
    return None if bool(touched.all()) else touched.to(each.vectors.b_enc.dtype)


def _check(d_in: int, d_out: int, specs: Sequence[SAESpec], total_steps: int, dtype: torch.dtype) -> None:
    if min(d_in, d_out, total_steps) < 1:
        raise GemmaScopeError(f"d_in, d_out and total_steps must be 1 or more, not {d_in}, {d_out}, {total_steps}.")
    if d_in != d_out and not specs[0].is_transcoder:
        raise GemmaScopeError(
            f"{specs[0].place.key}: an SAE reconstructs its input, so d_out = {d_out} must be {d_in}."
        )
    if dtype not in (torch.float32, torch.float64):
        raise GemmaScopeError(f"Training is in float32 (the paper's) or float64, not {dtype}.")
