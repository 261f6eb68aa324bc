"""Train the byte-level BPE tokenizer of the bundled model and tokenize the corpus with it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from scripts.bundled.domains import WEIGHTS
from scripts.bundled.files import read_jsonl, write_atomic, write_json

VOCAB_SIZE = 2048
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
PAD, EOS, BOS = 0, 1, 2
CONTEXT = 512
SAMPLE_BYTES = 12_000_000


def texts(work: Path, domain: str, split: str) -> list[str]:
    """Documents of one domain and split, in stored order."""
    return [row["text"] for row in read_jsonl(work / "corpus" / f"{domain}.{split}.jsonl")]


def _weighted_sample(work: Path, seed: int = 0) -> Iterator[str]:
    """Training text in the proportions of the mixture, `SAMPLE_BYTES` in all."""
    for domain, weight in WEIGHTS.items():
        documents = texts(work, domain, "train")
        random.Random(seed).shuffle(documents)
        left = int(weight * SAMPLE_BYTES)
        for text in documents:
            if left <= 0:
                break
            piece = text[:left]
            left -= len(piece.encode())
            yield piece


def train_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """Train on the weighted sample and save to `<work>/tokenizer`; returns the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_weighted_sample(work), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(fast, work / "tokenizer")
    return fast


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` atomically into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    config = json.loads((partial / "tokenizer_config.json").read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in {"backend", "is_local", "local_files_only"}}
    write_json(partial / "tokenizer_config.json", config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved by `train_tokenizer`."""
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


def token_byte_counts(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """UTF-8 bytes of every token, int64 [vocab]; special tokens count as 0."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if i in special else len(name) for i, name in enumerate(names)], dtype=np.int64)


def tokenize_corpus(work: Path) -> dict[str, dict[str, int]]:
    """Write `tokens/<domain>.npy` and `heldout/<domain>.npy` (uint16): documents, each followed by `<eos>`."""
    tokenizer = load_tokenizer(work)
    counts: dict[str, dict[str, int]] = {}
    for domain in WEIGHTS:
        counts[domain] = {}
        for split, folder in (("train", "tokens"), ("heldout", "heldout")):
            stream = list[int]()
            for ids in tokenizer(texts(work, domain, split), add_special_tokens=False, verbose=False)["input_ids"]:
                stream += [*ids, EOS]
            array = np.array(stream, dtype=np.uint16)
            path = work / folder / f"{domain}.npy"
            write_atomic(path, lambda temporary, array=array: _save_array(temporary, array))
            counts[domain][split] = len(array)
    return counts


def _save_array(path: Path, array: np.ndarray) -> None:
    """Save like `numpy.save`, which would add `.npy` to the name."""
    with path.open("wb") as handle:
        np.save(handle, array)
