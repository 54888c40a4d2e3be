"""Caption dumps: their files, and how their captions are read, cleaned and made unique."""
