"""Learning a policy from rollouts, with the language model frozen."""
