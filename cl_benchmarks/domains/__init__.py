"""Data sets of several domains, for domain generalisation; `dynmoe.registry` scans this folder."""
