"""Estimates of runs, before they are paid for."""
