"""A checkpoint gives back what was put in, or says in one line why it does not."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from rheostat.errors import StoreError
from rheostat.training import checkpoint
from rheostat.training.checkpoint import load_checkpoint, save_checkpoint


def state_after_a_step() -> dict[str, Any]:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = {"adapter": layer.state_dict(), "optimizer": optimizer.state_dict()}
    return state | {"step": 7, "is_fitted": True, "lines": '[{"reward": 0.30000000000000004}]\n'}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, "a run", state_after_a_step())
    return path


def test_what_comes_back_is_what_was_put_in(tmp_path: Path) -> None:
    state, path = state_after_a_step(), tmp_path / "c.pt"
    assert load_checkpoint(path, "a run") is None
    save_checkpoint(path, "a run", {"step": 1})
    save_checkpoint(path, "a run", state)
    found = load_checkpoint(path, "a run")
    assert found is not None
    assert found.keys() == state.keys()
    assert (found["step"], found["is_fitted"], found["lines"]) == (7, True, state["lines"])
    for name, tensor in state["adapter"].items():
        assert torch.equal(found["adapter"][name], tensor)
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for number, moments in state["optimizer"]["state"].items():
        assert all(torch.equal(found["optimizer"]["state"][number][name], moments[name]) for name in moments)
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_another_run_is_refused(path: Path) -> None:
    with pytest.raises(StoreError, match=r"checkpoint\.pt belongs to a run with other settings.*choose another --out"):
        load_checkpoint(path, "another run")


def test_another_version_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 3)
    with pytest.raises(StoreError, match=r"format version 2, this Rheostat reads 3; delete it"):
        load_checkpoint(path, "a run")


def test_no_flipped_bit_and_no_cut_goes_unnoticed(path: Path) -> None:
    whole, dice = path.read_bytes(), random.Random(0)
    damaged = [b"", b"null\n", b"[1]\n", b"\x80\x04", whole + b"\0", pickle.dumps({"format_version": 1})]
    damaged += [whole[: dice.randrange(len(whole))] for _ in range(100)]
    for at in [*range(120), *dice.sample(range(len(whole)), 200)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << dice.randrange(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(StoreError, match=r"checkpoint\.pt.*delete it to train anew") as caught:
            load_checkpoint(path, "a run")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert load_checkpoint(path, "a run") is not None


def test_nothing_in_the_file_is_executed(path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path.with_name("executed"),)

    save_checkpoint(path, "a run", {"step": Attack()})
    with pytest.raises(StoreError, match="damaged or no checkpoint"):
        load_checkpoint(path, "a run")
    assert not path.with_name("executed").exists()


def test_paths_that_refuse(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the folder does not exist; create it"):
        save_checkpoint(tmp_path / "missing" / "c.pt", "a run", {})
    with pytest.raises(StoreError, match="cannot read the checkpoint"):
        load_checkpoint(tmp_path, "a run")
