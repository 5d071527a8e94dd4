"""The compiled attention and norms against float64, and what happens where nothing can be compiled."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_local import TEXTS, config_of, save_model
from torch import Tensor
from torch.nn import functional

from rheostat.decoding.strategy import Strategy
from rheostat.engines import kernels as module
from rheostat.engines.base import Request
from rheostat.engines.kernels import Kernels, Place, kernels
from rheostat.engines.local import LocalEngine
from rheostat.types import Prompt

HEADS = [(torch.float32, 16, 1), (torch.float32, 48, 4), (torch.bfloat16, 64, 3), (torch.bfloat16, 128, 6)]
GROUPS = 2


def loaded(dtype: torch.dtype, size: int, shared: int) -> Kernels:
    found = kernels(dtype, size, shared)
    assert found is not None
    return found


def assert_near(found: Tensor, exact: Tensor, scale: float = 1.0, lost: float = 2e-6) -> None:
    """Within one rounding of the result, and what float32 sums have ``lost``, in units of ``scale``."""
    rounding = lost + (2**-8 if found.dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(found.double(), exact, rtol=rounding, atol=scale * rounding / 4)


class Case:
    """Random rows, each with padding and tokens of its own; nan wherever nobody may look."""

    def __init__(
        self, dtype: torch.dtype, size: int, shared: int, tokens: list[int], prefix: int, scale: float
    ) -> None:
        generator = torch.Generator().manual_seed(sum(tokens) + prefix)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).mul(scale).to(dtype)

        rows, room = len(tokens), max(tokens) + 7
        self.heads = GROUPS * shared
        self.qkv = random(rows, (self.heads + 2 * GROUPS) * size)
        angle = torch.rand(rows, size // 2, generator=generator) * 6
        self.cos = torch.cat([angle.cos(), angle.cos()], -1).to(dtype)
        self.sin = torch.cat([-angle.sin(), angle.sin()], -1).to(dtype)
        end_B = torch.tensor(tokens)
        start_B = (torch.rand(rows, generator=generator) * end_B).long()
        self.prefix = (random(GROUPS, prefix, size), random(GROUPS, prefix, size)) if prefix else None
        keys, values = random(rows, GROUPS, room, size), random(rows, GROUPS, room, size)
        for row in range(rows):
            for buffer in (keys, values):
                buffer[row, :, : start_B[row]] = math.nan
                buffer[row, :, end_B[row] - 1 :] = math.nan
        self.place = Place(keys, values, start_B, end_B, self.prefix)
        self.norm = random(self.heads + GROUPS, size) / scale
        self.size = size

    def exact(self, scaling: float, epsilon: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed values, and the new keys and values, in float64; rows mix what is stored, the new ones included."""
        rows, heads = len(self.qkv), self.heads
        parts = self.qkv.double().view(rows, -1, self.size)
        turning = parts[:, : heads + GROUPS]
        if epsilon is not None:
            turning = functional.rms_norm(turning, (self.size,), eps=epsilon) * self.norm.double()
        turned = turning * self.cos.double()[:, None] + turning.roll(self.size // 2, -1) * self.sin.double()[:, None]
        key, value = turned[:, heads:], parts[:, heads + GROUPS :]
        mixed = torch.empty(rows, heads, self.size, dtype=torch.float64)
        for row, (start, end) in enumerate(zip(self.place.start_B, self.place.end_B, strict=True)):
            keys, values = (buffer[row, :, start:end].double() for buffer in self.place[:2])
            if self.prefix is not None:
                keys, values = (torch.cat([p.double(), x], 1) for p, x in zip(self.prefix, (keys, values), strict=True))
            for head in range(heads):
                group = head // (heads // GROUPS)
                weight = (keys[group] @ turned[row, head] * scaling).softmax(-1)
                mixed[row, head] = weight @ values[group]
        return mixed.flatten(1), key, value


@pytest.mark.parametrize(("dtype", "size", "shared"), HEADS)
@pytest.mark.parametrize("tokens", [[1], [1, 2, 15, 16, 17], [63, 64, 65, 130, 200]])
@pytest.mark.parametrize(("prefix", "norm", "scale"), [(0, False, 1), (5, False, 1), (70, True, 1), (64, False, 6)])
def test_attention_of_a_step(
    dtype: torch.dtype, size: int, shared: int, tokens: list[int], prefix: int, norm: bool, scale: float
) -> None:
    case, scaling, epsilon = Case(dtype, size, shared, tokens, prefix, scale), size**-0.5, 1e-5
    before = [buffer.clone() for buffer in case.place[:2]]
    found = loaded(dtype, size, shared).attend(
        case.qkv, case.cos, case.sin, scaling, [case.place], case.norm if norm else None, epsilon
    )
    expected, key, value = case.exact(scaling, epsilon if norm else None)
    assert_near(found, expected, scale, 2e-6 * scale**2)  # scores of up to scale^2 sqrt(size)
    for buffer, old, new in zip(case.place[:2], before, (key, value), strict=True):
        at_B = torch.arange(len(tokens)), slice(None), case.place.end_B - 1
        assert_near(buffer[at_B], new, scale)
        buffer[at_B] = old[at_B]
        torch.testing.assert_close(buffer, old, rtol=0, atol=0, equal_nan=True)  # nothing else was written


def test_threads_change_no_bit() -> None:
    """Rows are divided among them, sums are not."""
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            case = Case(torch.bfloat16, 64, 3, list(range(1, 100, 9)), 40, 1.0)
            done = loaded(torch.bfloat16, 64, 3)
            found.append((done.attend(case.qkv, case.cos, case.sin, 0.125, [case.place]), case.place.keys_BGCD))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def test_scores_of_any_size() -> None:
    """One score far above all others takes everything, and far below it nothing, without overflow."""
    case = Case(torch.float32, 16, 1, [70], 0, 1.0)
    place = case.place._replace(start_B=torch.tensor([0]))
    place.keys_BGCD[:, :, :69], place.values_BGCD[:, :, :69] = -1.0, 3.0
    case.cos[:], case.sin[:] = 1, 0
    case.qkv[:] = 1
    for factor, expected in ((1e30, 1.0), (-1e30, 3.0)):  # of the new token: q k = 16; of the others: -16
        assert_near(
            loaded(torch.float32, 16, 1).attend(case.qkv, case.cos, case.sin, factor, [place]),
            torch.full((1, 32), expected).double(),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 33), (3, 5, 64), (500, 1, 576)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    expected = functional.rms_norm(x.double(), shape[-1:], weight.double(), 1e-3)
    found = loaded(dtype, 64, 1).norm(x, weight, 1e-3)
    assert found.shape == x.shape
    assert_near(found, expected)


def test_bfloat16_rounds_as_torch_does() -> None:
    """All of them, ties, infinities and nan included: a norm over one number of weight x gives sign(y) x."""
    x = torch.cat(
        [torch.randn(4096, generator=torch.Generator().manual_seed(1)), torch.tensor([math.nan, math.inf, 0.0])]
    )
    x = x[:, None].bfloat16()
    found = loaded(torch.bfloat16, 64, 1).norm(x, torch.tensor([1.01]).bfloat16(), 0.0)
    root = torch.rsqrt(x.float() ** 2)
    torch.testing.assert_close(found, (x.float() * root * torch.tensor(1.01).bfloat16()).bfloat16(), equal_nan=True)


@pytest.mark.parametrize(
    ("dtype", "size", "shared"), [(torch.float16, 64, 1), (torch.bfloat16, 48, 1), (torch.float32, 64, 17)]
)
def test_what_there_are_no_kernels_for(dtype: torch.dtype, size: int, shared: int) -> None:
    assert kernels(dtype, size, shared) is None


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_attends(
    compiler: str, forget_compiled: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = save_model(tmp_path, config_of("llama-wide"))
    requests = [Request(Prompt(text, text), Strategy(0), 0, 0, 20) for text in TEXTS]
    compiled = LocalEngine(folder, dtype=torch.float32, device="cpu")
    assert compiled.info.kernels == "compiled"
    forget_compiled()
    monkeypatch.setenv("CC", compiler)
    with pytest.warns(UserWarning, match="its steps are slower: install gcc") as caught:
        plain = LocalEngine(folder, dtype=torch.float32, device="cpu")
    assert len(caught) == 1
    assert plain.info.kernels == "torch"
    assert plain.generate(requests) == compiled.generate(requests)


def test_the_kernel_is_what_steps_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A step of a token for each row never reaches torch's attention."""
    engine = LocalEngine(save_model(tmp_path, config_of("llama-wide")), dtype=torch.float32, device="cpu")
    calls: list[int] = []
    attend = module.Kernels.attend

    def counted(self: Kernels, qkv_BN: Tensor, *args: object) -> Tensor:
        calls.append(len(qkv_BN))
        return attend(self, qkv_BN, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Kernels, "attend", counted)
    engine.vocabulary.eos_ids = frozenset()
    engine.generate([Request(Prompt(text, text), Strategy(), 0, 0, 5) for text in TEXTS[:3]])
    assert calls == [3] * 4 * 2  # the first token comes with the prompts; two layers
