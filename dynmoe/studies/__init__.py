"""Questions to the laboratory, one file each: `python -m dynmoe.study NAME`."""
