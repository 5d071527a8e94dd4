"""What was learned, in plain words: a claim is made only where the paired interval allows it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rheostat.reports import reading
from rheostat.reports.reading import ADAPTER, SINGLE, Results, number, percent, points

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
class Headline:
    """The verdict (gain, none, worse or unknown), its one-line title, the evidence, and what the policy does."""

    verdict: str
    title: str
    evidence: str
    behaviour: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.title, self.evidence, self.behaviour) if part)


def headline(results: Results) -> Headline:
    """Judge the adapter (that with budget, where there are several) against the best single strategy, over all budgets.

    A gain (or a loss) is claimed only if the 95 % interval of the paired difference excludes zero; an interval that
    touches zero does not.
    """
    differences = reading.items(results, "differences")
    row = reading.find(differences, policy=reading.judged(results), baseline=SINGLE, k="mean")
    estimate, low, high = (number(row.get(name)) for name in ("estimate", "low", "high"))
    if estimate is None or low is None or high is None:
        title = "This run holds no complete comparison with the best single strategy."
        return Headline("unknown", title, "", behaviour(results))
    who = _subject(results)
    digits = reading.digits_for((estimate, low, high))
    size = points(abs(estimate), digits).lstrip("+")
    if low > 0:
        verdict, title = "gain", f"{who[0].upper()}{who[1:]} gains {size} points over the best single strategy."
    elif high < 0:
        verdict, title = "worse", f"{who[0].upper()}{who[1:]} is {size} points worse than the best single strategy."
    else:
        verdict, title = "none", f"No gain: {who} cannot be told apart from the best single strategy."
    return Headline(verdict, title, _evidence(results, row, digits, verdict), behaviour(results))


def _subject(results: Results) -> str:
    """The adapter as a sentence names it; one that is named by its folder is called so."""
    policy = reading.judged(results)
    if policy != ADAPTER:
        return reading.the(policy)
    return "the token-level adapter" if reading.is_token(results) else "the adapter"


def _evidence(results: Results, row: Mapping[str, Any], digits: int, verdict: str) -> str:
    """Both levels, the paired difference with its interval, and over what it was taken."""
    rows = reading.items(results, "rows")
    single = reading.single_strategy(results)
    ours = number(reading.find(rows, policy=reading.judged(results), k="mean").get("estimate"))
    theirs = number(reading.find(rows, policy=single, k="mean").get("estimate"))
    budgets = reading.budgets(results)
    over = f"averaged over budgets of {_join([str(budget) for budget in budgets])} samples" if budgets else ""
    over = f"with {_samples(budgets[0])} each" if len(budgets) == 1 else over
    problems = f"on {reading.count(row.get('n_problems'))} test problems"
    where = ", ".join(part for part in (over, problems) if part)
    if ours is None or theirs is None:
        start = f"Measured {where}"
    else:
        start = f"It solves {percent(ours)} % of problems, {single} alone {percent(theirs)} %, {where}"
    interval = f"95 % interval {points(row.get('low'), digits)} to {points(row.get('high'), digits)}"
    zero = ", which includes zero" if verdict == "none" else ""
    return f"{start}; the paired difference is {points(row.get('estimate'), digits)} points ({interval}{zero})."


def mean_choices(results: Results) -> dict[int, list[float]]:
    """The policy's mean probabilities per budget over the test problems, each member weighted by its problems."""
    size = len(reading.strategies(results))
    members = [row for row in reading.items(results, "by_member") if row.get("policy") == reading.judged(results)]
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
    if reading.is_token(results):
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
