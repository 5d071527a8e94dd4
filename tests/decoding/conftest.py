"""What looks at whole vocabularies on a CPU is compiled where a compiler is; torch does the same where none is."""

import pytest

from rheostat.decoding import compiled_sampling


@pytest.fixture(params=["compiled", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two does it in this test."""
    if request.param == "torch":
        monkeypatch.setattr(compiled_sampling, "_functions", lambda: None)
    else:
        assert compiled_sampling._functions() is not None
    return str(request.param)
