# pyright: basic
"""SAELens's training runners with the paper's recipe.

SAELens builds its trainers itself. These runners change them between building and fitting, in a method that both
SAELens runners let subclasses override:

=========================== =========================================================================================
recipe                      how
=========================== =========================================================================================
``E ||x||^2 = 1``           the trainer's activation scaler is set to 1/RMS, streamed: two numbers a hook, no batches
cosine warm-up              the trainer's learning rate scheduler is replaced
Adam's betas and epsilon    set in the optimizer
unit decoder rows           hooks of the optimizer, before and after its step
no gradient clipping        SAELens clips to norm 1. Gradients leave the SAE times 2^-20 and the optimizer hook divides
                            it out: below a norm of 2^20 no step is clipped, and losses are logged as they are
interruption                SIGINT and SIGTERM write a full checkpoint (SAELens's single runner writes none)
seed                        ``cfg.seed`` seeds torch's global generator, which SAELens uses for weights and shuffling
=========================== =========================================================================================

Limits of this approach:

- A resumed run continues with the same weights, optimizer, schedules, scale and position in the data set, but with an
  empty shuffle buffer and a new generator, so it is not the uninterrupted run to the bit.
- Activations that measured the scale are not trained on. SAEs that share a hook share its scale.
- SAELens trains an SAE on one tensor, so there are no transcoders.
- Checkpoints hold weights in training units, with the scale beside them.
- The saved configuration says ``lr_scheduler_name="constant"`` without a warm-up; the schedule is the recipe's.
"""

from __future__ import annotations

import signal
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training._interruption import InterruptedException, interrupt_callback
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch.optim.lr_scheduler import SequentialLR

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAE
from gemma_scope_tl.training.loop import StreamingRMS, decoder_on_sphere, lr_schedule
from gemma_scope_tl.training.recipe import PAPER, Recipe

NO_CLIP = 2.0**-20
"""Factor of the gradients, so that clipping to norm 1 would need a norm of a million. A power of two is exact."""


@contextmanager
def recipe_applied(
    trainer: SAETrainer[Any, Any], recipe: Recipe, scale: float | None = None
) -> Generator[None, None, None]:
    """Within the context, a SAELens trainer of a :class:`GemmaScopeTrainingSAE` follows the recipe.

    Args:
        trainer: a new trainer, or one with the state of a checkpoint.
        recipe: see :mod:`gemma_scope_tl.training.recipe`.
        scale: ``C = sqrt(E ||x||^2)`` of the raw activations; None if the trainer already has a scale.

    Raises:
        GemmaScopeError: the SAE has another class.
    """
    sae = _checked_class(trainer.sae)
    if scale is not None:
        trainer.activation_scaler.scaling_factor = 1.0 / scale
    for group in trainer.optimizer.param_groups:
        group.update(lr=recipe.lr, betas=recipe.betas, eps=recipe.eps)
    schedule = lr_schedule(
        trainer.optimizer, recipe, trainer.cfg.total_training_steps, steps_done=trainer.n_training_steps
    )
    # A resumed run loads the saved state into SAELens's own scheduler first, which is a sequence of one.
    trainer.lr_scheduler = SequentialLR(trainer.optimizer, [schedule], milestones=[])
    sae.grad_scale = NO_CLIP
    try:
        with decoder_on_sphere(trainer.optimizer, lambda: sae.W_dec, grad_scale=NO_CLIP):
            yield
    finally:
        sae.grad_scale = 1.0


SAE_SETTINGS = ("bandwidth", "l0_warm_up_steps", "ste_to_input", "b_dec_start")
"""Settings of an SAE that must be the recipe's; lambda and the initial threshold may differ between SAEs."""


def check_settings(cfg: Any, recipe: Recipe, saes: Mapping[str, TrainingSAE[Any]]) -> None:
    """Compare a runner's configuration with the recipe.

    Raises:
        GemmaScopeError: settings differ, all of which the message names, or an SAE has another class.
    """
    settings = recipe.runner_settings(cfg.context_size)
    wanted = {name: settings[name] for name in ("lr", "adam_beta1", "adam_beta2", "train_batch_size_tokens")}
    # The recipe's schedule replaces SAELens's, and the paper trains in float32 throughout.
    wanted |= {"lr_scheduler_name": "constant", "lr_warm_up_steps": 0, "lr_decay_steps": 0, "autocast": False}
    wrong = [f"{n}={getattr(cfg, n)!r} (recipe: {value!r})" for n, value in wanted.items() if getattr(cfg, n) != value]
    for name, sae in saes.items():
        _checked_class(sae)
        for key in SAE_SETTINGS:
            given, value = getattr(sae.cfg, key, None), getattr(recipe, key)
            if given != value:
                wrong.append(f"{name + '.' if name else ''}{key}={given!r} (recipe: {value!r})")
    if wrong:
        raise GemmaScopeError(
            f"The configuration contradicts the recipe: {'; '.join(wrong)}. "
            "Build it with **recipe.runner_settings(context_size) and **recipe.sae_settings(), or change the recipe."
        )


class GemmaScopeTrainingRunner(LanguageModelSAETrainingRunner):
    """``LanguageModelSAETrainingRunner`` with the recipe, for one SAE at one hook. The module lists the changes."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], *, recipe: Recipe = PAPER, **overrides: Any) -> None:
        """
        Args:
            cfg: built with ``**recipe.runner_settings(context_size)`` and an SAE configuration built with
                ``**recipe.sae_settings()``.
            recipe: the hyper-parameters.
            overrides: ``override_dataset``, ``override_model`` and ``override_sae``, as in SAELens.
        """
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, **overrides)
        self.recipe = recipe
        check_settings(cfg, recipe, {"": self.sae})

    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        """Apply the recipe to the trainer that SAELens has built, then fit it."""
        scale = None
        if trainer.activation_scaler.scaling_factor is None:
            rms = StreamingRMS()
            for _ in range(self.cfg.n_batches_for_norm_estimate):
                rms.update(next(trainer.data_provider))
            scale = rms.scale
        with recipe_applied(trainer, self.recipe, scale):
            return _fit(trainer, self.cfg.checkpoint_path)


class GemmaScopeMultiTrainingRunner(MultiSAETrainingRunner):
    """``MultiSAETrainingRunner`` with the recipe, for many SAEs at any sites from one forward pass."""

    def __init__(self, cfg: MultiSAETrainingRunnerConfig, *, recipe: Recipe = PAPER, **overrides: Any) -> None:
        """
        Args:
            cfg: built as for the single runner; every SAE must have a ``GemmaScopeTrainingSAEConfig``.
            recipe: the hyper-parameters, except lambda and the initial threshold, which each SAE's configuration sets.
            overrides: ``override_dataset``, ``override_model`` and ``override_saes``, as in SAELens.
        """
        torch.manual_seed(cfg.seed)
        super().__init__(cfg, **overrides)
        self.recipe = recipe
        check_settings(cfg, recipe, self.saes)

    def _run_with_interruption_handling(self, trainer: MultiSAETrainer) -> dict[str, TrainingSAE[Any]]:
        """Apply the recipe to the trainers that SAELens has built, then fit them."""
        scales = self._scales(trainer)
        with ExitStack() as stack:
            for name, one in trainer.trainers.items():
                stack.enter_context(recipe_applied(one, self.recipe, scales.get(trainer.hook_names[name])))
            return _fit(trainer, self.cfg.checkpoint_path)

    def _scales(self, trainer: MultiSAETrainer) -> dict[str, float]:
        """Measure ``C`` of every hook whose trainers have no scale yet, on the same batches."""
        hooks = {
            trainer.hook_names[name]: StreamingRMS()
            for name, one in trainer.trainers.items()
            if one.activation_scaler.scaling_factor is None
        }
        if hooks:
            for _ in range(self.cfg.n_batches_for_norm_estimate):
                batch = next(trainer.data_provider)
                for hook, rms in hooks.items():
                    rms.update(batch[hook])
        return {hook: rms.scale for hook, rms in hooks.items()}


def _checked_class(sae: Any) -> GemmaScopeTrainingSAE:
    if not isinstance(sae, GemmaScopeTrainingSAE):
        raise GemmaScopeError(
            f"The recipe trains GemmaScopeTrainingSAE, not {type(sae).__name__}: "
            "use GemmaScopeTrainingSAEConfig, or SAELens's own runner."
        )
    return sae


def _fit(trainer: Any, checkpoint_path: str | None) -> Any:
    """Fit a trainer. On SIGINT or SIGTERM, write all that a resumed run needs before raising the exception again."""
    try:
        signal.signal(signal.SIGINT, interrupt_callback)
        signal.signal(signal.SIGTERM, interrupt_callback)
        return trainer.fit()
    except (KeyboardInterrupt, InterruptedException):
        if checkpoint_path is not None:
            trainer.save_checkpoint(checkpoint_name=str(trainer.n_training_samples))
            logger.warning("Interrupted; saved %s", Path(checkpoint_path) / str(trainer.n_training_samples))
        raise
