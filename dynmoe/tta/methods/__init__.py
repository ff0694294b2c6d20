"""The methods of test-time adaptation, one file each."""
