"""haste_dist: extreme multi-label classification with a dense head and a group-shared sparse tail (arXiv 2606.01117)."""

__version__ = "0.1.0"
