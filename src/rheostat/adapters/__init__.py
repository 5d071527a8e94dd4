"""What is learned: small policies on features of the frozen model, and the files they live in."""
