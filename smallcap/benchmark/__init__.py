"""How fast a machine captions, stage by stage."""
