"""Texts to token rows, packed once: ``pack_tokens`` finds them again when it is asked for the same."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock

from gemma_scope_tl.activations.chat import chat_wrapping
from gemma_scope_tl.activations.documents import Documents, open_documents
from gemma_scope_tl.activations.packer import PROGRESS_NAME, Packer
from gemma_scope_tl.activations.token_rows import DATA_NAME, Layout, Request, TokenRows, read_manifest
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import make_folder, writing

__all__ = ["TokenRows", "pack_tokens", "tokenizer_fingerprint"]


def pack_tokens(
    data: Any,
    tokenizer: Any,
    context: int,
    folder: str | os.PathLike[str],
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
    chat: bool = False,
    limit_tokens: int | None = None,
    progress: bool = True,
) -> TokenRows:
    """Rows of ``context`` tokens, in ``folder``; found again and not packed twice.

    Documents follow each other with EOS between, cut into rows that begin with BOS; what is left at the end is dropped
    (the rule of :func:`gemma_scope_tl.evals.packing.pack_texts`). With ``chat``, a document is a row: BOS, the user's
    prefix, the document, cut so that the model's prefix still fits after it, and padding on the right. A dataset of
    token ids is packed likewise, without the BOS that documents begin with; but when its first row has ``context`` ids
    and begins with BOS, its rows are taken as they are.

    A packing that was stopped goes on where it was; two processes may ask for the same folder, one of them packs. Where
    documents come from an iterator, they can be told from others only by packing them again.

    Args:
        data: see :func:`~gemma_scope_tl.activations.documents.open_documents`; also for the next five.
        tokenizer: a Hugging Face tokenizer with BOS and EOS (padding, for chat).
        context: tokens in a row, BOS included.
        folder: for these rows alone.
        column, split, config, revision, streaming: of the dataset.
        chat: wrap documents as for an instruction-tuned model.
        limit_tokens: stop after as many whole rows as fit.
        progress: show a bar.

    Raises:
        GemmaScopeError: no documents, or fewer tokens than a row; no tokenizer, or one without the special tokens; the
            folder holds other rows, or a damaged file.
    """
    documents = open_documents(data, column=column, split=split, config=config, revision=revision, streaming=streaming)
    request = _request(documents, tokenizer, context, chat, limit_tokens)
    place = Path(folder)
    make_folder(place)
    with ExitStack() as held:
        with writing(place / ".lock"):
            held.enter_context(FileLock(place / ".lock"))
        found = read_manifest(place)
        if found is not None:
            _check_same(place, found.request, request)
        elif (place / DATA_NAME).exists() and not (place / PROGRESS_NAME).exists():
            raise GemmaScopeError(
                f"{place / DATA_NAME} is there without its manifest: restore that, or remove the file."
            )
        if found is None or request.source is None:
            Packer(place, request, tokenizer).run(documents, progress)
        return TokenRows.open(place)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A sha256 of everything that decides which ids a text gets, special tokens around it apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:  # padding and truncation are set by every call
        parts = json.loads(backend.to_str())
        for key in ("padding", "truncation", "post_processor"):
            parts.pop(key, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _request(documents: Documents, tokenizer: Any, context: int, chat: bool, limit_tokens: int | None) -> Request:
    if tokenizer is None:
        raise GemmaScopeError("Packing needs the model's tokenizer: it also says what BOS, EOS and padding are.")
    bos, eos, pad = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad"))
    if bos is None or (pad if chat else eos) is None:
        raise GemmaScopeError(f"Rows need BOS and {'padding' if chat else 'EOS'}, and this tokenizer has not both.")
    prefix, suffix = chat_wrapping(tokenizer) if chat else ([], [])
    least = len(prefix) + len(suffix) + 2
    if context < least:
        raise GemmaScopeError(f"A row holds BOS and a token at least, {least} in all, so context cannot be {context}.")
    if limit_tokens is not None and limit_tokens < context:
        raise GemmaScopeError(f"limit_tokens={limit_tokens} is less than one row of {context}.")
    layout: Layout = "chat" if chat else "packed"
    if documents.tokenised and not chat:
        first = next(documents.read(0))[0]
        layout = "rows" if len(first) == context and first[0] == bos else layout
    return Request(
        source=documents.source,
        tokenizer=tokenizer_fingerprint(tokenizer),
        context=context,
        layout=layout,
        bos=bos,
        eos=eos,
        pad=pad,
        prefix=prefix,
        suffix=suffix,
        limit_tokens=limit_tokens,
    )


def _check_same(place: Path, found: Request, asked: Request) -> None:
    theirs, ours = found.model_dump(), asked.model_dump()
    other = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if other:
        raise GemmaScopeError(f"{place} holds other token rows ({'; '.join(other)}): choose another folder.")
