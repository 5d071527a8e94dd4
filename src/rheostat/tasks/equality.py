"""Whether two mathematical answers are equal, by math-verify; imported in worker processes only.

sympy, which does the work, can take for ever and any amount of memory: call it through a ``WorkerPool``. math-verify's
own time limits need the main thread and raise what no ``except Exception`` catches; they are off.
"""

import logging
from functools import lru_cache
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

# Its removal of units takes single letters for units, too: "a + b + c" becomes "a + b +", and 3x + 2t equals 3x + 2.
_BOX = LatexExtractionConfig(
    boxed_match_priority=0,
    try_extract_without_anchor=False,
    normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="all"),
)
_TEXT = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it would say for every worker that its limits are off


@lru_cache(maxsize=1024)  # one problem has many completions
def _expression(latex: str) -> Any:
    return parse(f"\\boxed{{{latex}}}", [_BOX], fallback_mode="no_fallback", parsing_timeout=None)


def equal(answer: str, written: str, boxed: bool) -> tuple[bool, str | None]:
    """Whether what was written equals the answer, which is bare LaTeX; and the text that was taken for an answer.

    Args:
        answer: the reference.
        written: bare LaTeX; or the text in which math-verify is to find the answer: after the word "answer", the last
            formula, the last number.
        boxed: that it is bare LaTeX.
    """
    found = _expression(written) if boxed else parse(written, _TEXT, fallback_mode="first_match", parsing_timeout=None)
    texts, found = [item for item in found if isinstance(item, str)], [x for x in found if not isinstance(x, str)]
    same = bool(verify(_expression(answer), found, allow_set_relation_comp=True, timeout_seconds=None))
    return same, next(iter(texts), None)
