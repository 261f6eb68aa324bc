"""Texts as token ids with a mask: from what users pass to functions, and from documents, to rows of tokens."""

from gemma_scope_tl.text.batch import Text, TokenBatch, as_batch
from gemma_scope_tl.text.tokenizing import text_ids, tokenize, without_bos

__all__ = ["Text", "TokenBatch", "as_batch", "text_ids", "tokenize", "without_bos"]
