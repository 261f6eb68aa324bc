"""Build the corpus: fetch pinned sources, read documents, split by group, write text and a manifest.

Writes `corpus/<domain>.train.jsonl`, `corpus/<domain>.heldout.jsonl` and `corpus.json` under the work folder.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from scripts.bundled.domains import DOMAINS, Domain
from scripts.bundled.files import write_json, write_jsonl
from scripts.bundled.readers import Document
from scripts.bundled.sources import PACKAGES

HELDOUT_SHARE = 0.05
HELDOUT_CAP_BYTES = 300_000
SEED = 0


def _bytes(documents: list[Document]) -> int:
    return sum(len(text.encode()) for _, text in documents)


def _capped(documents: list[Document], cap: int) -> list[Document]:
    """The documents that fit into `cap` bytes, in order; a document that does not fit is skipped."""
    kept, used = list[Document](), 0
    for document in documents:
        size = len(document[1].encode())
        if used + size <= cap:
            kept.append(document)
            used += size
    return kept


def split_documents(documents: list[Document], seed: int = SEED) -> tuple[list[Document], list[Document]]:
    """Split by whole groups; groups are drawn until about `HELDOUT_SHARE` of the bytes is held out."""
    groups = sorted({group for group, _ in documents})
    random.Random(seed).shuffle(groups)
    sizes = dict.fromkeys(groups, 0)
    for group, text in documents:
        sizes[group] += len(text.encode())
    target, held, taken = HELDOUT_SHARE * sum(sizes.values()), set[str](), 0
    for group in groups:
        if taken >= target:
            break
        if taken + sizes[group] <= 2 * target:
            held.add(group)
            taken += sizes[group]
    train = [d for d in documents if d[0] not in held]
    return train, [d for d in documents if d[0] in held]


def build_domain(domain: Domain, work: Path) -> dict[str, Any]:
    """Write one domain's two files and return its manifest entry."""
    documents = list(domain.reader(work))
    if domain.heldout_reader is None:
        train, heldout = split_documents(documents)
    else:
        train, heldout = documents, list(domain.heldout_reader(work))
    rng = random.Random(SEED)
    rng.shuffle(train)
    rng.shuffle(heldout)
    train, heldout = _capped(train, domain.cap_bytes), _capped(heldout, HELDOUT_CAP_BYTES)
    for split, rows in (("train", train), ("heldout", heldout)):
        path = work / "corpus" / f"{domain.name}.{split}.jsonl"
        write_jsonl(path, ({"group": group, "text": text} for group, text in rows))
    return {
        "domain": domain.name,
        "weight": domain.weight,
        "licence": domain.licence,
        "credit": domain.credit,
        "packages": [_package_entry(name) for name in domain.packages],
        "train": {"documents": len(train), "bytes": _bytes(train)},
        "heldout": {"documents": len(heldout), "bytes": _bytes(heldout)},
    }


def _package_entry(name: str) -> dict[str, str]:
    package = PACKAGES[name]
    kind = {"pip": "PyPI", "apt": "Debian", "npm": "npm"}[package.client]
    return {"registry": kind, "name": name, "version": package.version, "sha256": package.sha256}


def build_corpus(work: Path) -> dict[str, Any]:
    """Build every domain and write the manifest `corpus.json`."""
    domains = [build_domain(domain, work) for domain in DOMAINS]
    manifest = {"seed": SEED, "heldout_share": HELDOUT_SHARE, "domains": domains}
    write_json(work / "corpus.json", manifest)
    return manifest
