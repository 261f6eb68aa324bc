"""The interactive demo: computations without a user interface, their presentation, and the web app."""
