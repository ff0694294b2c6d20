"""dynmoe: neural networks that grow experts under distribution shift."""

__version__ = "0.1.0"
