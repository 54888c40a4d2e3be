"""Turns caption dumps into a published index, with `smallcap`; a runner that is handed in decides where work runs."""
