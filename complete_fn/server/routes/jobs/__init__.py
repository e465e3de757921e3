"""Routes of jobs: submit, status, results, estimates, usage."""
