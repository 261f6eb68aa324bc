"""Random models of Gemma 3 1B's shape, and random crosscoders and cross-layer transcoders (CLTs) for them.

In memory, a coder's decoders have all output planes, as in the released files; this package takes views of them without
the planes of earlier layers. On disk, they have the layout of the release: a file for each layer. A CLT of 1B takes
30 GiB there, of which only the rows of latents that fire on a given prompt are written. The rest are holes, which read
as zeros and take no space. Nothing in the time of a pass depends on the values of rows.

Encoder columns are normal with variance ``1 / d``, divided by the root mean square of the input, so that
pre-activations are N(0, 1) and one threshold makes as many latents fire as wanted. Decoder rows are scaled so that each
output has about the root mean square of the tensor it replaces.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

import gemma_scope_tl as gs
from benchmarks.gemma3_1b import Sizes, tokens_of, write_model
from gemma_scope_tl.model.read import visit_places
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sae.layered import LAYERED_KINDS, LayeredCoder, LayeredKind
from gemma_scope_tl.sites import Place
from scripts.tracer_parity.case import TOKENIZER

FOLDER = Path(__file__).parents[1] / "build" / "layered"
QUICK_FOLDER = FOLDER.with_name("layered-quick")
CUT_FOLDER, QUICK_CUT_FOLDER = FOLDER.with_name("layered-cut"), FOLDER.with_name("layered-cut-quick")
CLT_FOLDER = "clt/width_262k_l0_medium"
DONE = "sizes.json"
SMALL_VOCABULARY = 2_048
"""That of the bundled tokenizer. What is measured does not depend on the unembedding."""


@dataclass(frozen=True)
class CLTSizes:
    """A CLT of all layers of ``model``, and the prompt on which it is measured.

    Attributes:
        model: the model's sizes; ``tokens`` is the length of the prompt.
        latents: of each layer.
        l0: latents that fire on a token, in all layers together.
        family: ``gemma3``, or ``gemma2`` for what circuit-tracer runs on TransformerLens.
    """

    model: Sizes
    latents: int
    l0: int
    family: str = "gemma3"

    @property
    def threshold(self) -> float:
        """The threshold at which ``l0`` latents fire on a token."""
        return threshold_of(self.l0, self.latents * self.model.layers)


TRUE = CLTSizes(Sizes(vocabulary=SMALL_VOCABULARY, tokens=512), 10_080, 200)
"""262k of 1B, and about 100,000 active latents on a prompt, as users report of the released one."""
QUICK = CLTSizes(Sizes(64, 128, 2, 32, SMALL_VOCABULARY, 6, 8, 256, 8, 24), 64, 24)
CUT = CLTSizes(replace(TRUE.model, layers=6), 10_080, 46, "gemma2")
QUICK_CUT = replace(QUICK, family="gemma2")
"""What circuit-tracer attributes on TransformerLens, with as many latents active in a layer."""


def threshold_of(l0: float, latents: int) -> float:
    """The threshold above which ``l0`` of ``latents`` normal pre-activations are, on average."""
    share = torch.tensor(1.0 - l0 / latents, dtype=torch.float64)
    return float(torch.special.ndtri(share))


def random_encoder(d_in: int, latents: int, layer: int, rms: float = 1.0) -> Tensor:
    """``[d_in, latents]``."""
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(d_in, latents, generator=generator).mul_(d_in**-0.5 / rms)


def row_length(d_out: int, rms: float, l0: float, threshold: float) -> float:
    """The length of decoder rows with which ``l0`` latents just above ``threshold`` give outputs of this size."""
    return rms * d_out**0.5 / (max(l0, 1.0) ** 0.5 * threshold)


def random_coder(
    kind: LayeredKind, layers: Sequence[int], d: int, latents: int, l0: int, rms: Sequence[float]
) -> tuple[LayeredCoder, list[Tensor]]:
    """A coder, and for each of its layers the decoder with all planes ``[latents, layers, d]``, of which it has views.

    Args:
        kind: of the coder.
        layers: the model's layers.
        d: width of the tensors.
        latents: of each layer.
        l0: latents that fire on a token, in all layers together.
        rms: root mean square of each layer's tensors.
    """
    count = len(layers)
    theta = threshold_of(l0, latents * count)
    base = torch.nn.functional.normalize(torch.randn(latents, d, generator=torch.Generator().manual_seed(99)), dim=1)
    stacked: list[Tensor] = []
    for j in range(count):
        whole = torch.zeros(latents, count, d)
        for k in range(j, count):
            length = row_length(d, rms[k], l0 * (k + 1) / count, theta)
            torch.mul(base.roll(1 + 37 * j + 101 * k, dims=0), length, out=whole[:, k])
        stacked.append(whole)
    bias = [torch.randn(d, generator=torch.Generator().manual_seed(1_000 + k)).mul_(0.1 * rms[k]) for k in range(count)]
    coder = LayeredCoder(
        kind,
        layers,
        [random_encoder(d, latents, k, rms[k]) for k in range(count)],
        [torch.zeros(latents) for _ in layers],
        [torch.full((latents,), theta) for _ in layers],
        [whole[:, j:] for j, whole in enumerate(stacked)],
        bias,
    )
    return coder, stacked


def with_threshold(coder: LayeredCoder, l0: int) -> LayeredCoder:
    """The coder with its arrays, and thresholds at which ``l0`` latents fire on a token."""
    theta = threshold_of(l0, coder.d_sae)
    arrays = [list(part) for part in (coder.W_enc, coder.b_enc, coder.threshold, coder.W_dec, coder.b_dec)]
    w_enc, b_enc, threshold, w_dec, b_dec = arrays
    raised = [torch.full_like(one, theta) for one in threshold]
    skip = None if coder.W_skip is None else list(coder.W_skip)
    name = coder.model_name
    return LayeredCoder(coder.kind, coder.layers, w_enc, b_enc, raised, w_dec, b_dec, skip, model_name=name)


@torch.no_grad()
def calibrate(model: Any, coder: LayeredCoder, ids: Tensor, l0: int, rounds: int = 4) -> None:
    """Set one threshold a layer, at which ``l0`` latents fire on a token of ``ids`` in all layers of the spliced model.

    What a coder writes changes what its later layers read, so the first layers are right after one round, and further
    rounds set the later ones.
    """
    count = len(coder.layers)
    firing = max(1, round(l0 / count * ids.numel()))
    keep = lambda name: name.endswith("hook_sae_acts_pre")  # noqa: E731
    for _ in range(rounds):
        _, cache = model.run_with_cache_with_saes(ids, saes=[coder], names_filter=keep, exclude_special_tokens=False)
        for k, layer in enumerate(coder.layers):
            pre = cache[model.get_sae_hook_name(coder, "hook_sae_acts_pre", layer=layer)]
            found = pre.flatten().topk(firing + 1).values[-2:].mean()  # between two, so that none is on the threshold
            coder.threshold[k].fill_(max(float(found), 1e-3))


def sizes_of(ids: Tensor, model: Any, kind: LayeredKind, layers: Sequence[int]) -> list[float]:
    """Root mean squares of the tensors that a coder of ``kind`` reads on ``ids``, without their first token."""
    found: dict[int, float] = {}

    def visit(place: Place, values: Tensor) -> None:
        assert place.layer is not None
        found[place.layer] = float(values[:, 1:].float().square().mean().sqrt())

    visit_places(model, ids, [Place(LAYERED_KINDS[kind], layer) for layer in layers], visit)
    return [found[layer] for layer in layers]


@torch.no_grad()
def prepare(folder: Path, sizes: CLTSizes) -> None:
    """Write a model and a CLT of all its layers, unless they are there. Rows are written for latents of the prompt."""
    done = folder / DONE
    if done.exists() and json.loads(done.read_text(encoding="utf-8"))["sizes"] == asdict(sizes):
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder / "model", sizes.model) if sizes.family == "gemma3" else _write_gemma2(
        folder / "model", sizes.model
    )
    model = gs.load_model(folder / "model", check=False)
    clt = folder / CLT_FOLDER
    clt.mkdir(parents=True)
    (clt / "config.json").write_text(json.dumps(_config(sizes)), encoding="utf-8")
    counts: dict[int, tuple[int, int]] = {}

    def visit(place: Place, values: Tensor) -> None:
        assert place.layer is not None
        counts[place.layer] = _write_layer(clt, place.layer, values[0], sizes)

    places = [Place("transcoder", layer) for layer in range(sizes.model.layers)]
    visit_places(model, tokens_of(sizes.model, 1, sizes.model.tokens), places, visit)
    active, distinct = (sum(pair[i] for pair in counts.values()) for i in (0, 1))
    found = {"sizes": asdict(sizes), "active": active, "distinct": distinct}
    done.write_text(json.dumps(found), encoding="utf-8")


def prepared(folder: Path) -> dict[str, Any]:
    """What :func:`prepare` noted: the ``sizes``, and how many latents are ``active`` and how many ``distinct`` ones."""
    return json.loads((folder / DONE).read_text(encoding="utf-8"))


def mapped_coder(folder: Path, sizes: CLTSizes) -> LayeredCoder:
    """The CLT in ``folder`` without the checks of its files, for a model of a family that has no released CLT."""
    files = [load_file(file) for file in layer_files(folder, sizes.model.layers)]
    names = ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")
    w_enc, b_enc, threshold, w_dec, b_dec = ([file[name] for file in files] for name in names)
    planes = [whole[:, j:] for j, whole in enumerate(w_dec)]
    return LayeredCoder("clt", range(sizes.model.layers), w_enc, b_enc, threshold, planes, b_dec)


def loaded_coder(folder: Path) -> LayeredCoder:
    """The CLT in ``folder`` as users load one."""
    coder = gs.JumpReLUSAE.from_folder(folder / CLT_FOLDER, family="gemma3")
    assert isinstance(coder, LayeredCoder)
    return coder


def layer_files(folder: Path, layers: int) -> Iterator[Path]:
    """The files of the first ``layers`` layers of the CLT in ``folder``."""
    return (folder / CLT_FOLDER / f"params_layer_{layer}.safetensors" for layer in range(layers))


def _write_gemma2(folder: Path, sizes: Sizes) -> None:
    """A folder of a random model of the Gemma 2 kind, with the gains of all norms 1, in float32."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=1,
        head_dim=sizes.head,
        query_pre_attn_scalar=sizes.head,
        sliding_window=sizes.window,
        max_position_embeddings=2 * sizes.tokens,
        initializer_range=sizes.width**-0.5,
        bos_token_id=2,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    for file in BUNDLED_MODEL.glob("*token*"):
        shutil.copy(file, folder / file.name)
    older = folder.parent / "tokenizer"  # which circuit-tracer's environment reads
    older.mkdir()
    shutil.copy(BUNDLED_MODEL / "tokenizer.json", older / "tokenizer.json")
    (older / "tokenizer_config.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")


def _config(sizes: CLTSizes) -> dict[str, Any]:
    hook = "model.layers.{all}."
    return {
        "hf_hook_point_in": f"{hook}pre_feedforward_layernorm.output",
        "hf_hook_point_out": f"{hook}post_feedforward_layernorm.output",
        "width": sizes.latents * sizes.model.layers,
        "model_name": f"random-gemma-3-{sizes.model.width}",
        "architecture": "jump_relu",
        "l0": sizes.l0,
        "affine_connection": False,
        "type": "clt",
    }


def _write_layer(folder: Path, layer: int, x: Tensor, sizes: CLTSizes) -> tuple[int, int]:
    """Write a layer's file; returns how many latents are active on ``x [tokens, d]``, and how many distinct ones."""
    d, m, count = sizes.model.width, sizes.latents, sizes.model.layers
    w_enc, theta = random_encoder(d, m, layer), sizes.threshold
    on = (x[1:] @ w_enc) > theta
    chosen = on.any(0).nonzero().squeeze(1).numpy()
    file = folder / f"params_layer_{layer}.safetensors"
    small = {
        "w_enc": w_enc.numpy(),
        "b_enc": np.zeros(m, np.float32),
        "threshold": np.full(m, theta, np.float32),
        "b_dec": np.random.default_rng(layer).normal(0.0, 0.1, d).astype(np.float32),
    }
    at = sparse_file(file, small, "w_dec", (m, count, d))
    w_dec = np.memmap(file, np.float32, "r+", at, (m, count, d))
    rng = np.random.default_rng(1_000 + layer)
    for k in range(layer, count):
        length = row_length(d, 1.0, sizes.l0 * (k + 1) / count, theta)
        w_dec[chosen, k] = rng.standard_normal((len(chosen), d), np.float32) * (length * d**-0.5)
    w_dec.flush()
    file.chmod(0o444)  # read-only, like the files of the Hub's cache, so it may be mapped
    return int(on.sum()), len(chosen)


def sparse_file(file: Path, small: dict[str, np.ndarray[Any, Any]], name: str, shape: tuple[int, ...]) -> int:
    """Write a safetensors file of the arrays ``small`` and of a float32 array of zeros, which is a hole.

    Returns:
        The offset of the hole in the file.
    """
    header: dict[str, Any] = {}
    end = 0
    for key, array in (*small.items(), (name, None)):
        size = array.shape if array is not None else shape
        start, end = end, end + 4 * int(np.prod(size))
        header[key] = {"dtype": "F32", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for array in small.values():
            out.write(np.ascontiguousarray(array, np.float32).tobytes())
        at = out.tell()
        out.truncate(8 + len(text) + end)
    return at
