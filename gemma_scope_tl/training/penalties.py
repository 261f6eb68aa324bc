"""What a step charges for active latents, and the price's derivative for the straight-through estimator.

The step's loss is ``error + penalty``. A penalty depends on thresholds only through the steps ``H(z - theta)``, whose
derivative is estimated (``sae/ste.py``), so all a step needs is the penalty's derivative with respect to each ``H``:
the price of one more active latent.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Prices:
    """The penalties of one SAE at one step.

    With ``L_t`` the number of active latents of activation ``t``, ``p_i`` the share of the batch on which latent ``i``
    is active and ``n`` activations, summed over all processes::

        linear      lambda mean_t L_t                          price of H_ti: lambda / n
        quadratic   lambda (2 / L0*) mean_t (L_t - L0*)^2      price of H_ti: lambda (4 / L0*) (L_t - L0*) / n
        frequency   mu sum_i max(0, p_i - limit)               price of H_ti: mu / n where p_i > limit

    Attributes:
        l0: lambda.
        around: ``L0*`` of the quadratic penalty; None for the linear one.
        frequency: mu.
        limit: the share above which a latent is charged for its frequency.
    """

    l0: float
    around: float | None = None
    frequency: float = 0.0
    limit: float = 1.0

    def of_rows(self, l0: Tensor, n: int) -> Tensor:
        """The L0 penalty's price for each activation, given its L0."""
        if self.around is None:
            return l0.new_full((), self.l0 / n).expand(l0.shape)
        return (l0 - self.around) * (4.0 * self.l0 / (self.around * n))

    def of_latents(self, fired: Tensor, n: int) -> Tensor:
        """The frequency penalty's price for each latent, given on how many of ``n`` activations it was active."""
        return (fired > self.limit * n).to(fired.dtype) * (self.frequency / n)
