"""One protocol per module; `dynmoe.registry` scans this folder."""
