"""Rows from files and from the Hub, what is said about bad ones, and splits that share no question."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rheostat.errors import ConfigError
from rheostat.tasks.base import Split
from rheostat.tasks.records import Record, Source, read, sources_of, split_problems
from rheostat.types import Problem


def file_of(folder: Path, content: str | bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path) -> list[Record]:
    return list(read(Source(str(path))))


def asked(question: str, number: int = 0) -> Problem:
    return Problem(f"own/{number}", "own", "own", question, "1")


def placed(questions: list[str], start: int = 0) -> list[tuple[Problem, str]]:
    return [(asked(text, number), f"rows.jsonl:{number + 1}") for number, text in enumerate(questions, start)]


def split_alone(question: str, key: Split | None = None) -> Split:
    """The split of a question that is asked alone."""
    splits, _ = split_problems({key: placed([question])})
    [split] = [split for split, own in splits.items() if own]
    return split


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[Any, ...]]]:
    """Sets what the Hub gives by subset (an exception is raised); returns the calls to come."""

    def give(**subsets: list[dict[str, object]] | Exception) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load(location: str, subset: str | None, **options: object) -> Iterator[dict[str, object]]:
            calls.append((location, subset, options))
            found = subsets[subset or "default"]
            if isinstance(found, Exception):
                raise found
            return iter(found)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    return give


# files


def test_rows_keep_their_fields_and_the_lines_on_which_they_stand(tmp_path: Path) -> None:
    path = file_of(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n\n   \n{"a": "\xc3\xa9\xe2\x80\xa8"}')
    assert [(dict(row.fields), row.where) for row in rows_of(path)] == [
        ({"a": 1}, f"{path}:1"),
        ({"a": "é\u2028"}, f"{path}:4"),
    ]


@pytest.mark.parametrize(
    ("content", "line", "said"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 2}', 2, "no JSON"),
        (b"problem,answer\n1,2\n", 1, "no JSON"),
        (b'{"a": 1} {"a": 2}', 1, "Extra data at column 10"),
        (b'\n\n["a"]', 3, "a JSON object per line is wanted, got list"),
        (b'{"a": 1}\n"a"', 2, "got str"),
        (b"null", 1, "got NoneType"),
        (b'{"a": 1}\n\n{"a": "\xff"}', 3, "not UTF-8 text (invalid start byte at byte 8 of the line)"),
        (b'{"a": ' + b"[" * 100_000, 1, "recursion"),
        (b'{"a": ' + b"1" * 5_000 + b"}", 1, "4300 digits"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: bytes, line: int, said: str) -> None:
    path = file_of(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        rows_of(path)
    told = str(caught.value)
    assert told.startswith(f"{path}:{line}: ")
    assert said in told
    assert "\n" not in told


def test_a_far_line_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    """Beyond the buffers in which files are read."""
    path = file_of(tmp_path, b'{"a": 1}\n' * 50_000 + b'{"a": "\xff"}')
    with pytest.raises(ConfigError, match=r":50001: not UTF-8 text \(invalid start byte at byte 8 of the line\)"):
        rows_of(path)


def test_files_without_rows_or_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    empty = file_of(tmp_path, "\n  \n")
    for path, said in (
        (empty, "no rows"),
        (tmp_path / "absent.jsonl", r"cannot be read \(No such file or directory\)"),
        (tmp_path / "folder.jsonl", r"cannot be read \(Is a directory\)"),
    ):
        with pytest.raises(ConfigError, match=f"{path}: {said}"):
            rows_of(path)


def test_the_first_field_that_holds_something() -> None:
    row = Record({"a": None, "b": 0, "c": 2}, "rows.jsonl:3")
    assert row.first("a", "b", "c") == 0
    with pytest.raises(ConfigError, match=r"rows\.jsonl:3: no field 'x' or 'a'; there are a, b, c"):
        row.first("x", "a")


# sources


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("rows.jsonl", Source("rows.jsonl")),
        ("a=b/@c:d/rows.json", Source("a=b/@c:d/rows.json")),
        ("me/data", Source("me/data", "train", "", "main")),
        ("me/data:test", Source("me/data", "test")),
        ("me/data/main", Source("me/data", "train", "main")),
        ("me/data/a,b@v1:test", Source("me/data", "test", "a,b", "v1")),
        ("me/data@refs/pr/1", Source("me/data", "train", "", "refs/pr/1")),
        ("me/data@:", Source("me/data")),
    ],
)
def test_sources_are_files_or_of_the_hub(text: str, source: Source) -> None:
    found = Source.parse(text)
    assert found == source
    assert found.is_file == text.endswith((".jsonl", ".json"))
    assert Source.parse(str(found)) == found


@pytest.mark.parametrize("text", ["", "rows", "rows.csv", "/rows", "me/", "me//main", "me/data/", ":test", "@main"])
def test_what_is_no_source_is_told_what_one_is(text: str) -> None:
    with pytest.raises(ConfigError, match=r"ends in \.jsonl, or a data set of the Hub as owner/name"):
        Source.parse(text)


def test_sources_by_split() -> None:
    assert sources_of(["rows.jsonl"]) == {None: Source("rows.jsonl")}
    assert sources_of(["data/lang=en/rows.jsonl"]) == {None: Source("data/lang=en/rows.jsonl")}
    assert sources_of(["test=me/data:x", "train=a.jsonl"]) == {
        Split.TEST: Source("me/data", "x"),
        Split.TRAIN: Source("a.jsonl"),
    }
    assert sources_of([]) == {}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["trian=a.jsonl"], "--data trian=a.jsonl: the splits are train, validation, test"),
        (["=a.jsonl"], "the splits are train, validation, test"),
        (["train=a.jsonl", "train=b.jsonl"], "one SPLIT=SOURCE for each"),
        (["a.jsonl", "b.jsonl"], "one source for all splits"),
        (["a.jsonl", "test=b.jsonl"], "one source for all splits"),
        (["test=b.jsonl", "a.jsonl"], "one source for all splits"),
        (["train="], "give a file that ends in .jsonl"),
    ],
)
def test_sources_that_do_not_fit_together(data: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match="--data") as caught:
        sources_of(data)
    assert said in str(caught.value)


# the Hub


def test_rows_of_several_subsets_follow_each_other(hub: Callable[..., list[tuple[Any, ...]]]) -> None:
    calls = hub(one=[{"a": 1}, {"a": 2}], two=[{"a": 3}])
    rows = list(read(Source.parse("me/data/one,two@v1:test")))
    assert [row.fields["a"] for row in rows] == [1, 2, 3]
    assert len({row.where for row in rows}) == 3  # they may become ids
    assert rows[2].where == "me/data/two@v1:test row 0"
    wanted = {"split": "test", "revision": "v1", "streaming": True}
    assert calls == [("me/data", "one", wanted), ("me/data", "two", wanted)]


def test_no_subset_is_the_default_one(hub: Callable[..., list[tuple[Any, ...]]]) -> None:
    calls = hub(default=[{"a": 1}])
    assert len(list(read(Source.parse("me/data")))) == 1
    assert calls[0][1] is None


@pytest.mark.parametrize("error", [ConnectionError("no\nnetwork"), ValueError("no\nnetwork"), OSError()])
def test_where_the_hub_fails_local_files_are_offered(
    hub: Callable[..., list[tuple[Any, ...]]], error: Exception
) -> None:
    hub(default=error)
    with pytest.raises(ConfigError) as caught:
        list(read(Source.parse("me/data")))
    told = str(caught.value)
    assert told.startswith("me/data@main:train: the Hub does not give it (")
    assert (str(error).split("\n")[0] or "OSError") in told
    assert "--data train=FILE.jsonl test=FILE.jsonl" in told
    assert "\n" not in told


def test_a_hub_that_fails_in_the_middle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> Iterator[dict[str, object]]:
        yield {"a": 1}
        raise TimeoutError("read timed out")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ConfigError, match=r"the Hub does not give it \(read timed out\)"):
        list(read(Source.parse("me/data")))


# splits

QUESTIONS = st.lists(
    st.text(st.characters(codec=None), min_size=1, max_size=12)  # lone surrogates, too
    | st.sampled_from(["1 + 1", "1  + 1", " 1 + 1\n", "数え上げ", "كم عدد", "\ud800"]),
    max_size=30,
)


def normal(question: str) -> str:
    return " ".join(question.split())


@settings(max_examples=60)
@given(questions=QUESTIONS)
def test_a_source_for_all_is_divided_by_each_question_alone(questions: list[str]) -> None:
    splits, repeated = split_problems({None: placed(questions)})
    kept = [normal(problem.question) for own in splits.values() for problem in own]
    assert sorted(kept) == sorted({normal(question) for question in questions})
    assert repeated == len(questions) - len(kept)
    for split, own in splits.items():
        assert all(split_alone(problem.question) is split for problem in own)
    firsts = {normal(text): text for text in reversed(questions)}
    assert {problem.question for own in splits.values() for problem in own} == set(firsts.values())
    assert {problem.id for own in splits.values() for problem in own} == {
        f"own/{questions.index(text)}" for text in firsts.values()
    }


@settings(max_examples=30)
@given(questions=st.lists(st.text(min_size=1, max_size=8), unique_by=normal, max_size=30), data=st.data())
def test_the_order_of_rows_changes_nothing(questions: list[str], data: st.DataObject) -> None:
    rows = placed(questions)
    shuffled = data.draw(st.permutations(rows))
    assert split_problems({None: rows}) == split_problems({None: shuffled})


@settings(max_examples=40)
@given(
    train=st.lists(st.integers(0, 30), unique=True, max_size=15),
    test=st.lists(st.integers(20, 40), unique=True, max_size=10),
)
def test_explicit_splits_never_share_a_question(train: list[int], test: list[int]) -> None:
    sources: dict[Split | None, list[tuple[Problem, str]]] = {
        Split.TRAIN: placed([str(number) for number in train]),
        Split.TEST: placed([f" {number} " for number in test], start=100),
    }
    if set(train) & set(test):
        with pytest.raises(ConfigError, match="the same problem stands in"):
            split_problems(sources)
        return
    splits, repeated = split_problems(sources)
    assert repeated == 0
    assert {int(problem.question) for problem in splits[Split.TEST]} == set(test)
    own = [{int(problem.question) for problem in splits[split]} for split in (Split.TRAIN, Split.VALIDATION)]
    assert own[0] | own[1] == set(train)
    assert own[0].isdisjoint(own[1])


def test_shares_are_those_that_are_promised() -> None:
    questions = [f"What is {number} + 1?" for number in range(2000)]
    whole, _ = split_problems({None: placed(questions)})
    assert {split: round(len(own) / 2000, 1) for split, own in whole.items()} == {
        Split.TRAIN: 0.5,
        Split.VALIDATION: 0.2,
        Split.TEST: 0.3,
    }
    parted, _ = split_problems({Split.TRAIN: placed(questions)})
    assert round(len(parted[Split.VALIDATION]) / 2000, 1) == 0.2
    assert len(parted[Split.TRAIN]) + len(parted[Split.VALIDATION]) == 2000
    assert parted[Split.TEST] == []


def test_validation_is_taken_from_train_only_where_none_is_given() -> None:
    questions = [f"What is {number} + 1?" for number in range(100)]
    given_all: dict[Split | None, list[tuple[Problem, str]]] = {
        Split.TRAIN: placed(questions[:50]),
        Split.VALIDATION: placed(questions[50:60], 50),
        Split.TEST: placed(questions[60:], 60),
    }
    splits, _ = split_problems(given_all)
    assert [len(splits[split]) for split in Split] == [50, 10, 40]
    del given_all[Split.VALIDATION]
    splits, _ = split_problems(given_all)
    assert 0 < len(splits[Split.VALIDATION]) < 25
    assert len(splits[Split.TRAIN]) == 50 - len(splits[Split.VALIDATION])
    assert len(splits[Split.TEST]) == 40
    assert {p.question for p in splits[Split.VALIDATION]} <= set(questions[:50])


def test_problems_are_not_handed_out_in_the_order_of_their_file() -> None:
    """Published data sets are sorted by subject."""
    splits, _ = split_problems({Split.TEST: placed([str(number) for number in range(100)])})
    order = [int(problem.question) for problem in splits[Split.TEST]]
    assert order != sorted(order)
    assert 20 < sum(order[:50]) / 50 < 80


def test_one_question_in_two_splits_names_both_places() -> None:
    sources: dict[Split | None, list[tuple[Problem, str]]] = {
        Split.TEST: [(asked("1 + 1", 1), "test.jsonl:7")],
        Split.VALIDATION: [(asked("1  +  1", 2), "validation.jsonl:9")],
    }
    with pytest.raises(ConfigError, match=r"validation.jsonl:9: the same problem stands in test at test.jsonl:7"):
        split_problems(sources)


def test_one_id_for_two_problems_names_both_places() -> None:
    rows = [(asked("1 + 1", 5), "rows.jsonl:1"), (asked("2 + 2", 5), "rows.jsonl:2")]
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: the id 'own/5' stands also at rows.jsonl:1"):
        split_problems({None: rows})


def test_halves_of_surrogate_pairs_are_replaced(tmp_path: Path) -> None:
    """No tokenizer takes them, and no file can store them."""
    fields = {"problem": "\ud800 数 \U0001f600 \\ud800", "list": ["a\udfff", 1.5, None], "é": {"\ud800": True}}
    [row] = rows_of(file_of(tmp_path, json.dumps(fields)))
    assert row.fields == {
        "problem": "\ufffd 数 \U0001f600 \\ud800",
        "list": ["a\ufffd", 1.5, None],
        "é": {"\ufffd": True},
    }


def test_a_question_that_published_splits_share_stays_where_it_judges() -> None:
    rows = {
        split: [(Problem(f"{split}/{n}", "t", "t", asked, "1"), f"{split} row {n}") for n, asked in enumerate(own)]
        for split, own in ((Split.TEST, ("a", "b")), (Split.TRAIN, ("c", " b ", "d")))
    }
    found, repeated = split_problems(rows, refuse_shared=False)
    assert {problem.question for problem in found[Split.TEST]} == {"a", "b"}
    assert {problem.question for own in (Split.TRAIN, Split.VALIDATION) for problem in found[own]} == {"c", "d"}
    assert repeated == 1
    with pytest.raises(ConfigError, match="train row 1: the same problem stands in test at test row 1"):
        split_problems(rows)
