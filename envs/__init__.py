"""Environments as gymnasium vector environments that hand out torch tensors.

env = envs.make("Craftax-Classic-Pixels-v1", num_envs=64)
"""

from envs.make import make

__all__ = ["make"]
