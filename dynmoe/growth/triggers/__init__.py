"""Growth triggers, one file each."""
