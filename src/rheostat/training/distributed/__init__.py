"""Work for many processes, on Ray; only the modules of this room import it.

A :class:`RayEngine` is an engine to everybody else; behind it stand workers, one engine each, and judges, which verify
what the workers write. :class:`Trainers` make updates of a token-level adapter together.
"""

from rheostat.training.distributed.trainers import Trainers
from rheostat.training.distributed.workers import RayEngine

__all__ = ["RayEngine", "Trainers"]
