"""Environments that hand out torch tensors."""
