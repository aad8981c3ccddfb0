"""What another package adds to halfstep: see its entry points in pyproject.toml."""
