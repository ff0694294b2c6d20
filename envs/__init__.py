"""Environments as gymnasium vector environments that hand out torch tensors."""
