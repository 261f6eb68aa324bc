"""The registry, which holds every released SAE as one checked row. Importing it imports neither torch nor pandas."""

from gemma_scope_tl.registry.catalog import clear_cache, find, load_release, releases, resolve
from gemma_scope_tl.registry.listing import list_saes
from gemma_scope_tl.registry.registering import register_release, unregister_release
from gemma_scope_tl.registry.schema import ReleaseFile, SAEEntry, SAERow, read_release
from gemma_scope_tl.registry.widths import parse_width, width_label

__all__ = [
    "ReleaseFile",
    "SAEEntry",
    "SAERow",
    "clear_cache",
    "find",
    "list_saes",
    "load_release",
    "parse_width",
    "read_release",
    "register_release",
    "releases",
    "resolve",
    "unregister_release",
    "width_label",
]
