"""Tables in and out: files, databases, object storage."""
