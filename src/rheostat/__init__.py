"""Rheostat learns how to sample from a frozen language model.

Source of the method: *Learning Adaptive LLM Decoding*, Su et al., 2026, arXiv:2603.09065.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``RheostatLogitsProcessor``, imported when it is asked for: ``import rheostat`` alone stays quick."""
    if name == "RheostatLogitsProcessor":
        from rheostat.serving.transformers_processor import RheostatLogitsProcessor

        return RheostatLogitsProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
