"""Files that people, other programs or damaged disks may have written, and files that cannot be written."""
