"""The laboratory: settings, runs, checkpoints, logs, statistics. It knows no model and no data."""
