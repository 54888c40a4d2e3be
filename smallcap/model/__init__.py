"""The model: encoders, decoders with cross-attention, their checkpoints, and the prompt."""
