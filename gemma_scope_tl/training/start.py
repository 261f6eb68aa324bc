"""Initial weights from SAEs that exist: finetuning, as Gemma Scope 2's SAEs of tuned models were made.

An SAE of files has the scale and the pre-encoder bias folded in (appendix A of Gemma Scope's paper). Both are unfolded
here, with the scale of the activations on which the new training runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError, TrainingStateError, UnknownNameError, unknown_name
from gemma_scope_tl.files import checked_path, is_file, is_folder
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.training.checkpoint import SUITE_NAME, read_record
from gemma_scope_tl.training.grid import AnyGroup
from gemma_scope_tl.training.spec import SAESpec

if TYPE_CHECKING:
    from gemma_scope_tl.training.place import PlaceTrainer


def begin(trainer: PlaceTrainer, scale: float, model: str) -> None:
    """Give the SAEs that have an ``init_from`` the weights that it names.

    Args:
        trainer: before its first step.
        scale: ``C``, by which the activations are divided.
        model: name of the model that is trained on, for the units of an embedding SAE.

    Raises:
        GemmaScopeError: see :func:`read_start`.
    """
    for index, spec in enumerate(trainer.specs):
        if spec.init_from:
            arrays = read_start(spec, trainer.d_in, trainer.d_out, model)
            source = f"{spec.name}: {spec.start}"
            trainer.start_from(index, unfolded(arrays, scale, pre_encoder_bias=not spec.is_transcoder, source=source))


def read_start(spec: SAESpec, d_in: int, d_out: int, model: str) -> dict[str, Tensor]:
    """The weights that ``spec.init_from`` names, for raw activations, under canonical names.

    It is one of these, with the marks ``{site}``, ``{layer}``, ``{width}`` (such as ``16k``) and ``{affine}`` replaced
    by what the SAE has:

    - the folder of a finished run of ``train_suite``, of which the SAE with the same name is taken;
    - the folder, or the file, of one SAE;
    - a release and the id of a row in it, joined by ``/``.

    A skip transcoder may start from a transcoder without skip, whose missing matrix is 0.

    Raises:
        GemmaScopeError: nothing has that name, or what is found is of another place, size or kind.
        WeightsError: a file cannot be obtained or fails a check.
    """
    text = spec.start
    sae = _load(text, spec, model)
    place = (getattr(sae, "site", None), getattr(sae, "layer", None))
    if place != (spec.place.site, spec.place.layer):
        raise GemmaScopeError(f"{spec.name}: {text} is an SAE of {place[0]}, layer {place[1]}.")
    arrays = {name: value.detach() for name, value in sae.state_dict().items()}
    wanted = {"W_enc": (d_in, spec.d_sae), "W_dec": (spec.d_sae, d_out)}
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise GemmaScopeError(f"{spec.name}: {name} of {text} is {list(arrays[name].shape)}, not {list(shape)}.")
    if "W_skip" in arrays and not spec.skip:
        raise GemmaScopeError(f"{spec.name}: {text} has a skip path, which would be lost: write skip: true.")
    return arrays


def check_starts(groups: Sequence[AnyGroup], folder: Path) -> None:
    """Raise where an SAE would start from files in the run's own folder, which the run replaces.

    Raises:
        TrainingStateError: ``init_from`` names such files.
    """
    own = folder.resolve()
    starts = [(spec, start) for group in groups for spec in group.specs if spec.init_from for start in spec.starts]
    for spec, start in starts:
        path = checked_path(start)
        if (is_folder(path) or is_file(path)) and path.resolve().is_relative_to(own):
            raise TrainingStateError(
                f"{spec.name}: init_from {start!r} is inside the output, {folder}, whose SAEs this run would "
                "replace: choose another output, or copy the SAEs elsewhere."
            )


def absolute_start(text: str) -> str:
    """An ``init_from`` that names a folder, as an absolute path, for a process with another working directory."""
    head = text.partition("{")[0]
    folder = Path(head) if head == text or head.endswith("/") else Path(head).parent
    is_path = str(folder) != "." and folder.exists()
    return str(Path.cwd() / text) if is_path else text


@torch.no_grad()
def unfolded(
    arrays: Mapping[str, Tensor], scale: float, *, pre_encoder_bias: bool, source: str = "The set of arrays given"
) -> dict[str, Tensor]:
    """The trained parameters of an SAE for activations divided by ``scale``: the inverse of folding.

    With decoder rows of length ``n_i``, which become 1::

        enc_i = n_i W_enc[:, i]    b_enc_i = n_i (b_enc_i / C + (b_dec / C) . W_enc[:, i])    theta_i = n_i theta_i / C
        dec_i = W_dec[i] / n_i     b_dec = b_dec / C                                          S unchanged

    where the product with ``b_dec`` is left out of transcoders, from whose input nothing is subtracted.

    Args:
        arrays: ``W_enc [d_in, d_sae]``, ``W_dec``, ``b_enc``, ``b_dec``, ``threshold``, and ``W_skip [d_out, d_in]``.
        scale: ``C``.
        pre_encoder_bias: whether ``b_dec`` is subtracted before the encoder while training.
        source: the origin of the arrays, for the message.

    Returns:
        ``enc [d_sae, d_in]``, ``dec``, ``b_enc``, ``b_dec``, ``log_threshold``, and ``skip [d_in, d_out]``.

    Raises:
        GemmaScopeError: a decoder row is 0, or a threshold is not positive.
    """
    norm = torch.linalg.vector_norm(arrays["W_dec"].double(), dim=1)
    threshold = arrays["threshold"].double() * norm / scale
    dead = (~(threshold > 0.0)).nonzero().flatten().tolist()
    if dead:
        latent = dead[0]
        what = "a decoder row of 0" if not bool(norm[latent] > 0) else "a threshold that is not positive"
        others = f" ({len(dead)} latents are so)" if len(dead) > 1 else ""
        raise GemmaScopeError(f"{source} cannot be trained further. Latent {latent} has {what}{others}.")
    b_dec = arrays["b_dec"].double() / scale
    b_enc = arrays["b_enc"].double() / scale
    if pre_encoder_bias:
        b_enc = b_enc + b_dec @ arrays["W_enc"].double()
    wide = norm.to(arrays["W_enc"].dtype).unsqueeze(1)
    found = {
        "enc": arrays["W_enc"].T * wide,
        "dec": arrays["W_dec"] / wide,
        "b_enc": b_enc * norm,
        "b_dec": b_dec,
        "log_threshold": threshold.log(),
    }
    return found | ({"skip": arrays["W_skip"].T} if "W_skip" in arrays else {})


def _load(text: str, spec: SAESpec, model: str) -> Any:
    from gemma_scope_tl.sae.loading import load_folder, load_row

    path = checked_path(text)
    if is_folder(path) and is_file(path / SUITE_NAME):
        path = _of_run(path, spec)
    elif not is_folder(path) and not is_file(path):
        return load_row(_row(text, spec))
    family = family_and_sizes(model)[0].name  # the name of a model of one's own does not tell it
    return load_folder(path, model, spec.place.site, spec.place.layer, family=family)


def _of_run(folder: Path, spec: SAESpec) -> Path:
    """The folder of the SAE with the same name in a finished run."""
    rows = read_record(folder / SUITE_NAME).get("saes")
    try:
        paths = {str(row["name"]): str(row["path"]) for row in rows or ()}
    except (TypeError, KeyError) as error:
        raise GemmaScopeError(f"{folder / SUITE_NAME} does not list SAEs: {json.dumps(str(error))}.") from None
    if spec.name not in paths:
        raise unknown_name(f"SAE of the run in {folder}", spec.name, paths)
    return folder / paths[spec.name]


def _row(text: str, spec: SAESpec) -> Any:
    from gemma_scope_tl.registry import catalog

    release, _, sae_id = text.partition("/")
    try:
        return catalog.resolve(release, sae_id)
    except UnknownNameError as error:
        what = f"{spec.name}: init_from {text!r} is neither a folder nor a release and an id"
        raise GemmaScopeError(f"{what}. {error}") from None
