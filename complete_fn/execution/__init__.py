"""One run, from plan to committed slices."""
