"""Actions on rows of logits that another engine samples from: drawn without waiting for a GPU, applied in place."""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rheostat.adapters.autodeco import AutoDeco
from rheostat.adapters.files import Adapter
from rheostat.adapters.sequence import PromptFeatures, SequenceAdapter
from rheostat.adapters.token import TokenAdapter
from rheostat.decoding.policy import SamplingParameters
from rheostat.decoding.strategy import ActionSpace
from rheostat.decoding.support import supports
from rheostat.decoding.transforms import sigma_as_top_k, sort_descending, support_size, tempered
from rheostat.errors import AdapterError

_LEAST_TEMPERATURE = 1e-4  # below, a logit over the temperature could leave float32; the argmax it is long before


def draw_from(pi_SA: Float[Tensor, "S A"], uniform_S: Float[Tensor, " S"]) -> Int[Tensor, " S"]:
    """As :func:`rheostat.decoding.policy.invert_cdf`, but values are not looked at: a GPU would be waited for."""
    cdf_SA = pi_SA.double().cumsum(1)
    return (cdf_SA[:, :-1] <= uniform_S[:, None] * cdf_SA[:, -1:]).sum(1)


def most_probable(pi_SA: Float[Tensor, "S A"]) -> Int[Tensor, " S"]:
    """The action of the largest probability, the first of equals."""
    return (pi_SA == pi_SA.amax(1, keepdim=True)).int().argmax(1)


def _is_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def require_last_state(name: str, adapter: Adapter) -> SequenceAdapter | TokenAdapter:
    """The adapter, if all that it reads is the last token's hidden state: what an engine of others shows.

    Raises:
        AdapterError: it reads something else.
    """
    reads = None
    if isinstance(adapter, AutoDeco):
        reads = "is made of AutoDeco's heads"
    elif isinstance(adapter, SequenceAdapter):
        if adapter.config.features is PromptFeatures.ENTROPY:
            reads = "reads the entropy of a prompt"
        elif adapter.config.pooling != "last":
            reads = "reads the mean over a prompt's hidden states (train one with --pooling last)"
    elif adapter.start is not None:
        reads = "starts from a sequence-level adapter"
    if reads is not None or isinstance(adapter, AutoDeco):  # the second for the type checker
        raise AdapterError(f"{name}: it {reads}, which this engine cannot show it: use the local engine")
    return adapter


class Actions:
    """An action space that rows of logits are scaled and truncated by, in place."""

    def __init__(self, space: ActionSpace, device: torch.device) -> None:
        self._sets = SamplingParameters.of(space.strategies, device)
        self._order = space.order
        greedy_A = self._sets.temperature_K == 0
        self._temperature_A = torch.where(greedy_A, 1.0, self._sets.temperature_K).clamp(min=_LEAST_TEMPERATURE)
        self._plain = replace(self._sets, temperature_K=self._temperature_A)
        self._greedy_A = greedy_A
        self._truncated_A = torch.tensor([s.is_truncated for s in space], device=device)
        # known without asking the device
        self._any_greedy = any(s.is_greedy for s in space)
        self._any_truncated = any(s.is_truncated for s in space)
        self._any_scaled = any(s.temperature not in (0, 1) for s in space)

    def apply(self, logits_SV: Float[Tensor, "S V"], choice_S: Int[Tensor, " S"]) -> None:
        """Row s becomes logits whose softmax is the distribution of action ``choice_S[s]``."""
        if self._any_truncated:
            rows_S = self._rows(self._truncated_A[choice_S])
            if len(rows_S):
                self._truncate(logits_SV, rows_S, self._plain[choice_S[rows_S]])
        if self._any_greedy:
            rows_S = self._rows(self._greedy_A[choice_S])
            if len(rows_S):
                part_SV, greedy_S = logits_SV[rows_S], self._greedy_A[choice_S[rows_S]]
                best_S = part_SV.argmax(-1, keepdim=True)
                kept_SV = part_SV.masked_fill(greedy_S[:, None], -torch.inf)
                logits_SV.index_copy_(0, rows_S, kept_SV.scatter_(1, best_S, part_SV.gather(1, best_S)))
        if self._any_scaled:
            logits_SV.div_(self._temperature_A[choice_S].float()[:, None])

    def _rows(self, mask_S: Tensor) -> Tensor:
        """The rows of a mask; on a GPU, which would be waited for to name them, all rows."""
        if _is_cpu(mask_S):
            return mask_S.nonzero().squeeze(1)
        return torch.arange(len(mask_S), device=mask_S.device)

    def _truncate(self, logits_SV: Tensor, row_D: Tensor, sets: SamplingParameters) -> None:
        logits_DV = logits_SV[row_D]
        dropped_DV = torch.ones_like(logits_DV, dtype=torch.bool)
        if _is_cpu(logits_SV):
            for member_D, _, index_DK, kept_DK in supports(logits_SV, row_D, sets, self._order):
                dropped_DV[member_D[:, None], index_DK] = ~kept_DK
        else:  # sorted as a whole: how many candidates would do is known to the device alone
            sets = sigma_as_top_k(logits_DV, torch.arange(len(logits_DV), device=logits_DV.device), sets)
            top_DV, index_DV = sort_descending(logits_DV.double())
            log_total_D = tempered(top_DV, sets.temperature_K).logsumexp(-1)
            size_D, _ = support_size(top_DV, log_total_D, sets, self._order, complete=True)
            outside_DV = torch.arange(logits_DV.shape[1], device=logits_DV.device) >= size_D[:, None]
            dropped_DV.scatter_(1, index_DV, outside_DV)
        logits_SV.index_copy_(0, row_D, logits_DV.masked_fill(dropped_DV, -torch.inf))
