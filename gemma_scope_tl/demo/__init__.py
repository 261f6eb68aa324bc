"""The interactive demo: what it computes (no word of a user interface), how that looks, and the web app around it."""
