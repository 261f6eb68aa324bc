"""circuit-tracer on the files of :mod:`benchmarks.layered_coders`. Runs in the environment of circuit-tracer alone.

    build/circuit-tracer-venv/bin/python -m benchmarks.layered_tracer load FOLDER LAYERS
    build/circuit-tracer-venv/bin/python -m benchmarks.layered_tracer attribute FOLDER LAYERS IDS BATCH NODES

Prints a line of JSON. ``load`` reads the CLT with circuit-tracer's reader of Gemma Scope 2's files. ``attribute`` also
attributes a prompt, whose token ids are in the file ``IDS``.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

HOOKS = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}


def peak() -> float:
    """The most memory that this process has had resident, in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def load(folder: Path, layers: int) -> Any:
    """The CLT in float32. Release 0.5.0 reads one file less than it is given; with the last one twice it reads all."""
    from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt

    clt = next(folder.glob("clt/*"))
    paths = {k: str(clt / f"params_layer_{k}.safetensors") for k in range(layers)}
    given = {**paths, layers: paths[layers - 1]}
    return load_gemma_scope_2_clt(given, device=torch.device("cpu"), dtype=torch.float32, **HOOKS)


def attribute(folder: Path, layers: int, ids: Path, batch: int, nodes: int) -> dict[str, Any]:
    """Attribute the prompt; ``nodes`` latents become targets, ``batch`` at a time."""
    from circuit_tracer import attribute as run
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
    from transformers import AutoTokenizer, Gemma2ForCausalLM

    from scripts.tracer_parity.reference import config_of

    hf = Gemma2ForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", torch_dtype=torch.float32)
    config = config_of(hf, folder / "model", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    model = TransformerLensReplacementModel(config, tokenizer)
    model.load_and_process_state_dict(
        convert_gemma_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    del hf
    model._configure_replacement_model(load(folder, layers))
    tokens = torch.tensor(json.loads(ids.read_text(encoding="utf-8")))
    started = time.perf_counter()
    graph = run(tokens, model, batch_size=batch, max_feature_nodes=nodes)
    seconds = time.perf_counter() - started
    strongest = graph.adjacency_matrix[-len(graph.logit_probabilities) :].abs().sum(1)
    return {
        "s": seconds,
        "active": len(graph.active_features),
        "nodes": len(graph.selected_features),
        "logits": strongest.tolist(),
    }


def main() -> None:
    """See the module."""
    what, folder, layers, *rest = sys.argv[1:]
    started = time.perf_counter()
    if what == "load":
        kept = load(Path(folder), int(layers))
        found = {"s": time.perf_counter() - started, "layers": kept.n_layers}
    else:
        ids, batch, nodes = rest
        found = attribute(Path(folder), int(layers), Path(ids), int(batch), int(nodes))
    print(json.dumps({**found, "mib": peak()}))


if __name__ == "__main__":
    main()
