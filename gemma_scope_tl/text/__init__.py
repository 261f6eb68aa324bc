"""Conversion of texts and documents to token ids with a mask, and to rows of tokens for training and evaluation."""

from gemma_scope_tl.text.batch import Text, TokenBatch, as_batch
from gemma_scope_tl.text.tokenizing import text_ids, tokenize, without_bos

__all__ = ["Text", "TokenBatch", "as_batch", "text_ids", "tokenize", "without_bos"]
