"""Seeds and uniforms: known answers, an independent implementation, and independence between streams."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from rheostat.seeding import Purpose, derive_seed, tensor_uniforms, uniforms

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    """SplitMix64's finaliser on Python's big integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def reference_uniform(stream: int, t: int, purpose: int) -> float:
    counter = 2 * t + purpose + 1
    return (mix(mix((mix(stream) + counter * 0x9E3779B97F4A7C15) & MASK)) >> 11) / 2**53


def test_finaliser_is_the_published_one() -> None:
    """SplitMix64 with state 0 gives this first output (its authors' reference code)."""
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), 0xB4B2797457A0A6E4),
        ((0,), 0x636971503AFF47BA),
        ((42, "gsm8k/17", 3, "T=0.75,k=10"), 0x728E964B5EDB135A),
        (("é", 1.5, None, True), 0xFD3023A994F2B674),
        ((9223372036854775808,), 0x29EABCCBD5C3C197),
    ],
)
def test_seed_known_answers(parts: tuple[str | int | float | bool | None, ...], expected: int) -> None:
    assert derive_seed(*parts) == expected


@pytest.mark.parametrize(
    ("stream", "t", "purpose", "expected"),
    [
        (0x0, 0, Purpose.TOKEN, 0.28176129772258496),
        (0x0, 0, Purpose.ACTION, 0.80255116473696),
        (0x0, 1, Purpose.TOKEN, 0.4815585823555033),
        (0x123456789ABCDEF, 12345, Purpose.ACTION, 0.8875897400018373),
        (0xFFFFFFFFFFFFFFFF, 7, Purpose.TOKEN, 0.6052401306900156),
    ],
)
def test_uniform_known_answers(stream: int, t: int, purpose: Purpose, expected: float) -> None:
    assert uniforms(np.array([stream], dtype=np.uint64), t, purpose).tolist() == [expected]


def test_purposes_keep_their_numbers() -> None:
    assert {p.name: p.value for p in Purpose} == {"TOKEN": 0, "ACTION": 1}


@given(st.integers(0, MASK), st.integers(0, 2**40), st.sampled_from(Purpose))
def test_uniform_equals_big_integers(stream: int, t: int, purpose: Purpose) -> None:
    got = uniforms(np.array([stream], dtype=np.uint64), t, purpose)
    assert got.dtype == np.float64
    assert got.tolist() == [reference_uniform(stream, t, purpose)]


@pytest.mark.parametrize("purpose", Purpose)
def test_tensors_give_the_same_bits(purpose: Purpose) -> None:
    draw = np.random.default_rng(int(purpose))
    edges = np.array([0, 1, MASK, 1 << 63, (1 << 63) - 1], dtype=np.uint64)
    streams = np.concatenate([edges, draw.integers(0, 2**64, 5000, dtype=np.uint64)])
    t = draw.integers(0, 2**20, len(streams))
    got = tensor_uniforms(torch.from_numpy(streams.view(np.int64)), torch.from_numpy(t), purpose)
    assert got.dtype == torch.float64
    assert got.tolist() == [
        reference_uniform(int(stream), int(at), purpose) for stream, at in zip(streams, t, strict=True)
    ]
    np.testing.assert_array_equal(got.numpy(), uniforms(streams, t, purpose))


@given(st.lists(st.tuples(st.integers(0, MASK), st.integers(0, 10_000)), min_size=1, max_size=40), st.randoms())
def test_no_dependence_on_batch_position(pairs: list[tuple[int, int]], random) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(pairs)))
    random.shuffle(order)
    streams = np.array([stream for stream, _ in pairs], dtype=np.uint64)
    steps = np.array([t for _, t in pairs])
    together = uniforms(streams, steps, Purpose.ACTION)
    np.testing.assert_array_equal(uniforms(streams[order], steps[order], Purpose.ACTION), together[order])
    alone = [uniforms(streams[i : i + 1], int(steps[i]), Purpose.ACTION)[0] for i in range(len(pairs))]
    np.testing.assert_array_equal(alone, together)


def test_uniform_over_streams_and_over_steps() -> None:
    streams = np.array([derive_seed("problem", i) for i in range(20_000)], dtype=np.uint64)
    for t, purpose in ((0, Purpose.TOKEN), (0, Purpose.ACTION), (1, Purpose.TOKEN), (517, Purpose.TOKEN)):
        values = uniforms(streams, t, purpose)
        assert values.min() >= 0
        assert values.max() < 1
        assert kstest(values, "uniform").pvalue > 1e-3
    one = np.full(20_000, derive_seed(0), dtype=np.uint64)
    assert kstest(uniforms(one, np.arange(20_000), Purpose.TOKEN), "uniform").pvalue > 1e-3
    # streams that differ by one, as careless callers have them
    assert kstest(uniforms(np.arange(20_000, dtype=np.uint64), 3, Purpose.TOKEN), "uniform").pvalue > 1e-3


def test_purposes_steps_and_neighbouring_streams_are_uncorrelated() -> None:
    streams = np.arange(20_000, dtype=np.uint64)
    columns = [uniforms(streams, t, purpose) for t in range(6) for purpose in Purpose]
    columns += [uniforms(streams + np.uint64(1), 0, Purpose.TOKEN)]
    correlation = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(correlation).max() < 5 / np.sqrt(len(streams))


def test_steps_and_purposes_never_share_a_counter() -> None:
    """All of (t, purpose) give different uniforms: no draw of an action repeats the draw of a token."""
    stream = np.full(5000, 99, dtype=np.uint64)
    values = np.concatenate([uniforms(stream, np.arange(5000), purpose) for purpose in Purpose])
    assert len(np.unique(values)) == 10_000


def test_seeds_tell_apart_what_looks_alike() -> None:
    parts: list[tuple[str | int | float | bool | None, ...]] = [
        (1,), ("1",), (1.0,), (True,), (None,), ("None",), (), ("",), ("a", "b"), ("ab",), ("a\x1fb",),
        ("a", "b", ""), ("b", "a"), ("a'\x1fstr:'b",), (-1,), (2**64,), (2**64 + 1,),
    ]  # fmt: skip
    assert len({derive_seed(*p) for p in parts}) == len(parts)


def test_seeds_spread_over_64_bits() -> None:
    seeds = np.array([derive_seed("x", i) for i in range(5000)], dtype=np.uint64)
    assert kstest(seeds.astype(np.float64) / 2**64, "uniform").pvalue > 1e-3
