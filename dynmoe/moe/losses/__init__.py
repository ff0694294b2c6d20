"""Auxiliary losses, one file each."""
