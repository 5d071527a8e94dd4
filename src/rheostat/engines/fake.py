"""The fake engine: a tiny language model whose distribution is known exactly, for tutorials and tests.

It needs no weights. Its "model" is a function of the prompt and the tokens so far; its completions run through
the same loop as everyone else's, and :meth:`FakeEngine.distribution` enumerates what that loop samples from.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import jinja2
import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from torch import Tensor

from rheostat.decoding.policy import SamplingParameters, StepObserver, TokenPolicy
from rheostat.decoding.strategy import Order, Strategy
from rheostat.decoding.transforms import transform
from rheostat.engines.base import EngineInfo, Pooling, Request, own_strategies
from rheostat.engines.continuous import ContinuousBatch, Fed
from rheostat.engines.decode import Batch, decode, ending_tokens
from rheostat.errors import ConfigError, ModelError
from rheostat.seeding import Purpose, derive_seed, uniforms
from rheostat.types import Completion, Prompt

EOS = "<eos>"

# What the fake model computes from the prompt's text and the tokens written so far.
Table = Callable[[str, tuple[int, ...]], ArrayLike]


class FakeEngine:
    """A deterministic engine over a small vocabulary. A prompt's "tokens" are its characters.

    Args:
        vocabulary: the text of each token; ``<eos>`` is among them once, and no part of any completion.
        logits: V untempered logits for a prompt and the ids of the tokens so far. It must accept every
            prefix: the loop may step on rows that have ended. By default hashed from both, so that every
            prompt has its own fixed distribution.
        features: the hidden state for a prompt and the tokens so far, of ``hidden_size`` numbers. By default a
            Gaussian vector hashed from both.
        hidden_size: length of the hidden state.
        context_length: characters of the prompt plus tokens that fit.
        chat_template: the Jinja template of conversations; by default it is a base model.
        seed: what the two defaults are hashed with.
        name: how users call the model. The fingerprint knows functions by their names only, so give different
            models different names.

    Raises:
        ConfigError: a vocabulary without ``<eos>``, or a function whose result has the wrong length.
    """

    def __init__(
        self,
        vocabulary: Sequence[str] = (EOS, *"0123456789", " "),
        logits: Table | None = None,
        features: Table | None = None,
        hidden_size: int = 16,
        context_length: int = 4096,
        seed: int = 0,
        name: str = "fake",
        chat_template: str | None = None,
    ) -> None:
        if vocabulary.count(EOS) != 1:
            raise ConfigError(f"vocabulary of {name!r}: list {EOS!r} once, got {list(vocabulary)}")
        self.vocabulary = _FakeVocabulary(tuple(vocabulary))
        self._chat_template = chat_template
        self._logits = logits or (lambda text, tokens: 2 * _gaussian(len(vocabulary), seed, "logits", text, tokens))
        self._features = features or (lambda text, tokens: _gaussian(hidden_size, seed, "features", text, tokens))
        functions = [
            None if f is None else getattr(f, "__qualname__", type(f).__qualname__) for f in (logits, features)
        ]
        definition = json.dumps([name, list(vocabulary), functions, hidden_size, seed])
        self.info = EngineInfo(
            kind="fake",
            model=name,
            fingerprint=hashlib.sha256(definition.encode()).hexdigest()[:32],
            hidden_size=hidden_size,
            context_length=context_length,
            dtype="float32",
            device="cpu",
            threads=1,
        )

    def logits(self, text: str, tokens: Sequence[int] = ()) -> Float[Tensor, " V"]:
        """The untempered logits after ``tokens``, as the loop sees them (float32)."""
        return _vector(self._logits(text, tuple(tokens)), len(self.vocabulary.texts), "logits")

    def features(self, text: str, tokens: Sequence[int] = ()) -> Float[Tensor, " H"]:
        """The hidden state after ``tokens``, float32."""
        return _vector(self._features(text, tuple(tokens)), self.info.hidden_size, "features")

    def embed(self, prompts: Sequence[Prompt], pooling: Pooling = Pooling.LAST) -> Float[Tensor, "P H"]:
        """See :meth:`rheostat.engines.base.Engine.embed`; the mean is taken over the prompt's characters."""
        result_PH = torch.empty(len(prompts), self.info.hidden_size)
        for row, prompt in enumerate(prompts):
            self._check(prompt, 0)
            first = len(prompt.text) if pooling is Pooling.LAST else 1
            ends = range(first, len(prompt.text) + 1)
            result_PH[row] = torch.stack([self.features(prompt.text[:end]) for end in ends]).mean(0)
        return result_PH

    @property
    def chat_template(self) -> str | None:
        """See :attr:`rheostat.engines.base.Engine.chat_template`."""
        return self._chat_template

    def chat_text(self, turns: Sequence[Mapping[str, str]], thinking: bool | None = None) -> str:
        """See :meth:`rheostat.engines.base.Engine.chat_text`."""
        if self._chat_template is None:
            raise ModelError(f"{self.info.model} has no chat template: give the prompt as plain text")
        fields = {"messages": list(turns), "add_generation_prompt": True, "enable_thinking": thinking}
        return str(jinja2.Template(self._chat_template).render(fields))

    def open_slots(self) -> "FakeSlots":
        """See :meth:`rheostat.engines.continuous.SlotEngine.open_slots`."""
        return FakeSlots(self)

    def open_batch(self, rows: int) -> ContinuousBatch:
        """See :meth:`rheostat.engines.jobs.ServedEngine.open_batch`."""
        return ContinuousBatch(self, rows)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """See :meth:`rheostat.engines.jobs.ServedEngine.encode`; a character c is −1 − ord(c)."""
        text = prompt if isinstance(prompt, str) else self.vocabulary.decode(prompt)
        return [-1 - ord(character) for character in text]

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """See :meth:`rheostat.engines.base.Engine.pieces`."""
        return [self.vocabulary.texts[token] for token in token_ids]

    def generate(
        self,
        requests: Sequence[Request],
        policy: TokenPolicy | None = None,
        order: Order = Order.VLLM,
        observer: StepObserver | None = None,
    ) -> list[Completion]:
        """See :meth:`rheostat.engines.base.Engine.generate`."""
        if not requests:
            return []
        for request in requests:
            self._check(request.prompt, request.max_tokens)
        row_of = {text: row for row, text in enumerate(dict.fromkeys(r.prompt.text for r in requests))}
        rows = _FakeRows(self, list(row_of))
        row_of_request = [row_of[request.prompt.text] for request in requests]
        policy = policy or own_strategies(requests)
        batch = Batch(rows, requests, row_of_request, range(len(requests)))
        done = decode(batch, self.vocabulary, self._ending_tokens, order, policy, observer)
        return [done[position] for position in batch.positions]

    def distribution(
        self, prompt: Prompt, strategy: Strategy, max_tokens: int, order: Order = Order.VLLM
    ) -> dict[str, float]:
        """The probability of every completion text under one strategy, by enumeration (up to V^max_tokens)."""
        ended: dict[str, float] = {}
        alive: dict[tuple[int, ...], float] = {(): 1.0}
        for t in range(max_tokens):
            logits_BV = torch.stack([self.logits(prompt.text, tokens) for tokens in alive])
            next_BV = transform(logits_BV, SamplingParameters.of([strategy] * len(alive)), order)
            prefixes, alive = alive, {}
            for (tokens, probability), next_V in zip(prefixes.items(), next_BV.tolist(), strict=True):
                for token, share in enumerate(next_V):
                    if share == 0:
                        continue
                    text = self.vocabulary.decode((*tokens, token))
                    cuts = [text.index(stop) for stop in prompt.stop if stop in text]
                    if cuts or token in self.vocabulary.eos_ids or t + 1 == max_tokens:
                        text = text[: min(cuts, default=len(text))]
                        ended[text] = ended.get(text, 0.0) + probability * share
                    else:
                        alive[(*tokens, token)] = probability * share
            if not alive:
                break
        return ended

    def _ending_tokens(self, stop: tuple[str, ...]) -> Tensor:
        return ending_tokens(self.vocabulary, stop)

    def _check(self, prompt: Prompt, budget: int) -> None:
        if not prompt.text:
            raise ModelError(f"prompt of problem {prompt.problem_id!r} is empty: give the model some text")
        if len(prompt.text) + budget > self.info.context_length:
            raise ModelError(
                f"prompt of problem {prompt.problem_id!r} has {len(prompt.text)} characters and asks for {budget} "
                f"tokens more, but the context of {self.info.model} holds {self.info.context_length}: "
                "shorten it or lower max_tokens"
            )


class _FakeVocabulary:
    """Token texts by themselves; a text is their concatenation without the end."""

    def __init__(self, texts: tuple[str, ...]) -> None:
        self.texts = texts
        self.eos_ids = frozenset({texts.index(EOS)})

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.texts[token] for token in token_ids if token not in self.eos_ids)


class _FakeRows:
    """The loop's rows: each a prompt's text and the tokens so far, looked up at every step."""

    def __init__(self, engine: FakeEngine, texts: Sequence[str]) -> None:
        self.engine = engine
        self.rows: list[tuple[str, tuple[int, ...]]] = [(text, ()) for text in texts]

    def begin(self) -> tuple[Tensor, Tensor]:
        hidden_BH = torch.stack([self.engine.features(*row) for row in self.rows])
        return hidden_BH, torch.stack([self.engine.logits(*row) for row in self.rows])

    def advance(self, parent_B: Tensor | None, token_B: Tensor) -> tuple[Tensor, Tensor]:
        parents = range(len(self.rows)) if parent_B is None else parent_B.tolist()
        pairs = zip((self.rows[parent] for parent in parents), token_B.tolist(), strict=True)
        self.rows = [(text, (*tokens, token)) for (text, tokens), token in pairs]
        return self.begin()

    def join(self, other: Self) -> tuple[Tensor, Tensor]:
        self.rows += other.rows
        return other.begin()


class FakeSlots:
    """See :class:`rheostat.engines.continuous.Slots`; a row is the prompt's text and the tokens so far."""

    capacity = 1 << 20

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._rows: list[tuple[str, tuple[int, ...]]] = []

    def feed(self, tokens: Sequence[Sequence[int]]) -> Fed:
        self._rows += [("", ())] * (len(tokens) - len(self._rows))
        totals = []
        for row, own in enumerate(tokens):
            total_H = torch.zeros(self._engine.info.hidden_size)
            for token in own:
                text, written = self._rows[row]
                self._rows[row] = (text, (*written, token)) if token >= 0 else (text + chr(-1 - token), ())
                total_H += self._engine.features(*self._rows[row])
            totals.append(total_H)
        hidden_BH = torch.stack([self._engine.features(*row) for row in self._rows])
        return Fed(hidden_BH, torch.stack([self._engine.logits(*row) for row in self._rows]), torch.stack(totals))

    def copy(self, source: int, target: int) -> None:
        self._rows += [("", ())] * (target + 1 - len(self._rows))
        self._rows[target] = self._rows[source]

    def keep(self, rows: int) -> None:
        del self._rows[rows:]


def _gaussian(size: int, *parts: str | int | tuple[int, ...]) -> NDArray[np.float64]:
    """``size`` standard normal numbers hashed from ``parts``, the same with every version of every library."""
    stream = derive_seed(*(str(part) if isinstance(part, tuple) else part for part in parts))
    uniform = uniforms(np.full(size, stream, dtype=np.uint64), np.arange(size), Purpose.TOKEN)
    normal: NDArray[np.float64] = ndtri(uniform + 2.0**-54)
    return normal


def _vector(values: ArrayLike, size: int, name: str) -> Tensor:
    vector = torch.as_tensor(np.asarray(values, dtype=np.float32))
    if vector.shape != (size,):
        raise ConfigError(f"{name} of the fake engine must give {size} numbers, got shape {tuple(vector.shape)}")
    return vector
