"""Activations of the bundled model at every site from one forward pass, and an in-place shuffle buffer over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Gemma2ForCausalLM

from scripts.bundled.data import load_token_batches
from scripts.bundled.files import read_jsonl
from scripts.bundled.tokenizer import BOS, EOS, PAD

SITES = ("res", "mlp", "att")
SPECIAL = torch.tensor([PAD, EOS, BOS])
Place = tuple[str, int]
"""A site's name and a layer."""


def load_bundled(folder: Path) -> Gemma2ForCausalLM:
    """The model in `folder`, fp32, without gradients."""
    model = Gemma2ForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return model.eval().requires_grad_(False)


def is_text(tokens: Tensor) -> Tensor:
    """Where `tokens` is neither BOS, EOS nor padding."""
    return ~torch.isin(tokens, SPECIAL)


def site_width(model: Gemma2ForCausalLM, site: str) -> int:
    """Width of a site's activations."""
    config = model.config
    return config.num_attention_heads * config.head_dim if site == "att" else config.hidden_size


def hook_site(model: Gemma2ForCausalLM, place: Place, use: Any) -> Any:
    """Call `use(x [batch, pos, d])` at a site in every forward pass; a tensor it returns replaces the activations.

    res: the decoder layer's output. mlp: the output of the norm after the MLP. att: the input of `o_proj`.
    """
    site, layer = place
    block: Any = model.model.layers[layer]
    if site == "att":
        return block.self_attn.o_proj.register_forward_pre_hook(lambda _module, args: use(args[0]))
    module = block if site == "res" else block.post_feedforward_layernorm

    def after(_module: Any, _args: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return use(output)
        new = use(output[0])
        return None if new is None else (new, *output[1:])

    return module.register_forward_hook(after)


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks on leaving."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def harvest(model: Gemma2ForCausalLM, tokens: Tensor, places: list[Place]) -> dict[Place, Tensor]:
    """Activations `[kept positions, d]` of `tokens [batch, pos]` at all places from one forward pass, text only."""
    keep = is_text(tokens)
    found: dict[Place, Tensor] = {}

    def reader(place: Place) -> Any:
        def read(x: Tensor) -> None:
            found[place] = x[keep]

        return read

    with hooked([hook_site(model, place, reader(place)) for place in places]):
        model.model(input_ids=tokens, use_cache=False)
    return found


class ShuffleBuffer:
    """Batches of activations, the same tokens at all places, drawn at random from a buffer that is refilled in place.

    Half of the buffer is served in random order, then new activations overwrite the served rows.
    """

    def __init__(
        self, model: Gemma2ForCausalLM, work: Path, places: list[Place], *, rows: int, batch: int, seed: int
    ) -> None:
        self.model, self.places, self.batch, self.rows = model, places, batch, rows
        self.tokens = load_token_batches(work, 16, 256, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.data = {place: torch.empty(rows, site_width(model, place[0])) for place in places}
        self.spare: dict[Place, Tensor] | None = None
        self.seen = 0
        self._fill(torch.arange(rows))
        self._shuffle()

    def next_rows(self) -> Tensor:
        """Row numbers of the next batch; read them with `take`."""
        if self.at + self.batch > self.rows // 2:
            self._fill(self.order[: self.at])
            self._shuffle()
        picked = self.order[self.at : self.at + self.batch]
        self.at += self.batch
        return picked

    def take(self, place: Place, rows: Tensor) -> Tensor:
        """Activations `[batch, d]` of one place."""
        return self.data[place].index_select(0, rows)

    def _shuffle(self) -> None:
        self.order, self.at = torch.randperm(self.rows, generator=self.generator), 0

    def _fill(self, rows: Tensor) -> None:
        done = 0
        while done < len(rows):
            new = self.spare or harvest(self.model, next(self.tokens), self.places)
            count = len(next(iter(new.values())))
            use = min(count, len(rows) - done)
            for place, x in new.items():
                self.data[place].index_copy_(0, rows[done : done + use], x[:use])
            self.spare = {place: x[use:] for place, x in new.items()} if use < count else None
            done += use
        self.seen += done


def heldout_tokens(model_folder: Path, text: Path, *, context: int = 256, limit: int | None = None) -> Tensor:
    """Windows `[n, context]` of the held-out documents, each with BOS first; the tail of a document is padded.

    With `limit`, that many windows spread evenly over the documents.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    windows: list[list[int]] = []
    for row in read_jsonl(text):
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [ids[i : i + context - 1] for i in range(0, len(ids), context - 1)]
        windows += [[BOS, *p, *[PAD] * (context - 1 - len(p))] for p in pieces if len(p) >= 32]
    picked = range(len(windows))
    if limit is not None and limit < len(windows):
        picked = [int(i) for i in torch.linspace(0, len(windows) - 1, limit)]
    return torch.tensor([windows[i] for i in picked])
