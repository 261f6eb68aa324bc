"""Reading of some latents of one layer of a crosscoder or cross-layer transcoder, here or on the Hub.

A latent's row of ``w_dec [m, n, d_out]`` is one run of bytes, and so are its planes from its own layer on, which alone
are read. What is true of single values and of the encoder's columns in
:mod:`~gemma_scope_tl.weights.partial` is true here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gemma_scope_tl.weights.checks import Expected, weights_error
from gemma_scope_tl.weights.layer_files import checked_layer, inspect_layer
from gemma_scope_tl.weights.layout import map_array
from gemma_scope_tl.weights.npz import read_errors
from gemma_scope_tl.weights.partial import Arrays, check_latents, checked_arrays, read_rows
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors

if TYPE_CHECKING:
    from gemma_scope_tl.weights.remote import RemoteFile

_VECTORS = ("b_enc", "threshold")


def read_local_layer(
    path: Path, place: int, count: int, latents: Sequence[int], expected: Expected, encoder: bool
) -> Arrays:
    """Read the arrays of some latents of one layer from a file on this machine.

    Args:
        path: the file of the layer.
        place: the layer's number among the coder's layers.
        count: number of layers of the coder.
        latents: indices within the layer, in any order.
        expected: sizes that the file must have.
        encoder: whether to read the encoder columns too.

    Returns:
        ``W_dec [k, count - place, d_out]``, ``b_enc [k]``, ``threshold [k]``, and with ``encoder`` also
        ``W_enc [d_in, k]``, as copies in the dtype of the file.

    Raises:
        WeightsError: when the file is broken, lacks a latent, or a value that is read fails a check.
    """
    layouts = inspect_layer(path, expected, count)
    check_latents(latents, layouts["b_enc"].count, str(path))
    index = torch.tensor(latents)
    with read_errors(path):
        found = {name: map_array(path, layouts[name]).index_select(0, index) for name in _VECTORS}
        found["W_dec"] = map_array(path, layouts["W_dec"])[:, place:].index_select(0, index)
        if encoder:
            found["W_enc"] = map_array(path, layouts["W_enc"]).index_select(1, index)
    return _checked(found, str(path))


def read_remote_layer(remote: RemoteFile, place: int, count: int, latents: Sequence[int], expected: Expected) -> Arrays:
    """Read as :func:`read_local_layer` from a file on the Hub, without the encoder.

    Raises:
        WeightsError: when the file cannot be read, and as :func:`read_local_layer`.
    """
    layouts = checked_layer(inspect_safetensors(remote), remote.source, expected, count)
    check_latents(latents, layouts["b_enc"].count, remote.source)
    wanted = {name: (layouts[name], latents) for name in ("W_dec", *_VECTORS)}
    d_out = layouts["b_dec"].count
    found = read_rows(remote, wanted, {"W_dec": place * d_out})
    vectors = {name: found[name].squeeze(-1) for name in _VECTORS}
    return _checked({"W_dec": found["W_dec"].unflatten(-1, (-1, d_out)), **vectors}, remote.source)


def _checked(arrays: Arrays, source: str) -> Arrays:
    found = checked_arrays(arrays, source)
    if not bool((found["threshold"] > 0).all()):
        raise weights_error(source, "has thresholds that are 0; those of such coders are positive")
    return found
