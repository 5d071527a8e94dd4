"""An adapter in plain transformers: a logits processor for ``model.generate``."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.adapters.description import BaseModel
from rheostat.adapters.files import load_adapter
from rheostat.adapters.token import TokenAdapter, TokenInputs
from rheostat.decoding.recording import row_statistics
from rheostat.engines.loading import fingerprint
from rheostat.errors import ConfigError
from rheostat.seeding import Purpose, derive_seed, uniforms
from rheostat.serving.actions import Actions, draw_from, most_probable, require_last_state


class RheostatLogitsProcessor(transformers.LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """Scales and truncates every row of ``model.generate`` as an adapter's action says.

    ::

        processor = RheostatLogitsProcessor(model, tokenizer, "runs/demo/adapter")
        model.generate(**inputs, **processor.arguments(max_new_tokens=64))

    The hidden state is read by a hook on the model, which :meth:`remove` takes out again.

    Args:
        model: a causal language model of transformers; batches are padded on the left, as ``generate`` wants them.
        tokenizer: the model's; it belongs to the model's identity, which the adapter is checked against.
        adapter: folder or Hub id.
        commit: take the most probable action instead of drawing one.
        seed: the actions' draws are a function of it, the row and the token's position.

    Raises:
        AdapterError: no adapter, one for another model, or a sequence-level one that reads a mean over the prompt.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        adapter: str | Path,
        commit: bool = False,
        seed: int = 0,
    ) -> None:
        hidden_size = model.config.get_text_config().hidden_size
        base = BaseModel(model.config.name_or_path, None, hidden_size, fingerprint(model, tokenizer))
        loaded = load_adapter(adapter, base=base).adapter
        loaded = require_last_state(str(adapter), loaded)
        self.adapter = loaded.to(model.device)
        self.commit, self.seed = commit, seed
        self.actions: list[Tensor] = []  # of each step so far, one per row: positions in the action space
        self._apply = Actions(self.adapter.space, model.device)
        self._hidden_BLH = torch.empty(0)
        self._budget = self._parallel = 1
        self._hook = model.base_model.register_forward_hook(self._keep_hidden)

    def _keep_hidden(self, _module: object, _args: object, output: Any) -> None:
        self._hidden_BLH = output.last_hidden_state

    def remove(self) -> None:
        """Take the hook out of the model."""
        self._hook.remove()

    def arguments(self, max_new_tokens: int, parallel_budget: int = 1) -> dict[str, Any]:
        """What one call of ``generate`` is to be given: this processor, and sampling that leaves its rows alone.

        Args:
            max_new_tokens: the token budget b, at least 1.
            parallel_budget: B, how many completions of a prompt may be sampled, at least 1.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("parallel_budget", parallel_budget)):
            if value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        self._budget, self._parallel = max_new_tokens, parallel_budget
        self.actions = []
        return {
            "logits_processor": transformers.LogitsProcessorList([self]),
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": None,
            "num_beams": 1,
        }

    @torch.no_grad()
    def __call__(self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """One step of ``generate``."""
        if len(self.actions) == self._budget:
            raise ConfigError("each call of generate needs processor.arguments(...) of its own")
        if len(self._hidden_BLH) != len(scores):
            raise ConfigError("generate runs the model on other rows than it samples: no beams, no assistant model")
        logits_BV = scores.float().clone()
        choice_B = self._choose(logits_BV)
        self.actions.append(choice_B)
        self._apply.apply(logits_BV, choice_B)
        return logits_BV

    def _choose(self, logits_BV: Tensor) -> Int[Tensor, " B"]:
        t, rows = len(self.actions), len(logits_BV)
        hidden_BH = self._hidden_BLH[:, -1]
        parallel_B = torch.full((rows,), self._parallel, device=logits_BV.device)
        if isinstance(self.adapter, TokenAdapter):
            inputs = TokenInputs(
                hidden_BH.bfloat16(),  # as AdaptiveDecoding reads it
                row_statistics(logits_BV).entropy_B,
                torch.full_like(parallel_B, self._budget - t),
                torch.full_like(parallel_B, self._budget),
                parallel_B,
            )
            return self._pick(self.adapter.log_probabilities(inputs).exp(), t)
        if t:
            return self.actions[0]
        return self._pick(self.adapter.probabilities(hidden_BH.float(), parallel_B), 0)

    def _pick(self, pi_BA: Tensor, t: int) -> Int[Tensor, " B"]:
        if self.commit:
            return most_probable(pi_BA)
        streams = np.array([derive_seed(self.seed, "row", row) for row in range(len(pi_BA))], dtype=np.uint64)
        return draw_from(pi_BA, torch.from_numpy(uniforms(streams, t, Purpose.ACTION)).to(pi_BA.device))
