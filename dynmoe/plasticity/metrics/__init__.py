"""Plasticity metrics, one file each."""
