"""The interactive demo: computations that do not depend on the user interface, their presentation, and the web app."""
