"""``python -m gemma_scope_tl.cli`` is ``gemma-scope``."""

from gemma_scope_tl.cli import main

if __name__ == "__main__":
    main()
