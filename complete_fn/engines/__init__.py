"""Models, and what answers their prompts."""
