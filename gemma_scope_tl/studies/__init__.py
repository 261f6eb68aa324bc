"""The paper's studies: each a function from a model, SAEs and text to a table. ``viz.study_figures`` draws them."""

from gemma_scope_tl.studies.domains import by_domain, labelled_texts, pile_texts
from gemma_scope_tl.studies.fidelity import by_dtype, importance_uniformity, sparsity_fidelity
from gemma_scope_tl.studies.firing import count_firing, firing_frequencies
from gemma_scope_tl.studies.positions import binned_by_position, position_edges
from gemma_scope_tl.studies.probe_data import bundled_concepts
from gemma_scope_tl.studies.probe_results import Probes
from gemma_scope_tl.studies.probes import measure_probes, probe_concepts
from gemma_scope_tl.studies.random_saes import random_twin
from gemma_scope_tl.studies.rollouts import Rollouts, roll_out
from gemma_scope_tl.studies.transfer import base_on_tuned, rescaled

__all__ = [
    "Probes",
    "Rollouts",
    "base_on_tuned",
    "binned_by_position",
    "bundled_concepts",
    "by_domain",
    "by_dtype",
    "count_firing",
    "firing_frequencies",
    "importance_uniformity",
    "labelled_texts",
    "measure_probes",
    "pile_texts",
    "position_edges",
    "probe_concepts",
    "random_twin",
    "rescaled",
    "roll_out",
    "sparsity_fidelity",
]
