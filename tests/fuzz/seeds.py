"""Small valid files of every kind, made in code: where the fuzzer starts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np

from tests.fuzz.zip_files import DEFLATED, Member, npy, write_zip

D_IN, D_SAE = 3, 6
_KINDS = {"float64": "F64", "float32": "F32", "float16": "F16"}


def arrays(dtype: str = "float32", skip: bool = False, **more: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a tiny SAE: ``W_enc [3, 6]``, ``W_dec [6, 3]`` and the vectors."""
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    made = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    made["threshold"] = np.abs(rng.normal(size=D_SAE)).astype(dtype)
    if skip:
        made["W_skip"] = rng.normal(size=(D_IN, D_IN)).astype(dtype)
    return {**made, **more}


def npz(made: dict[str, np.ndarray], method: int = 0, version: tuple[int, int] = (1, 0)) -> bytes:
    """The arrays as numpy saves them."""
    return write_zip([Member(f"{name}.npy".encode(), npy(array, version), method) for name, array in made.items()])


def safetensors(made: dict[str, np.ndarray], **metadata: str) -> bytes:
    """The arrays in a safetensors file."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, array in made.items():
        end = at + array.nbytes
        header[name] = {"dtype": _KINDS[str(array.dtype)], "shape": list(array.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in made.values())


def npz_seeds() -> list[bytes]:
    """Stored and deflated, every npy version, both orders, zip64, descriptors, more and fewer arrays."""
    plain = arrays()
    fortran = {name: np.asfortranarray(array) for name, array in plain.items()}
    big = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in plain.items()}
    members = [Member(f"{name}.npy".encode(), npy(array)) for name, array in plain.items()]
    zip64 = [
        replace(m, local_extra=b"\x01\x00\x10\x00" + len(m.content).to_bytes(8, "little") * 2,
                local={"compressed": 0xFFFFFFFF, "size": 0xFFFFFFFF})
        for m in members
    ]  # fmt: skip
    streamed = [replace(m, method=DEFLATED, descriptor=b"PK\x07\x08" + bytes(12)) for m in members]
    logarithm = {name: array for name, array in plain.items() if name != "threshold"}
    odd = {
        "i": np.arange(5),
        "b": np.ones(3, bool),
        "u": np.ones(2, np.uint16),
        "s": np.float32(1),
        "d": np.ones((2, 1, 2)),
    }
    return [
        npz(plain),
        npz(plain, DEFLATED),
        npz(fortran),
        npz(big, DEFLATED, (2, 0)),
        npz(arrays("float16"), DEFLATED, (3, 0)),
        npz(arrays("float64", skip=True)),
        npz(arrays(scaling_factor=np.ones(D_SAE, np.float32)), DEFLATED),
        npz({**logarithm, "log_threshold": np.log(plain["threshold"])}),
        npz(odd),
        npz({"x": np.zeros(1 << 14, np.float32)}, DEFLATED),
        write_zip(zip64),
        write_zip(streamed),
        write_zip(members, comment=b"a comment"),
    ]


def safetensors_seeds() -> list[bytes]:
    """Every float dtype, a skip transcoder, metadata, and other names."""
    plain, skip = arrays(), np.arange(D_IN * D_IN, dtype=np.float32).reshape(D_IN, D_IN)
    logarithm = {name: array for name, array in plain.items() if name != "threshold"}
    return [
        safetensors(plain),
        safetensors(plain, format="pt"),
        safetensors(arrays("float16")),
        safetensors(arrays("float64", skip=True)),
        safetensors({name.lower(): array for name, array in plain.items()}),
        safetensors({name.lower(): array for name, array in arrays(affine_skip_connection=skip).items()}),
        safetensors(arrays(scaling_factor=np.ones(D_SAE, np.float32))),
        safetensors({**logarithm, "log_threshold": np.full(D_SAE, math.log(2), np.float32)}),
    ]


def yaml_seeds() -> list[bytes]:
    """Release files, flow style, and every kind of scalar."""
    row = (
        "- id: layer_{0}/width_1k/average_l0_9\n  site: res\n  layer: {0}\n  width: 1k\n  d_sae: 1024\n  d_in: 64\n"
        "  l0: 9.5\n  path: layer_{0}/width_1k/average_l0_9\n  canonical: true\n"
    )
    head = (
        "# a release\nrelease: fuzz\ncanonical_release: fuzz-canonical\nrepo: {0}\nmodel: gemma-2-2b\n"
        'license: CC-BY-4.0\ndescription: "A release"\nnotes: []\nsaes:\n'
    )
    flow = json.dumps({"release": "fuzz", "repo": "o/n", "model": "m", "license": "x", "description": "d", "saes": []})
    scalars = "a: ~\nb: yes\nc: 0x1f\nd: 1_000\ne: 1.5e+5\nf: .inf\ng: 2024-01-01\nh: '1'\ni: !!str 5\n1: {}\nj: [1, 2]"
    block = "a: |\n  text\n  more\nb: >-\n  folded\n? c\n: - d\n  - !!int '7'\n  - !!float '1'\n  - !!bool 'no'\n"
    full = row.format(0) + "  neuronpedia: gemma-2-2b/0-res\n  revision: main\n  note: hm\n  sha256: " + "a" * 64 + "\n"
    return [
        (head.format("owner/name") + row.format(3) + row.format(4)).encode(),
        (head.format(".") + full).encode(),
        (head.format("./escape") + row.format(1) + "format: sae-lens\n").encode(),
        flow.encode(),
        scalars.encode(),
        block.encode(),
    ]


def cfg_seeds() -> list[bytes]:
    """Configurations of SAELens 6, before it, and of transcoders."""
    metadata = {"sae_lens_version": "6.0.0", "hook_name": "blocks.3.hook_resid_post", "model_name": "gemma-2-2b"}
    metadata |= {"prepend_bos": True, "context_size": 1024, "hook_name_out": None, "model_from_pretrained_kwargs": {}}
    new = {"architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}
    new |= {"apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none"}
    old = {
        **new,
        "hook_name": "blocks.3.hook_resid_post",
        "hook_layer": 3,
        "hook_head_index": None,
        "prepend_bos": True,
    }
    old |= {"model_name": "gemma-2-2b", "sae_lens_version": "5.1.0", "finetuning_scaling_factor": False}
    out = {**metadata, "hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    made = [
        {**new, "metadata": metadata},
        {**new, "apply_b_dec_to_input": True, "metadata": metadata},
        old,
        {**new, "architecture": "jumprelu_transcoder", "d_out": D_IN, "metadata": out},
    ]
    return [json.dumps(one).encode() for one in made]


def config_seeds() -> list[bytes]:
    """Gemma Scope 2's configurations: of an SAE, with a label for the width, of a transcoder, and of several layers."""
    point = "model.layers.3.output"
    sae = {"hf_hook_point_in": point, "hf_hook_point_out": point, "width": D_SAE, "architecture": "jump_relu"}
    sae |= {"model_name": "google/gemma-3-1b-pt", "l0": 6, "affine_connection": False, "type": "sae"}
    norms = [f"model.layers.3.{name}_feedforward_layernorm.output" for name in ("pre", "post")]
    transcoder = {**sae, "hf_hook_point_in": norms[0], "hf_hook_point_out": norms[1], "type": "transcoder"}
    made = [
        sae,
        transcoder,
        {**transcoder, "model_name": "someone/tiny"},
        {},
        {**sae, "width": "16k"},
        {**transcoder, "affine_connection": True},
        {**transcoder, "type": "clt"},
    ]
    return [json.dumps(one).encode() for one in made]


def stamp_seeds() -> list[bytes]:
    """Stamps of the fixed file: right, without a hash, and of another file. ``"@KEY@"`` stands for the file's key."""
    ranges = {name: [float(array.min()), float(array.max())] for name, array in arrays().items()}
    made = [
        {"key": "@KEY@", "ranges": ranges, "sha256": None},
        {"key": "@KEY@", "ranges": ranges, "sha256": "0" * 64},
        {"key": {"path": "/x", "version": 1, "size": 1}, "ranges": ranges, "sha256": None},
        {"key": "@KEY@", "ranges": {}, "sha256": None},
    ]
    return [json.dumps(one).encode() for one in made]
