"""Generation: prompts and encoded images in, tokens out; prefill, decode, and the strategies that choose tokens."""
