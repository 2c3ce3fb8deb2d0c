"""The tests. `make test` runs all, `make quick` those without processes and models."""
