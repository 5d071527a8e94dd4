"""How a token-level adapter is trained: every choice that the paper names or leaves open (docs/paper-gaps.md)."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rheostat.adapters.token import Features
from rheostat.training.budgets import ParallelBudgets


class TokenEstimator(StrEnum):
    """How the policy gradient is estimated; both have the same mean where nothing is masked."""

    MARGINAL = "marginal"  # A · ∇log μ(y|x), μ = Σ_a π(a|x) p_a(y): never more variance
    ACTION = "action"  # A · ∇log π(a|x): the paper's


class Objective(StrEnum):
    """What a group of rollouts is rewarded for."""

    PASS_1 = "pass@1"
    PASS_K = "pass@k"  # at a parallel budget B that the policy sees, drawn from `budgets` for every prompt


class TokenTrainingConfig(BaseModel):
    """How a token-level adapter is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    estimator: TokenEstimator = Field(TokenEstimator.MARGINAL, description="marginal, or action (the paper's)")
    objective: Objective = Field(
        Objective.PASS_K,
        description="pass@1, or pass@k: the policy sees the parallel budget and is rewarded for pass@B",
    )
    budgets: ParallelBudgets = Field((1, 2, 4, 8), description="parallel budgets B of pass@k; pass@1 ignores them")
    steps: int = Field(30, ge=1, description="batches of rollouts")
    prompts: int = Field(24, ge=1, description="prompts in one batch")
    group: int = Field(12, ge=2, description="rollouts G of each prompt, more than the largest parallel budget")
    staleness: int = Field(
        0, ge=0, description="updates by which a batch's weights may be behind; from 1 on workers sample during updates"
    )
    passes: int = Field(4, ge=1, description="gradient steps on each batch")
    clip: float = Field(0.2, gt=0, description="ε of the clipped ratio, per token")
    learning_rate: float = Field(1e-3, gt=0, description="Adam's step size at the start")
    decay: float = Field(0.98, gt=0, le=1, description="factor on the step size after each batch")
    beta: float = Field(0.01, ge=0, description="weight of the policy's entropy, summed over a rollout's tokens")
    max_gradient_norm: float = Field(1.0, gt=0, description="longer gradients are shortened to this")
    mask_above: float = Field(
        0.95, gt=0, le=1, description="leave tokens out whose largest probability lies above; 1: keep all"
    )
    filter_samples: int = Field(
        4, ge=0, description="samples per training prompt for its initial pass rate; 0: keep all prompts"
    )
    filter_low: float = Field(0.0, ge=0, le=1, description="keep prompts with an initial pass rate above")
    filter_high: float = Field(1.0, ge=0, le=1, description="keep prompts with an initial pass rate below")
    validate_every: int = Field(15, ge=1, description="batches between two looks at the validation problems")
    validation_samples: int = Field(
        4, ge=1, description="samples per validation problem at B = 1 (at least B at others)"
    )
    features: Features = Field(
        Features.HIDDEN, description="what the policy reads; entropy alone is the paper's ablation"
    )
    with_budget: bool = Field(True, description="let the policy see the remaining and the total token budget")
    width: int = Field(128, ge=1, description="hidden units of each layer of the adapter")
    dropout: float = Field(0.1, ge=0, lt=1, description="in gradients; rollouts and ratios are without")

    @model_validator(mode="after")
    def _fits(self) -> "TokenTrainingConfig":
        if self.filter_low >= self.filter_high:
            raise ValueError(f"filter_low must lie below filter_high, got {self.filter_low:g} and {self.filter_high:g}")
        if self.group <= max(self.seen_budgets or (1,)):
            raise ValueError(f"group must exceed the largest parallel budget, {max(self.budgets)}")
        return self

    @property
    def seen_budgets(self) -> tuple[int, ...]:
        """The parallel budgets that the policy is trained for and sees; none for pass@1."""
        return self.budgets if self.objective is Objective.PASS_K else ()
