"""What a page says of whom it is about: the adapters by name, or where nothing was learned the baselines."""

from rheostat.reports import reading
from rheostat.reports.headline import in_words
from rheostat.reports.reading import Results, number


def subject(results: Results) -> str:
    """Whom sections are about, as their headings begin."""
    found = reading.subjects(results)
    word = "adapter" if reading.learned(results) else "baseline"
    return f"{'Each' if len(found) > 1 else 'The'} {word}" if found else "The best single strategy"


def adapters(results: Results) -> list[tuple[list[str], str]]:
    """What each adapter is whose name does not say it: level, what it reads, and how many actions it has; of equals
    all names together."""
    reads = {
        "hidden": "the model’s hidden state",
        "entropy": "how undecided the model is, in place of its hidden state",
        "hidden+entropy": "the model’s hidden state and how undecided it is",
    }
    found: dict[str, list[str]] = {}
    for name, nature in reading.learned(results).items():
        if not (what := reading.what(results, name)):
            continue
        told = reading.mapping(reading.mapping(results, "adapters"), name)
        budget = "the budget B" if nature == "sequence" else "how many tokens it may still write"
        seen = [reads[str(told["features"])]] if told.get("features") in reads else []
        seen += [budget] if told.get("with_budget") else []
        actions = number(told.get("actions"))
        parts = [what, f"reads {', and '.join(seen)}" if seen else ""]
        parts.append(f"picks one of {in_words(int(actions))} strategies" if actions else "")
        found.setdefault("; ".join(part for part in parts if part), []).append(name)
    return [(names, text) for text, names in found.items()]


def number_of_actions(results: Results) -> int:
    """How many strategies the first adapter picks from; where that is not told, all that were measured."""
    told = reading.mapping(reading.mapping(results, "adapters"), reading.judged(results)).get("actions")
    return int(number(told) or len(reading.strategies(results)))
