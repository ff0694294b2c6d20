"""Expert banks, one file each."""
