"""What a person reads: the HTML report of a run and its figures, and the same table for the terminal."""
