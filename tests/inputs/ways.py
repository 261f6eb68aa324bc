"""Ways of giving the same texts, and what Hugging Face's own tokenizer makes of each text alone."""

from __future__ import annotations

from typing import Any

import torch

TEXTS = ["hello you", "hi", "a third one"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def conversations() -> list[list[dict[str, str]]]:
    """A conversation for each text."""
    return [[{"role": "user", "content": text}] for text in TEXTS]


def alone(tokenizer: Any, texts: list[str]) -> list[torch.Tensor]:
    """Ids ``[pos]`` of each text, by Hugging Face."""
    return [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]


def padded(rows: list[torch.Tensor], side: str, pad: int = 0) -> torch.Tensor:
    """Rows as one tensor."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad, padding_side=side)


def ways(tokenizer: Any) -> dict[str, Any]:
    """Each way gives the texts ``TEXTS`` in this order: keyword arguments of ``as_batch`` by name."""
    import datasets
    import numpy as np
    import pandas as pd

    rows = alone(tokenizer, TEXTS)
    left, right = padded(rows, "left"), padded(rows, "right")
    lists = [row.tolist() for row in rows]
    table = datasets.Dataset.from_dict({"text": TEXTS, "ids": lists})
    options = {"return_tensors": "pt", "padding": True}
    encoded = {side: tokenizer(TEXTS, padding_side=side, **options) for side in ("left", "right")}
    ones = padded([torch.ones_like(row) for row in rows], "right")
    return {
        "list": {"text": list(TEXTS)},
        "tuple": {"text": tuple(TEXTS)},
        "generator": {"text": (text for text in TEXTS)},
        "series": {"text": pd.Series(TEXTS, index=[5, 3, 9])},
        "array": {"text": np.array(TEXTS)},
        "array of objects": {"text": np.array(TEXTS, dtype=object)},
        "column": {"text": table["text"]},
        "with BOS": {"text": ["<bos>" + text for text in TEXTS]},
        "left-padded": {"text": left},
        "left-padded int32": {"text": left.int()},
        "right-padded": {"text": right},
        "right-padded uint8 array": {"text": right.numpy().astype("uint8")},
        "left with mask": {"text": left, "attention_mask": (left != 0).long()},
        "right with mask": {"text": right, "attention_mask": right != 0},
        "pads unknown, with mask": {"text": padded(rows, "right", 7), "attention_mask": ones.tolist()},
        "lists": {"text": lists},
        "column of lists": {"text": table["ids"]},
        "list of tensors": {"text": rows},
        "list of arrays": {"text": [row.numpy() for row in rows]},
        "encoding left": {"text": encoded["left"]},
        "encoding right": {"text": encoded["right"]},
        "encoding of lists": {"text": tokenizer(TEXTS)},
        "dict": {"text": dict(encoded["left"])},
    }
