"""Hooked models with sites, and splicing of SAEs into their forward passes.

An SAE is attached as an ordinary hook on the ``HookPoint`` of its site. No module of the model is replaced, so
detaching restores the model exactly, hooks of the user keep running, and both backends behave in the same way.

While an SAE is attached, its hook points have names such as ``<hook of the site>.hook_sae_acts_post``, with the name of
the site's hook in either backend. These are the cache keys of both models of SAELens. A hook on one of them edits the
activations of the latents.

This is the only package that imports the models of TransformerLens.
"""
