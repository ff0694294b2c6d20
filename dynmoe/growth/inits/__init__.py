"""How new experts start, one file each."""
