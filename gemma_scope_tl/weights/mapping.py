"""Which files may be used where they lie: those that are replaced, and never written into.

A map shows what the file holds now. Where somebody opens the file for writing (``np.savez``, ``save_file``, ``cp`` over
it), a map gives other weights without a word, and kills the process (SIGBUS) where the file has become shorter. Nothing
in a process can prevent that, so a file is mapped only where it does not happen: in the Hub's cache, whose client puts
whole files into place by renaming them; in this package; and where the file's permissions let nobody write. All others
are copied into memory, as they are when they are loaded. A rename leaves a map its old content, on any file.
"""

from __future__ import annotations

from pathlib import Path

from gemma_scope_tl.registry.locate import BUNDLED_SAES
from gemma_scope_tl.weights.fetch import in_hub_cache

_ANYONE_WRITES = 0o222


def may_map(path: Path) -> bool:
    """Whether a file can be mapped for as long as its tensors live.

    Raises:
        OSError: the file cannot be looked at.
    """
    return (
        in_hub_cache(path)
        or path.resolve().is_relative_to(BUNDLED_SAES.parent)
        or not path.stat().st_mode & _ANYONE_WRITES
    )
