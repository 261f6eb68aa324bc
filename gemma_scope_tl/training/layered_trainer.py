"""One coder over several layers, stepped from one stream of batches of all its layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.layered_pass import LayeredPass, LayerPass
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.layered_stack import LayeredWeights, folded, initialize, member_of
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
from gemma_scope_tl.training.place import DENSE_ENTRIES, moved_latents
from gemma_scope_tl.training.shard import WHOLE, Shard
from gemma_scope_tl.training.window import Window, check_state

_STEPS, _STEERING = "steps_done", "steering"


class LayeredTrainer:
    """Trains a crosscoder or a cross-layer transcoder by its recipe, each input and output in units of its mean square.

    The recipe is applied as to SAEs: Adam, rates, warm-ups, thresholds and kernel, the frequency penalty on each
    latent, Matryoshka prefixes, of which each layer has its share (the first latents of every layer together must
    reconstruct the outputs), and the pre-encoder bias of crosscoders. What spans layers: the error is the sum of the
    squared errors of all outputs, the L0 penalty is on the active latents of all layers together, ``L0*`` may fall
    (:meth:`LayeredSpec.target_at`), and rows of unit length are those of
    :mod:`~gemma_scope_tl.training.layered_stack`.

    A step costs what its active latents cost, and the products of the encoders. For layers of which many latents were
    near or above their thresholds in the step before, all is dense products. The same batches give the same bits
    with the same number of threads.

    Attributes:
        spec: the coder.
        weights: the parameters.
        first, second: Adam's moments; ``first`` is None without momentum. Rows of ``enc`` and ``dec`` are up to date as
            of the step in ``last``.
        last: for each layer ``[latents]``, the last step in which the rows of each latent were read.
        steer: the sparsity coefficient.
        windows: the counts of each layer since the last report.
        l0_start: the target L0 of the first step; None where it does not fall.
        entries: for each layer the share of pre-activations above the kernel's lower end in the last step.
        steps_done: number of steps done.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        spec: LayeredSpec,
        *,
        total_steps: int,
        device: str | torch.device = "cpu",
        shard: Shard = WHOLE,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """
        Args:
            d_in, d_out: widths of each input and each output; equal for a crosscoder.
            spec: the coder.
            total_steps: length of the run, for recipes that decay the learning rate.
            device: device of parameters and batches.
            shard: this process's part of each layer's latents and of the batch.
            dtype: float32 as in the paper, or float64.

        Raises:
            GemmaScopeError: a number is out of range.
        """
        if min(d_in, d_out, total_steps) < 1 or (d_in != d_out and not spec.is_transcoder):
            raise GemmaScopeError(f"{spec.name}: widths {d_in} and {d_out} and {total_steps} steps do not suit it.")
        if dtype not in (torch.float32, torch.float64):
            raise GemmaScopeError(f"Training is in float32 (the paper's) or float64, not {dtype}.")
        self.spec, self.total_steps, self.shard = spec, total_steps, shard
        self.d_in, self.d_out, self.dtype, self.device = d_in, d_out, dtype, torch.device(device)
        self.member, count = member_of(spec, shard), len(spec.layers)
        own = self.member.rows.stop

        def zeros() -> LayeredWeights:
            return LayeredWeights.zeros(own, count, d_in, d_out, dtype, self.device, skip=spec.skip)

        self.weights, self.second = zeros(), zeros()
        self.first = zeros() if self.member.momentum else None
        initialize(self.weights, spec, shard)
        self.last = [torch.zeros(own, dtype=torch.int64, device=self.device) for _ in spec.layers]
        self.steer = Lambda(spec.recipe, spec.target_l0, total_steps)
        self.windows = [Window(own, self.device) for _ in spec.layers]
        self.l0_start = spec.l0_start
        self.entries = [1.0] * count
        self.steps_done = 0
        self._started = False

    @torch.no_grad()
    def start_from(self, params: Mapping[str, Tensor], l0_start: float | None = None) -> None:
        """Replace the initial weights before the first step; ``b_dec_start`` does not apply then.

        Args:
            params: all latents', as :func:`~gemma_scope_tl.training.layered_stack.unfolded` returns them; without
                ``skip`` the skip paths stay 0.
            l0_start: the target L0 of the first step, unless the spec has one.

        Raises:
            GemmaScopeError: the trainer has stepped already.
        """
        if self.steps_done:
            raise GemmaScopeError(f"The weights of {self.spec.name} can be set before the first step only.")
        own = self.shard.latents(self.spec.width)
        for name, value in self.weights.named().items():
            if name in params:
                value.copy_(params[name] if name in ("b_dec", "skip") else params[name][own])
        self._started = True
        if self.spec.l0_start is None:
            self.l0_start = l0_start

    @torch.no_grad()
    def step(self, x: Sequence[Tensor], y: Sequence[Tensor] | None = None) -> None:
        """Step once.

        Args:
            x: for each layer ``[rows, d_in]``, this process's rows of the batch divided by ``C_j``; not changed.
            y: for a CLT what it reconstructs, ``[rows, d_out]`` each, divided by ``D_k``; None for a crosscoder.

        Raises:
            GemmaScopeError: a shape is wrong, or the loss is not finite. No parameter has changed in these cases.
        """
        x, y = self._checked(x, y)
        self._start(y)
        dense, centred = [share > DENSE_ENTRIES for share in self.entries], not self.spec.is_transcoder
        found = LayeredPass(self.weights, self.member, x, y, dense=dense, centred=centred, shard=self.shard)
        if not math.isfinite(found.loss + float(found.squares.sum())):
            raise GemmaScopeError(
                f"Step {self.steps_done}: the loss of {self.spec.name} is not finite. Nothing was changed."
            )
        self._update(found)
        self.steps_done += 1

    def _checked(self, x: Sequence[Tensor], y: Sequence[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
        if (y is None) == self.spec.is_transcoder:
            what = "needs targets y" if self.spec.is_transcoder else "reconstructs its inputs: give no y"
            raise GemmaScopeError(f"{self.spec.name} {what}.")
        count, rows = len(self.spec.layers), len(x[0]) if len(x) else 0
        for name, tensors, width in (("x", x, self.d_in), ("y", x if y is None else y, self.d_out)):
            shapes = [list(tensor.shape) for tensor in tensors]
            if not rows or shapes != [[rows, width]] * count:
                raise GemmaScopeError(f"{name} must be {count} times [{rows or 'rows'}, {width}], not {shapes}.")
        inputs = [tensor.to(self.device, self.dtype).contiguous() for tensor in x]
        return inputs, inputs if y is None else [tensor.to(self.device, self.dtype) for tensor in y]

    def _start(self, y: Sequence[Tensor]) -> None:
        """Before the first step, set the biases that start at the mean of the targets."""
        if self.steps_done or self._started or self.spec.recipe.b_dec_start == "zero":
            return
        mean = self.shard.sum_data(torch.stack([each.sum(0) for each in y])) / (len(y[0]) * self.shard.data_ranks)
        if bool(torch.isfinite(mean).all()):  # otherwise the loss is not finite either, and the step will say so
            self.weights.b_dec.copy_(mean)

    @property
    def target(self) -> float | None:
        """``L0*`` of the next step."""
        return self.spec.target_at(self.steps_done, self.l0_start)

    def _prices(self) -> Prices:
        recipe, step = self.spec.recipe, self.steps_done
        around = self.target if recipe.l0_penalty == "quadratic" else None
        frequency = recipe.frequency_coefficient * recipe.warm_up_at(step)
        to_input = recipe.ste_to_input_at(step, self.total_steps)
        return Prices(self.steer.at(step), around, frequency, recipe.frequency_limit, to_input)

    def _update(self, found: LayeredPass) -> None:
        """The backward half of a step, and Adam."""
        recipe = self.spec.recipe
        lr = recipe.lr_at(self.steps_done, self.total_steps)
        rate = Rate(lr, *recipe.betas, recipe.eps, self.steps_done + 1)
        found.backward(self._prices())
        n, squares, active = found.n, found.squares.tolist(), found.active.tolist()
        for j, window in enumerate(self.windows):
            with found.layer(j) as each:
                self._update_layer(j, each, rate)
                window.update(self.steps_done + 1, squares[j] / n, active[j] / n, each.vectors.fired)
        adam_(self.weights.b_dec, self._moments("b_dec"), found.b_dec, rate)
        if len(found.skip):
            adam_(self.weights.skip, self._moments("skip"), found.skip, rate)
        self.steer.update(self.steps_done, sum(active) / n)
        self.entries = [count / (n * self.spec.width) for count in found.entries.tolist()]

    def _update_layer(self, j: int, each: LayerPass, rate: Rate) -> None:
        layer = self.weights.layers[j]
        for chunk in each.chunks(0):
            matrices = [
                (Matrix(getattr(layer, name)[chunk.rows], self._moments(name, j, chunk.rows), update), grad)
                for name, grad, update in (("enc", chunk.enc, adam_), ("dec", chunk.dec, on_sphere_))
            ]
            moved = moved_latents(self.member, each, chunk.rows, 0)
            update_rows_(matrices, self.last[j][chunk.rows], chunk.touched, rate, moved)
        moved = moved_latents(self.member, each, self.member.rows, 0)
        for name in ("b_enc", "log_threshold"):
            grad = getattr(each.vectors, name)
            adam_(getattr(layer, name), self._moments(name, j), grad, rate, moved=moved)

    def _moments(self, name: str, j: int | None = None, rows: slice = slice(None)) -> Moments:
        """Views of a parameter's moments: of rows of layer ``j``, or of what no layer has by itself."""

        def of(weights: LayeredWeights) -> Tensor:
            return getattr(weights, name) if j is None else getattr(weights.layers[j], name)[rows]

        return Moments(None if self.first is None else of(self.first), of(self.second))

    def status(self) -> list[dict[str, float | int | str]]:
        """Report one row, and reset the counts of the window.

        ``error`` is the mean over outputs of ``||y - y_hat||^2`` in scaled units (1 is the mean square of each), and
        ``l0`` the number of active latents of all layers together, both means since the last call. ``l0_layer_L`` and
        ``error_layer_L`` are those of a layer of the model. The others are as of
        :meth:`~gemma_scope_tl.training.place.PlaceTrainer.status`; ``target`` is the ``L0*`` of the next step.
        """
        spec, count = self.spec, len(self.spec.layers)
        found = [window.report(self.steps_done, spec.width, self.shard) for window in self.windows]
        row: dict[str, float | int | str] = {"name": spec.name, "step": self.steps_done}
        row["error"] = sum(each["error"] for each in found) / count
        row["l0"] = sum(each["l0"] for each in found)
        for key in ("silent", "dead"):
            row[key] = sum(each[key] for each in found) / count
        row["lambda"] = self.steer.at(self.steps_done)
        row["lr"] = spec.recipe.lr_at(self.steps_done, self.total_steps)
        log = torch.stack([layer.log_threshold.double().sum() for layer in self.weights.layers]).sum()
        row["threshold"] = math.exp(self.shard.sum_latents(log).item() / spec.d_sae)
        if self.target is not None:
            row["target"] = self.target
        for layer, each in zip(spec.layers, found, strict=True):
            row |= {f"l0_layer_{layer}": each["l0"], f"error_layer_{layer}": each["error"]}
        return [row]

    def state(self) -> dict[str, Tensor]:
        """Everything that a step reads or changes, as copies on the CPU.

        A run that loads it continues to the same bits. A divided trainer returns the tensors of this process's latents.
        """
        found = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in self._live().items()}
        start = 0.0 if self.l0_start is None else self.l0_start
        found[_STEERING] = torch.tensor((self.steer.base, self.steer.error, start, *self.entries), dtype=torch.float64)
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
        expected |= {
            _STEERING: (torch.Size((3 + len(self.entries),)), torch.float64),
            _STEPS: (torch.Size(()), torch.int64),
        }
        check_state(state, expected)
        for name, value in live.items():
            value.copy_(state[name])
        self.steer.base, self.steer.error, start, *self.entries = state[_STEERING].tolist()
        self.l0_start = start or None
        self.steps_done = int(state[_STEPS])

    def _live(self) -> dict[str, Tensor]:
        """The trainer's own tensors: writing to them changes it."""
        found = self.weights.named()
        found |= {f"second.{name}": value for name, value in self.second.named().items()}
        if self.first is not None:
            found |= {f"first.{name}": value for name, value in self.first.named().items()}
        for j, (last, window) in enumerate(zip(self.last, self.windows, strict=True)):
            found |= {f"{j}.{name}": value for name, value in {"last": last, **window.tensors()}.items()}
        return found

    def released(self, inputs: Sequence[float], outputs: Sequence[float]) -> list[dict[str, Tensor]]:
        """The coder for raw activations, a mapping for each layer
        (:func:`~gemma_scope_tl.training.layered_stack.folded`); of a divided trainer, this process's latents.

        Args:
            inputs, outputs: the scalars by which the activations of each layer were divided.
        """
        return folded(self.weights, inputs, outputs, pre_encoder_bias=not self.spec.is_transcoder)
