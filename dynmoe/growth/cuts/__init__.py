"""Cuts, one file each."""
