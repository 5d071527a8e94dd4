"""The verdict on a mathematical answer: what stands in the last box, or else what math-verify takes for the answer.

math-verify is generous, and so is this: 10\\% equals 10 and 0.1, 90^\\circ equals 90, the pair (1,2) equals the set
1,2, and units count for nothing. A base counts where both answers name one: 12_8 is not 12_7.
"""

import re
from collections import deque
from typing import Any

from rheostat.tasks.workers import CallFailed, Raised, WorkerPool
from rheostat.types import Problem, Verdict

_TIMEOUT = 5.0  # seconds; the slowest verdict on an answer of MATH takes 0.3, and a busy machine is slower
_TAIL = 4_000  # characters in which the answer of a completion without a box is looked for, from its end
_LONGEST = 1_000  # characters of an answer in a box; MATH's longest has 159
_DEEPEST = 12  # brackets within brackets: each costs the parser twice the time; MATH's deepest has 3
_LARGEST = 100_000  # exponent or factorial beyond which sympy computes for ever; MATH's largest is 4950

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_TEXT = re.compile(r"\\(?:text(?:rm|bf|it|sf|normal)?|mbox|math(?:rm|bf|it|sf))\s*\{([^{}]*)\}")
_WORDS = (
    r"mm|cm|km|ft|kg|mph|feet|foot|inch(?:es)?|miles?|yards?|(?:kilo|centi|milli)?met(?:er|re)s?|(?:kilo)?grams?|"
    r"pounds?|lit(?:er|re)s?|degrees?|dollars?|cents?|seconds?|minutes?|hours?|days?|weeks?|months?|years?|units?"
)
_UNIT = re.compile(rf"(?:{_TEXT.pattern}|(?<![a-zA-Z\\])(?:(?:square|cubic)\s+)?(?:{_WORDS}))\s*(?:\^\{{?[23]\}}?)?$")
_ENDING = " \t\n.,;:"
_REWRITES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\[()\[\]$]|\$", ""),  # mathematics within mathematics, and dollars
        (r"(?<=\d)(?:,\\!|\{,\}|\\,)\s*(?=\d{3})", ""),  # thousands
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[,;: ]|~", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])", ""),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r",?\s*\\(?:text|mbox)\s*\{,?\s*(?:and|or)\s*\}", ", "),
        (r"\\(?:text|mbox)\s*\{\s*([aApP])\.?\s*[mM]\.?\s*\}", r"\1m"),  # no unit: it tells times apart
        (r"°|\\degree(?![a-zA-Z])", r"^\\circ "),
        (r"^\s*(?:\\approx|[a-zA-Z]\s*\\in)(?![a-zA-Z])\s*", ""),
    )
]
_STOPS = re.compile(r"[.,;]\s*(?=\\[\])]|\$(?:\s|$))")  # a sentence that ends inside its formula
_GAP = re.compile(r"\s+(?=[^\w\s,])|(?<=[^\w\s,])\s+")
_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_BASE = re.compile(r"-?[\dA-Z]+_\{?(\d+)\}?", re.ASCII)

_POWER = re.compile(r"\^[\s{(]*-?\s*(\d+)|(\d+)\s*!|\\[dt]?binom\s*\{\s*(\d+)")
_TOWER = re.compile(r"\d[\s})]*\^[\s{(-]*(\d+)[\s})]*\^[\s{(-]*(\d+)")
_FACTORIALS = re.compile(r"![\s})]*!")


class MathVerifier:
    """Judges completions against the answers of their problems; for any number of threads.

    sympy decides whatever equal text and integers do not, in worker processes that start when they are first needed.
    An answer that hangs or crashes it is wrong.
    """

    def __init__(self) -> None:
        self._pool = WorkerPool("rheostat.tasks.equality:equal", timeout=_TIMEOUT)

    def __call__(self, problem: Problem, completion: str) -> Verdict:
        """Right when the completion's answer equals ``problem.answer``, which is bare LaTeX or text.

        The answer is the content of the last ``\\boxed`` or ``\\fbox``; an empty or unclosed one is wrong. Without a
        box it is what math-verify finds: what follows the word "answer", else the last formula, else the last number.

        Raises:
            RheostatError: the worker processes cannot start: there is no verdict.
        """
        answer, box = _plain(problem.answer), last_box(completion)
        if box is None:
            return self._compare(answer, _STOPS.sub("", completion[-_TAIL:]), boxed=False)
        if len(box) > max(_LONGEST, 2 * len(problem.answer)):
            return Verdict(False, "the answer is too long")
        written = _plain(box)
        if not written:
            return Verdict(False, "the box is empty")
        if (same := _same(answer, written)) is not None:
            return Verdict(same, "" if same else "not equal", written)
        if _is_hopeless(answer) or _is_hopeless(written):
            return Verdict(False, "the answer is too large or too deep to be computed", written)
        return self._compare(answer, written, boxed=True)

    def _compare(self, answer: str, written: str, boxed: bool) -> Verdict:
        if not written.strip():
            return Verdict(False, "no answer")
        known = written if boxed else None  # in a text, only the worker finds the answer
        try:
            outcome: Any = self._pool.call(answer, written, boxed)
        except CallFailed as error:
            return Verdict(False, str(error), known)
        if isinstance(outcome, Raised):
            return Verdict(False, f"{outcome.type}: {outcome.message}", known)
        is_equal, found = outcome
        return Verdict(is_equal, "" if is_equal else "not equal", known or found)

    def close(self) -> None:
        """Ends the worker processes."""
        self._pool.close()


def last_box(text: str) -> str | None:
    """What stands in the last ``\\boxed`` or ``\\fbox``: empty when it is not closed; None when there is no box."""
    boxes = deque(_BOX.finditer(text), maxlen=1)
    if not boxes:
        return None
    last = boxes[0]
    if text[last.end() : last.end() + 1] != "{":  # TeX takes the next token, people mean the rest of the formula
        return re.split(r"[$\n]", text[last.end() : last.end() + _LONGEST], maxsplit=1)[0]
    depth = 0
    for brace in _BRACE.finditer(text, last.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0 and brace[0] == "}":
            return text[last.end() + 1 : brace.start()]
    return ""


def _plain(latex: str) -> str:
    """An answer without spacing, units and final punctuation, which sympy's parser trips over."""
    latex = latex.rstrip(_ENDING)
    for pattern, replacement in _REWRITES:
        latex = pattern.sub(replacement, latex)
    latex = latex.strip().rstrip(_ENDING)
    number = _UNIT.sub("", latex).rstrip(_ENDING)
    return number if re.search(r"\d|\\pi", number) else latex


def _same(answer: str, written: str) -> bool | None:
    """What the texts alone tell: equal text, two integers, numbers in two bases; None when it takes sympy."""
    answer, written = (_GAP.sub("", _TEXT.sub(r"\1", text)) for text in (answer, written))
    if answer == written:
        return True
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(written):
        return int(answer) == int(written)
    bases = [_BASE.fullmatch(text) for text in (answer, written)]
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    return None


def _is_hopeless(latex: str) -> bool:
    """Whether sympy would compute for ever: the commonest cases, known without waiting for the timeout."""
    depth = deepest = 0
    for bracket in re.findall(r"[{(\[\])}]", latex):
        depth += 1 if bracket in "{([" else -1
        deepest = max(deepest, depth)
    powers = (int(number) for match in _POWER.finditer(latex) for number in match.groups() if number)
    towers = (int(exponent) * int(base).bit_length() for base, exponent in _TOWER.findall(latex))
    return (
        deepest > _DEEPEST
        or any(power > _LARGEST for power in powers)
        or any(bits > _LARGEST.bit_length() for bits in towers)
        or _FACTORIALS.search(latex) is not None
    )
