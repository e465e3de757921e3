"""Columns and options become prompt texts."""
