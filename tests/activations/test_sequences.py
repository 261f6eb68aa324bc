"""Packing: the evaluation's rule from every kind of source; nothing half-written counts; chat as in the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.text import pack as packer
from gemma_scope_tl.text.documents import open_documents
from gemma_scope_tl.text.pack import TokenRows, pack_tokens
from gemma_scope_tl.text.rows import pack_texts
from tests.helpers import CharTokenizerFactory

TEXTS = [f"Document {i}: " + "the quick brown fox. " * (i % 7) for i in range(300)] + ["", "end"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED_MODEL)


def pack(data: Any, tokenizer: Any, folder: Path, **options: Any) -> TokenRows:
    return pack_tokens(data, tokenizer, options.pop("context", 32), folder, progress=False, **options)


def sources(folder: Path) -> dict[str, Any]:
    """The same texts in every form."""
    dataset = datasets.Dataset.from_dict({"id": list(range(len(TEXTS))), "text": TEXTS})
    dataset.to_json(folder / "a.jsonl")
    dataset.to_parquet(folder / "a.parquet")
    dataset.save_to_disk(folder / "saved")
    half = len(TEXTS) // 2
    (folder / "several").mkdir()
    dataset.select(range(half)).to_json(folder / "several" / "0.jsonl")
    dataset.select(range(half, len(TEXTS))).to_json(folder / "several" / "1.jsonl")
    files = {name: folder / name for name in ("a.jsonl", "a.parquet", "saved", "several")}
    memory = {"list": TEXTS, "iterator": iter(TEXTS), "dataset": dataset, "iterable": dataset.to_iterable_dataset()}
    return {**files, **memory, "splits": datasets.DatasetDict({"train": dataset})}


def test_every_source_packs_as_the_evaluation_does(tmp_path: Path, tokenizer: Any) -> None:
    wanted = pack_texts(tokenizer, TEXTS, 32)
    for name, data in sources(tmp_path).items():
        rows = pack(data, tokenizer, tmp_path / "out" / name)
        assert torch.equal(rows[0 : len(rows)], wanted), name
        assert rows.manifest.documents == len(TEXTS)
        assert torch.equal(load_file(tmp_path / "out" / name / "tokens.safetensors")["tokens"].long(), wanted)
    with_bos = pack([tokenizer.bos_token + text for text in TEXTS], tokenizer, tmp_path / "out" / "with BOS")
    assert torch.equal(with_bos[0 : len(with_bos)], wanted)  # rows begin with their own


def test_kept_positions_are_those_of_the_mask(tmp_path: Path, tokenizer: Any) -> None:
    rows = pack(TEXTS, tokenizer, tmp_path)
    mask = rows.keep_mask(rows[0 : len(rows)])
    assert torch.equal(mask, rows[0 : len(rows)] > 2)
    assert not bool(mask[:, 0].any()) and 0 < int(mask.sum()) < mask.numel()
    assert np.array_equal(rows.kept, mask.sum(1).numpy())


def test_rows_are_found_again_and_other_requests_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack(TEXTS, tokenizer, tmp_path)
    with pytest.raises(GemmaScopeError, match="context 32, not 16"):
        pack(TEXTS, tokenizer, tmp_path, context=16)
    with pytest.raises(GemmaScopeError, match="source"):
        pack(TEXTS[1:], tokenizer, tmp_path)
    with pytest.raises(GemmaScopeError, match="tokenizer"):
        pack(TEXTS, CharTokenizerFactory.get(), tmp_path)
    monkeypatch.setattr(packer.Packer, "run", lambda *_: pytest.fail("packed twice"))
    again = pack(list(TEXTS), tokenizer, tmp_path)
    assert again.sha256 == first.sha256


def test_an_iterators_rows_are_recognised_by_their_content(tmp_path: Path, tokenizer: Any) -> None:
    first = pack(iter(TEXTS), tokenizer, tmp_path)
    assert pack(iter(TEXTS), tokenizer, tmp_path).sha256 == first.sha256
    with pytest.raises(GemmaScopeError, match="other token rows"):
        pack(iter(TEXTS[1:]), tokenizer, tmp_path)
    TokenRows.open(tmp_path, verify=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".lock") == [
        "tokens.json",
        "tokens.safetensors",
    ]


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_a_stopped_packing_is_not_finished_and_goes_on(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    monkeypatch.setattr(packer, "CHECKPOINT_SECONDS", -1.0)
    encode, calls = packer.Packer._encode, []

    def stopping(self: Any, batch: Any, read: int) -> Any:
        calls.append(read)
        if len(calls) == batches + 1:
            raise KeyboardInterrupt
        return encode(self, batch, read)

    monkeypatch.setattr(packer.Packer, "_encode", stopping)
    with pytest.raises(KeyboardInterrupt):
        pack(TEXTS, tokenizer, tmp_path)
    with pytest.raises(GemmaScopeError, match="no finished"):
        TokenRows.open(tmp_path)
    with (tmp_path / ".tokens.partial").open("ab") as file:
        file.write(b"half a row")
    rows = pack(TEXTS, tokenizer, tmp_path)
    assert torch.equal(rows[0 : len(rows)], pack_texts(tokenizer, TEXTS, 32))
    assert calls[batches + 1] == 128 * batches  # documents packed before are not read again
    assert rows.sha256 == pack(TEXTS, tokenizer, tmp_path / "fresh").sha256


def test_damage_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    pack(TEXTS, tokenizer, tmp_path)
    path, manifest = tmp_path / "tokens.safetensors", tmp_path / "tokens.json"
    good, text = path.read_bytes(), manifest.read_text()
    for bad in (good[:-1], good + b"\0", good[:8] + b"x" + good[9:]):
        path.write_bytes(bad)
        with pytest.raises(GemmaScopeError, match="tokens.safetensors"):
            TokenRows.open(tmp_path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    TokenRows.open(tmp_path)
    with pytest.raises(GemmaScopeError, match="sha256"):
        TokenRows.open(tmp_path, verify=True)
    path.unlink()
    with pytest.raises(GemmaScopeError, match="missing"):
        pack(TEXTS, tokenizer, tmp_path)
    path.write_bytes(good)
    for bad_text in ("", "{}", text[:-9], json.dumps({**json.loads(text), "rows": -1})):
        manifest.write_text(bad_text)
        with pytest.raises(GemmaScopeError, match="corrupt"):
            TokenRows.open(tmp_path)
    manifest.unlink()
    with pytest.raises(GemmaScopeError, match="has no manifest"):
        pack(TEXTS, tokenizer, tmp_path)


def test_a_limit_gives_the_first_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = pack(TEXTS, tokenizer, tmp_path, limit_tokens=32 * 20 + 31)
    assert torch.equal(rows[0 : len(rows)], pack_texts(tokenizer, TEXTS, 32)[:20])
    with pytest.raises(GemmaScopeError, match="limit_tokens"):
        pack(TEXTS, tokenizer, tmp_path / "b", limit_tokens=31)


def test_token_ids_pack_like_their_texts_and_rows_stay_as_they_are(tmp_path: Path, tokenizer: Any) -> None:
    wanted = pack_texts(tokenizer, TEXTS, 32)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]  # BOS first
    assert ids[0][0] == 2
    for name in ("tokens", "input_ids"):
        rows = pack(datasets.Dataset.from_dict({name: ids}), tokenizer, tmp_path / name)
        assert torch.equal(rows[0 : len(rows)], wanted)
    whole = pack(datasets.Dataset.from_dict({"tokens": wanted.tolist()}), tokenizer, tmp_path / "rows")
    assert whole.manifest.request.layout == "rows" and torch.equal(whole[0 : len(whole)], wanted)
    for number, wrong in enumerate(([[2, 2048]], [[2, -1]], [wanted[0].tolist(), [2, 5]], [[0.5]])):
        with pytest.raises(GemmaScopeError):
            pack(datasets.Dataset.from_dict({"tokens": wrong}), tokenizer, tmp_path / str(number))


def chat_wanted(tokenizer: Any, text: str, context: int) -> tuple[list[int], list[bool]]:
    """A row and its mask, from whole strings."""
    before, after = "<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"
    prefix, body, suffix = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, text, after))
    body = body[: context - 1 - len(prefix) - len(suffix)]
    row = [2, *prefix, *body, *suffix]
    keep = [False] * (1 + len(prefix)) + [True] * (len(body) + len(suffix))
    padding = context - len(row)
    return row + [0] * padding, keep + [False] * padding


@pytest.mark.parametrize("template", [False, True])
def test_chat_rows_are_wrapped_and_the_users_prefix_dropped(tmp_path: Path, template: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    if template:  # Gemma's, for one user's turn
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] | trim "
            "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
        )
    rows = pack(TEXTS, tokenizer, tmp_path, chat=True)
    expected = [chat_wanted(tokenizer, text, 32) for text in TEXTS]
    assert torch.equal(rows[0 : len(rows)], torch.tensor([row for row, _ in expected]))
    mask = torch.tensor([keep for _, keep in expected])
    assert torch.equal(rows.keep_mask(rows[0 : len(rows)]), mask)
    assert np.array_equal(rows.kept, mask.sum(1).numpy())
    with pytest.raises(GemmaScopeError, match="context cannot be"):
        pack(TEXTS, tokenizer, tmp_path / "b", chat=True, context=8)


def test_chat_needs_a_tokenizer_that_knows_it(tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError, match="<start_of_turn>"):
        pack(TEXTS, CharTokenizerFactory.get(), tmp_path, chat=True)


def test_bad_sources_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.pdf").write_bytes(b"")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    for number, data in enumerate(
        (tmp_path / "a.pdf", tmp_path / "bad.parquet", tmp_path / "bad.jsonl", "no/such-dataset", [], [1], 7, ["short"])
    ):
        with pytest.raises(GemmaScopeError):
            pack(data, tokenizer, tmp_path / str(number))
    with pytest.raises(UnknownNameError, match="column"):
        open_documents(datasets.Dataset.from_dict({"content": ["a"]}))
    with pytest.raises(UnknownNameError, match="split"):
        open_documents(datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["a"]})}))
    with pytest.raises(GemmaScopeError, match="tokenizer"):
        pack(TEXTS, None, tmp_path / "none")
    with pytest.raises(GemmaScopeError, match="context"):
        pack(TEXTS, tokenizer, tmp_path / "context", context=1)


def test_lines_of_a_text_file_are_documents(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("one line\n\n" * 40 + "last")
    rows = pack(tmp_path / "a.txt", tokenizer, tmp_path / "out", context=8)
    assert torch.equal(rows[0 : len(rows)], pack_texts(tokenizer, ["one line"] * 40 + ["last"], 8))
