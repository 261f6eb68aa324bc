"""Made-up coders (SAEs and transcoders) in Gemma Scope 2's layout, under released names, in a cache of the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gemma_scope_tl.families import family_named
from gemma_scope_tl.registry import resolve
from gemma_scope_tl.weights.coder_config import module_hooks

REPO, MODEL = "google/gemma-scope-2-1b-pt", "google/gemma-3-1b-pt"
COMMIT = "0" * 40
_FOLDERS = {"res": "resid_post", "transcoder": "transcoder"}
_RELEASES = {"res": "gemma-scope-2-1b-pt-res", "transcoder": "gemma-scope-2-1b-pt-transcoders"}


@dataclass(frozen=True)
class Coder:
    """A released coder of Gemma 3 1B: its names here, in SAELens and in its repository.

    Attributes:
        site: ``res`` or ``transcoder``.
        layer: one of the four of the subset, 7, 13, 17 or 22.
        width: the label in its name; a made-up file may have fewer latents.
        affine: whether it has a skip connection.
    """

    site: str
    layer: int = 7
    width: str = "16k"
    affine: bool = False

    @property
    def release(self) -> str:
        """The release, by the name that SAELens and this package share."""
        return _RELEASES[self.site]

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"layer_{self.layer}_width_{self.width}_l0_medium{'_affine' if self.affine else ''}"

    @property
    def path(self) -> str:
        """Its folder in the repository."""
        return f"{_FOLDERS[self.site]}/{self.name}"

    @property
    def id(self) -> str:
        """Its id in the release."""
        return self.path if self.site == "transcoder" else self.name

    @property
    def title(self) -> str:
        """What it is, in words."""
        return "res" if self.site == "res" else "skip transcoder" if self.affine else "transcoder"

    def write(self, root: Path, arrays: Mapping[str, torch.Tensor]) -> Path:
        """Write ``params.safetensors`` and ``config.json`` below the root of a repository; returns the weights file."""
        folder = root / self.path
        folder.mkdir(parents=True, exist_ok=True)
        hooks = module_hooks(family_named("gemma3"), self.site, self.layer)
        assert hooks is not None
        config = {
            "hf_hook_point_in": hooks[0],
            "hf_hook_point_out": hooks[1],
            "width": arrays["w_enc"].shape[1],
            "model_name": MODEL,
            "architecture": "jump_relu",
            "l0": resolve(self.release, self.id).l0,
            "affine_connection": self.affine,
            "type": "sae" if self.site == "res" else "transcoder",
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        file = folder / "params.safetensors"
        save_file({name: array.contiguous() for name, array in arrays.items()}, file)
        file.chmod(0o444)  # read-only, like the files of the Hub's cache, so it may be mapped
        os.sync()  # so that writing it back does not disturb what follows
        return file


def hub_cache(folder: Path) -> Path:
    """Make an empty cache of the Hub in ``folder``, and return the folder of the repository's only commit in it."""
    repo = folder / f"models--{REPO.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    root = repo / "snapshots" / COMMIT
    root.mkdir(parents=True)
    return root


def random_arrays(
    width: int, latents: int, *, affine: bool = False, threshold: float = 2.5, decoder: float = 1.0, seed: int = 0
) -> dict[str, torch.Tensor]:
    """The arrays of a coder, as the files name them.

    Args:
        width: width of the tensors that it reads and writes.
        latents: number of latents.
        affine: whether there is a skip connection.
        threshold: of every latent. Pre-activations of inputs of unit variance have unit variance too.
        decoder: length of the decoder rows.
        seed: of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    arrays: dict[str, Any] = {
        "w_enc": normal(width, latents).div_(width**0.5),
        "w_dec": torch.nn.functional.normalize(normal(latents, width), dim=1).mul_(decoder),
        "b_enc": normal(latents).mul_(0.1),
        "b_dec": normal(width).mul_(0.1),
        "threshold": torch.full((latents,), threshold),
    }
    return arrays | ({"affine_skip_connection": normal(width, width).div_(width**0.5)} if affine else {})
