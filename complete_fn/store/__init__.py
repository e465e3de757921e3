"""Answers and attempts in SQLite or PostgreSQL."""
