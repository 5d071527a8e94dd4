"""Errors that tell the user what to do; the command line turns each into one line and exit code 2."""


class RheostatError(Exception):
    """Base of every error that Rheostat raises on purpose."""


class ConfigError(RheostatError):
    """A field, flag or strategy that cannot be used as given."""


class ModelError(RheostatError):
    """A base model that is unknown, damaged, out of reach or too small for the request."""


class AdapterError(RheostatError):
    """A folder that is no adapter, or an adapter that does not fit the base model or the engine."""


class StoreError(RheostatError):
    """A rollout store or output folder that cannot be read or written."""
