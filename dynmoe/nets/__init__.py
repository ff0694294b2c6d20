"""Networks, one file each: trunks under a head of hidden blocks."""
