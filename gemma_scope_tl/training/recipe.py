"""Recipes: the hyper-parameters of a training run, and the presets ``paper``, ``fast`` and ``gemma_scope_2``."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from numbers import Integral, Real
from statistics import NormalDist
from typing import Any, Literal, cast

from gemma_scope_tl.errors import GemmaScopeError, unknown_name

PENALTIES = ("linear", "quadratic")
STARTS = ("zero", "mean")
WHOLE = ("lr_warm_up_steps", "batch_size", "l0_warm_up_steps")
LISTS = ("betas", "matryoshka")
WORDS = ("l0_penalty", "b_dec_start")
"""The values that are whole numbers, several numbers, and words; all others are numbers."""


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of one training run; the defaults are Gemma Scope's. See :data:`PAPER`, :func:`fast` and
    :data:`GEMMA_SCOPE_2`.

    The defaults down to ``bandwidth`` are from the Gemma Scope paper (sections 3.1 and 3.2) or, where it refers to it,
    the JumpReLU paper (appendix I). The options from ``l0_penalty`` to ``matryoshka`` are Gemma Scope 2's (its report,
    section 3); the description of each states what the report does not print. Those after it are for short runs.

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
        init_encoder_scale: the factor with which the initial ``W_enc``, in the paper ``W_dec^T``, is multiplied.
        ste_to_input: the factor, at the start of the run, with which the straight-through estimator passes a gradient
            to the pre-activations too, and so to the encoder. It is 0 in the paper; SAELens's ``jumprelu_ste_to_input``
            is 1.
        ste_to_input_fade: the share of the run, from its start, over which this factor falls linearly to 0; 0 keeps it.
        b_dec_start: ``"zero"``, the paper's, or ``"mean"``: ``b_dec`` starts at the mean of the first batch's targets.
            Projections on the mean otherwise decide at first which latents are active.

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
    init_encoder_scale: float = 1.0
    ste_to_input: float = 0.0
    ste_to_input_fade: float = 0.0
    b_dec_start: Literal["zero", "mean"] = "zero"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not _has_type(name, value):
                raise GemmaScopeError(f"recipe.{name} cannot be {value!r}.")
        for name in ("lr", "eps", "batch_size", "init_threshold", "bandwidth", "frequency_limit", "init_encoder_scale"):
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
        for name, known in (("l0_penalty", PENALTIES), ("b_dec_start", STARTS)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
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
        return self.ste_to_input * max(0.0, 1.0 - step / max(1, round(self.ste_to_input_fade * total_steps)))

    def rescaled(self, factor: float) -> Recipe:
        """The recipe for activations whose projections on a unit direction are ``factor`` times as large.

        Pre-activations, biases and entries of the weights are larger by this factor, so the threshold and the bandwidth
        with which they are compared, and the learning rate, are multiplied by it.
        """
        names = ("lr", "init_threshold", "bandwidth")
        return replace(self, **{name: getattr(self, name) * factor for name in names})

    def sae_settings(self, total_steps: int | None = None) -> dict[str, Any]:
        """Keyword arguments of :class:`~gemma_scope_tl.interop.training_sae.GemmaScopeTrainingSAEConfig`.

        SAELens's runners use PyTorch's Adam. With momentum it goes on moving latents that a batch does not reach,
        unlike this package's trainers.

        Args:
            total_steps: length of the run, for recipes that fade ``ste_to_input``.

        Raises:
            GemmaScopeError: the recipe has penalties that the SAELens training class does not have, or ``total_steps``
                is missing.
        """
        if self.l0_penalty != "linear" or self.frequency_coefficient or self.matryoshka:
            raise GemmaScopeError("SAELens's runners train with the linear L0 penalty only: use a PlaceTrainer.")
        names = ("l0_coefficient", "l0_warm_up_steps", "init_threshold", "bandwidth", "init_encoder_scale")
        names += ("ste_to_input", "b_dec_start")
        found = {name: value for name, value in asdict(self).items() if name in names}
        if self.ste_to_input and self.ste_to_input_fade:
            if total_steps is None:
                raise GemmaScopeError("This recipe fades the estimator's gradient to the input: give total_steps.")
            found["ste_to_input_steps"] = max(1, round(self.ste_to_input_fade * total_steps))
        return found

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


def _has_type(name: str, value: object) -> bool:
    if name in WORDS:
        return isinstance(value, str)
    if name in LISTS:
        return isinstance(value, (tuple, list)) and all(_is_number(item) for item in cast("Sequence[object]", value))
    return _is_number(value, Integral if name in WHOLE else Real)


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


PAPER = Recipe()
"""The values of the paper, for runs of a million steps and more."""

FAST_WIDTH = 128
"""The width of the activations for which the values of :func:`fast` were found."""


def fast(d_in: int, *, d_sae: int = 1_024, target_l0: float = 16.0, steps: int = 2_000) -> Recipe:
    """The preset for runs of a few hundred to a few thousand steps on small models.

    Loss, initialisation, unit decoder rows, projection and Adam's epsilon are the paper's. What differs, and why:

    - **Rates.** In a step Adam moves a coordinate, or log theta, by about the learning rate. The run is a thousandth of
      the paper's, so the rate is higher, with momentum, and falls to 0 over the last half. It falls with the square
      root of the length of the run, and, as entries of unit vectors do, with that of the width. The second moment
      averages about 20 steps: the large gradients of the first steps would slow down a short run.
    - **The first reconstruction is of the right size.** ``b_dec`` starts at the mean, and about three quarters of
      ``E ||x||^2 = 1`` are left around it. Projections on random directions have a standard deviation of ``sqrt(0.75 /
      d_in)``; with the normal quantile of ``1 - n / d_sae`` as threshold, n latents are active, twice the target. Their
      sum is too long, since active directions are similar to the activation and so to each other: with ``s`` the sum of
      the squared projections, by about ``1 + 1.5 s`` (three quarters and 1.5 are measured). Encoder and thresholds
      start divided by this. Otherwise the first steps push nearly all latents below their thresholds, many for ever.
    - **Thresholds** therefore start near their final value. From 0.001, the paper's start, log theta could not reach it
      in time.
    - **The bandwidth** is 2.5 thresholds at the start: each of the few activations of a batch contributes to more of
      the kernel density estimate. The kernel then reaches below 0.
    - **Lambda** starts at ``2e-3 (16 / L0)^1.4``, near its value at the end, so that L0 reaches its target from above
      and not from below. It rises over the first quarter.
    - **The estimator passes a gradient to the input**, so that latents below their thresholds learn to become active:
      fewer are dead at the end.

    Args:
        d_in: width of the activations.
        d_sae: number of latents.
        target_l0: the wanted L0.
        steps: length of the run.

    >>> sparse, dense = fast(128, target_l0=8), fast(128, target_l0=32)
    >>> sparse.init_threshold > dense.init_threshold, sparse.l0_coefficient > dense.l0_coefficient
    (True, True)

    Raises:
        GemmaScopeError: a number is out of range.
    """
    if min(d_in, d_sae, steps) < 1:
        raise GemmaScopeError(f"d_in, d_sae and steps must be 1 or more, not {d_in}, {d_sae} and {steps}.")
    share = _share(target_l0, d_sae)
    normal = NormalDist()
    quantile = normal.inv_cdf(1.0 - share)
    spread = math.sqrt(0.75 / d_in)
    square = spread**2 * (1.0 + quantile * normal.pdf(quantile) / share)  # the mean above the threshold
    scale = 1.0 / (1.0 + 1.5 * share * d_sae * square)
    threshold = scale * quantile * spread
    return Recipe(
        lr=2e-2 * math.sqrt(FAST_WIDTH / d_in) * min(1.0, math.sqrt(400 / steps)),
        lr_warm_up_steps=round(0.1 * steps),
        lr_decay=0.5,
        betas=(0.9, 0.95),
        batch_size=2_048,
        l0_coefficient=2e-3 * (16.0 / target_l0) ** 1.4,
        l0_warm_up_steps=round(0.25 * steps),
        init_threshold=threshold,
        bandwidth=2.5 * threshold,
        init_encoder_scale=scale,
        ste_to_input=1.0,
        b_dec_start="mean",
    )


def _share(target_l0: float, d_sae: int) -> float:
    """The share of the latents that are active at the start of :func:`fast`."""
    share = min(0.3, 2.0 * target_l0 / d_sae)
    if not (target_l0 > 0.0 and 1.0 - share < 1.0):  # the quantile would be infinite
        raise GemmaScopeError(f"The preset fast knows no start for an L0 of {target_l0:g} among {d_sae} latents.")
    return share


FAST = fast(FAST_WIDTH)
""":func:`fast` for activations of 128 dimensions, 1,024 latents, an L0 of 16 and 2,000 steps."""

GEMMA_SCOPE_2 = Recipe(l0_penalty="quadratic", l0_warm_up_steps=50_000, frequency_coefficient=1e-2)
"""Gemma Scope 2's changes to the paper's recipe, as far as they are reported.

Reported: the quadratic penalty around a target L0, a penalty on latents that fire on more than 10 % of tokens through
the same straight-through estimator, a warm-up of 50,000 steps, Matryoshka prefixes; bandwidth, rate, Adam, batch and
initialisation as before. Our choices: lambda stays 6e-4 (an L0 a quarter above L0* then has the price that 6e-4 gives
in the linear penalty), the form and size of the frequency penalty (about sixteen times that price for each firing), and
no prefixes unless ``matryoshka`` names them.
"""


_MOVED = (
    "adam",
    "lr_schedule",
    "project_out_rows",
    "project_out_rows_",
    "unit_rows_",
    "decoder_on_sphere",
    "StreamingRMS",
)


def __getattr__(name: str) -> Any:
    """The tools of a training loop, which were in this module in the previous release."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    message = f"gemma_scope_tl.training.recipe.{name} is now gemma_scope_tl.training.loop.{name}."
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return getattr(import_module("gemma_scope_tl.training.loop"), name)
