"""Registry files that are added to this process and removed from it: ``register_release``, ``unregister_release``."""

from __future__ import annotations

from pathlib import Path

from gemma_scope_tl.errors import RegistryError, unknown_name
from gemma_scope_tl.files import checked_path
from gemma_scope_tl.registry.catalog import clear_cache, headers
from gemma_scope_tl.registry.locate import add_file, registered_files, remove_file
from gemma_scope_tl.registry.schema import read_release


def register_release(path: str | Path) -> str:
    """Add a registry file to this process, so that its SAEs can be loaded by name.

    To add files permanently, put them into a folder that ``GEMMA_SCOPE_TL_REGISTRY`` names or into the user's folder
    (``locate.user_folder``), or provide them in a package (entry-point group ``gemma_scope_tl.releases``). If the file
    is deleted or broken later, its release is left out with a warning, and all others can be used as before.

    Args:
        path: the YAML file. Adding it a second time reads it again.

    Returns:
        The release's name.

    Raises:
        RegistryError: with every problem of the file, or with the other file that has one of its names.
    """
    file = checked_path(path).absolute()
    release = read_release(file)
    clear_cache()
    add_file(file, release.release)
    try:
        headers()
    except RegistryError:
        remove_file(file)
        raise
    return release.release


def unregister_release(release: str | Path) -> None:
    """Undo :func:`register_release`, also for a file that does not exist any more.

    SAEs that are loaded can be used as before.

    Args:
        release: the name of the release, or its file.

    Raises:
        UnknownNameError: no file with this release was registered in this process.
    """
    added = registered_files()
    files = [file for file, name in added.items() if name == release]
    if not files and (file := checked_path(release).absolute()) in added:
        files = [file]
    if not files:
        others = {name: header.path for header in headers() for name in header.names}
        place = others.get(str(release))
        hint = "" if place is None else f"It comes from {place}, and not from register_release."
        raise unknown_name("registered release", release, added.values(), hint)
    for file in files:
        remove_file(file)
    clear_cache()
