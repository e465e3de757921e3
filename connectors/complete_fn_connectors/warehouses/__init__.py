"""What warehouses send, and the replies they take."""
