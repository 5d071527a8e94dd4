"""Adapter folders of both kinds: the round trip, every way of damage, killed saves, and a stand-in for the Hub."""

import base64
import contextlib
import errno
import hashlib
import inspect
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import huggingface_hub
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rheostat.adapters.files import BaseModel, LoadedAdapter, load_adapter, push_adapter, save_adapter
from rheostat.adapters.sequence import PromptFeatures, SequenceAdapter, SequenceConfig
from rheostat.adapters.token import AdaptiveDecoding, Features, TokenAdapter, TokenConfig, TokenInputs
from rheostat.decoding.spaces import TABLE_13, TABLE_14
from rheostat.decoding.strategy import ActionSpace, Order
from rheostat.errors import AdapterError, StoreError
from rheostat.generate import generate

BASE = BaseModel("owner/base-model", "main", 5, "f00d")
TRAINING: dict[str, object] = {"task": "chain-sum", "seed": 1, "sizes": [3, 4], "nested": {"a": None}}
ROW = {"policy": "adapter | with budget", "k": 4, "estimate": 0.5125, "low": 0.4, "high": 0.625, "n_problems": 97}
METRICS: dict[str, object] = {"rows": [ROW], "seconds": 12.5}
FILES = ["README.md", "adapter.json", "adapter.safetensors"]


def adapter_of(seed: int = 0, with_budget: bool = True) -> SequenceAdapter:
    config = SequenceConfig(5, with_budget, width=6, budget_width=3, pooling="mean", budgets=(1, 4))
    adapter = SequenceAdapter(config, ActionSpace(TABLE_13.strategies, Order.TRANSFORMERS), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        adapter.output.weight.normal_(generator=generator)
    adapter.standardizer.fit(torch.randn(9, 5, generator=generator))
    return adapter


def token_adapter_of(
    features: str = "hidden+entropy", with_budget: bool = True, budgets: tuple[int, ...] = (1, 4)
) -> TokenAdapter:
    config = TokenConfig(5, Features(features), with_budget, budgets, width=6, budget_width=3, temperature=0.4)
    adapter = TokenAdapter(config, ActionSpace(TABLE_14.strategies, Order.TRANSFORMERS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        adapter.output.weight.normal_(generator=generator)
    if adapter.standardizer is not None:
        adapter.standardizer.fit(torch.randn(9, 5, generator=generator))
    return adapter


def outputs(adapter: SequenceAdapter | TokenAdapter) -> torch.Tensor:
    embedding_NH, budget_N = torch.arange(10.0).view(2, 5), torch.tensor([1, 4])
    if isinstance(adapter, TokenAdapter):
        inputs = TokenInputs(embedding_NH, torch.tensor([0.1, 2.0]), budget_N, budget_N + 7, budget_N)
        return adapter.log_probabilities(inputs).detach()
    return adapter.probabilities(embedding_NH, budget_N)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "adapter", adapter_of(), BASE, TRAINING, METRICS)
    return tmp_path / "adapter"


@pytest.fixture
def token_folder(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "token-adapter", token_adapter_of(), BASE, TRAINING, METRICS)
    return tmp_path / "token-adapter"


def require_equal(loaded: LoadedAdapter[Any], adapter: SequenceAdapter | TokenAdapter) -> None:
    assert type(loaded.adapter) is type(adapter)
    expected = adapter.state_dict()
    assert list(loaded.adapter.state_dict()) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.adapter.state_dict().items())
    assert torch.equal(outputs(loaded.adapter), outputs(adapter))
    assert (loaded.adapter.config, loaded.adapter.space) == (adapter.config, adapter.space)
    assert not loaded.adapter.training
    assert (loaded.base, loaded.training, loaded.metrics) == (BASE, TRAINING, METRICS)


def refusal(place: Any, **arguments: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        load_adapter(place, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("with_budget", [True, False])
def test_an_adapter_comes_back_as_it_was(tmp_path: Path, with_budget: bool) -> None:
    adapter = adapter_of(with_budget=with_budget)
    save_adapter(tmp_path / "new" / "adapter", adapter, BASE, TRAINING, METRICS)
    require_equal(load_adapter(tmp_path / "new" / "adapter", base=BASE), adapter)
    assert sorted(p.name for p in (tmp_path / "new" / "adapter").iterdir()) == FILES
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["adapter"]


def test_an_adapter_that_reads_the_entropy_comes_back_and_a_file_from_before_reads_the_hidden_state(
    folder: Path, tmp_path: Path
) -> None:
    config = SequenceConfig(5, width=6, budget_width=3, features=PromptFeatures.ENTROPY)
    adapter = SequenceAdapter(config, TABLE_13)
    adapter.standardizer.fit(torch.tensor([[0.1, 0.9], [2.0, 0.3]]))
    save_adapter(tmp_path / "entropy", adapter, BASE, TRAINING, METRICS)
    loaded = load_adapter(tmp_path / "entropy", base=BASE, kind="sequence").adapter
    assert loaded.config == config
    assert torch.equal(loaded.standardizer.scale_H, adapter.standardizer.scale_H)
    card = " ".join((tmp_path / "entropy" / "README.md").read_text().split())
    assert "it reads the entropy and the largest probability of the model's next-token distribution after the" in card
    rewrite(folder, lambda fields: fields["features"].pop("features"))
    assert load_adapter(folder, kind="sequence").adapter.config == adapter_of().config


@pytest.mark.parametrize(
    ("features", "with_budget", "budgets"), list(itertools.product(Features, (True, False), ((), (1, 4))))
)
def test_a_token_adapter_comes_back_as_it_was(
    tmp_path: Path, features: str, with_budget: bool, budgets: tuple[int, ...]
) -> None:
    adapter = token_adapter_of(features, with_budget, budgets)
    save_adapter(tmp_path / "adapter", adapter, BASE, TRAINING, METRICS)
    loaded = load_adapter(tmp_path / "adapter", base=BASE, kind="token")
    require_equal(loaded, adapter)
    assert AdaptiveDecoding(loaded.adapter).key == AdaptiveDecoding(adapter).key
    require_equal(load_adapter(tmp_path / "adapter"), adapter)
    fields = json.loads((tmp_path / "adapter" / "adapter.json").read_text())
    assert (fields["format_version"], fields["kind"], fields["budgets"]) == (1, "token", list(budgets))
    sizes = {"width": 6, "budget_width": 3, "dropout": 0.1, "temperature": 0.4}
    assert fields["features"] == sizes | {"features": features, "with_budget": with_budget}


def test_an_adapter_of_the_other_kind_is_refused_where_one_kind_is_needed(folder: Path, token_folder: Path) -> None:
    assert isinstance(load_adapter(folder, kind="sequence").adapter, SequenceAdapter)
    text = refusal(folder, base=BASE, kind="token")
    assert text.startswith(f"{folder}: this is a sequence-level adapter, a token-level adapter is needed: ")
    text = refusal(token_folder, base=BASE, kind="sequence")
    assert text.startswith(f"{token_folder}: this is a token-level adapter, a sequence-level adapter is needed: ")


def test_a_token_adapter_is_for_its_base_model_too(token_folder: Path, tmp_path: Path) -> None:
    assert "trained for owner/base-model@main" in refusal(token_folder, base=BaseModel("other", None, 5, "beef"))
    for features in Features:  # one that reads the entropy alone is tied to its model as well
        with pytest.raises(AdapterError, match=r"5 numbers, but owner/base-model@main has 6"):
            save_adapter(
                tmp_path / "a", token_adapter_of(features), BaseModel("owner/base-model", "main", 6, "f"), {}, {}
            )


def test_a_kind_replaces_the_other_in_its_folder(folder: Path) -> None:
    save_adapter(folder, token_adapter_of(), BASE, TRAINING, METRICS)
    require_equal(load_adapter(folder, kind="token"), token_adapter_of())


def test_json_has_no_tuples_and_no_numbers_that_are_not_finite(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", adapter_of(), BASE, {"sizes": (1, 2)}, {"rows": [ROW | {"low": float("nan")}]})
    loaded = load_adapter(tmp_path / "a")
    assert loaded.training == {"sizes": [1, 2]}
    assert loaded.metrics == {"rows": [ROW | {"low": None}]}
    assert "| – to 0.625 |" in (tmp_path / "a" / "README.md").read_text()
    with pytest.raises(AdapterError, match=r"adapter\.json: training\.what"):
        save_adapter(tmp_path / "b", adapter_of(), BASE, {"what": object()}, {})
    assert not (tmp_path / "b").exists()


def test_the_model_card_shows_what_was_measured(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    front = card.split("---\n")[1]
    for line in ("library_name: rheostat", "license: apache-2.0", 'base_model: "owner/base-model"', "- decoding"):
        assert line in front.splitlines()
    assert "| adapter \\| with budget | 4 | 0.512 | 0.400 to 0.625 | 97 |" in card
    assert "| 4 | 0.75 | 10 | 0.95 | 0.1 |" in card
    assert "| 5 | greedy | – | – | – |" in card
    assert "| sizes | 3, 4 |" in card
    assert "| seconds | 12.5 |" in card
    assert "rheostat generate " in card
    assert "--adapter DIR" in card


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_the_snippet_of_the_model_card_runs(
    folder: Path, token_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    place = folder if kind == "sequence" else token_folder
    found = re.search(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
    assert found
    asked: dict[str, Any] = {}
    signature = inspect.signature(generate)

    def stand_in(*positional: Any, **named: Any) -> dict[str, Any]:
        asked.update(signature.bind(*positional, **named).arguments)
        chosen = {"strategy": "T=1"} if kind == "sequence" else {}  # no one strategy made the completion
        return chosen | {"probabilities": {}, "completions": [{"text": "84", "tokens": 1}]}

    monkeypatch.setattr("rheostat.generate.generate", stand_in)
    exec(compile(found[1], "README.md", "exec"), {})
    assert asked["model"] == "owner/base-model"
    assert asked["adapter"] == "DIR"


@pytest.mark.parametrize(
    ("features", "with_budget", "budgets", "reads"),
    [
        ("hidden", False, (), "the model's last hidden state"),
        (
            "hidden+entropy",
            True,
            (),
            "the model's last hidden state, the entropy of the model's next-token distribution and the remaining and "
            "the total token budget",
        ),
        (
            "entropy",
            False,
            (1, 4),
            "the entropy of the model's next-token distribution and the parallel budget B (trained for pass@B with "
            "B = 1, 4)",
        ),
    ],
)
def test_the_card_of_a_token_adapter_says_what_it_reads(
    tmp_path: Path, features: str, with_budget: bool, budgets: tuple[int, ...], reads: str
) -> None:
    save_adapter(tmp_path / "a", token_adapter_of(features, with_budget, budgets), BASE, TRAINING, METRICS)
    card = (tmp_path / "a" / "README.md").read_text()
    assert f"token-level decoding adapter: before every token it reads {reads}, and picks one of 4 " in card
    assert ("trained for pass@1 and does not see" in card) is not bool(budgets)
    assert 'rheostat generate "What is 12 * 7?" --model "owner/base-model" --adapter DIR' in card


def test_a_local_path_stays_out_of_the_front_matter(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", adapter_of(), BaseModel("/home/me/my model", None, 5, "f"), {}, {})
    card = (tmp_path / "a" / "README.md").read_text()
    assert "base_model" not in card
    assert "No results were stored" in card


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "adapter.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], rehash: bool = True) -> None:
    path = folder / "adapter.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    if rehash:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rewrite(folder, lambda fields: fields.update(weights_sha256=digest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(surprise=1), "surprise: unknown key"),
        (lambda f: f["features"].update(layers=3), r"features\.layers: unknown key"),
        (lambda f: f["action_space"]["strategies"][1].update(typical_p=1), r"strategies\.1\.typical_p: unknown key"),
        (lambda f: f.pop("metrics"), "metrics: is missing"),
        (lambda f: f["base_model"].pop("fingerprint"), r"base_model\.fingerprint: is missing"),
        (lambda f: f.update(format_version=2), "format_version 2: this Rheostat reads version 1"),
        (lambda f: f.update(format_version=True), "format_version True"),
        (
            lambda f: f.update(kind="both"),
            "kind 'both': this Rheostat loads adapters of kind 'sequence', 'token' and 'autodeco' only",
        ),
        (lambda f: f.update(kind=["token"]), r"kind \['token'\]"),
        (lambda f: f.update(kind="token"), r"features\.pooling: unknown key"),
        (lambda f: f.pop("kind"), "not the description of an adapter"),
        (lambda f: f["features"].update(with_budget=1), r"features\.with_budget"),
        (lambda f: f["features"].update(width="6"), r"features\.width"),
        (lambda f: f["features"].update(dropout=1.5), "dropout must lie in"),
        (lambda f: f["features"].update(temperature=float("inf")), "not valid JSON"),
        (lambda f: f["features"].update(pooling="first"), "pooling must be last or mean"),
        (lambda f: f.update(budgets=[1, 4.0]), r"budgets\.1"),
        (lambda f: f.update(budgets=[4, 1]), "budgets must be"),
        (lambda f: f["action_space"].update(order="ours"), r"action_space\.order"),
        (lambda f: f["action_space"]["strategies"][0].update(top_p=2.0), "top_p must lie in"),
        (lambda f: f["action_space"]["strategies"].append(f["action_space"]["strategies"][0]), "listed twice"),
        (lambda f: f["action_space"]["strategies"].pop(), r"output\.bias has shape \(6,\), .* asks for \(5,\)"),
        (lambda f: f["base_model"].update(hidden_size=6), r"hidden_1\.weight has shape"),
        (lambda f: f["features"].update(width=10**12), "too small for the sizes"),
        (lambda f: f["features"].update(budget_width=10**9), "too small for the sizes"),
        (lambda f: f["features"].update(with_budget=False), "unknown tensor budget_encoder"),
        (lambda f: f.update(weights_sha256="0" * 64), "not the weights that"),
        (lambda f: f["training"].update(loss=float("nan")), "not valid JSON"),
        (lambda f: f.update({"two\nlines": 1}), "two lines: unknown key"),
    ],
)
def test_a_damaged_description_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    rewrite(folder, change)
    text = refusal(folder)
    assert re.search(message, text), text
    assert str(folder) in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(kind="sequence"), r"features\.pooling: is missing"),
        (lambda f: f["features"].update(pooling="last"), r"features\.pooling: unknown key"),
        (
            lambda f: f["features"].update(features="logits"),
            r"features\.features: Input should be 'hidden', 'entropy' or",
        ),
        (lambda f: f["features"].update(features=1), r"features\.features"),
        (lambda f: f["features"].pop("with_budget"), r"features\.with_budget: is missing"),
        (lambda f: f["features"].update(temperature=0), "temperature must be a number above 0"),
        (lambda f: f.update(budgets=[4, 1]), "budgets must be"),
        (lambda f: f.update(budgets=[]), r"hidden_1\.weight has shape \(6, 14\), .* asks for \(6, 11\)"),
        (lambda f: f["features"].update(features="hidden"), "unknown tensor entropy_encoder"),
        (lambda f: f["features"].update(features="entropy", with_budget=False), "unknown tensor budget_encoder"),
        (lambda f: f["action_space"].update(strategies=f["action_space"]["strategies"][:1]), "at least two actions"),
        (lambda f: f["action_space"]["strategies"].pop(), r"output\.bias has shape \(4,\), .* asks for \(3,\)"),
        (lambda f: f["base_model"].update(hidden_size=6), r"hidden_1\.weight has shape"),
        (lambda f: f["base_model"].update(hidden_size=10**12), "too small for the sizes"),
        (lambda f: f["features"].update(width=10**12), "too small for the sizes"),
        (lambda f: f["features"].update(budget_width=10**9), "too small for the sizes"),
        (lambda f: f.update(weights_sha256="0" * 64), "not the weights that"),
    ],
)
def test_a_damaged_description_of_a_token_adapter_is_refused(
    token_folder: Path, change: Callable[[Any], object], message: str
) -> None:
    rewrite(token_folder, change)
    text = refusal(token_folder)
    assert re.search(message, text), text
    assert str(token_folder) in text


class Built(Exception):
    """The network was about to be built."""


@pytest.mark.parametrize(
    "variant",
    [("hidden", False, ()), ("entropy", False, ()), ("hidden", True, ()), ("hidden", False, (1, 4))],
)
@pytest.mark.parametrize("size", ["hidden_size", "width", "budget_width"])
def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: tuple[str, bool, tuple[int, ...]], size: str
) -> None:
    """The bound counts the matrices that the variant has: what it has not may be of any size."""
    save_adapter(tmp_path / "a", token_adapter_of(*variant), BASE, {}, {})
    monkeypatch.setattr("rheostat.adapters.files.TokenAdapter", Mock(side_effect=Built))
    with pytest.raises(Built):
        load_adapter(tmp_path / "a")  # a whole one gets that far
    rewrite(tmp_path / "a", lambda f: f["base_model" if size == "hidden_size" else "features"].update({size: 10**9}))
    reads_hidden, has_codes = variant[0] == "hidden", variant != ("hidden", False, ())
    if {"hidden_size": reads_hidden, "budget_width": has_codes}.get(size, True):
        assert "too small for the sizes" in refusal(tmp_path / "a")
    else:
        with pytest.raises(Built):
            load_adapter(tmp_path / "a")


def set_value(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[0].fill_(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("hidden_2.bias"), r"tensor hidden_2\.bias is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "unknown tensor more"),
        (lambda t: t.update({"hidden_2.bias": torch.zeros(7)}), r"has shape \(7,\), .* asks for \(6,\)"),
        (lambda t: t.update({"hidden_2.bias": t["hidden_2.bias"].double()}), r"must be torch\.float32"),
        (set_value("hidden_2.bias", float("nan")), r"hidden_2\.bias holds values that are not finite"),
        (set_value("standardizer.mean_H", float("inf")), r"standardizer\.mean_H holds values"),
        (set_value("standardizer.scale_H", 0.0), "scale_H must be above 0"),
    ],
)
def test_damaged_weights_are_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    reweigh(folder, change)
    text = refusal(folder)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("parallel_encoder.output.bias"), r"tensor parallel_encoder\.output\.bias is missing"),
        (lambda t: t.update(more=torch.zeros(1)), "unknown tensor more"),
        (lambda t: t.update({"budget_encoder.hidden.weight": torch.zeros(3, 1)}), r"has shape \(3, 1\), .* \(3, 2\)"),
        (lambda t: t.update({"hidden_2.bias": t["hidden_2.bias"].half()}), r"must be torch\.float32"),
        (set_value("entropy_encoder.output.bias", float("nan")), r"entropy_encoder\.output\.bias holds values"),
        (set_value("standardizer.scale_H", -1.0), "scale_H must be above 0"),
    ],
)
def test_damaged_weights_of_a_token_adapter_are_refused(
    token_folder: Path, change: Callable[[Any], object], message: str
) -> None:
    reweigh(token_folder, change)
    text = refusal(token_folder)
    assert re.search(message, text), text


def test_an_adapter_that_reads_the_entropy_alone_has_no_standardizer(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", token_adapter_of("entropy"), BASE, {}, {})
    reweigh(tmp_path / "a", lambda tensors: tensors.update({"standardizer.scale_H": torch.ones(5)}))
    assert "unknown tensor standardizer.scale_H" in refusal(tmp_path / "a")


def test_weights_of_another_adapter_are_refused(folder: Path) -> None:
    reweigh(folder, set_value("hidden_2.bias", 0.25), rehash=False)
    assert "these are not the weights" in refusal(folder)


@pytest.mark.parametrize("saved", [adapter_of(), token_adapter_of()], ids=["sequence", "token"])
@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_byte_is_cut_or_flipped_the_adapter_is_refused_or_whole(
    tmp_path: Path, saved: SequenceAdapter | TokenAdapter, data: st.DataObject
) -> None:
    folder = tmp_path / "adapter"
    if not folder.exists():
        save_adapter(folder, saved, BASE, TRAINING, METRICS)
    copy = folder.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    path = copy / data.draw(st.sampled_from(FILES[1:]))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:at]
    else:
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    if path.name == "adapter.safetensors":
        refusal(copy)
        return
    with contextlib.suppress(AdapterError):  # a digit of a free value, or space between values, may well change
        loaded, expected = load_adapter(copy).adapter.state_dict(), saved.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())


def test_another_base_model_is_refused_by_name(folder: Path) -> None:
    text = refusal(folder, base=BaseModel("owner/other", None, 5, "beef"))
    assert "trained for owner/base-model@main (fingerprint f00d" in text
    assert "not for owner/other (fingerprint beef" in text
    assert "load it with owner/base-model@main or train one for owner/other" in text
    assert "hidden size 6" in refusal(folder, base=BaseModel("owner/other", None, 6, "f00d"))
    assert "for two lines" in refusal(folder, base=BaseModel("two\nlines", None, 5, "beef"))
    load_adapter(folder, base=BaseModel("my-copy", None, 5, "f00d"))  # the content counts, not the name


def test_what_is_no_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    assert "is no adapter: it has no adapter.json" in refusal(tmp_path)
    assert "no such folder" in refusal(tmp_path / "nothing")
    assert "this is a file" in refusal(folder / "README.md")
    assert "has no revision" in refusal(folder, revision="v2")
    assert "no usable name" in refusal("x" * 5000)
    (folder / "adapter.safetensors").unlink()
    assert "is no adapter: it has no adapter.safetensors" in refusal(folder)
    (folder / "adapter.json").write_text("[" * 100_000)
    assert "not valid JSON" in refusal(folder)


def test_saving_refuses_what_could_not_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"5 numbers, but owner/base-model@main has 6"):
        save_adapter(tmp_path / "a", adapter_of(), BaseModel("owner/base-model", "main", 6, "f"), {}, {})
    broken = adapter_of()
    torch.nn.init.constant_(broken.output.bias, float("nan"))
    with pytest.raises(AdapterError, match=r"output\.bias holds values that are not finite"):
        save_adapter(tmp_path / "a", broken, BASE, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_folders_of_others_are_not_replaced_and_their_files_move_along(folder: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    for place in (thesis, thesis / "chapter.txt"):
        with pytest.raises(AdapterError, match="choose another folder"):
            save_adapter(place, adapter_of(), BASE, {}, {})
    (folder / "notes.txt").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("main")
    save_adapter(folder, adapter_of(1), BASE, TRAINING, METRICS)
    require_equal(load_adapter(folder), adapter_of(1))
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / ".git" / "HEAD").read_text() == "main"


class Killed(BaseException):
    """The process is gone: nothing that would clean up gets anything done."""


@pytest.mark.parametrize("is_killed", [True, False])
@pytest.mark.parametrize("call", range(1, 21))
def test_a_save_that_fails_anywhere_leaves_one_whole_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: int, is_killed: bool
) -> None:
    """The n-th file operation fails, either alone (a full disk) or with all that follow (a killed process)."""
    calls = 0

    def failing(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if is_killed and calls >= call:
                raise Killed
            if calls == call:
                if kwargs.get("ignore_errors"):  # what rmtree cannot delete stays there
                    return None
                raise OSError(errno.ENOSPC, "no space left")
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree")):
            patch.setattr(owner, name, failing(getattr(owner, name)))
        patch.setattr(Path, "unlink", failing(Path.unlink)) if is_killed else None
        try:
            save_adapter(folder, adapter_of(1), BASE, TRAINING, METRICS)
            finished = True
        except (Killed, StoreError):
            finished = False
    loaded = load_adapter(folder)
    is_new = torch.equal(outputs(loaded.adapter), outputs(adapter_of(1)))
    assert is_new or not finished
    require_equal(loaded, adapter_of(1 if is_new else 0))
    if not is_killed:
        assert loaded.folder == folder
    save_adapter(folder, adapter_of(2), BASE, TRAINING, METRICS)  # and the next save puts everything right
    require_equal(load_adapter(folder), adapter_of(2))
    assert load_adapter(folder).folder == folder
    assert not folder.with_name(".adapter.old").exists()


class Hub(BaseHTTPRequestHandler):
    """The endpoints of the Hub's HTTP API that creating, committing and downloading a repository use."""

    TOKEN = "hf_secret"
    COMMIT = "c0ffee" + "0" * 34
    files: ClassVar[dict[str, bytes]]
    created: ClassVar[list[dict[str, Any]]]
    tokens: ClassVar[set[str | None]]
    refuses: ClassVar[int]

    def log_message(self, *args: object) -> None:
        del args

    def answer(self, value: object, status: int = 200, **headers: str) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, header in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        path = self.path.split("?")[0]
        if self.refuses or self.headers["Authorization"] != f"Bearer {self.TOKEN}":
            self.answer({"error": "no"}, self.refuses or 401)
        elif path == "/api/repos/create":
            self.created.append(json.loads(body))
            self.answer({"url": f"http://{self.headers['Host']}/owner/adapter", "name": "owner/adapter"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/owner/adapter/preupload/main":
            asked = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]})
        elif path == "/api/models/owner/adapter/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/owner/adapter/commit/{self.COMMIT}"
            self.answer({"success": True, "commitOid": self.COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({"error": f"unknown {path}"}, 404)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        name = path.rpartition("/")[2]
        if not path.removeprefix("/api/models").startswith("/owner/adapter"):
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif path.endswith("/revision/v9"):
            self.answer({"error": "Invalid rev id: v9"}, 404, X_Error_Code="RevisionNotFound")
        elif "/revision/" in path or path == "/api/models/owner/adapter":
            siblings = [{"rfilename": file} for file in self.files]
            self.answer({"id": "owner/adapter", "sha": self.COMMIT, "siblings": siblings, "tags": []})
        elif "/tree/" in path:
            self.answer(
                [
                    {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for file, data in self.files.items()
                ]
            )
        elif "/resolve/" in path and name in self.files:
            etag = f'"{hashlib.sha1(self.files[name]).hexdigest()}"'
            self.answer(self.files[name], ETag=etag, X_Repo_Commit=self.COMMIT)
        else:
            self.answer({"error": f"unknown {path}"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A Hub of this test's own, where huggingface_hub looks for it, and an empty cache."""
    Hub.files, Hub.created, Hub.tokens, Hub.refuses = {}, [], set(), 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


def push_refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        push_adapter(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pushed_adapter_loads_by_its_id(folder: Path, endpoint: str) -> None:
    (folder / "notes.txt").write_text("private")
    url = push_adapter(folder, "owner/adapter", private=True, endpoint=endpoint, token=Hub.TOKEN)
    assert url == f"{endpoint}/owner/adapter"
    assert Hub.created == [{"name": "adapter", "organization": "owner", "visibility": "private"}] or (
        Hub.created[0]["private"] is True  # older clients
    )
    assert Hub.tokens == {f"Bearer {Hub.TOKEN}"}
    assert Hub.files == {name: (folder / name).read_bytes() for name in FILES}
    loaded = load_adapter("owner/adapter", base=BASE)
    require_equal(loaded, adapter_of())
    assert loaded.folder.is_relative_to(huggingface_hub.constants.HF_HUB_CACHE)
    assert "trained for owner/base-model" in refusal("owner/adapter", base=BaseModel("x", None, 5, "y"))


def test_the_stored_token_is_used(folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", Hub.TOKEN)
    push_adapter(folder, "owner/adapter", endpoint=endpoint)
    assert Hub.tokens == {f"Bearer {Hub.TOKEN}"}


def test_what_keeps_an_adapter_from_being_pushed_is_said(
    folder: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no token for the Hub: log in with `hf auth login`" in push_refusal(folder, "owner/adapter")
    assert "404" in push_refusal(folder, "owner/adapter", endpoint=f"{endpoint}/elsewhere", token=Hub.TOKEN)
    assert "refused the token (401)" in push_refusal(folder, "owner/adapter", token="hf_wrong")
    assert "hf_wrong" not in push_refusal(folder, "owner/adapter", token="hf_wrong")
    assert "owner/name" in push_refusal(folder, "a/b/c", token=Hub.TOKEN)
    Hub.refuses = 403
    assert "may not write there (403)" in push_refusal(folder, "owner/new", token=Hub.TOKEN)
    nobody = "http://127.0.0.1:9"
    assert "cannot be reached" in push_refusal(folder, "owner/adapter", endpoint=nobody, token=Hub.TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in push_refusal(folder, "owner/adapter", token=Hub.TOKEN)
    assert "no such folder" in push_refusal(folder / "nothing", "owner/adapter", token=Hub.TOKEN)
    rewrite(folder, lambda fields: fields.update(kind="both"))
    assert "kind 'both'" in push_refusal(folder, "owner/adapter", token=Hub.TOKEN)
    assert Hub.files == {}


@pytest.mark.usefixtures("endpoint")
def test_what_the_hub_does_not_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "neither a folder here nor on the Hub" in refusal("owner/missing")
    Hub.files["config.json"] = b"{}"
    assert "no revision 'v9'" in refusal("owner/adapter", revision="v9")
    assert "is no adapter: it has no adapter.json" in refusal("owner/adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "nor in the Hub's cache" in refusal("owner/never-seen")
