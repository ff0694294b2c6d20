"""What keeps a network plastic, one file each; on any network, in any training loop."""
