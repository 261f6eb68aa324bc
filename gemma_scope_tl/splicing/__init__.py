"""SAEs inside hooked forward passes: replace an activation by its reconstruction, with or without the error term.

An SAE is attached as an ordinary hook on the site's own ``HookPoint``. Nothing is swapped in the model, so detaching
restores it exactly, the user's own hooks stay where they are and keep firing, and both backends behave the same.

While attached, the SAE's hook points answer to ``<site's HookedTransformer hook>.hook_sae_acts_post`` and the like, on
both backends, and to the bridge's name of the site's hook in that place: the cache keys of both of SAELens's models. A
hook on one of them edits the features.
"""

from gemma_scope_tl.splicing.mixin import SpliceMixin, splice
from gemma_scope_tl.splicing.names import translate_hook_name
from gemma_scope_tl.tokens import ExcludeTokens

__all__ = ["ExcludeTokens", "SpliceMixin", "splice", "translate_hook_name"]
