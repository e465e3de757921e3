"""The shell command and its verbs."""
