"""Train a bundled model: Muon for hidden matrices, AdamW for embedding and gains, fp32 on CPU.

The learning rate is a function of tokens seen: linear warm-up, then linear decay to 0 at `total_tokens`.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.bundled.bundles import Bundle
from scripts.bundled.data import load_token_batches
from scripts.bundled.evaluate import heldout_metrics, mean_bits_per_byte
from scripts.bundled.files import write_atomic
from scripts.bundled.muon import Muon
from scripts.bundled.tokenizer import load_tokenizer, token_byte_counts


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; token counts include BOS."""

    total_tokens: int = 20_200_000
    batch: int = 16
    context: int = 256
    warmup_tokens: int = 300_000
    muon_lr: float = 0.02
    adam_lr: float = 4e-3
    momentum: float = 0.95
    seed: int = 0
    compile: bool = True
    log_every: int = 20
    checkpoint_seconds: float = 200.0
    evaluations: int = 10
    eval_windows: int = 48  # per domain, during training

    @property
    def tokens_a_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.context

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.total_tokens // self.tokens_a_step


def new_model(bundle: Bundle, seed: int) -> Any:
    """A freshly initialised fp32 model of Hugging Face."""
    torch.manual_seed(seed)
    return bundle.architecture(bundle.config()).float()


def make_optimizers(model: Any, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for 2-D weights of the layers, AdamW for the tied embedding and the gains."""
    hidden = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(hidden, lr=config.muon_lr, momentum=config.momentum),
        torch.optim.AdamW(rest, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_factor(tokens: int, config: TrainConfig) -> float:
    """Multiplier of the base learning rates after `tokens` tokens."""
    if tokens < config.warmup_tokens:
        return (tokens + config.tokens_a_step) / (config.warmup_tokens + config.tokens_a_step)
    return max(0.0, (config.total_tokens - tokens) / (config.total_tokens - config.warmup_tokens))


class Trainer:
    """One training run in `<work>/<bundle.run>`: `train.jsonl` (log) and `checkpoint.pt`."""

    def __init__(self, work: Path, bundle: Bundle, config: TrainConfig, *, resume: bool = False) -> None:
        self.work, self.config = work, config
        self.folder = work / bundle.run
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = new_model(bundle, config.seed)
        self.optimizers = make_optimizers(self.model, config)
        self.base_lrs = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.step = 0
        if resume:
            self._load()
        else:
            (self.folder / "train.jsonl").unlink(missing_ok=True)
        self.token_bytes = token_byte_counts(load_tokenizer(work))
        self.loss_of = torch.compile(self._loss) if config.compile else self._loss

    def _logits(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits

    def _loss(self, tokens: Tensor) -> Tensor:
        logits = self._logits(tokens)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def train_step(self, tokens: Tensor) -> tuple[float, float]:
        """One optimizer step on [batch, context]; returns loss (nats per token) and the learning-rate factor."""
        factor = lr_factor(self.step * self.config.tokens_a_step, self.config)
        loss = self.loss_of(tokens)
        loss.backward()
        for optimizer, base in zip(self.optimizers, self.base_lrs, strict=True):
            optimizer.param_groups[0]["lr"] = base * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), factor

    def run(self) -> None:
        """Train to the end of the schedule."""
        config = self.config
        batches = load_token_batches(self.work, config.batch, config.context, config.seed, skip=self.step)
        self._log(
            {
                "event": "resume" if self.step else "start",
                "step": self.step,
                "config": asdict(config),
                "threads": torch.get_num_threads(),
            }
        )
        eval_steps = {round(config.steps * i / config.evaluations) for i in range(1, config.evaluations + 1)}
        losses, since, saved = list[float](), time.monotonic(), time.monotonic()
        while self.step < config.steps:
            loss, factor = self.train_step(next(batches))
            losses.append(loss)
            if not np.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {self.step}; the last checkpoint is kept")
            if len(losses) == config.log_every or self.step == config.steps:
                speed = len(losses) * config.tokens_a_step / (time.monotonic() - since)
                self._log_step(float(np.mean(losses)), factor, speed)
                losses, since = [], time.monotonic()
            if self.step in eval_steps:
                self._log_eval()
                since = time.monotonic()
            if time.monotonic() - saved > config.checkpoint_seconds or self.step == config.steps:
                self.save()
                saved = time.monotonic()

    def _log_step(self, loss: float, factor: float, speed: float) -> None:
        self._log(
            {
                "step": self.step,
                "tokens": self.step * self.config.tokens_a_step,
                "loss": round(loss, 4),
                "lr_muon": round(self.base_lrs[0] * factor, 6),
                "lr_adam": round(self.base_lrs[1] * factor, 7),
                "tokens_per_second": round(speed),
            }
        )

    def _log_eval(self) -> None:
        config = self.config
        metrics = heldout_metrics(
            self._logits, self.work, self.token_bytes,
            batch=config.batch, context=config.context, limit=config.eval_windows,
        )  # fmt: skip
        per_domain = {domain: row["bits_per_byte"] for domain, row in metrics.items()}
        mean = mean_bits_per_byte(metrics)
        tokens = self.step * config.tokens_a_step
        self._log({"step": self.step, "tokens": tokens, "mean_bits_per_byte": mean, "bits_per_byte": per_domain})

    def _log(self, row: dict[str, Any]) -> None:
        with (self.folder / "train.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write `checkpoint.pt` atomically."""
        state = {
            "step": self.step,
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        write_atomic(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def _load(self) -> None:
        """Continue from `checkpoint.pt`; log rows of later steps are dropped."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]
        log = self.folder / "train.jsonl"
        rows = [line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= self.step]
        log.write_text("".join(line + "\n" for line in rows), encoding="utf-8")


def train(work: Path, bundle: Bundle, config: TrainConfig, *, resume: bool = False) -> None:
    """Run or continue the training in `work`."""
    Trainer(work, bundle, config, resume=resume).run()


def checkpoint_model(work: Path, bundle: Bundle) -> tuple[Any, int]:
    """The model of the last checkpoint, fp32, and its step."""
    state = torch.load(work / bundle.run / "checkpoint.pt", weights_only=True)
    model = new_model(bundle, seed=0)
    model.load_state_dict(state["model"])
    return model.eval(), int(state["step"])
