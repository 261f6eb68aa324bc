"""Measure the exported model: held-out bits per byte and unselected samples, written to `metrics.json`."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from scripts.bundled.bundles import Bundle
from scripts.bundled.domains import WEIGHTS
from scripts.bundled.evaluate import heldout_metrics, mean_bits_per_byte
from scripts.bundled.files import write_json
from scripts.bundled.tokenizer import texts, token_byte_counts
from scripts.bundled.train_model import TrainConfig, checkpoint_model

PROMPT_TOKENS = 16
NEW_TOKENS = 80
TEMPERATURE = 0.7
TOP_K = 40
SAMPLE_SEED = 0


def load_folder(folder: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """The exported model and tokenizer, as `load_model` loads them: in float32, whatever the dtype of the file."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def sample(model: Any, ids: list[int], generator: torch.Generator) -> list[int]:
    """Continue `ids` by at most `NEW_TOKENS` tokens, sampled at `TEMPERATURE` from the `TOP_K` likeliest."""
    new = list[int]()
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        top = logits.topk(TOP_K)
        pick = torch.multinomial((top.values / TEMPERATURE).softmax(-1), 1, generator=generator)
        token = int(top.indices[pick])
        if token == model.config.eos_token_id:
            break
        new.append(token)
    return new


def draw_samples(model: Any, tokenizer: PreTrainedTokenizerFast, work: Path) -> list[dict[str, str]]:
    """One continuation per domain: the first draw from the start of the first held-out document."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    rows = []
    for domain in WEIGHTS:
        ids = tokenizer(texts(work, domain, "heldout")[0])["input_ids"][: PROMPT_TOKENS + 1]
        new = sample(model, ids, generator)
        prompt = tokenizer.decode(ids, skip_special_tokens=True)
        rows.append({"domain": domain, "prompt": prompt, "continuation": tokenizer.decode(new)})
    return rows


def compressed_bits_per_byte(work: Path, domain: str) -> float:
    """Bits per byte of the held-out text under xz, without training text, for comparison."""
    data = "".join(texts(work, domain, "heldout")).encode()
    return round(8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data), 3)


def seen_line_share(work: Path, domain: str) -> float:
    """Share of held-out bytes in lines that also occur, word for word, in the domain's training text."""
    seen = {line for text in texts(work, domain, "train") for line in text.splitlines()}
    lines = [line for text in texts(work, domain, "heldout") for line in text.splitlines()]
    return round(sum(len(s.encode()) for s in lines if s in seen) / sum(len(s.encode()) for s in lines), 3)


def _domains(model: Any, work: Path, tokenizer: PreTrainedTokenizerFast, limit: int | None) -> dict[str, Any]:
    config = TrainConfig()
    return heldout_metrics(
        lambda tokens: model(input_ids=tokens, use_cache=False).logits,
        work,
        token_byte_counts(tokenizer),
        batch=config.batch,
        context=config.context,
        limit=limit,
    )


def measure(work: Path, bundle: Bundle, step: int, limit: int | None = None) -> dict[str, Any]:
    """Evaluate the exported model on all held-out windows (or `limit` per domain); write `metrics.json` beside it.

    If its weights are rounded, those of the checkpoint are measured as well.
    """
    model, tokenizer = load_folder(bundle.model_folder)
    config = TrainConfig()
    domains = _domains(model, work, tokenizer, limit)
    for domain, row in domains.items():
        row["xz_bits_per_byte"] = compressed_bits_per_byte(work, domain)
        row["seen_line_share"] = seen_line_share(work, domain)
    metrics = {
        "step": step,
        "tokens_seen": step * config.tokens_a_step,
        "parameters": model.num_parameters(),
        "context": config.context,
        "mean_bits_per_byte": mean_bits_per_byte(domains),
        "domains": domains,
        "sampling": {"temperature": TEMPERATURE, "top_k": TOP_K, "seed": SAMPLE_SEED, "new_tokens": NEW_TOKENS},
        "samples": draw_samples(model, tokenizer, work),
    }
    if bundle.dtype != torch.float32:
        unrounded = _domains(checkpoint_model(work, bundle)[0], work, tokenizer, limit)
        metrics["rounding"] = {
            "dtype": str(bundle.dtype).removeprefix("torch."),
            "mean_bits_per_byte_before": mean_bits_per_byte(unrounded),
            "largest_rise": max(
                round(row["bits_per_byte"] - unrounded[domain]["bits_per_byte"], 4) for domain, row in domains.items()
            ),
        }
    write_json(bundle.model_folder / "metrics.json", metrics)
    return metrics
