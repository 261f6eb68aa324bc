"""Interpretation of latents: examples of where they fire, scored explanations by a language model, and exports."""

from gemma_scope_tl.interp.client import ChatClient, LocalModel
from gemma_scope_tl.interp.controls import compare_explanations, explanation_study
from gemma_scope_tl.interp.examples import Example, Examples, top_examples
from gemma_scope_tl.interp.explanations import detection_scores, explain, simulation_scores
from gemma_scope_tl.interp.neuronpedia import export_neuronpedia
from gemma_scope_tl.interp.sampling import Sampling

__all__ = [
    "ChatClient",
    "Example",
    "Examples",
    "LocalModel",
    "Sampling",
    "compare_explanations",
    "detection_scores",
    "explain",
    "explanation_study",
    "export_neuronpedia",
    "simulation_scores",
    "top_examples",
]
