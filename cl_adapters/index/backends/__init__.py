"""INDEX BACK-ENDS, one file each."""
