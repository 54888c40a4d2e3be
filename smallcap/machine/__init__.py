"""What a machine or a cluster can carry: actors, precision and memory."""
