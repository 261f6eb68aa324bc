"""Rollouts: prompts, and the answers that a tuned model samples at temperature 1 (sections 4.5 and C.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from rich.progress import track

from gemma_scope_tl.counts import checked_count, checked_real
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.text.tokenizing import chat_wrapping, text_ids, turn_end_id, without_bos

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


@dataclass(frozen=True)
class Rollouts:
    """Prompts of one length and their answers.

    Attributes:
        tokens: token ids ``[rows, pos]``, with padding after the end of an answer.
        prompt: length of the prompts, including BOS and the tokens around a turn.
    """

    tokens: Int[torch.Tensor, "rows pos"]
    prompt: int

    @property
    def edges(self) -> dict[str, tuple[int, int]]:
        """Start and end (exclusive) of each part."""
        return {"prompt": (0, self.prompt), "rollout": (self.prompt, self.tokens.shape[1])}

    def by_part(self, binned: pd.DataFrame) -> pd.DataFrame:
        """The table of ``binned_by_position`` with a column ``part`` in place of the edges of bins."""
        starts = {start: part for part, (start, _) in self.edges.items()}
        table = binned.drop(columns=["start", "stop"])
        table.insert(0, "part", [starts[start] for start in binned["start"]])
        return table


@torch.no_grad()
def roll_out(
    model: GemmaModel,
    prompts: Sequence[str] | Int[torch.Tensor, "rows words"],
    prompt_tokens: int = 32,
    new_tokens: int = 128,
    *,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> Rollouts:
    """Sample an answer to each prompt (the paper: 1,024 rollouts of 9B IT at temperature 1).

    A model whose tokenizer has a chat template gets each prompt as a user's turn. All prompts have the same length, so
    that the position separates prompts from answers: longer texts are truncated, and shorter ones left out.

    Args:
        model: a model from ``load_model``.
        prompts: texts, or token ids without BOS and the tokens around a turn.
        prompt_tokens: length in tokens to which each text is truncated.
        new_tokens: maximum length of an answer, which ends with the first EOS or end-of-turn token.
        temperature: temperature of the sampling.
        batch_size: number of prompts in a batch.
        seed: seed of the sampling; the same seed and batch size give the same answers.
        progress: show a progress bar.

    Raises:
        GemmaScopeError: no text is long enough, the model's context is too short, or a number is out of range.
    """
    prompt_tokens = checked_count(prompt_tokens, "prompt_tokens")
    new_tokens, batch_size = checked_count(new_tokens, "new_tokens"), checked_count(batch_size, "batch_size")
    temperature, seed = checked_real(temperature, "temperature", above=0), checked_count(seed, "seed", least=0)
    starts = _framed(model.tokenizer, _cut(model.tokenizer, prompts, prompt_tokens))
    length = starts.shape[1]
    if length + new_tokens > model.cfg.n_ctx:
        raise GemmaScopeError(
            f"Prompts of {length} tokens and {new_tokens} new ones do not fit the model's context, {model.cfg.n_ctx}."
        )
    device = next(model.embedding_module().parameters()).device
    found: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for part in track(starts.split(batch_size), "rollouts", disable=not progress, transient=True):
            settings = {"do_sample": True, "temperature": temperature, "stop_at_eos": False, "return_type": "tokens"}
            found.append(model.generate(part.to(device), max_new_tokens=new_tokens, **settings).cpu())
    return Rollouts(_ended(torch.cat(found), length, model.tokenizer), length)


def _cut(tokenizer: Any, prompts: Any, prompt_tokens: int) -> torch.Tensor:
    if isinstance(prompts, torch.Tensor):
        if prompts.ndim != 2 or not prompts.numel() or prompts.is_floating_point():
            raise GemmaScopeError(f"Prompts must be ids [rows, pos], not {prompts.dtype} {list(prompts.shape)}.")
        return prompts.long()
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [without_bos(tokenizer, row)[:prompt_tokens] for row in text_ids(tokenizer, texts)]
    kept = [row for row in ids if len(row) == prompt_tokens]
    if not kept:
        raise GemmaScopeError(f"None of {len(ids)} prompts has {prompt_tokens} tokens: ask for fewer.")
    return torch.tensor(kept)


def _framed(tokenizer: Any, words: torch.Tensor) -> torch.Tensor:
    """Put BOS before the rows and, if the tokenizer has a chat template, the tokens of a user's turn around them."""
    prefix, suffix = chat_wrapping(tokenizer) if getattr(tokenizer, "chat_template", None) else ([], [])
    before, after = (
        torch.tensor(ids, dtype=torch.int64).expand(len(words), -1)
        for ids in ([tokenizer.bos_token_id, *prefix], suffix)
    )
    return torch.cat([before, words, after], dim=1)


def _ended(tokens: torch.Tensor, prompt: int, tokenizer: Any) -> torch.Tensor:
    """``tokens`` with padding after the end of each answer."""
    ends = [end for end in (tokenizer.eos_token_id, turn_end_id(tokenizer)) if end is not None]
    answer = tokens[:, prompt:]
    stops = torch.isin(answer, torch.tensor(ends))
    over = stops.long().cumsum(1) - stops.long() > 0
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return torch.cat([tokens[:, :prompt], answer.masked_fill(over, pad)], dim=1)
