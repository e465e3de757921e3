"""The loops and processes that do a service's work."""
