"""One data set per module; `dynmoe.registry` scans this folder."""
