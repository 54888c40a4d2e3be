"""How a build runs its work items, and how it remembers which are done."""
