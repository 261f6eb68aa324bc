"""Run circuit-tracer on a case and write what it finds. Runs in the environment of circuit-tracer alone.

    build/circuit-tracer-venv/bin/python scripts/tracer_parity/reference.py FOLDER [--dtype float64]

FOLDER is a case that ``case.py`` wrote. The results are ``graph.npz`` (nodes, the adjacency matrix with targets in
rows, the masks of its pruning) and ``graph/case.json``, the file for its viewer.
"""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from circuit_tracer import attribute
from circuit_tracer.graph import prune_graph
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.cross_layer_transcoder import load_gemma_scope_2_clt
from circuit_tracer.transcoder.single_layer_transcoder import (
    TranscoderSet,
    load_gemma_scope_2_transcoder,
    load_gemma_scope_transcoder,
)
from circuit_tracer.utils.create_graph_files import create_graph_files
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights
from transformers import AutoTokenizer, Gemma2ForCausalLM

HOOKS = {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
"""What circuit-tracer's own configuration of Gemma Scope's transcoders reads and writes."""
THRESHOLDS = {"node_threshold": 0.8, "edge_threshold": 0.98}
PACKAGES = ("circuit-tracer", "transformer-lens", "transformers", "torch")


def config_of(hf: Any, folder: Path, dtype: torch.dtype) -> HookedTransformerConfig:
    """TransformerLens's configuration of a model of the Gemma 2 kind, as it has it for the released ones."""
    c = hf.config
    return HookedTransformerConfig(
        model_name="tiny-gemma-2",
        tokenizer_name=str(folder),
        original_architecture="Gemma2ForCausalLM",
        d_model=c.hidden_size,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        n_layers=c.num_hidden_layers,
        n_ctx=c.max_position_embeddings,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn=c.hidden_activation,
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        final_rms=True,
        gated_mlp=True,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=10_000,
        use_attn_scale=True,
        attn_scale=c.query_pre_attn_scalar**0.5,
        use_local_attn=True,
        window_size=c.sliding_window,
        attn_types=["local" if kind == "sliding_attention" else "global" for kind in c.layer_types],
        attn_scores_soft_cap=c.attn_logit_softcapping,
        output_logits_soft_cap=c.final_logit_softcapping,
        use_normalization_before_and_after=True,
        default_prepend_bos=True,
        device="cpu",
        dtype=dtype,
    )


def transcoders_of(folder: Path, kind: str, layers: int, dtype: torch.dtype) -> Any:
    """The case's transcoders, read by circuit-tracer's own readers of the released files."""
    kwargs: dict[str, Any] = {"device": torch.device("cpu"), "dtype": dtype}
    if kind == "clt":
        paths = {k: str(folder / f"layer_{k}.safetensors") for k in range(layers)}
        # Release 0.5.0 reads one file less than it is given; with the last one given twice it reads all.
        return load_gemma_scope_2_clt({**paths, layers: paths[layers - 1]}, scan="tiny", **HOOKS, **kwargs)
    if kind == "transcoder":
        found = {k: load_gemma_scope_transcoder(str(folder / f"layer_{k}.npz"), k, **kwargs) for k in range(layers)}
    else:
        paths = {k: str(folder / f"layer_{k}.safetensors") for k in range(layers)}
        found = {k: load_gemma_scope_2_transcoder(path, k, **kwargs) for k, path in paths.items()}
    return TranscoderSet(found, scan="tiny", **HOOKS)


def run(folder: Path, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Attribute the case's prompt, prune the graph and write the viewer's file."""
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    hf = Gemma2ForCausalLM.from_pretrained(folder / "model", attn_implementation="eager", torch_dtype=torch.float32)
    config = config_of(hf, folder / "model", dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = TransformerLensReplacementModel(config, tokenizer)
    model.load_and_process_state_dict(
        convert_gemma_weights(hf, config), fold_ln=False, center_writing_weights=False, center_unembed=False
    )
    model.to(dtype)
    model._configure_replacement_model(transcoders_of(folder, case["kind"], case["layers"], dtype))
    tokens = torch.tensor(case["token_ids"])
    graph = attribute(tokens, model, batch_size=64)
    pruned = prune_graph(graph, **THRESHOLDS)
    create_graph_files(graph, "case", str(folder / "graph"), scan="tiny", **THRESHOLDS)
    with torch.no_grad():
        logits = model(tokens[None])[0, -1]
    return {
        "adjacency": graph.adjacency_matrix.numpy(),
        "latents": graph.active_features.numpy(),
        "activations": graph.activation_values.numpy(),
        "logit_tokens": graph.logit_token_ids.numpy(),
        "probabilities": graph.logit_probabilities.detach().numpy(),
        "token_ids": graph.input_tokens.numpy(),
        "logits": logits[graph.logit_token_ids].numpy(),
        "kept_nodes": pruned.node_mask.numpy(),
        "kept_edges": pruned.edge_mask.numpy(),
        "cumulative_influence": pruned.cumulative_scores.numpy(),
    }


def main() -> None:
    """Read a case's folder, run circuit-tracer, and write the results into it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="float64", choices=["float32", "float64"])
    args = parser.parse_args()
    torch.manual_seed(0)
    found = run(args.folder, getattr(torch, args.dtype))
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    facts = {"versions": versions, "dtype": args.dtype, **THRESHOLDS}
    arrays: dict[str, Any] = {"facts": np.array(json.dumps(facts)), **found}
    np.savez_compressed(args.folder / "graph.npz", **arrays)
    kept = found["kept_nodes"].sum(), found["kept_edges"].sum()
    print(f"{args.folder.name}: {len(found['adjacency'])} nodes, {np.count_nonzero(found['adjacency'])} edges; {kept}")


if __name__ == "__main__":
    main()
