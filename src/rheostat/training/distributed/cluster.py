"""A Ray cluster: one that is there, or one that starts here; what it must have, and what its errors say."""

import contextlib
import importlib
import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rheostat.errors import ConfigError

ray: Any = None  # an extra, untyped in parts
with contextlib.suppress(ImportError):
    ray = importlib.import_module("ray")
    importlib.import_module("ray.util.scheduling_strategies")

OLDEST, NEXT = (2, 50), (3, 0)  # versions of Ray
PATIENCE = 15.0  # seconds to reach a cluster, and for others to leave it


def connect(address: str | None, workers: int, trainers: int) -> None:
    """To the cluster at ``address``, or to one that starts here, with a processor for each process that needs one.

    Args:
        trainers: beside the workers; 1: none, since the driver is the one.

    Raises:
        ConfigError: no Ray, another version of it, nobody at the address, or too few resources.
    """
    if ray is None:
        raise ConfigError(f"{_asked(workers, trainers)} needs Ray: pip install 'rheostat[ray]'")
    found = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if not OLDEST <= found < NEXT:
        raise ConfigError(
            f"--workers: Ray {ray.__version__} is not supported, {OLDEST[0]}.{OLDEST[1]} to below {NEXT[0]} is: "
            "pip install 'rheostat[ray]'"
        )
    _keep_stdout_clean()
    quiet = {"log_to_driver": False, "logging_level": "error"}
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # what a batch given out again had come to
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # the default since 2.51
    if address is None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default 15, which starves them where anything else runs
        ray.init(num_cpus=_processes(workers, trainers), include_dashboard=False, **quiet)
    else:
        if trainers > 1 and address.startswith("ray://"):  # Ray Train hangs
            raise ConfigError(
                f"--address {address}: trainers cannot be reached through a Ray client; run the command on a machine "
                "of the cluster, with --address auto"
            )
        if address != "auto":
            _require_listener(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--address {address}: no Ray cluster answers there, or none without its RAY_AUTH_TOKEN ({line(error)})"
            ) from error
    _require_resources(workers, trainers)


def has_gpus() -> bool:
    """Whether the cluster has any: then every worker and every trainer gets one."""
    return bool(ray.cluster_resources().get("GPU", 0) > 0)


def failed(reference: Any) -> bool:
    """Whether there will be no such object, because who was to make it has ended."""
    try:
        ray.get(reference, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return False
    except ray.exceptions.RayError:
        return True
    return False


def line(error: BaseException) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _keep_stdout_clean() -> None:
    """What Ray has to say about its processes goes to stdout, whatever its settings; results belong there alone."""
    own = ray._private.worker
    say = getattr(own, "print_to_stdstream", None)
    if say is not None and not isinstance(say, partial):
        own.print_to_stdstream = partial(_on_stderr, say)


def _on_stderr(say: Callable[..., None], data: dict[str, Any], *others: Any, **named: Any) -> None:
    say(data | {"is_err": True}, *others, **named)


def _require_listener(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--address {address}: give auto, HOST:PORT or ray://HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: nobody answers there ({error.strerror or error})") from error


def _require_resources(workers: int, trainers: int) -> None:
    """Ray itself would wait for ever."""
    need, until = _processes(workers, trainers), time.monotonic() + PATIENCE
    kinds = {"GPU": "GPUs", "CPU": "processors"} if has_gpus() else {"CPU": "processors"}
    for kind, what in kinds.items():
        have = ray.cluster_resources().get(kind, 0)
        while (free := ray.available_resources().get(kind, 0)) < need <= have and time.monotonic() < until:
            time.sleep(0.5)
        if free < need:
            ray.shutdown()
            left = f"has {have:g} {what}" if have < need else f"has {have:g} {what}, of which {free:g} are free"
            each = "worker" if trainers == 1 else "worker and trainer"
            raise ConfigError(f"{_asked(workers, trainers)}: the cluster {left}, and each {each} needs one")


def _processes(workers: int, trainers: int) -> int:
    return workers + (trainers if trainers > 1 else 0)


def _asked(workers: int, trainers: int) -> str:
    return f"--workers {workers}" + (f" --trainers {trainers}" if trainers > 1 else "")
