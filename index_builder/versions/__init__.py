"""The versions of a published index: publishing one, removing captions, going back, and collecting garbage."""
