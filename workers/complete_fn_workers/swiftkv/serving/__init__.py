"""Serves SwiftKV models on vLLM."""
