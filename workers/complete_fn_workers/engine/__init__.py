"""The embedded engine: vLLM in a child process, and its callers' side."""
