"""The demo world: rendered scenes, their captions, and the small SmallCap model trained on them."""
