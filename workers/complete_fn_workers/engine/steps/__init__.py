"""Rows, tokens and device time of one step of the engine."""
