"""From a fresh process to one resolved registry row, against SAELens's catalogue."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from benchmarks.timing import paired, save

ROW = ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
OURS = f"import gemma_scope_tl as gs; assert gs.registry.resolve{ROW!r}.l0 == 71"
PEER = (
    "from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as d; "
    f"assert d()[{ROW[0]!r}].saes_map[{ROW[1]!r}]"
)


def run() -> list[dict[str, Any]]:
    """One row: whole processes, imports included."""
    times = paired(lambda: _python(OURS), lambda: _python(PEER), runs=3)
    return [{"what": "resolve one id in a fresh process", "peer": "SAELens catalogue", **times}]


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


if __name__ == "__main__":
    print(save("registry", run()))
