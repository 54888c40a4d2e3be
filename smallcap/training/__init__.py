"""What training is made of: stored features, the order of examples, the objective, and checkpoints."""
