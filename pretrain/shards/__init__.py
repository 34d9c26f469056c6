"""The format on the disk: tar shards, their sidecars and index; reading, writing, fetching and verifying them."""
