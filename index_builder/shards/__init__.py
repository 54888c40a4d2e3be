"""The trained template, and shards, which are filled copies of it."""
