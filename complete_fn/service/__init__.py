"""What a service does; no HTTP, no loops."""
