"""Adapters in other people's engines: vLLM's server and offline engine, and transformers' ``generate``."""
