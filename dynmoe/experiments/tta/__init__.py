"""What a run of `dynmoe.tta` does."""
