"""Several tasks as one, each with the same number of problems (paper, section 3.3)."""

from collections.abc import Sequence
from dataclasses import replace

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split, Task
from rheostat.types import Completion, Problem, Prompt, Verdict

_OWN = "own"  # the member's own problem, which may name a member of the member


class MixtureTask:
    """A balanced mixture; results are shown per member as well.

    Args:
        tasks: at least two, with names of their own. A member's problems keep the order of its task.

    Raises:
        ConfigError: one task, or two of one name.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._members = {task.name: task for task in tasks}
        if len(tasks) < 2 or len(self._members) < len(tasks):
            raise ConfigError(f"a mixture needs two tasks or more of different names, got {[t.name for t in tasks]}")
        self.name = "+".join(self._members)
        self.max_tokens = max(task.max_tokens for task in tasks)
        self.verifies_concurrently = all(getattr(task, "verifies_concurrently", False) for task in tasks)

    @property
    def members(self) -> tuple[Task, ...]:
        return tuple(self._members.values())

    def problems(self, split: Split, count: int, start: int = 0) -> list[Problem]:
        """As many of each member, one member after another; see :class:`rheostat.tasks.base.Task`."""
        size = len(self._members)
        if count % size or start % size:
            raise ConfigError(
                f"task {self.name}: problems come in multiples of its {size} members, got {count} from {start}"
            )
        found: dict[str, Problem] = {}
        for name, task in self._members.items():
            for own in task.problems(split, count // size, start // size):
                if own.id in found:
                    raise ConfigError(
                        f"task {self.name}: {found[own.id].member} and {name} share the problem {own.id}: leave one out"
                    )
                found[own.id] = replace(own, task=self.name, member=name, metadata={_OWN: own})
        return list(found.values())

    def _own(self, problem: Problem) -> tuple[Task, Problem]:
        own = problem.metadata[_OWN]
        assert isinstance(own, Problem)
        return self._members[problem.member], own

    def prompt(self, problem: Problem, epoch: int = 0) -> Prompt:
        """The member's; see :class:`rheostat.tasks.base.Task`."""
        task, own = self._own(problem)
        return task.prompt(own, epoch)

    def verify(self, problem: Problem, completion: Completion) -> Verdict:
        """The member's; see :class:`rheostat.tasks.base.Task`."""
        task, own = self._own(problem)
        return task.verify(own, completion)
