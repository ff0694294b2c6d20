"""Agents that grow experts while they learn to act."""
