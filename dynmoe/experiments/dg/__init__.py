"""What a run of `dynmoe.dg` does."""
