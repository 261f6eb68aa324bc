"""Tests never ask the network for anything, and leave nothing in the user's cache."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["GEMMA_SCOPE_TL_CACHE"] = tempfile.mkdtemp(prefix="gemma_scope_tl_")
atexit.register(shutil.rmtree, os.environ["GEMMA_SCOPE_TL_CACHE"], ignore_errors=True)
