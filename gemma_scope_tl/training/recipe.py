"""The paper's optimisation details (section 3.2 and the JumpReLU paper's appendix I), for any training loop.

A loop that follows them looks like this, for an SAE with ``W_dec [d_sae, d_in]`` of unit rows::

    rms = StreamingRMS()                        # a pass over some batches: rms.update(x); then x / rms.scale
    optimizer = adam(sae.parameters(), recipe)
    schedule = lr_schedule(optimizer, recipe, total_steps)
    with decoder_on_sphere(optimizer, lambda: sae.W_dec):
        ...                                     # loss.backward(); optimizer.step(); schedule.step()
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError, unknown_name

PENALTIES = ("linear", "quadratic")
KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("lr_warm_up_steps", "batch_size", "l0_warm_up_steps"), (int,)),
    **dict.fromkeys(("betas", "matryoshka"), (tuple,)),
    "l0_penalty": (str,),
}
"""The types of values that are not any number."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run; the defaults are Gemma Scope's. See :data:`PAPER`, :func:`fast` and
    :data:`GEMMA_SCOPE_2`.

    The defaults down to ``bandwidth`` are from the Gemma Scope paper (sections 3.1 and 3.2) or, where it refers to it,
    the JumpReLU paper (appendix I). The options from ``l0_penalty`` to ``matryoshka`` are Gemma Scope 2's (its report,
    section 3); the description of each states what the report does not print. The last two are for short runs.

    Attributes:
        lr: learning rate after the warm-up.
        lr_start: the warm-up is a half cosine from ``lr_start * lr`` to ``lr``.
        lr_warm_up_steps: length of the warm-up of the learning rate.
        lr_decay: the share of the run, at its end, over which the learning rate falls linearly to 0. The paper has no
            decay.
        betas, eps: parameters of Adam. The paper's first beta is 0, no momentum. With and without momentum a latent
            does not move in a step whose batch does not reach its threshold's kernel.
        batch_size: number of activations per step.
        l0_coefficient: lambda, the sparsity coefficient.
        l0_warm_up_steps: lambda rises linearly from 0 over these steps.
        init_threshold: theta of every latent at the start, for activations with ``E ||x||^2 = 1``.
        bandwidth: epsilon of the rectangle kernel, in the same units.
        l0_penalty: ``"linear"``, ``lambda ||f||_0``, is the paper's; ``"quadratic"`` is ``lambda (2 / L0*) (||f||_0 -
            L0*)^2`` around a target. It is computed for each activation and averaged, as the target-L0 loss in the
            JumpReLU paper's appendix F; the reports do not say how.
        frequency_coefficient: coefficient of the penalty on latents that fire often, ``coefficient * sum_i max(0, p_i -
            limit)``, where ``p_i`` is the share of the batch on which latent i is active, with the same
            straight-through estimator and the same warm-up as lambda. Such a penalty is reported; its form and size are
            our choice.
        frequency_limit: the share above which latents are penalised; 0.1 is reported.
        matryoshka: shares of the latents, empty for none. For each share, the first latents up to it must reconstruct
            the target by themselves; the error is the mean over these prefixes and the whole. Such prefixes are
            reported, but not their sizes. The mean (not the sum) is our choice, so that lambda keeps its meaning.
        ste_to_input: the factor, at the start of the run, with which the straight-through estimator passes a gradient
            to the pre-activations too, and so to the encoder. It is 0 in the paper; SAELens's ``jumprelu_ste_to_input``
            is 1.
        ste_to_input_fade: the share of the run, from its start, over which this factor falls linearly to 0; 0 keeps it.

    Raises:
        GemmaScopeError: a value is out of range.
    """

    lr: float = 7e-5
    lr_start: float = 0.1
    lr_warm_up_steps: int = 1_000
    lr_decay: float = 0.0
    betas: tuple[float, float] = (0.0, 0.999)
    eps: float = 1e-8
    batch_size: int = 4_096
    l0_coefficient: float = 6e-4
    l0_warm_up_steps: int = 10_000
    init_threshold: float = 1e-3
    bandwidth: float = 1e-3
    l0_penalty: Literal["linear", "quadratic"] = "linear"
    frequency_coefficient: float = 0.0
    frequency_limit: float = 0.1
    matryoshka: tuple[float, ...] = ()
    ste_to_input: float = 0.0
    ste_to_input_fade: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "batch_size", "init_threshold", "bandwidth", "frequency_limit"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise GemmaScopeError(f"{name} must be greater than 0, not {getattr(self, name)!r}.")
        free = ("lr_start", "lr_warm_up_steps", "l0_coefficient", "l0_warm_up_steps", "frequency_coefficient")
        for name in (*free, "ste_to_input"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise GemmaScopeError(f"{name} must be 0 or greater, not {getattr(self, name)!r}.")
        for name in ("lr_decay", "ste_to_input_fade"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise GemmaScopeError(f"{name} is a share of the run, 0 to 1, not {getattr(self, name)!r}.")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise GemmaScopeError(f"betas must be two numbers from 0 to below 1, not {self.betas!r}.")
        if self.l0_penalty not in PENALTIES:
            raise unknown_name("l0_penalty", self.l0_penalty, PENALTIES)
        ends = (0.0, *self.matryoshka, 1.0)
        if not all(a < b for a, b in itertools.pairwise(ends)):
            raise GemmaScopeError(f"matryoshka must be rising shares between 0 and 1, not {self.matryoshka!r}.")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Make a recipe from plain data, such as ``dataclasses.asdict`` returns; missing values are the paper's.

        Raises:
            UnknownNameError: a key is not the name of a field.
            GemmaScopeError: a value is invalid.
        """
        names = [field.name for field in fields(cls)]
        for key in data:
            if key not in names:
                raise unknown_name("recipe value", key, names)
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        for key, value in values.items():
            expected = KINDS.get(key, (int, float))
            if not isinstance(value, expected) or isinstance(value, bool):
                raise GemmaScopeError(f"recipe.{key} cannot be {value!r}.")
        return cls(**values)

    def prefixes_of(self, d_sae: int) -> tuple[int, ...]:
        """The number of latents of each Matryoshka prefix; the last prefix has all latents.

        Raises:
            GemmaScopeError: two prefixes have the same size.

        >>> Recipe(matryoshka=(0.125, 0.5)).prefixes_of(64)
        (8, 32, 64)
        """
        sizes = (*(round(share * d_sae) for share in self.matryoshka), d_sae)
        if not all(a < b for a, b in itertools.pairwise((0, *sizes))):
            raise GemmaScopeError(
                f"Matryoshka shares {self.matryoshka} of {d_sae} latents give prefixes of {sizes} latents, which must "
                "be 1 or more and different from each other."
            )
        return sizes

    def lr_at(self, step: int, total_steps: int | None = None) -> float:
        """The learning rate of step ``step`` (from 0): cosine warm-up, constant, and the decay if there is one.

        ``lr(t) = lr (s + (1 - s) (1 - cos(pi t / T)) / 2)`` for ``t < T``, with ``s = lr_start``.

        >>> [round(PAPER.lr_at(t), 8) for t in (0, 500, 1000, 10**6)]
        [7e-06, 3.85e-05, 7e-05, 7e-05]
        """
        rate = self.lr
        if step < self.lr_warm_up_steps:
            rise = 0.5 * (1.0 - math.cos(math.pi * step / self.lr_warm_up_steps))
            rate *= self.lr_start + (1.0 - self.lr_start) * rise
        if self.lr_decay > 0.0:
            if total_steps is None:
                raise GemmaScopeError("This recipe decays the learning rate: give total_steps.")
            left = (total_steps - step) / max(1.0, self.lr_decay * total_steps)
            rate *= min(1.0, max(0.0, left))
        return rate

    def l0_coefficient_at(self, step: int) -> float:
        """Lambda of step ``step`` (from 0).

        >>> [PAPER.l0_coefficient_at(t) for t in (0, 5_000, 10_000, 20_000)]
        [0.0, 0.0003, 0.0006, 0.0006]
        """
        return self.l0_coefficient * self.warm_up_at(step)

    def warm_up_at(self, step: int) -> float:
        """The factor of the penalties at step ``step`` (from 0), which rises linearly from 0 to 1.

        >>> [PAPER.warm_up_at(t) for t in (0, 2_500, 10_000, 20_000)]
        [0.0, 0.25, 1.0, 1.0]
        """
        return 1.0 if step >= self.l0_warm_up_steps else step / self.l0_warm_up_steps

    def ste_to_input_at(self, step: int, total_steps: int | None = None) -> float:
        """The factor of the estimator's gradient to the pre-activations at step ``step`` (from 0).

        >>> one = Recipe(ste_to_input=1.0, ste_to_input_fade=0.5)
        >>> [one.ste_to_input_at(t, 100) for t in (0, 25, 50, 99)]
        [1.0, 0.5, 0.0, 0.0]
        """
        if not (self.ste_to_input and self.ste_to_input_fade):
            return self.ste_to_input
        if total_steps is None:
            raise GemmaScopeError("This recipe fades the estimator's gradient to the input: give total_steps.")
        return self.ste_to_input * max(0.0, 1.0 - step / (self.ste_to_input_fade * total_steps))

    def rescaled(self, factor: float) -> Recipe:
        """The recipe for activations whose projections on a unit direction are ``factor`` times as large.

        Pre-activations, biases and entries of the weights are larger by this factor, so the threshold and the bandwidth
        with which they are compared, and the learning rate, are multiplied by it.
        """
        names = ("lr", "init_threshold", "bandwidth")
        return replace(self, **{name: getattr(self, name) * factor for name in names})

    def sae_settings(self) -> dict[str, Any]:
        """Keyword arguments of :class:`~gemma_scope_tl.interop.training_sae.GemmaScopeTrainingSAEConfig`.

        Raises:
            GemmaScopeError: the recipe has penalties that the SAELens training class does not have.
        """
        if self.l0_penalty != "linear" or self.frequency_coefficient or self.matryoshka:
            raise GemmaScopeError("SAELens's runners train with the linear L0 penalty only: use a PlaceTrainer.")
        names = ("l0_coefficient", "l0_warm_up_steps", "init_threshold", "bandwidth")
        return {name: value for name, value in asdict(self).items() if name in names}

    def runner_settings(self, context_size: int, shuffle_tokens: int = 1_000_000) -> dict[str, Any]:
        """Keyword arguments of a SAELens runner's configuration, single or multi.

        Args:
            context_size: number of tokens in a sequence.
            shuffle_tokens: size of the shuffle buffer (about 1e6 in the paper). SAELens holds ``n_batches_in_buffer *
                context_size`` activations, although its log says otherwise, and ``n_batches_in_buffer`` is set
                accordingly.
        """
        return {
            "lr": self.lr,
            "adam_beta1": self.betas[0],
            "adam_beta2": self.betas[1],
            "train_batch_size_tokens": self.batch_size,
            "context_size": context_size,
            "n_batches_in_buffer": math.ceil(max(shuffle_tokens, self.batch_size) / context_size),
            "exclude_special_tokens": True,
        }


PAPER = Recipe()
"""The values of the paper, for runs of a million steps and more."""

FAST = Recipe(
    lr=6e-3,
    lr_warm_up_steps=100,
    lr_decay=0.5,
    betas=(0.0, 0.95),
    batch_size=2_048,
    l0_coefficient=2e-3,
    l0_warm_up_steps=200,
    init_threshold=0.06,
    bandwidth=0.1,
)
"""The values for runs of a few thousand steps on small models. The differences from the paper, and their reasons:

- Adam moves log theta by at most about the learning rate in a step. The distance from 0.001 to 0.05, the final
  threshold of small SAEs, is ln(50) = 3.9, which takes 56,000 steps at 7e-5. The learning rate is therefore higher, and
  thresholds start near their final value.
- The bandwidth is larger: with fewer activations, each must contribute to more of the kernel density estimate. It is
  about two thresholds, so that nearly all of the kernel lies on positive pre-activations.
- Lambda is larger: with fewer latents and a lower L0, each active latent explains more of the error.
- The warm-ups of learning rate and lambda are shorter, because the run is, and the batch is half as large.
- The learning rate falls linearly to 0 over the last half, since without a decay the higher rate leaves noise.
- The second moment averages about 20 steps instead of 1,000: the large gradients of the first steps would slow down a
  run that is not much longer than 1,000 steps.

Loss, the absence of momentum, Adam's epsilon, unit decoder rows, projection and initialisation are the paper's.
Learning rate, threshold and bandwidth are for :data:`FAST_WIDTH` dimensions; :func:`fast` rescales them for others.
"""

FAST_WIDTH = 128
"""The width of the activations for which the values of :data:`FAST` were found."""


def fast(d_in: int) -> Recipe:
    """Rescale :data:`FAST` for another width by :meth:`Recipe.rescaled`.

    The projection of an activation of length 1 on a unit direction is about ``1 / sqrt(d_in)``.

    >>> round(fast(512).init_threshold, 3), fast(FAST_WIDTH) == FAST
    (0.03, True)
    """
    return FAST.rescaled(math.sqrt(FAST_WIDTH / d_in))


GEMMA_SCOPE_2 = Recipe(l0_penalty="quadratic", l0_warm_up_steps=50_000, frequency_coefficient=1e-2)
"""Gemma Scope 2's changes to the paper's recipe, as far as they are reported.

Reported: the quadratic penalty around a target L0, a penalty on latents that fire on more than 10 % of tokens through
the same straight-through estimator, a warm-up of 50,000 steps, Matryoshka prefixes; bandwidth, rate, Adam, batch and
initialisation as before. Our choices: lambda stays 6e-4 (an L0 a quarter above L0* then has the price that 6e-4 gives
in the linear penalty), the form and size of the frequency penalty (about sixteen times that price for each firing), and
no prefixes unless ``matryoshka`` names them.
"""


def adam(params: Iterable[Tensor], recipe: Recipe, *, fused: bool | None = None) -> torch.optim.Adam:
    """Adam with the recipe's learning rate, betas and epsilon, without weight decay."""
    return torch.optim.Adam(params, lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)


def lr_schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, total_steps: int | None = None, *, steps_done: int = 0
) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler of the learning rate :meth:`Recipe.lr_at`; ``steps_done`` continues a run."""
    for group in optimizer.param_groups:
        group["initial_lr"] = recipe.lr
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: recipe.lr_at(step, total_steps) / recipe.lr, last_epoch=steps_done - 1
    )


def project_out_rows(grad: Tensor, rows: Tensor) -> Tensor:
    """The part of a gradient that is orthogonal to each row: ``g - (g.d / d.d) d``.

    Args:
        grad, rows: ``[d_sae, d_in]``.

    >>> project_out_rows(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]])).tolist()
    [[3.0, 0.0]]
    """
    return project_out_rows_(grad.clone(), rows)


def project_out_rows_(grad: Tensor, rows: Tensor) -> Tensor:
    """:func:`project_out_rows` in place."""
    along = torch.linalg.vecdot(grad, rows) / torch.linalg.vecdot(rows, rows).clamp_min(1e-30)
    return grad.addcmul_(rows, along.unsqueeze(-1), value=-1.0)


def unit_rows_(rows: Tensor) -> Tensor:
    """Scale each row of ``[d_sae, d_in]`` to length 1, in place."""
    return rows.div_(torch.linalg.vecdot(rows, rows).sqrt_().clamp_min(1e-30).unsqueeze(-1))


@contextmanager
def decoder_on_sphere(
    optimizer: torch.optim.Optimizer, decoder: Callable[[], Tensor], *, grad_scale: float = 1.0
) -> Generator[None, None, None]:
    """Within the context, every ``optimizer.step()`` keeps the decoder's rows at unit length (paper, section 3.2).

    Before the update, gradients are divided by ``grad_scale``, and the component of the decoder's gradient along each
    row is removed. After the update, rows are scaled to length 1. Both are hooks of the optimizer, which are removed at
    the end of the context.

    Args:
        decoder: returns ``W_dec [d_sae, d_in]``; called at every step.
        grad_scale: the factor by which the gradients of the loss were multiplied; a power of two is exact.
    """

    @torch.no_grad()
    def before(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if grad_scale != 1.0:
            for grad in (p.grad for group in opt.param_groups for p in group["params"]):
                if grad is not None:
                    grad.div_(grad_scale)
        rows = decoder()
        if rows.grad is not None:
            project_out_rows_(rows.grad, rows)

    @torch.no_grad()
    def after(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        unit_rows_(decoder())

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class StreamingRMS:
    """``C = sqrt(E ||x||^2)``, the scalar by which a site's activations are divided, from a stream of batches.

    Only two numbers are kept. The scale is neither a mean of norms nor one per token, and activations are not centred
    (section 3.1).

    >>> rms = StreamingRMS()
    >>> rms.update(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> round(rms.scale, 4)
    3.5355
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def update(self, activations: Tensor) -> None:
        """Add a batch ``[..., d_in]`` of any dtype; the sum is kept in float64."""
        rows = activations.detach().reshape(-1, activations.shape[-1])
        norms = rows.to(torch.promote_types(rows.dtype, torch.float32)).square().sum(-1)
        self.total += norms.double().sum().item()
        self.count += rows.shape[0]

    @property
    def scale(self) -> float:
        """The scale ``C``.

        Raises:
            GemmaScopeError: there were no activations, or they are all zero or not all finite.
        """
        if not (self.count and 0.0 < self.total < float("inf")):
            raise GemmaScopeError(f"{self.count} activations with a sum of squares of {self.total} give no scale.")
        return math.sqrt(self.total / self.count)
