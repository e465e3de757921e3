"""Money and tokens, before and while they are spent."""
