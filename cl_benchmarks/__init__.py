"""Data sets, protocols and streams for continual learning. Knows no model."""
