"""Methods of domain generalisation, one file each."""
