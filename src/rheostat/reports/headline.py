"""What was learned, in plain words: a claim is made only where the paired interval allows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rheostat.reports import reading
from rheostat.reports.reading import ADAPTER, OWN_NAMES, SINGLE, Results, number, percent, points
from rheostat.statistics import holm

_WORDS = {
    1: "one",
    2: "two",
    3: "three",
    4: "four",
    5: "five",
    6: "six",
    7: "seven",
    8: "eight",
    10: "ten",
    16: "sixteen",
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """One policy against the best single strategy: the verdict (gain, none or worse), and it in a sentence."""

    policy: str
    verdict: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Headline:
    """The verdict (gain, none, worse, several or unknown), its one-line title, the evidence, what the policy does, and
    the judgement of each where several are judged."""

    verdict: str
    title: str
    evidence: str
    behaviour: str
    judgements: tuple[Judgement, ...] = ()

    def __str__(self) -> str:
        parts = (self.title, self.evidence, *(one.sentence for one in self.judgements), self.behaviour)
        return " ".join(part for part in parts if part)

    @property
    def short(self) -> str:
        """The verdict in a few words."""
        if self.judgements:
            return counted([one.verdict for one in self.judgements], "for")
        return _SHORT[self.verdict]


_SHORT = {"gain": "a gain", "none": "no gain", "worse": "worse", "unknown": "not compared"}


def counted(verdicts: Sequence[str], word: str) -> str:
    """How many gain, do not, and are worse: ``a gain for one, no gain for two``; ``word`` is "for" or "in"."""
    found = {"gain": "a gain", "none": "no gain", "worse": "a loss"}
    return ", ".join(f"{said} {word} {in_words(verdicts.count(v))}" for v, said in found.items() if v in verdicts)


def headline(results: Results) -> Headline:
    """Judge the adapter with budget against the best single strategy, over all budgets; where it is not there each
    adapter, or where nothing was learned each baseline.

    A gain (or a loss) is claimed only if the 95 % interval of the paired difference excludes zero; an interval that
    touches zero does not. Of several policies it is claimed only if Holm's correction over them leaves it, too.
    """
    judged = reading.judged(results)
    policies = [judged] if judged == ADAPTER else reading.subjects(results)
    found = [(policy, row) for policy in policies if (row := _difference(results, policy))]
    if not found:
        return Headline("unknown", *_content(results), behaviour(results))
    corrected = _corrected([row for _, row in found])
    judgements = [_judge(results, *one, p, len(found)) for one, p in zip(found, corrected, strict=True)]
    if len(found) == 1:
        (policy, row), (alone,) = found[0], judgements
        return Headline(alone.verdict, alone.sentence, _evidence(results, policy, row), behaviour(results))
    title = _title(results, [one.verdict for one in judgements])
    return Headline("several", title, _shared_evidence(results, found[0][1]), "", tuple(judgements))


_NUMBERS = ("estimate", "low", "high")
_LEVEL = 0.05


def _difference(results: Results, policy: str) -> Mapping[str, Any]:
    """A policy minus the best single strategy, mean over the budgets; empty where a number is missing."""
    row = reading.find(reading.items(results, "differences"), policy=policy, baseline=SINGLE, k="mean")
    return row if all(number(row.get(name)) is not None for name in _NUMBERS) else {}


def _corrected(rows: Sequence[Mapping[str, Any]]) -> Sequence[float | None]:
    """The p-value of each difference after Holm's correction over all of these; None where one has none."""
    found = [number(row.get("p")) for row in rows]
    known = [p for p in found if p is not None]
    return [float(p) for p in holm(known)] if len(known) == len(rows) else [None] * len(rows)


def _verdict(row: Mapping[str, Any]) -> str:
    return "gain" if row["low"] > 0 else "worse" if row["high"] < 0 else "none"


def _digits(row: Mapping[str, Any]) -> int:
    return reading.digits_for(row[name] for name in _NUMBERS)


def _judge(results: Results, policy: str, row: Mapping[str, Any], p: float | None, many: int) -> Judgement:
    """What can be claimed of a policy; beside others with its interval, and for all of them together."""
    verdict, digits = _verdict(row), _digits(row)
    is_alone = many == 1
    is_taken_back = verdict != "none" and not is_alone and p is not None and p >= _LEVEL
    verdict = "none" if is_taken_back else verdict
    size = points(abs(row["estimate"]), digits).lstrip("+")
    is_plural = reading.learned(results).get(policy) == "autodeco"
    who, start = _subject(results, policy, "the"), _subject(results, policy, "The")
    said = {
        "gain": f"{start} {'gain' if is_plural else 'gains'} {size} points over the best single strategy",
        "worse": f"{start} {'are' if is_plural else 'is'} {size} points worse than the best single strategy",
        "none": f"No gain: {who} cannot be told apart from the best single strategy",
    }[verdict]
    if is_alone:
        return Judgement(policy, verdict, f"{said}.")
    ours, (estimate, *ends) = _solved(results, policy), (points(row[name], digits) for name in _NUMBERS)
    solved = [] if ours is None else [f"{percent(ours)} % solved"]
    difference = [f"paired difference {estimate} points"] if verdict == "none" else []
    corrected = [f"p = {reading.p_value(p)} after correction for {in_words(many)} comparisons"] if is_taken_back else []
    numbers = ", ".join([*solved, *difference, f"95 % interval {ends[0]} to {ends[1]}", *corrected])
    return Judgement(policy, verdict, f"{said} ({numbers}).")


def _subject(results: Results, policy: str, article: str) -> str:
    """A policy as a sentence names it: what it is, and where that is not its name its name, letter for letter."""
    if policy == ADAPTER:
        return f"{article} token-level adapter" if reading.is_token(results) else f"{article} adapter"
    if policy in OWN_NAMES:
        return f"{article} {policy}"
    what = reading.what(results, policy)
    return f"{article} {what} {policy}" if what else policy


def _title(results: Results, verdicts: Sequence[str]) -> str:
    """How many of several gain."""
    natures = set(reading.learned(results).values())
    who = "learned policies" if "autodeco" in natures else "adapters" if natures else "baselines"
    n = len(verdicts)
    everyone = f"Both {who}" if n == 2 else f"All {in_words(n)} {who}"
    if set(verdicts) == {"gain"}:
        return f"{everyone} gain over the best single strategy."
    if set(verdicts) == {"worse"}:
        return f"{everyone} are worse than the best single strategy."
    if set(verdicts) == {"none"}:
        none = "neither of the" if n == 2 else "none of the"
        return f"No gain: {none} {in_words(n)} {who} can be told apart from the best single strategy."
    said = {
        "gain": ("gains over", "gain over"),
        "none": ("cannot be told apart from", "cannot be told apart from"),
        "worse": ("is worse than", "are worse than"),
    }
    found = [(verdicts.count(v), words) for v, words in said.items() if v in verdicts]
    parts = [f"{in_words(many)} {words[many > 1]}" for many, words in found]
    parts = [f"{part} {'it' if place else 'the best single strategy'}" for place, part in enumerate(parts)]
    return f"Of {in_words(n)} {who}, {_join(parts)}."


def _content(results: Results) -> tuple[str, str]:
    """Title and evidence of a page on which nothing can be compared."""
    lines = reading.table(results).lines
    statics = [line for line in lines if line.kind == "static"]
    if not statics or reading.subjects(results):
        return "This run holds no complete comparison with the best single strategy.", ""
    strategies = f"{in_words(len(statics))} {'strategies' if len(statics) > 1 else 'strategy'}"
    title = f"No adapter was judged: {strategies} on {statics[0].n_problems} test problems."
    row = reading.find(reading.items(results, "rows"), policy=reading.single_strategy(results), k="mean")
    return title, _shared_evidence(results, row) if row else ""


def _where(results: Results, row: Mapping[str, Any]) -> str:
    """Over what a difference was taken."""
    budgets = reading.budgets(results)
    over = f"averaged over budgets of {_join([str(budget) for budget in budgets])} samples" if budgets else ""
    over = f"with {_samples(budgets[0])} each" if len(budgets) == 1 else over
    problems = f"on {reading.count(row.get('n_problems'))} test problems"
    return ", ".join(part for part in (over, problems) if part)


def _solved(results: Results, policy: str | None) -> float | None:
    """The share of problems that a policy solves, mean over the budgets."""
    return number(reading.find(reading.items(results, "rows"), policy=policy, k="mean").get("estimate"))


def _evidence(results: Results, policy: str, row: Mapping[str, Any]) -> str:
    """Both levels, the paired difference with its interval, and over what it was taken."""
    single = reading.single_strategy(results)
    ours, theirs = _solved(results, policy), _solved(results, single)
    where, digits = _where(results, row), _digits(row)
    if ours is None or theirs is None:
        start = f"Measured {where}"
    else:
        start = f"It solves {percent(ours)} % of problems, {single} alone {percent(theirs)} %, {where}"
    interval = f"95 % interval {points(row.get('low'), digits)} to {points(row.get('high'), digits)}"
    zero = ", which includes zero" if _verdict(row) == "none" else ""
    return f"{start}; the paired difference is {points(row.get('estimate'), digits)} points ({interval}{zero})."


def _shared_evidence(results: Results, row: Mapping[str, Any]) -> str:
    """What all judgements rest on."""
    single = reading.single_strategy(results)
    theirs, where = _solved(results, single), _where(results, row)
    if theirs is None:
        return f"Measured {where}."
    return f"The best single strategy, {single}, solves {percent(theirs)} % of problems, {where}."


def mean_choices(results: Results) -> dict[int, list[float]]:
    """The mean probabilities of the sequence-level adapter whose choices are known, per budget over the test problems,
    each member weighted by its problems."""
    size = len(reading.strategies(results))
    chooser = reading.chooser(results) or reading.judged(results)
    members = [row for row in reading.items(results, "by_member") if row.get("policy") == chooser]
    sums: dict[int, list[float]] = {}
    for choice in reading.items(results, "choices"):
        shares = reading.probabilities(choice.get("probability"), size)
        budget = number(choice.get("budget"))
        if shares is None or budget is None:
            continue
        weight = (
            number(reading.find(members, member=choice.get("member"), k=choice.get("budget")).get("n_problems")) or 1
        )
        before = sums.get(int(budget), [0.0] * size)
        sums[int(budget)] = [old + weight * share for old, share in zip(before, shares, strict=True)]
    return {budget: [value / sum(sums[budget]) for value in sums[budget]] for budget in sorted(sums)}


def behaviour(results: Results) -> str:
    """What the policy does with the smallest and with the largest budget; empty where no choices are recorded."""
    if "token" in reading.levels(results):
        return _at_tokens(results)
    names = reading.strategies(results)
    means = mean_choices(results)
    if not means:
        return ""
    favourites = {budget: max(range(len(names)), key=shares.__getitem__) for budget, shares in means.items()}
    first, last = min(means), max(means)
    share = {budget: means[budget][favourites[budget]] for budget in means}
    does = _does(names[favourites[first]], share[first])
    start = f"With {_samples(first)} it {does} ({100 * share[first]:.0f} % of the time)"
    if first == last:
        return f"{start}."
    if favourites[first] == favourites[last]:
        does = _does(names[favourites[first]], min(share[first], share[last]))
        with_first = f"{100 * share[first]:.0f} % of the time with {_samples(first)}"
        return (
            f"It {does} with few samples and with many: {with_first}, {100 * share[last]:.0f} % with {_samples(last)}."
        )
    return (
        f"{start}; with {_samples(last)} it {_does(names[favourites[last]], share[last])} ({100 * share[last]:.0f} %)."
    )


def _at_tokens(results: Results) -> str:
    """The favourite action of a token policy, over the tokens that were looked at."""
    names = reading.actions(results)
    entropy = reading.mapping(results, "entropy")
    by_action = entropy.get("by_action")
    if reading.mapping(entropy, "adapted").get("policy") != reading.judged(results) or not by_action:
        return ""
    shares = reading.probabilities([sum(reading.counts(row)) for row in by_action], len(names))
    if shares is None:
        return ""
    favourite = max(range(len(names)), key=shares.__getitem__)
    parallel = number(entropy.get("parallel_budget"))
    start = f"With {_samples(int(parallel))} it" if parallel else "It"
    return f"{start} {_does(names[favourite], shares[favourite])} ({100 * shares[favourite]:.0f} % of tokens)."


def _does(strategy: str, share: float) -> str:
    how = "mostly" if share >= 0.5 else "most often"
    return f"{how} decodes greedily" if strategy == "greedy" else f"{how} samples with {strategy}"


def in_words(whole: int) -> str:
    """A small whole number as a word, any other in digits."""
    return _WORDS.get(whole, str(whole))


def _samples(budget: int) -> str:
    return f"{in_words(budget)} sample{'' if budget == 1 else 's'}"


def _join(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
