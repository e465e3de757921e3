"""The loops and processes of a service."""
