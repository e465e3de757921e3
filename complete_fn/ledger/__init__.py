"""Tokens and device time that runs used, and their cost."""
