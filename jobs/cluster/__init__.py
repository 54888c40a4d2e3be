"""What every job needs of Ray: a session, guarded tasks and actors, and errors that reach the driver as themselves."""
