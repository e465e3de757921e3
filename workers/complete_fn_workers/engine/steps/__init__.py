"""What one step of the engine takes: rows, tokens, time."""
