"""A saved mask without training: the masks of a folder, merging them into a base, verifying them."""
