"""Rheostat learns how to sample from a frozen language model.

Source of the method: *Learning Adaptive LLM Decoding*, Su et al., 2026, arXiv:2603.09065.
"""

__version__ = "0.1.0"
