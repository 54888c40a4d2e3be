"""What every job needs of Ray: a session, guarded actors, tasks, and errors that reach the driver unchanged."""

from jobs.cluster.ray_colleagues import join_colleagues

join_colleagues()
