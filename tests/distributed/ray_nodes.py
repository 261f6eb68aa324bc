"""A Ray cluster of two nodes in processes of this machine, which leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

WORKER = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
# A lost node is noticed in a second, not in Ray's half minute.
_WATCHFUL = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 2_000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A head and a worker node of one processor each; this process is connected as their driver."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # names of sockets may have 107 letters
    quiet = {"RAY_TMPDIR": folder, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    cluster: Any = None
    with patch.dict(os.environ, quiet):
        os.environ.pop("RAY_ADDRESS", None)
        try:
            head = {"num_cpus": 1, "_system_config": _WATCHFUL, **WORKER}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            cluster.add_node(num_cpus=1, **WORKER)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            if cluster is not None:
                cluster.shutdown()
            for _ in range(20):  # processes that are about to end may still write logs
                shutil.rmtree(folder, ignore_errors=True)
                if not os.path.exists(folder):
                    break
                time.sleep(0.1)
