"""What users give: texts as token ids with a mask, SAEs as a list, latents as ints. One way in for every function."""

from gemma_scope_tl.inputs.batch import Text, TokenBatch, as_batch
from gemma_scope_tl.inputs.choices import as_indices, as_saes
from gemma_scope_tl.inputs.tokenizing import text_ids, tokenize, without_bos

__all__ = ["Text", "TokenBatch", "as_batch", "as_indices", "as_saes", "text_ids", "tokenize", "without_bos"]
