"""Metrics of a training run: always one JSON object per line, and where asked tensorboard, trackio or wandb."""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from rheostat.errors import ConfigError
from rheostat.files import atomic_write, disk_error


class Tracking(StrEnum):
    """Where metrics go beside ``metrics.jsonl``."""

    TENSORBOARD = "tensorboard"
    TRACKIO = "trackio"
    WANDB = "wandb"


class _Sink(Protocol):
    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _Tensorboard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Module:
    """trackio and wandb share their interface."""

    def __init__(self, name: str, folder: Path) -> None:
        import importlib

        self._module = importlib.import_module(name)
        self._module.init(project="rheostat", name=folder.name)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._module.log(numbers, step=step)

    def close(self) -> None:
        self._module.finish()


class Tracker:
    """Writes ``metrics.jsonl`` in ``folder``, and to the services that are asked for.

    Args:
        folder: exists.
        services: their packages must be installed.
        history: the lines of an interrupted run up to its checkpoint; the file is rewritten with these.

    Raises:
        ConfigError: a service's package is not installed, or it refuses (no login, no network).
        StoreError: the file cannot be written.
    """

    def __init__(
        self, folder: Path, services: Sequence[Tracking] = (), history: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._path = folder / "metrics.jsonl"
        atomic_write(self._path, "".join(json.dumps(line) + "\n" for line in history))
        self._sinks: list[_Sink] = []
        for service in services:
            try:
                sink = _Tensorboard(folder) if service is Tracking.TENSORBOARD else _Module(str(service), folder)
            except ImportError as error:
                raise ConfigError(f"tracking: {service} is not installed: pip install {service}") from error
            except Exception as error:  # theirs are of any kind
                raise ConfigError(f"tracking: {service} does not start: {_line(error)}") from error
            self._sinks.append(sink)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """One line; it has a ``step``. A service that fails now is left out from here on, with a warning."""
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(metrics) + "\n")
        except OSError as error:
            raise disk_error("write", self._path, error) from error
        self._each(lambda sink: sink.log(_numbers(metrics), int(metrics["step"])))

    def close(self) -> None:
        """Finish with the services."""
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[_Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except Exception as error:  # hours of training are not lost with a dashboard
                self._sinks.remove(sink)
                warnings.warn(
                    f"tracking: a service failed and gets no more metrics ({_line(error)}); {self._path} has them all",
                    RuntimeWarning,
                    stacklevel=3,
                )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names with slashes."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            found[prefix + name] = float(value)
    return found
