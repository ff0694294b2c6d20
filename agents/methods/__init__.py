"""Agents and what they are compared with, one file each."""
