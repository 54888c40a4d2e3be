"""What every job needs of Ray: a session, guarded actors, tasks, and errors that reach the driver unchanged."""
