"""One of two processes, the second of which is killed or stops for good: ``failing_worker SIGNAL SECONDS``."""

from __future__ import annotations

import os
import signal
import sys

import torch

from gemma_scope_tl.training.shard import process_mesh


def main() -> None:
    """Exchange numbers until something happens."""
    number, seconds = getattr(signal, sys.argv[1]), float(sys.argv[2])
    with process_mesh(2, 1, seconds=seconds) as shard:
        for step in range(10**6):
            if shard.latent_rank == 1 and step == 3:
                os.kill(os.getpid(), number)
            shard.sum_latents(torch.ones(4))


if __name__ == "__main__":
    main()
