"""Shifted test images in streams: what test-time adaptation is measured on. Data only."""
