"""How well a new version agrees with exact search, and the settings at which it does."""
