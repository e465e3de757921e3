"""SwiftKV models on vLLM."""
