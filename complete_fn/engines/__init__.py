"""Models, and the engines that answer their prompts."""
