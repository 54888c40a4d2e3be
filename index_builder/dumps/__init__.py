"""Caption dumps: their files, the captions in them, and how these are cleaned and made unique."""
