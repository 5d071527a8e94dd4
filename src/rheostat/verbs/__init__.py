"""What the commands do, as functions: open the engine and the store, sample, train, evaluate, write."""
