"""Hooked models with the sites of a suite, and SAEs spliced into their forward passes.

An SAE is attached as an ordinary hook on the site's own ``HookPoint``. Nothing is swapped in the model, so detaching
restores it exactly, the user's own hooks stay where they are and keep firing, and both backends behave the same.

While attached, the SAE's hook points answer to ``<site's HookedTransformer hook>.hook_sae_acts_post`` and the like, on
both backends, and to the bridge's name of the site's hook in that place: the cache keys of both of SAELens's models. A
hook on one of them edits the features.

This is the only room that imports TransformerLens's models.
"""
