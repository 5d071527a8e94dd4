"""What a policy is worth: pass@k with intervals, paired against the best static strategy."""
