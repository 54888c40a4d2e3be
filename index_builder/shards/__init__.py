"""The trained template, and the shards that are filled copies of it."""
