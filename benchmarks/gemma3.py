"""How far logits are off when a transcoder of Gemma Scope 2 is spliced, on a small random Gemma 3.

The files are in the released layout under released names. The peer is stock SAELens: the name as it is released there,
and the same object after its hook was corrected by hand. Both sides splice on the bridge; ours on HookedTransformer is
recorded beside it. All are compared with Hugging Face's model, in which the output of the post-MLP norm is replaced by
the formula in float64. Everything runs in float32 and splices at every token, because SAELens's bridge cannot leave
tokens out. Nothing is timed, so the numbers do not depend on the load of the machine.

Why SAELens's name is wrong is asserted as well: its logits are those of a splice that encodes the *output* of the MLP,
and a skip transcoder's with the right hook are those without the skip connection.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAETransformerBridge
from torch import Tensor
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

import gemma_scope_tl as gs
from benchmarks.coder_files import Coder, random_arrays
from benchmarks.saelens_loader import load_released_with_sae_lens
from benchmarks.timing import main
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS

RELEASED, CORRECTED = "SAELens's bridge, released name", "SAELens's bridge, its hook corrected"
TOLERANCE = 1e-4  # two float32 programs of a dozen layers, whose logits are of size 5
VOCABULARY = 512


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, its coders and the text; the heads together are wider than the stream."""

    width: int = 128
    heads: int = 4
    head: int = 64
    layers: int = 12  # full attention at 5 and 11, a sliding window at the others
    window: int = 8
    latents: int = 1024
    rows: int = 4
    tokens: int = 64


QUICK = Sizes(64, 2, 64, 9, 8, 256, 1, 20)


def random_model(sizes: Sizes) -> Any:
    """A random Gemma 3 whose weights and gains are so large that a wrong tensor cannot look right."""
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=1,
        head_dim=sizes.head,
        query_pre_attn_scalar=sizes.head,
        sliding_window=sizes.window,
        max_position_embeddings=sizes.tokens,
    )
    config.architectures = ["Gemma3ForCausalLM"]  # which SAELens's bridge needs
    torch.manual_seed(0)
    model: Any = Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 1.2 * sizes.width**-0.5)
    model.set_attn_implementation("eager")
    return model.eval()


def formula(arrays: dict[str, Tensor], x: Tensor, skip: bool) -> Tensor:
    """``f W_dec + b_dec (+ x S)`` with ``f = z H(z - theta)``, ``z = x W_enc + b_enc``, in float64."""
    wide, x = {name: array.double() for name, array in arrays.items()}, x.double()
    z = x @ wide["w_enc"] + wide["b_enc"]
    out = (z * (z > wide["threshold"])) @ wide["w_dec"] + wide["b_dec"]
    return out + x @ wide["affine_skip_connection"] if skip else out


class Case:
    """A transcoder in a folder, the models, and what the formula gives.

    Attributes:
        clean: logits of the model without a splice.
        wanted: logits with the splice.
    """

    def __init__(self, root: Path, affine: bool, sizes: Sizes) -> None:
        self.coder, self.root = Coder("transcoder", affine=affine), root
        self.arrays = random_arrays(sizes.width, sizes.latents, affine=affine, threshold=1.5, decoder=0.5)
        self.coder.write(root, self.arrays)
        self.hf = random_model(sizes)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (sizes.rows, sizes.tokens), generator=generator)
        self.clean = self.hf(self.ids).logits
        self.wanted = self.reference(behind_gain=True, skip=affine)

    def reference(self, *, behind_gain: bool, skip: bool) -> Tensor:
        """Logits of Hugging Face's model with the formula at the MLP's output.

        Args:
            behind_gain: encode the output of the pre-MLP norm, as the coder was trained; else the MLP's output.
            skip: add the skip connection.
        """
        layer, seen = self.hf.model.layers[self.coder.layer], dict[str, Tensor]()

        def keep(_module: Any, _args: Any, out: Tensor) -> None:
            seen["x"] = out

        def replace(_module: Any, _args: Any, out: Tensor) -> Tensor:
            return formula(self.arrays, seen["x"] if behind_gain else out, skip).to(out.dtype)

        handles = [
            layer.pre_feedforward_layernorm.register_forward_hook(keep),
            layer.post_feedforward_layernorm.register_forward_hook(replace),
        ]
        try:
            return self.hf(self.ids).logits
        finally:
            for handle in handles:
                handle.remove()

    def ours(self, backend: str) -> Tensor:
        """Logits of this package."""
        model = gs.load_model(hf_model=copy.deepcopy(self.hf), backend=backend)
        sae = gs.JumpReLUTranscoder.from_folder(self.root / self.coder.path)
        return model.run_with_saes(self.ids, saes=sae, exclude_special_tokens=False)

    def stock(self) -> tuple[Tensor, Tensor]:
        """Logits of stock SAELens under the released name, and after the hook was corrected."""
        tokenizer, hf_model = AutoTokenizer.from_pretrained(BUNDLED_MODEL), copy.deepcopy(self.hf)
        bridge = SAETransformerBridge.boot_transformers("google/gemma-3-1b-pt", hf_model=hf_model, tokenizer=tokenizer)
        bridge.eval()
        assert float((bridge(self.ids) - self.clean).abs().max()) <= TOLERANCE, "the models differ without a splice"
        sae = load_released_with_sae_lens(self.root, self.coder.release, self.coder.id)
        released = bridge.run_with_saes(self.ids, saes=[sae])
        sae.cfg.metadata.hook_name = f"blocks.{self.coder.layer}.mlp.hook_in"
        return released, bridge.run_with_saes(self.ids, saes=[sae])  # pyright: ignore[reportReturnType]


def largest_and_mean(difference: Tensor) -> dict[str, float]:
    """The largest and the mean absolute entry."""
    size = difference.double().abs()
    return {"largest": float(size.max()), "mean": float(size.mean())}


@torch.no_grad()
def run(quick: bool = False) -> list[dict[str, Any]]:
    """Two rows for a transcoder without a skip connection, and two for one with it."""
    rows: list[dict[str, Any]] = []
    for affine in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            rows += _rows(Case(Path(folder), affine, QUICK if quick else Sizes()))
    return rows


def _rows(case: Case) -> list[dict[str, Any]]:
    errors = {backend: largest_and_mean(case.ours(backend) - case.wanted) for backend in BACKENDS}
    assert max(error["largest"] for error in errors.values()) <= TOLERANCE, errors
    ours = errors["bridge"]  # as the peer
    released, corrected = case.stock()
    moves = largest_and_mean(case.wanted - case.clean)
    causes = {
        "encodes_the_output": (released, case.reference(behind_gain=False, skip=False)),
        "drops_the_skip": (corrected, case.reference(behind_gain=True, skip=False)),
    }
    explained = {name: float((got - meant).abs().max()) for name, (got, meant) in causes.items()}
    assert max(explained.values()) <= TOLERANCE, explained
    what = f"logit error of a spliced {case.coder.title} of Gemma Scope 2 (the splice moves logits by up to "
    what += f"{moves['largest']:.1f}, on average {moves['mean']:.2f})"
    rows: list[dict[str, Any]] = []
    for id_, peer, logits in (("released", RELEASED, released), ("corrected", CORRECTED, corrected)):
        theirs = largest_and_mean(logits - case.wanted)
        row = {
            "id": f"{case.coder.title.replace(' ', '-')}-{id_}",
            "what": what,
            "peer": peer,
            "ours": _shown(ours),
            "theirs": _shown(theirs),
            "ratio": theirs["largest"] / max(ours["largest"], torch.finfo(torch.float32).eps),
            "moves": moves,
            "peer_error": theirs,
            "ours_error": errors,
        }
        rows.append(row | ({"peer_explained_within": explained} if id_ == "released" else {}))
    return rows


def _shown(error: dict[str, float]) -> str:
    """Both numbers, those of rounding as a power of ten."""
    largest, mean = (f"{value:.2f}" if value >= 0.01 else f"{value:.0e}" for value in error.values())
    return f"{largest}, on average {mean}"


if __name__ == "__main__":
    main("gemma3", run)
