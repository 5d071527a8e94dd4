"""What is asked and how it is judged, together: problems by split, prompts, and verdicts."""
