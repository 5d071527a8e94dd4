"""An OpenAI-compatible endpoint over an engine and its adapters: ``rheostat serve``."""
