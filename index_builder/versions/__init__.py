"""A published index's versions: a new one, removals, going back, and removing what none needs."""
