"""How each file of the registry is derived; ``scripts/build_registry.py`` writes and checks them."""
