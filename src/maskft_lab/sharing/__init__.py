"""What others are given: an adapter's card with its scores, and a folder on the hub."""
