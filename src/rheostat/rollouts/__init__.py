"""Rollouts: sampled, judged, and kept so that nothing paid for is lost or paid for twice."""
